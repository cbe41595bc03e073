//! The machine's virtio devices: which there are, where they are, and what is behind them on this
//! host.
//!
//! A device's place, its registers' address and its interrupt line, follows from its number alone,
//! so that both ends of a migration agree. What is behind it belongs to the host: a disk's path and
//! a tap's name are given anew at the destination, unless the tap itself comes, open, from a
//! process on the same host.

mod announcing;
mod backing;
mod balloon;
mod ballooning;
mod console;
mod error;
mod fitting;
mod place;
mod sockets;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ferry_devices::balloon::Balloon;
use ferry_devices::balloon::auto::Settings;
use ferry_devices::block::{Block, Disk};
use ferry_devices::bus::Bus;
use ferry_devices::console::Console;
use ferry_devices::net::{Backend as _, MacAddress, Net};
use ferry_devices::rng::Rng;
use ferry_devices::virtio::{
    AnyVirtio, Device, MMIO_LEN, PauseError, QUEUE_NOTIFY, RestoreError, VirtioDevice, VirtioState,
};
use ferry_devices::vsock::Vsock;
use serde::{Deserialize, Serialize};

pub use crate::boot::MmioDevice;
pub use backing::DiskBacking;
pub(super) use backing::{backings, with as with_backing};
pub use balloon::BalloonInfo;
pub use console::ConsoleOptions;
pub use error::DeviceError;
pub use place::{MAX_DEVICES, place};
pub use sockets::{VsockError, VsockOptions};

use super::builder::BuildError;
use crate::kvm::Vm;
use crate::memory::{GuestMemory, MemoryOptions};
use crate::numa::NumaMap;
use crate::sandbox::Descriptor;
use announcing::Announcing;
use balloon::HostPages;
use ballooning::Ballooning;
use fitting::{Card, cards, check, wanted};

/// A disk as it is given on a host.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskOptions {
    /// A raw image or a block device.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// It, where it is open already; `path` is that of the descriptor then.
    pub open: Option<Descriptor>,
}

impl DiskOptions {
    /// A raw image or a block device.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, read_only: bool) -> Self {
        Self {
            path: path.into(),
            read_only,
            open: None,
        }
    }

    /// A disk that is open already.
    #[must_use]
    pub fn open(disk: Descriptor, read_only: bool) -> Self {
        Self {
            path: format!("/proc/self/fd/{}", disk.number()).into(),
            read_only,
            open: Some(disk),
        }
    }
}

/// A network card as it is given on a host.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NetOptions {
    /// Name of a tap device that exists.
    pub tap: String,
    /// The card's address; a random one if it is left out. A guest that arrives brings its own.
    pub mac: Option<MacAddress>,
    /// The device, where it is open already; `tap` is of no use then.
    pub open: Option<Descriptor>,
}

impl NetOptions {
    /// A card at a tap device that exists, with a random address.
    #[must_use]
    pub fn new(tap: impl Into<String>) -> Self {
        Self {
            tap: tap.into(),
            mac: None,
            open: None,
        }
    }

    /// A tap device that is open already.
    #[must_use]
    pub const fn open(tap: Descriptor) -> Self {
        Self {
            tap: String::new(),
            mac: None,
            open: Some(tap),
        }
    }
}

/// What is behind the guest's memory and virtio devices on this host.
///
/// Built by functional update, `Backends { …, ..Backends::default() }`:
/// a new field has a default and breaks no caller. `#[non_exhaustive]` would forbid just that.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Backends {
    /// What its memory is made of.
    pub memory: MemoryOptions,
    /// Which of this host's NUMA nodes the guest's go to, as far as that is said.
    pub numa_map: NumaMap,
    /// The disks, in the order in which the guest sees them.
    pub disks: Vec<DiskOptions>,
    /// The network cards, in the order in which the guest sees them.
    pub nets: Vec<NetOptions>,
    /// Whether there is a balloon. A guest that arrives has one if it had one.
    pub balloon: bool,
    /// Whether there is a source of random numbers. As for the balloon.
    pub rng: bool,
    /// What is behind the guest's vsock device, if it has one.
    pub vsock: Option<VsockOptions>,
    /// What is behind the guest's console. A guest that arrives has one if it had one; without this
    /// its output is dropped.
    pub console: Option<ConsoleOptions>,
    /// An operator insists: a guest that arrives is taken although a disk is not the file that it
    /// used on this host, or the CPU not the one that it counts on.
    pub insist: bool,
}

