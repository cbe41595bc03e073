//! A guest that sends frames all the time is handed over with its tap, and none of them is lost.

use std::io::Read;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use ferry_migration::options::{Handover, Options};
use ferry_migration::report::Status;
use ferry_vmm::machine::{Backends, DeviceDescription, Machine, NetOptions, RunState};
use ferry_vmm::migrate::{Arrival, Handle, Receiver, Uri, migrate};

use crate::support::{COUNTER, eventually, kvm, progresses, read};
use crate::virtio::{descriptor, driver};

/// Before the counter in a frame: virtio-net's header, and Ethernet's.
const VIRTIO: usize = 12;
const ETHERNET: usize = 14;
/// The least that a frame has.
const FRAME: usize = 60;
/// The queue that a card sends from.
const TRANSMIT: u8 = 1;
/// What a destination says of its own accord.
const ANNOUNCEMENTS: u64 = 4;

/// A tap, while it lives.
struct Tap(String);

impl Tap {
    fn make(prefix: &str) -> Option<Self> {
        let tap = Self(format!("{prefix}{}", std::process::id()));
        let made = tap.ip(&["tuntap", "add", "mode", "tap"]) && tap.ip(&["link", "set", "up"]);
        made.then_some(tap)
    }

    fn ip(&self, args: &[&str]) -> bool {
        let done = Command::new("ip")
            .args(args)
            .args(["dev", &self.0])
            .status();
        done.is_ok_and(|status| status.success())
    }

    fn says(&self, what: &str) -> u64 {
        let path = format!("/sys/class/net/{}/{what}", self.0);
        std::fs::read_to_string(path)
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    }

    /// Frames that it had from the guest, and of the guest.
    fn frames(&self) -> u64 {
        self.says("statistics/rx_packets")
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.ip(&["link", "del"]);
    }
}

fn with(tap: &Tap) -> Backends {
    Backends {
        nets: vec![NetOptions::new(&tap.0)],
        ..Backends::default()
    }
}

/// Counts the announcements of one guest: frames of RARP (RFC 903) from its address, which nothing
/// else here sends.
struct Announcements {
    socket: socket2::Socket,
    mac: [u8; 6],
    count: u64,
}

impl Announcements {
    fn of(machine: &Machine) -> Self {
        // packet(7): a frame's type, as it stands in the frame.
        let rarp = i32::from(0x8035_u16.to_be()).into();
        let socket = socket2::Socket::new(socket2::Domain::PACKET, socket2::Type::RAW, Some(rarp));
        let socket = socket.unwrap();
        socket.set_nonblocking(true).unwrap();
        let devices = &machine.description().devices;
        let mac = devices.iter().find_map(|device| match device {
            DeviceDescription::Net { mac } => Some(mac.0),
            _ => None,
        });
        Self {
            socket,
            mac: mac.unwrap(),
            count: 0,
        }
    }

    fn count(&mut self) -> u64 {
        let mut frame = [0; FRAME];
        while let Ok(length) = (&self.socket).read(&mut frame) {
            self.count += u64::from(length >= ETHERNET && frame[6..12] == self.mac);
        }
        self.count
    }
}

/// A machine whose guest sends its counter in a frame, again and again.
fn sender(tap: &Tap) -> Machine {
    let mut ethernet = vec![0xff; 6];
    // From a local address, of a type for experiments (IEEE 802, local experimental).
    ethernet.extend([2, 0, 0, 0, 0, 9, 0x88, 0xb5]);
    let start = usize::try_from(COUNTER).unwrap() - VIRTIO - ETHERNET;
    let buffer = [vec![0; VIRTIO], ethernet].concat();
    let len = u32::try_from(VIRTIO + FRAME).unwrap();
    let at = u32::try_from(start).unwrap();
    driver(
        Machine::builder().devices(with(tap)),
        TRANSMIT,
        descriptor(at, len, 0, 0),
        vec![(at.into(), buffer)],
    )
}

