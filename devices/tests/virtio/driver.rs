//! A guest's driver: it finds a device, negotiates, builds rings in memory and uses them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ferry_devices::Trigger;
use ferry_devices::bus::BusDevice;
use ferry_devices::virtio::{AnyVirtio, Device, VirtioDevice, VirtioState};
use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, Permissions};

/// RAM in which an access may meet a defect of ferry: a panic, as an index that is wrong makes one.
pub struct Memory {
    pub mmap: GuestMemoryMmap<AtomicBitmap>,
    /// Reading or writing this address panics; none does when it is 0.
    pub trap: AtomicU64,
}

impl GuestMemory for Memory {
    type PhysicalMemory = GuestMemoryMmap<AtomicBitmap>;
    type Bitmap = AtomicBitmap;

    fn check_range(&self, address: GuestAddress, count: usize, access: Permissions) -> bool {
        GuestMemory::check_range(&self.mmap, address, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>, GuestMemoryError> {
        let trap = self.trap.load(Ordering::SeqCst);
        assert!(
            trap == 0 || !(address.0..address.0 + count as u64).contains(&trap),
            "a defect"
        );
        GuestMemory::get_slices(&self.mmap, address, count, access)
    }
}

/// The guest's RAM.
pub const RAM: u64 = 16 << 20;
/// Where the rings of queue `n` are: at `n` times this.
const RINGS: u64 = 0x1_0000;
/// Where data may be.
pub const DATA: u64 = 0x10_0000;

pub const ACKNOWLEDGE: u32 = 1;
pub const DRIVER: u32 = 2;
pub const DRIVER_OK: u32 = 4;
pub const FEATURES_OK: u32 = 8;
pub const NEEDS_RESET: u32 = 64;

pub fn memory() -> Arc<Memory> {
    Arc::new(Memory {
        mmap: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap(),
        trap: AtomicU64::new(0),
    })
}

/// Memory of another host with the same contents.
pub fn copy(from: &Memory) -> Arc<Memory> {
    let to = memory();
    let mut bytes = vec![0; RAM as usize];
    from.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    to.write_slice(&bytes, GuestAddress(0)).unwrap();
    to
}

/// Counts interrupts.
#[derive(Clone, Default)]
pub struct Line(pub Arc<AtomicUsize>);

impl Trigger for Line {
    fn trigger(&self) -> std::io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// The driver's side of a queue.
#[derive(Clone, Debug)]
pub struct Ring {
    pub size: u16,
    pub base: u64,
    pub next: u16,
    pub seen: u16,
    pub free: Vec<u16>,
    /// Descriptors of each chain that the device has.
    pub chains: HashMap<u16, Vec<u16>>,
}

impl Ring {
    fn new(index: u32, size: u16) -> Self {
        Self {
            size,
            base: RINGS * u64::from(index + 1),
            next: 0,
            seen: 0,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
        }
    }

    pub fn descriptors(&self) -> u64 {
        self.base
    }

    pub fn available(&self) -> u64 {
        self.base + 0x4000
    }

    pub fn used(&self) -> u64 {
        self.base + 0x8000
    }

    pub fn write_descriptor(
        &self,
        memory: &Memory,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let at = self.descriptors() + u64::from(index) * 16;
        memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Makes a chain available; its head.
    pub fn add(
        &mut self,
        memory: &Memory,
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
    ) -> u16 {
        let parts: Vec<(u64, u32, u16)> = readable
            .iter()
            .map(|(a, n)| (*a, *n, 0))
            .chain(writable.iter().map(|(a, n)| (*a, *n, 2)))
            .collect();
        let indices: Vec<u16> = parts.iter().map(|_| self.free.pop().unwrap()).collect();
        for (i, (address, len, write)) in parts.iter().enumerate() {
            let next = indices.get(i + 1);
            let flags = write | u16::from(next.is_some());
            self.write_descriptor(
                memory,
                indices[i],
                *address,
                *len,
                flags,
                next.copied().unwrap_or(0),
            );
        }
        let head = indices[0];
        self.chains.insert(head, indices);
        self.publish(memory, head);
        head
    }

    /// Puts a head into the available ring, whatever it is.
    pub fn publish(&mut self, memory: &Memory, head: u16) {
        let at = self.available() + 4 + u64::from(self.next % self.size) * 2;
        memory.write_obj(head, GuestAddress(at)).unwrap();
        self.next = self.next.wrapping_add(1);
        self.set_index(memory, self.next);
    }

    pub fn set_index(&self, memory: &Memory, index: u16) {
        let at = GuestAddress(self.available() + 2);
        memory.store(index, at, Ordering::Release).unwrap();
    }

    /// The next chain that the device gave back: its head and the bytes written.
    pub fn take(&mut self, memory: &Memory) -> Option<(u16, u32)> {
        let index: u16 = memory
            .load(GuestAddress(self.used() + 2), Ordering::Acquire)
            .unwrap();
        if index == self.seen {
            return None;
        }
        let at = self.used() + 4 + u64::from(self.seen % self.size) * 8;
        let id: u32 = memory.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        self.seen = self.seen.wrapping_add(1);
        let head = u16::try_from(id).unwrap();
        let indices = self
            .chains
            .remove(&head)
            .expect("given back twice, or never given");
        self.free.extend(indices);
        Some((head, len))
    }

    /// With EVENT_IDX: whether the device has taken all that is available, and waits for more.
    pub fn all_taken(&self, memory: &Memory) -> bool {
        let at = self.used() + 4 + u64::from(self.size) * 8;
        let event: u16 = memory.load(GuestAddress(at), Ordering::SeqCst).unwrap();
        event == self.next
    }

    /// With EVENT_IDX: says at which used entry it wants an interrupt.
    pub fn set_used_event(&self, memory: &Memory, index: u16) {
        let at = self.available() + 4 + u64::from(self.size) * 2;
        memory
            .store(index, GuestAddress(at), Ordering::SeqCst)
            .unwrap();
    }
}

/// A guest with one device.
pub struct Driver<D: Device<Memory>> {
    pub device: VirtioDevice<D, Memory>,
    pub memory: Arc<Memory>,
    pub line: Line,
    pub rings: Vec<Ring>,
    /// The sentence of a thread of the device's that has failed.
    pub failure: mpsc::Receiver<String>,
}

impl<D: Device<Memory>> Driver<D> {
    /// Puts the device behind its transport, running, without a driver.
    pub fn plug(device: D, memory: Arc<Memory>) -> Self {
        let line = Line::default();
        let (failed, failure) = mpsc::channel();
        let device = VirtioDevice::new(
            device,
            Arc::clone(&memory),
            Box::new(line.clone()),
            move |why| failed.send(why).unwrap(),
        )
        .unwrap();
        device.resume();
        Self {
            device,
            memory,
            line,
            rings: Vec::new(),
            failure,
        }
    }

    /// A driver that accepts those of `features` that are offered, and queues of `size`.
    pub fn start(device: D, memory: Arc<Memory>, features: u64, size: u16) -> Self {
        let mut driver = Self::plug(device, memory);
        driver.init(features, size);
        driver
    }

    pub fn init(&mut self, features: u64, size: u16) {
        assert_eq!(self.read(0), 0x7472_6976);
        assert_eq!(self.read(4), 2);
        self.write(0x70, 0);
        assert_eq!(self.read(0x70), 0);
        self.write(0x70, ACKNOWLEDGE);
        self.write(0x70, ACKNOWLEDGE | DRIVER);
        let accepted = self.offered() & (features | 1 << 32);
        self.accept(accepted);
        self.write(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(self.read(0x70) & FEATURES_OK, FEATURES_OK);
        self.rings.clear();
        for index in 0..self.device.kind().queue_sizes.len() {
            self.set_up(index as u32, size);
        }
        self.write(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    pub fn offered(&self) -> u64 {
        self.write(0x14, 0);
        let low = u64::from(self.read(0x10));
        self.write(0x14, 1);
        low | u64::from(self.read(0x10)) << 32
    }

    pub fn accept(&self, features: u64) {
        for select in [0, 1] {
            self.write(0x24, select);
            self.write(0x20, (features >> (32 * select)) as u32);
        }
    }

    pub fn set_up(&mut self, index: u32, size: u16) {
        self.write(0x30, index);
        let max = self.read(0x34);
        assert!(max > 0);
        let ring = Ring::new(index, size.min(max as u16));
        self.memory
            .write_slice(&vec![0; RINGS as usize], GuestAddress(ring.base))
            .unwrap();
        self.write(0x38, ring.size.into());
        for (register, address) in [
            (0x80, ring.descriptors()),
            (0x90, ring.available()),
            (0xa0, ring.used()),
        ] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
        self.rings.push(ring);
    }

    pub fn read(&self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.device.port().read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&self, offset: u64, value: u32) {
        self.device.port().write(offset, &value.to_le_bytes());
    }

    pub fn status(&self) -> u32 {
        self.read(0x70)
    }

    pub fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0xff; N];
        self.device.port().read(0x100 + offset, &mut data);
        data
    }

    /// Notifies as a guest does whose ioeventfd catches it.
    pub fn kick(&self, queue: usize) {
        self.device.queue_events()[queue].signal();
    }

    pub fn add(&mut self, queue: usize, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        self.rings[queue].add(&self.memory, readable, writable)
    }

    pub fn take(&mut self, queue: usize) -> Option<(u16, u32)> {
        self.rings[queue].take(&self.memory)
    }

    /// Waits for the next chain to come back.
    pub fn wait(&mut self, queue: usize) -> (u16, u32) {
        let mut got = None;
        eventually("a buffer is used", || {
            got = self.take(queue);
            got.is_some()
        });
        got.unwrap()
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// So far. A used buffer is seen before its interrupt is raised, and both happen under the
    /// device's lock, which the status is read under: who has seen the buffer counts its interrupt.
    pub fn interrupts(&self) -> usize {
        self.status();
        self.line.0.load(Ordering::SeqCst)
    }

    /// Waits until the device has given up because of the driver.
    pub fn broken(&self) {
        eventually("the device asks for a reset", || {
            self.status() & NEEDS_RESET != 0
        });
    }

    /// The guest goes on elsewhere: with a copy of the memory, and `device` in the state of this
    /// one, saved while it is paused.
    pub fn migrate<E: Device<Memory>>(self, device: impl FnOnce(Arc<Memory>) -> E) -> Driver<E> {
        let driver = self.migrate_paused(device);
        driver.device.resume();
        driver
    }

    /// As [`migrate`](Self::migrate), but there it does not run yet.
    pub fn migrate_paused<E: Device<Memory>>(
        self,
        device: impl FnOnce(Arc<Memory>) -> E,
    ) -> Driver<E> {
        self.device.pause().unwrap();
        let state: VirtioState = self.device.save();
        let memory = copy(&self.memory);
        // The source ends before the destination runs.
        drop(self.device);
        let line = Line::default();
        let (failed, failure) = mpsc::channel();
        let device = VirtioDevice::new(
            device(Arc::clone(&memory)),
            Arc::clone(&memory),
            Box::new(line.clone()),
            move |why| failed.send(why).unwrap(),
        )
        .unwrap();
        device.restore(&state).unwrap();
        assert_eq!(device.save(), state, "what was restored is what is saved");
        Driver {
            device,
            memory,
            line,
            rings: self.rings,
            failure,
        }
    }
}

pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: did not happen");
        std::thread::sleep(Duration::from_micros(50));
    }
}