/// A virtio device, as far as both hosts must agree on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceDescription {
    /// A disk.
    Disk {
        /// Its size.
        bytes: u64,
        /// Whether the guest may only read it.
        read_only: bool,
        /// The file behind it at the source, where that was told.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        backing: Option<DiskBacking>,
    },
    /// A network card.
    Net {
        /// Its address.
        mac: MacAddress,
    },
    /// A balloon.
    Balloon,
    /// A source of random numbers.
    Rng,
    /// Sockets between guest and host.
    Vsock {
        /// The guest's context.
        cid: u32,
    },
    /// A console.
    Console,
}

type Memory = GuestMemory;

/// Gets a sentence when a thread of a device's has failed: the guest cannot go on.
pub(super) type OnFailure = Arc<dyn Fn(String) + Send + Sync>;

/// All virtio devices of a machine, in the order of their places. Made at rest.
#[derive(Debug, Default)]
pub(super) struct VirtioSet {
    all: Vec<Arc<dyn AnyVirtio>>,
    disks: Vec<Arc<Disk>>,
    nets: Vec<Arc<VirtioDevice<Net, Memory>>>,
    /// Those of the cards, once more.
    taps: Vec<OwnedFd>,
    balloon: Option<Ballooning>,
    vsock: Option<Arc<VirtioDevice<Vsock, Memory>>>,
    console: Option<Arc<VirtioDevice<Console, Memory>>>,
    console_lost: Arc<AtomicU64>,
    announcing: Announcing,
}

impl VirtioSet {
    /// Makes the devices and puts them on `bus`: those of `described`, or, for a new machine, those
    /// that `backends` asks for. A new machine's disks are locked; those of one that arrives belong
    /// to its source still. Disks that are `opened` already are taken as they are, and so are taps
    /// that are `shared` by the guest's process. `on_failure` ends the guest.
    pub(super) fn build(
        vm: &Arc<Vm>,
        (backends, opened, shared): (&Backends, Option<Vec<Arc<Disk>>>, Vec<OwnedFd>),
        described: Option<&[DeviceDescription]>,
        bus: &mut Bus,
        on_failure: &OnFailure,
    ) -> Result<(Self, Vec<DeviceDescription>), BuildError> {
        let disks = match opened {
            Some(disks) => disks,
            None => backing::open_disks(backends, described)?,
        };
        let cards = cards(backends, shared)?;
        let devices = match described {
            Some(devices) => {
                check(devices, (&cards, backends), &disks)?;
                // What was behind a disk at the source is of no more use.
                backing::without(devices)
            }
            None => {
                let devices = wanted(backends, &disks)?;
                for disk in &disks {
                    disk.lock().map_err(DeviceError::Disk)?;
                }
                devices
            }
        };
        let mut set = Self {
            disks,
            ..Self::default()
        };
        let memory = Arc::new(vm.ram().memory().clone());
        let mut left = (0, cards.into_iter());
        for (number, device) in devices.iter().enumerate() {
            let place = place(number).ok_or(DeviceError::TooMany(devices.len()))?;
            let socket = Socket {
                vm,
                memory: &memory,
                place,
                on_failure,
            };
            set.add(device, &socket, backends, &mut left, bus)?;
        }
        Ok((set, devices))
    }

