//! A guest that does anything at all to its virtio devices.

use super::vsock;
use ferry_devices::Trigger;
use ferry_devices::balloon::{Balloon, FreePages};
use ferry_devices::block::{Block, Disk};
use ferry_devices::bus::BusDevice;
use ferry_devices::console::Console;
use ferry_devices::net::{Backend, MAX_FRAME, MacAddress, Net, Offloads};
use ferry_devices::rng::Rng;
use ferry_devices::virtio::{AnyVirtio, Device, VirtioDevice, VirtioState};
use ferry_devices::vsock::Vsock;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const RAM: u64 = 1 << 20;
/// Sectors of the disk.
const SECTORS: u64 = 64;

pub(super) type Memory = GuestMemoryMmap<()>;

/// Bytes are a device and then what its guest does: disks to registers, disks to memory,
/// notifications, pauses, moves.
///
/// Whatever it is, nothing panics or goes on forever, the backends get nothing that they cannot
/// have, and what is saved can be restored and is the same then.
pub fn virtio(bytes: &[u8]) {
    if let Some((&kind, script)) = bytes.split_first() {
        run(kind, script, None);
    }
}

/// Bytes are a device, a state that it is said to have had on another host, and what its guest does
/// then, as for [`virtio`]. Returns whether the state was taken.
///
/// It is refused, or is one that could have been; nothing panics or goes on forever afterwards.
pub fn virtio_state(bytes: &[u8]) -> bool {
    let Some((&kind, bytes)) = bytes.split_first() else {
        return false;
    };
    let Ok((state, script)) = postcard::take_from_bytes::<VirtioState>(bytes) else {
        return false;
    };
    run(kind, script, Some(&state))
}

fn run(kind: u8, script: &[u8], state: Option<&VirtioState>) -> bool {
    match kind % 8 {
        0 | 4 => {
            // In memory, where there is such a place: a disk that is busy with something else must
            // not look like one that does not answer.
            let mut image = tempfile::NamedTempFile::new_in("/dev/shm")
                .or_else(|_| tempfile::NamedTempFile::new())
                .unwrap();
            image.write_all(&[0x5a; 512 * 64]).unwrap();
            let disk = Arc::new(Disk::open(image.path(), kind & 4 != 0).unwrap());
            let taken = play(script, state, |memory| {
                Block::new(Arc::clone(&disk), "fuzz", memory).unwrap()
            });
            let len = image.as_file().metadata().unwrap().len();
            assert_eq!(len, SECTORS * 512, "a guest changed its disk's size");
            taken
        }
        1 => play(script, state, |_| Rng::new()),
        2 | 6 => play(script, state, |_| Balloon::new(Arc::new(Pages))),
        5 => play(script, state, |_| {
            Vsock::new(vsock::CID, Box::new(vsock::Programs::default())).unwrap()
        }),
        7 => play(script, state, |_| {
            let mut console = Console::new(Box::new(Screen)).unwrap();
            assert_eq!(console.input(b"typed before there was a driver"), 31);
            console
        }),
        _ => play(script, state, |_| {
            let (ours, theirs) = UnixDatagram::pair().unwrap();
            theirs.set_nonblocking(true).unwrap();
            ours.set_nonblocking(true).unwrap();
            for len in [4, 12, 100, 3000] {
                // A queue that is full has enough.
                let _ = ours.send(&vec![1; len]);
            }
            let wire = Wire {
                socket: theirs,
                _other: ours,
            };
            Net::new(Box::new(wire), MacAddress([2, 0, 0, 0, 0, 1]))
        }),
    }
}

fn memory() -> Arc<Memory> {
    let len = usize::try_from(RAM).unwrap();
    Arc::new(Memory::from_ranges(&[(GuestAddress(0), len)]).unwrap())
}

fn plug<D: Device<Memory>>(device: D, memory: &Arc<Memory>) -> VirtioDevice<D, Memory> {
    VirtioDevice::new(device, Arc::clone(memory), Box::new(Nothing), |why| {
        panic!("{why}")
    })
    .unwrap()
}

/// Returns whether the state was taken.
fn play<D: Device<Memory>>(
    script: &[u8],
    state: Option<&VirtioState>,
    make: impl Fn(Arc<Memory>) -> D,
) -> bool {
    play_with(script, state, make, |_, _| {})
}

