//! What the fuzz targets begin with: input that is good, so that what is made of it is nearly good.
//!
//! The same each time, but for the machines' states, which hold what this host's KVM says.

mod kernel;
mod snapshot;
mod stream;
mod virtio;

use crate::guests_run;
use ferry_devices::block::BlockState;
use ferry_devices::console::ConsoleState;
use ferry_devices::net::{MacAddress, NetState};
use ferry_devices::rng::RngState;
use ferry_devices::virtio::{DeviceState, QueueState, TransportState, VirtioState};
use ferry_devices::vsock::{Reset, VsockState};
use ferry_migration::options::Options;
use ferry_migration::page::{PageSet, RamLayout, Run};
use ferry_migration::rng::Rng;
use ferry_migration::trace::{Header, Writer};
use ferry_vmm::machine::{Backends, Machine, OLDEST_STATE_VERSION, STATE_VERSION};
use std::time::Duration;

/// A place in something so long.
pub fn below(random: &mut Rng, n: usize) -> usize {
    usize::try_from(random.below(n as u64)).unwrap()
}

/// What a fuzzer does to its input.
pub fn mutate(random: &mut Rng, bytes: &mut Vec<u8>) {
    const EDGES: [u64; 8] = [0, 1, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX];
    for _ in 0..=below(random, 4) {
        let at = below(random, bytes.len());
        match below(random, 7) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << below(random, 8),
            1 if !bytes.is_empty() => bytes[at] = random.next().to_le_bytes()[0],
            2 => bytes.truncate(at),
            3 => {
                let more = below(random, 64);
                let some: Vec<u8> = (0..more).map(|_| random.next().to_le_bytes()[0]).collect();
                bytes.splice(at..at, some);
            }
            4 => {
                let end = (at + below(random, 200)).min(bytes.len());
                bytes.drain(at..end);
            }
            5 => {
                let end = (at + below(random, 200)).min(bytes.len());
                let copy = bytes[at..end].to_vec();
                let to = below(random, bytes.len());
                bytes.splice(to..to, copy);
            }
            _ => {
                let width = 1 << below(random, 4);
                let edge = EDGES[below(random, EDGES.len())].to_le_bytes();
                if let Some(place) = bytes.get_mut(at..at + width) {
                    place.copy_from_slice(&edge[..width]);
                }
            }
        }
    }
}

/// For [`codec`](crate::fuzz_bodies::codec).
pub fn codec() -> Vec<Vec<u8>> {
    stream::coded_bodies()
        .into_iter()
        .map(|(encoding, body)| [&[encoding as u8 - 1, 0, 0][..], &body].concat())
        .collect()
}

/// For [`frame`](crate::fuzz_bodies::frame).
pub fn frame() -> Vec<Vec<u8>> {
    let whole = stream::migration(false, 0);
    (0..whole.len().min(1200))
        .step_by(7)
        .map(|at| whole[at..].to_vec())
        .collect()
}

/// For [`handshake`](crate::fuzz_bodies::handshake): migrations that succeed, as they are.
pub fn handshake() -> Vec<Vec<u8>> {
    vec![
        stream::migration(false, 0),
        stream::migration(true, 0),
        stream::migration(false, 2),
        stream::post_copy(),
        stream::with_disks(),
    ]
}

/// For [`machine_state`](crate::fuzz_bodies::machine_state).
pub fn machine_state() -> Vec<Vec<u8>> {
    let mut seeds = vec![
        vec![0; 24],
        [b"FRYSTATE\x01\0\0\0\x01\0\0\0".to_vec(), vec![0; 4000]].concat(),
    ];
    if guests_run() {
        for cpus in [1, 2] {
            let machine = Machine::builder()
                .memory(16 << 20)
                .cpus(cpus)
                .devices(Backends {
                    balloon: true,
                    rng: cpus == 2,
                    ..Backends::default()
                })
                .build()
                .unwrap();
            let state = machine.pause().unwrap().save().unwrap();
            let versions = OLDEST_STATE_VERSION..=STATE_VERSION;
            seeds.extend(versions.map(|version| state.to_bytes_as(version).unwrap()));
        }
    }
    seeds
}

/// For [`snapshot`](crate::fuzz_bodies::snapshot).
pub fn snapshot() -> Vec<Vec<u8>> {
    snapshot::snapshots()
}

/// For [`virtio`](crate::fuzz_bodies::virtio).
pub fn virtio() -> Vec<Vec<u8>> {
    [(0, 1), (4, 1), (1, 1), (2, 4), (3, 3), (5, 3), (7, 2)]
        .into_iter()
        .map(|(kind, queues)| virtio::driver(kind, queues))
        .collect()
}