    /// Makes a device and puts it on the bus. Of the disks the number of those that were added is
    /// counted, and of the cards are those left that were not.
    fn add<'c>(
        &mut self,
        device: &DeviceDescription,
        socket: &Socket<'_>,
        backends: &Backends,
        (disks, cards): &mut (usize, impl Iterator<Item = Card<'c>>),
        bus: &mut Bus,
    ) -> Result<(), BuildError> {
        match device {
            DeviceDescription::Disk { .. } => {
                let number = *disks;
                let disk = self.disks.get(number).cloned();
                let disk = disk.ok_or(DeviceError::Missing("disk"))?;
                let id = format!("ferry-{number}");
                *disks += 1;
                let block = Block::new(disk, &id, Arc::clone(socket.memory));
                self.plug(socket, block.map_err(DeviceError::Resources)?, bus)?;
            }
            DeviceDescription::Net { mac } => {
                let card = cards.next().ok_or(DeviceError::Missing("network card"))?;
                let tap = card.tap()?;
                let file = tap.readable().map_err(DeviceError::Resources)?;
                self.taps.push(file);
                let net = self.plug(socket, Net::new(Box::new(tap), *mac), bus)?;
                self.nets.push(net);
            }
            DeviceDescription::Balloon => {
                let pages = Arc::new(HostPages::new(Arc::clone(socket.vm.ram())));
                let balloon = Balloon::new(Arc::clone(&pages) as _);
                let balloon = self.plug(socket, balloon, bus)?;
                let ballooning = Ballooning::start(balloon, pages, socket.vm.ram().size());
                self.balloon = Some(ballooning.map_err(DeviceError::Resources)?);
            }
            DeviceDescription::Rng => drop(self.plug(socket, Rng::new(), bus)?),
            DeviceDescription::Vsock { cid } => {
                let options = backends.vsock.as_ref();
                let options = options.ok_or(DeviceError::Missing("vsock"))?;
                let programs = options.programs().map_err(DeviceError::Resources)?;
                let vsock = Vsock::new(*cid, Box::new(programs));
                let vsock = vsock.map_err(DeviceError::Resources)?;
                self.vsock = Some(self.plug(socket, vsock, bus)?);
            }
            DeviceDescription::Console => {
                let output = match &backends.console {
                    Some(options) => options.open().map_err(DeviceError::Resources)?,
                    None => Box::new(io::sink()),
                };
                let console = Console::new(output).map_err(DeviceError::Resources)?;
                self.console_lost = console.lost_output();
                self.console = Some(self.plug(socket, console, bus)?);
            }
        }
        Ok(())
    }