/// As [`play`], with a host that does something now and then, by the script, and in the end.
pub(super) fn play_with<D: Device<Memory>>(
    script: &[u8],
    state: Option<&VirtioState>,
    make: impl Fn(Arc<Memory>) -> D,
    mut host: impl FnMut(&VirtioDevice<D, Memory>, &mut Script<'_>),
) -> bool {
    let memory = memory();
    let mut device = plug(make(Arc::clone(&memory)), &memory);
    let taken = state.is_some_and(|state| device.restore(state).is_ok());
    if taken {
        // It travels on as it came.
        let state = device.save();
        let next = plug(make(Arc::clone(&memory)), &memory);
        next.restore(&state).unwrap();
        assert_eq!(next.save(), state);
    }
    device.resume();
    let mut script = Script(script);
    while let Some(step) = script.byte() {
        let mut port = device.port();
        match step {
            // A register, whole.
            0..=99 => {
                let value = script.word().to_le_bytes();
                port.write(u64::from(step) * 4, &value);
            }
            // Anything at all within the page.
            100..=119 => {
                let offset = u64::from(script.word() & 0x1ff);
                let width = usize::from(step % 9);
                port.write(
                    offset,
                    &0x0102_0304_0506_0708u64.to_le_bytes()[..width.min(8)],
                );
                port.read(offset, &mut vec![0; width]);
            }
            // Memory: where, and up to 63 bytes.
            120..=219 => {
                let at = u64::from(script.word()) % RAM;
                let n = usize::from(script.byte().unwrap_or(0) & 63);
                let bytes = script.take(n);
                // What runs over the end of RAM does not arrive.
                let _ = memory.write_slice(bytes, GuestAddress(at));
            }
            220..=239 => {
                let queues = device.queue_events();
                queues[usize::from(step) % queues.len()].signal();
            }
            240..=247 => {
                device.pause().unwrap();
                device.resume();
            }
            248..=251 => host(&device, &mut script),
            // On to another host; the memory stays.
            _ => {
                device.pause().unwrap();
                let state = device.save();
                drop(device);
                device = plug(make(Arc::clone(&memory)), &memory);
                device.restore(&state).unwrap();
                assert_eq!(device.save(), state);
                device.resume();
            }
        }
    }
    host(&device, &mut script);
    device.pause().unwrap();
    // A worker that panicked would have left the lock poisoned and its thread dead; a reset finds
    // it alive.
    device.port().write(0x70, &[0; 4]);
    device.resume();
    taken
}

pub(super) struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    pub(super) fn take(&mut self, n: usize) -> &'a [u8] {
        let (now, later) = self.0.split_at(n.min(self.0.len()));
        self.0 = later;
        now
    }

    pub(super) fn byte(&mut self) -> Option<u8> {
        self.take(1).first().copied()
    }

    fn word(&mut self) -> u32 {
        let mut bytes = [0; 4];
        let got = self.take(4);
        bytes[..got.len()].copy_from_slice(got);
        u32::from_le_bytes(bytes)
    }
}

struct Nothing;

impl Trigger for Nothing {
    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Takes output as a slow terminal does: in part.
pub(super) struct Screen;

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        assert!(!bytes.is_empty() && u64::try_from(bytes.len()).unwrap() <= RAM);
        match bytes.len() % 3 {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            1 => Ok(1),
            _ => Ok(bytes.len()),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Pages;

impl Pages {
    fn check(first: u64, count: u64) {
        assert!(
            count > 0 && (first + count) * 4096 <= RAM,
            "page {first} and {count} are not RAM"
        );
    }
}

impl FreePages for Pages {
    fn inflated(&self, first: u64, count: u64) {
        Self::check(first, count);
    }
    fn deflated(&self, first: u64, count: u64) {
        Self::check(first, count);
    }
    fn reported(&self, first: u64, count: u64) {
        Self::check(first, count);
    }
}

struct Wire {
    socket: UnixDatagram,
    _other: UnixDatagram,
}

impl Backend for Wire {
    fn read(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        self.socket.recv(frame)
    }
    fn write(&mut self, frame: &[u8]) -> io::Result<()> {
        assert!(frame.len() <= MAX_FRAME);
        self.socket.send(frame).map(drop)
    }
    fn set_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }
    fn readable(&self) -> io::Result<OwnedFd> {
        self.socket.try_clone().map(Into::into)
    }
}