/// For [`console`](crate::fuzz_bodies::console).
pub fn console() -> Vec<Vec<u8>> {
    // More than there is room for, a size, a look, a move, a look.
    let user = [
        248, 9, 248, 127, 248, 127, 249, 132, 43, 250, 255, 251, 255, 248, 255,
    ];
    let driver = virtio::driver(7, 2);
    let typed_later = [&driver[1..], &user].concat();
    let typed_before = [&user, &driver[1..]].concat();
    vec![user.to_vec(), typed_later, typed_before]
}

/// For [`vsock`](crate::fuzz_bodies::vsock).
pub fn vsock() -> Vec<Vec<u8>> {
    // The guest connects to port 5, is answered, sends; the program answers, reads, hangs up.
    let guest = vec![
        1, 0, 5, 0, 0, 255, 0, 8, 255, 3, 1, 4, 5, 100, 0, 255, 0, 13, 1, 255, 12, 1, 40, 10, 8,
        255, 15, 1, 3, 5, 0, 0, 255, 20, 15, 1, 10, 8, 255, 15, 1, 3, 5, 0, 3, 255, 20, 7, 1, 9,
    ];
    // A program connects to port 52, is answered, sends more than there is room for.
    let program = vec![
        11, 11, 10, 10, 8, 255, 15, 2, 1, 128, 0, 0, 1, 0, 10, 8, 255, 9, 13, 0, 1, 12, 0, 200, 10,
        8, 255, 15, 2, 5, 128, 0, 0, 1, 4, 10, 8, 255, 15, 2, 2, 128, 0, 0, 0, 0, 14, 0, 10,
    ];
    // More connections than there can be, and none of the answers taken.
    let flood =
        (0..u8::MAX).flat_map(|port| [1, 0, port & 0x7f, 0, 0, 1, 0, 2, 0, port, 0, 0, 1, 0]);
    vec![guest, program, flood.collect()]
}

/// For [`virtio_state`](crate::fuzz_bodies::virtio_state): devices whose driver has set them up,
/// and what it does next.
pub fn virtio_state() -> Vec<Vec<u8>> {
    let state = |device, queues: u64| VirtioState {
        transport: TransportState {
            status: 15,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 1 << 32,
            queue_sel: 0,
            interrupt_status: 1,
            config_generation: 0,
            queues: (1..=queues)
                .map(|queue| QueueState {
                    size: 8,
                    ready: true,
                    descriptors: queue << 16,
                    available: (queue << 16) + 0x1000,
                    used: (queue << 16) + 0x2000,
                    next_available: 0,
                    next_used: 0,
                    returned: vec![0],
                })
                .collect(),
        },
        device,
    };
    let disk = |read_only| {
        DeviceState::Block(BlockState {
            sectors: 64,
            read_only,
        })
    };
    let vsock = VsockState {
        cid: 3,
        reset: true,
        owed: vec![Reset {
            cid: 2,
            host_port: 5,
            guest_port: 1025,
            kind: 1,
        }],
        next_port: 1 << 30,
    };
    let console = ConsoleState {
        input: b"typed".to_vec(),
        columns: 80,
        rows: 25,
    };
    let net = NetState {
        mac: MacAddress([2, 0, 0, 0, 0, 1]),
        announce: true,
    };
    [
        (0, 1, disk(false)),
        (4, 1, disk(true)),
        (1, 1, DeviceState::Rng(RngState::default())),
        (2, 4, DeviceState::Balloon(Box::default())),
        (3, 3, DeviceState::Net(net)),
        (5, 3, DeviceState::Vsock(vsock)),
        (7, 2, DeviceState::Console(console)),
    ]
    .into_iter()
    .map(|(kind, queues, device)| {
        let state = postcard::to_allocvec(&state(device, queues.into())).unwrap();
        let script = virtio::driver(kind, queues);
        [&[kind][..], &state, &script[1..]].concat()
    })
    .collect()
}

/// For [`data channels`](crate::fuzz_bodies::data channels): migrations that succeed, as they are.
pub fn data_channels() -> Vec<Vec<u8>> {
    stream::on_data_channels()
}

/// For [`source`](crate::fuzz_bodies::source).
pub fn source() -> Vec<Vec<u8>> {
    stream::answers()
}