    fn plug<D: Device<Memory>>(
        &mut self,
        socket: &Socket<'_>,
        device: D,
        bus: &mut Bus,
    ) -> Result<Arc<VirtioDevice<D, Memory>>, BuildError> {
        let device = Arc::new(socket.plug(device, bus)?);
        self.all.push(Arc::clone(&device) as _);
        Ok(device)
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// Brings all devices to rest. After an error some are, and some are not.
    pub(super) fn pause(&self) -> Result<(), PauseError> {
        self.announcing.rest();
        self.all.iter().try_for_each(|device| device.pause())
    }

    pub(super) fn resume(&self) {
        for device in &self.all {
            device.resume();
        }
    }

    pub(super) fn save(&self) -> Vec<VirtioState> {
        self.all.iter().map(|device| device.save()).collect()
    }

    pub(super) fn restore(&self, states: &[VirtioState]) -> Result<(), RestoreError> {
        self.all
            .iter()
            .zip(states)
            .try_for_each(|(device, state)| device.restore(state))?;
        if let Some(balloon) = &self.balloon {
            // Whether it is moved automatically came along.
            balloon.look();
        }
        Ok(())
    }

    pub(super) fn taps(&self) -> &[OwnedFd] {
        &self.taps
    }

    pub(super) fn disks(&self) -> &[Arc<Disk>] {
        &self.disks
    }

    /// All locks, or an error and those that were held before: the other side may take back the
    /// guest, and its disks.
    pub(super) fn lock_disks(&self) -> Result<(), DeviceError> {
        let mut taken = Vec::new();
        for disk in &self.disks {
            match disk.lock() {
                Ok(news) => taken.extend(news.then_some(disk)),
                Err(error) => {
                    for disk in taken {
                        if let Err(error) = disk.unlock() {
                            tracing::warn!(%error, "the lock on a disk stays");
                        }
                    }
                    return Err(DeviceError::Disk(error));
                }
            }
        }
        Ok(())
    }

    pub(super) fn release_disks(&self) -> Result<(), DeviceError> {
        self.disks
            .iter()
            .try_for_each(|disk| disk.unlock())
            .map_err(DeviceError::Disk)
    }

    /// The guest goes on elsewhere, and its connections to this host's programs do not.
    pub(super) fn close_connections(&self) {
        if let Some(vsock) = &self.vsock {
            vsock.with(Vsock::leave);
        }
    }

    /// Bytes typed at the console; how many it took. At once: a console that is at work, or rests,
    /// takes none.
    pub(super) fn console_input(&self, bytes: &[u8]) -> usize {
        let console = self.console.as_ref();
        let taken = console.and_then(|c| c.try_while_running(|c| c.input(bytes)));
        taken.unwrap_or(0)
    }

    /// The size of the console's terminal; whether the console has taken note, at once.
    pub(super) fn set_console_size(&self, columns: u16, rows: u16) -> bool {
        let console = self.console.as_ref();
        console.is_some_and(|c| c.try_reconfigure(|c| c.set_size(columns, rows)))
    }

    pub(super) fn has_console(&self) -> bool {
        self.console.is_some()
    }

    pub(super) fn console_output_lost(&self) -> u64 {
        self.console_lost.load(Ordering::Relaxed)
    }

    /// A guest was put here: its cards tell the network so when it runs for the first time.
    pub(super) fn announce_when_resumed(&self) {
        self.announcing.ask();
    }

    /// The guest runs.
    pub(super) fn resumed(self: &Arc<Self>) {
        announcing::begin(self);
    }

    pub(super) fn announce(&self) {
        for net in &self.nets {
            net.reconfigure(|net| {
                if let Err(error) = net.announce() {
                    tracing::warn!(mac = %net.mac(), %error, "the network could not be told where the guest is");
                }
            });
        }
    }

    pub(super) fn set_balloon(&self, bytes: u64) -> bool {
        let pages = u32::try_from(bytes / ferry_devices::balloon::PAGE).unwrap_or(u32::MAX);
        self.balloon.as_ref().map(|b| b.set_size(pages)).is_some()
    }

    pub(super) fn set_balloon_auto(&self, settings: Settings) -> bool {
        let balloon = self.balloon.as_ref();
        balloon.map(|b| b.set_auto(settings)).is_some()
    }

    pub(super) const fn has_balloon(&self) -> bool {
        self.balloon.is_some()
    }

    pub(super) fn balloon(&self) -> Option<BalloonInfo> {
        self.balloon.as_ref().map(Ballooning::info)
    }

    pub(super) fn keep_free_pages(&self, keep: bool) {
        if let Some(balloon) = &self.balloon {
            balloon.pages().keep(keep);
        }
    }
}

/// Where a device is plugged in.
struct Socket<'a> {
    vm: &'a Vm,
    memory: &'a Arc<Memory>,
    place: MmioDevice,
    on_failure: &'a OnFailure,
}

impl Socket<'_> {
    fn plug<D: Device<Memory>>(
        &self,
        device: D,
        bus: &mut Bus,
    ) -> Result<VirtioDevice<D, Memory>, BuildError> {
        let line = self.vm.irq_line(self.place.gsi)?;
        let memory = Arc::clone(self.memory);
        let on_failure = Arc::clone(self.on_failure);
        let device = VirtioDevice::new(device, memory, Box::new(line), move |why| on_failure(why))
            .map_err(DeviceError::Resources)?;
        let base = u64::from(self.place.base);
        for (queue, event) in (0u32..).zip(device.queue_events()) {
            self.vm.signal_writes(event, base + QUEUE_NOTIFY, queue)?;
        }
        bus.insert(base, MMIO_LEN, Arc::new(Mutex::new(device.port())))?;
        Ok(device)
    }
}