fn hand_over(source: &Arc<Machine>, backends: Backends) -> Result<Arc<Machine>, String> {
    let dir = tempfile::tempdir().unwrap();
    let uri = Uri::Unix(dir.path().join("link"));
    let serial = Arc::new(|| Ok(Box::new(std::io::sink()) as _));
    let receiver = Receiver::bind_with(&uri, serial, backends, Default::default()).unwrap();
    let options = Options {
        handover: Handover::On,
        ..Options::default()
    };
    let report = migrate(source, &uri, &options, &Handle::new(), &mut |_| {});
    match (report.status, receiver.wait(Duration::from_secs(60))) {
        (Status::Completed, Some(Arrival::Arrived { machine, .. })) => Ok(machine),
        _ => Err(report.error.unwrap()),
    }
}

#[test]
fn no_frame_is_lost_when_the_tap_goes_along() {
    if !kvm() {
        return;
    }
    let Some(tap) = Tap::make("fc") else {
        eprintln!(
            "NOT RUN: no_frame_is_lost_when_the_tap_goes_along: no tap can be made here (root and ip are needed)"
        );
        return;
    };
    let mut here = Arc::new(sender(&tap));
    here.resume().unwrap();
    progresses(&here, COUNTER);
    let links = tap.says("carrier_changes");
    let mut announcements = Announcements::of(&here);
    let mut past = Vec::new();
    // With nothing given, and with the tap's own name; and in between one that comes to nothing
    // after the tap has passed.
    for backends in [Backends::default(), with(&tap), Backends::default()] {
        let mut strange = with(&tap);
        strange.nets[0].mac = Some("02:00:00:00:00:77".parse().unwrap());
        let why = hand_over(&here, strange).unwrap_err();
        assert!(why.contains("mac="), "{why}");
        let before = tap.frames();
        eventually("frames of the guest's", &here, || {
            tap.frames() > before + ANNOUNCEMENTS
        });

        let there = hand_over(&here, backends).unwrap();
        past.push(std::mem::replace(&mut here, there));
        let before = tap.frames();
        eventually("frames of the guest's", &here, || {
            tap.frames() > before + ANNOUNCEMENTS
        });
        assert_eq!(tap.says("carrier"), 1);
        // A guest that leaves is not announced any more, and then there are fewer.
        let all = u64::try_from(past.len()).unwrap() * ANNOUNCEMENTS;
        eventually("all announcements", &here, || announcements.count() >= all);
    }
    let others = announcements.count();
    assert_eq!(others, u64::try_from(past.len()).unwrap() * ANNOUNCEMENTS);
    let paused = here.pause().unwrap();
    // The last may be sent and not be counted yet.
    let sent = read(&here, COUNTER)..=read(&here, COUNTER) + 1;
    eventually("as many frames as the guest sent", &here, || {
        sent.contains(&(tap.frames() - others))
    });
    eprintln!("{} frames in {} moves", sent.start(), past.len());
    // The old machines go, and their files of the tap with them.
    drop((paused, past));
    progresses(&here, COUNTER);
    assert_eq!(tap.says("carrier_changes"), links);
    here.stop();
}

#[test]
fn a_guest_that_was_moved_while_paused_is_announced_when_it_is_resumed() {
    if !kvm() {
        return;
    }
    let Some(tap) = Tap::make("fp") else {
        eprintln!(
            "NOT RUN: a_guest_that_was_moved_while_paused_is_announced_when_it_is_resumed: no tap can be made here (root \
             and ip are needed)"
        );
        return;
    };
    // It has no program, and sends nothing by itself.
    let here = Machine::builder().memory(crate::support::MIB);
    let here = Arc::new(here.devices(with(&tap)).build().unwrap());
    let there = hand_over(&here, Backends::default()).unwrap();
    assert_eq!(there.run_state(), RunState::Paused);
    assert_eq!(tap.frames(), 0);
    there.resume().unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while tap.frames() < ANNOUNCEMENTS {
        assert!(std::time::Instant::now() < deadline, "no announcement");
        std::thread::sleep(Duration::from_millis(10));
    }
}