/// For [`kernel`](crate::fuzz_bodies::kernel): all but the last would be booted.
pub fn kernel() -> Vec<Vec<u8>> {
    let into = |mode: u8, kernel: Vec<u8>| [vec![mode], kernel].concat();
    vec![
        into(2, kernel::elf(1 << 20, true)),
        into(6, kernel::elf(1 << 20, true)),
        into(2, kernel::elf(1 << 20, false)),
        into(2, kernel::bzimage()),
        into(7, kernel::bzimage()),
        into(0, kernel::bzimage()),
    ]
}

/// For [`pairing`](crate::fuzz_bodies::pairing): first a line that is one.
pub fn pairing() -> Vec<Vec<u8>> {
    let digits = |byte: u8| format!("{byte:02x}").repeat(32);
    let line = format!("ferry-pair-1:{}:{}", digits(0xa7), digits(0x3c));
    let capitals = format!(
        " ferry-pair-1:{}:{}\n",
        digits(0xa7),
        digits(0x3c).to_uppercase()
    );
    let admissions = (0..3).map(|kind| [&[kind][..], &[9; 32]].concat());
    let texts = [&line, &capitals, "192.0.2.0/24", "2001:db8::/32"];
    let texts = texts.map(|text| text.as_bytes().to_vec());
    texts.into_iter().chain(admissions).collect()
}

/// For [`trace`](crate::fuzz_bodies::trace).
pub fn trace() -> Vec<Vec<u8>> {
    let layout = RamLayout::new(vec![Run::new(0, 300), Run::new(500, 100)]).unwrap();
    let header = Header {
        layout: layout.clone(),
        memory_bytes: 400 << 12,
        cpus: 1,
        name: None,
        workload: Some("cg.S".into()),
        empty_pages: None,
        interval_us: 1000,
    };
    let mut sparse = PageSet::new(layout.end());
    sparse.insert_run(Run::new(7, 20));
    sparse.insert_run(Run::new(520, 3));
    let mut dense = PageSet::new(layout.end());
    (0..300).step_by(2).for_each(|gfn| {
        dense.insert(gfn);
    });
    let written = |frames: &[&PageSet]| {
        let mut writer = Writer::new(Vec::new(), &header).unwrap();
        let mut at = Duration::ZERO;
        for pages in frames {
            at += Duration::from_millis(1);
            writer.frame(at, pages).unwrap();
        }
        writer.finish(at).unwrap()
    };
    vec![
        written(&[&sparse, &dense, &sparse]),
        written(&[&dense]),
        written(&[]),
    ]
}

/// For [`api`](crate::fuzz_bodies::api): each is answered, request by request.
pub fn api() -> Vec<Vec<u8>> {
    let put = |path: &str, body: &str| {
        let length = body.len();
        format!("PUT /v1/{path} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{body}")
    };
    let get = |path: &str| format!("GET /v1/{path} HTTP/1.1\r\nHost: a\r\n\r\n");
    let options = serde_json::to_string(&Options::default()).unwrap();
    [
        get("status") + &get("migration") + &get("balloon"),
        put("pause", "{}") + &put("resume", "") + &put("cancel", "") + &put("power-button", "{}"),
        put("migrate", &format!(r#"{{"uri":"tcp:a:1","options":{options}}}"#)),
        put("migrate", r#"{"uri":"unix:/a","detach":true}"#) + &get("status"),
        put("recover", r#"{"uri":"tcp:a:1"}"#) + &put("recover", r#"{"take_over":true}"#),
        put("record", r#"{"duration_ms":1000,"interval_ms":100}"#),
        put("balloon", r#"{"auto":{"interval_ms":100,"reserve_bytes":4096}}"#)
            + &put("balloon", r#"{"size_bytes":4096}"#),
        put("snapshot", r#"{"path":"/a"}"#),
        get("memory") + &put("memory", r#"{"size_bytes":0}"#),
        "HEAD /v1/status?a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n".into(),
        "PUT http://a/v1/stop HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}".into(),
    ]
    .map(String::into_bytes)
    .to_vec()
}

/// Makes the seeds of a target.
pub type Seeds = fn() -> Vec<Vec<u8>>;

/// Those of each target in `fuzz/`, by its name.
pub const TARGETS: &[(&str, Seeds)] = &[
    ("frame", frame),
    ("codec", codec),
    ("handshake", handshake),
    ("data_channels", data_channels),
    ("source", source),
    ("machine_state", machine_state),
    ("snapshot", snapshot),
    ("trace", trace),
    ("pairing", pairing),
    ("virtio", virtio),
    ("virtio_state", virtio_state),
    ("vsock", vsock),
    ("console", console),
    ("kernel", kernel),
    ("api", api),
];
