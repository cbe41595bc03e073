//! Building a machine.

mod facts;

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use ferry_devices::acpi_pm::{ACPI_PM_BASE, ACPI_PM_IRQ, ACPI_PM_LEN, AcpiPm};
use ferry_devices::block::Disk;
use ferry_devices::bus::{Bus, BusError};
use ferry_devices::i8042::{I8042, I8042_BASE, I8042_LEN};
use ferry_devices::serial::{COM1_BASE, COM1_IRQ, COM1_LEN, Serial};
use ferry_devices::sync::lock;
use ferry_devices::thread;
use ferry_migration::options::Tracking;
use vmm_sys_util::eventfd::EventFd;

use self::facts::{cpu_facts, host_cpu};
use super::alarm::Alarm;
use super::control::{Control, EndWish};
use super::cpu::{CpuError, CpuModel, vendor};
use super::description::{DescriptionError, MachineDescription, OLDEST_FORMAT};
use super::devices::{Backends, DeviceError, VirtioSet};
use super::disk_marks::DiskMarks;
use super::fit::Misfit;
use super::nodes::Nodes;
use super::run_state::Exit;
use super::{Devices, Machine};
use crate::kvm::{DirtyLog, Host, IoctlError, MAX_CPUS, OpenError, Vcpu, Vm, VmError};
use crate::memory::{GuestRam, MemoryOptions, RamError, ShareError, SharedRam};
use crate::numa::{PlacementError, Topology, TopologyError};

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The host's KVM cannot be used.
    #[error(transparent)]
    Host(#[from] OpenError),
    /// The guest's memory cannot be had.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The memory that was shared is not the guest's.
    #[error(transparent)]
    Shared(#[from] ShareError),
    /// KVM refused the VM or a vCPU.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// KVM did not tell what CPU it can offer.
    #[error("the host's CPU features could not be read: {0}")]
    Cpuid(#[source] IoctlError),
    /// Rings were asked for.
    #[error(
        "this host's KVM has no dirty ring, which --dirty ring asked for: leave --dirty out, or use Linux 5.11 or later"
    )]
    NoDirtyRing,
    /// Not the CPU that was asked for.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// Too many vCPUs, or none.
    #[error("a machine with {asked} vCPUs was asked for, but 1 to {max} are possible on this host")]
    Cpus {
        /// Number asked for.
        asked: u32,
        /// The most there can be.
        max: u32,
    },
    /// A description that cannot be true.
    #[error(transparent)]
    Description(#[from] DescriptionError),
    /// NUMA nodes that cannot be the guest's.
    #[error(transparent)]
    Numa(#[from] TopologyError),
    /// NUMA nodes that cannot be where they should.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// A virtio device cannot be had.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Two devices in one place.
    #[error("the machine's devices do not fit together: {0}")]
    Bus(#[from] BusError),
    /// The guest counts on a CPU that this host's is not.
    #[error(transparent)]
    Misfit(#[from] Misfit),
    /// Out of file descriptors or threads.
    #[error("the machine could not be built: {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// A machine to be built.
pub struct Builder {
    memory: u64,
    cpus: u32,
    cpu: CpuModel,
    /// Whether the guest's RAM came from a pool where it arrives from.
    hugepages: bool,
    numa: Option<Topology>,
    name: String,
    serial: Box<dyn Write + Send>,
    backends: Backends,
    dirty: Tracking,
    ring_entries: Option<u32>,
    opened_disks: Option<Vec<Arc<Disk>>>,
    shared_taps: Vec<OwnedFd>,
    /// Of a machine that exists already.
    description: Option<MachineDescription>,
    /// That another process has shared.
    shared: Option<SharedRam>,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            memory: 0,
            cpus: 1,
            cpu: CpuModel::default(),
            hugepages: false,
            numa: None,
            name: "ferry".to_owned(),
            serial: Box::new(io::sink()),
            backends: Backends::default(),
            dirty: Tracking::Auto,
            ring_entries: None,
            opened_disks: None,
            shared_taps: Vec::new(),
            description: None,
            shared: None,
        }
    }
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder")
            .field("memory", &self.memory)
            .field("cpus", &self.cpus)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Builder {
    /// RAM in bytes; a multiple of 4 KiB, of 2 MiB with
    /// [`Backing::Hugetlb`](crate::memory::Backing::Hugetlb). There is no default.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// Number of vCPUs; 1 by default.
    #[must_use]
    pub fn cpus(mut self, n: u32) -> Self {
        self.cpus = n;
        self
    }

    /// The CPU of a new machine; by default all that the host can give. A machine from a
    /// description keeps the one it has.
    #[must_use]
    pub fn cpu(mut self, model: CpuModel) -> Self {
        self.cpu = model;
        self
    }

    /// The NUMA nodes of a new machine: they add up to its memory and its vCPUs. Where they are on
    /// this host [`devices`](Self::devices) may say.
    #[must_use]
    pub fn numa(mut self, topology: Option<Topology>) -> Self {
        self.numa = topology;
        self
    }

    /// The machine's name, for people.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Where the serial port's output goes; nowhere by default. The writer should not block for
    /// long: the vCPU waits for it, and so does a pause.
    #[must_use]
    pub fn serial(mut self, output: Box<dyn Write + Send>) -> Self {
        self.serial = output;
        self
    }

    /// What is behind the memory, the virtio devices, and what is behind them here. For a machine
    /// from a description: what is behind the devices that it has.
    #[must_use]
    pub fn devices(mut self, backends: Backends) -> Self {
        self.backends = backends;
        self
    }

    /// How the pages that the guest dirties are found while it is migrated. By default as
    /// [`DirtyLog`] finds better on this host. A machine has it for good.
    #[must_use]
    pub fn dirty(mut self, tracking: Tracking) -> Self {
        self.dirty = tracking;
        self
    }

    /// Entries of each vCPU's dirty ring, where there are rings: a power of two, 16 bytes of the
    /// kernel's memory each. By default as many as KVM takes on a small machine, and fewer on large
    /// ones. A vCPU whose ring is full stops for as long as it takes to empty it.
    #[must_use]
    pub fn dirty_ring_entries(mut self, entries: u32) -> Self {
        self.ring_entries = Some(entries);
        self
    }

    /// The disks, where they are open already: those of [`devices`](Self::devices) are not opened
    /// then.
    #[must_use]
    pub fn opened_disks(mut self, disks: Option<Vec<Arc<Disk>>>) -> Self {
        self.opened_disks = disks;
        self
    }

    /// The same machine as another one, which may be on another host: memory, vCPUs, name
    /// and CPU features are taken from its description.
    #[must_use]
    pub fn from_description(mut self, description: &MachineDescription) -> Self {
        self.memory = description.memory;
        self.cpus = description.cpus;
        self.hugepages = description.hugepages;
        self.name.clone_from(&description.name);
        self.numa.clone_from(&description.numa);
        self.description = Some(description.clone());
        self
    }

    /// The memory of a guest that runs in another process of this host, instead of new memory: for
    /// a machine from that guest's description. Until the machine is resumed it changes nothing
    /// there.
    #[must_use]
    pub fn shared_memory(mut self, memory: SharedRam) -> Self {
        self.shared = Some(memory);
        self
    }

    /// Taps that came with the [shared memory](Self::shared_memory), in the order of the guest's
    /// cards. They are behind its cards where [`devices`](Self::devices) has none, and in the place
    /// of those of the same name; others are closed.
    #[must_use]
    pub fn shared_taps(mut self, taps: Vec<OwnedFd>) -> Self {
        self.shared_taps = taps;
        self
    }

    /// Builds the machine: paused, its vCPUs as after reset, its memory zero unless it was shared.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn build(self) -> Result<Machine, BuildError> {
        if let Some(description) = &self.description {
            description.validate()?;
        }
        let host = Host::open()?;
        check_cpus(self.cpus, &host)?;
        check_nodes(self.numa.as_ref(), self.memory, self.cpus)?;
        let offered = host.guest_cpuid().map_err(BuildError::Cpuid)?;
        let host_vendor = vendor(&offered);
        let cpuid = match &self.description {
            Some(d) => d.cpuid.clone(),
            None => self.cpu.cpuid(offered)?,
        };
        let nodes = Nodes::place(self.numa, &self.backends, self.shared.is_some())?;
        let per_package = nodes.package(self.cpus);
        let bytes = (self.memory, self.hugepages);
        let ram = guest_ram(bytes, self.shared, self.backends.memory, &nodes)?;
        let hugepages = ram.hugepages();
        let entries = ring_entries(self.dirty, self.ring_entries, self.cpus, &host)?;
        let vm = Arc::new(Vm::with_dirty_rings(&host, Arc::new(ram), entries)?);

        let wish = EndWish::default();
        let (own, pio) = own_devices(&vm, self.serial, &wish)?;
        let mut mmio = Bus::new();
        let alarm = Alarm::default();
        let raised = alarm.clone();
        let described = self.description.as_ref().map(|d| d.devices.as_slice());
        let (virtio, devices) = VirtioSet::build(
            &vm,
            (&self.backends, self.opened_disks, self.shared_taps),
            described,
            &mut mmio,
            &(Arc::new(move |why| raised.raise(why)) as _),
        )?;
        let virtio = Arc::new(virtio);
        let buses = Arc::new((pio, mmio));

        let vcpus: Vec<Vcpu> = (0..self.cpus)
            .map(|id| vm.create_vcpu(id, per_package, &cpuid))
            .collect::<Result<_, _>>()?;
        let here = host_cpu(&host, host_vendor, &vcpus);
        let described = self.description.as_ref();
        let insist = self.backends.insist;
        let (tsc_khz, arch_capabilities) = cpu_facts(described, &self.cpu, &here, &vcpus, insist)?;
        let description = MachineDescription {
            format: OLDEST_FORMAT,
            requires: Vec::new(),
            name: self.name,
            memory: self.memory,
            cpus: self.cpus,
            hugepages,
            cpuid,
            tsc_khz,
            arch_capabilities,
            devices,
            numa: None,
        };
        let description = description.with_numa(nodes.topology().cloned());
        // A name that is too long is found here for a new machine.
        description.validate()?;

        let control = Arc::new(control(&vcpus, wish, &virtio, &vm)?);
        alarm.connect(&control);
        let machine = Machine {
            control: control.clone(),
            threads: Mutex::new(Vec::new()),
            vcpus: vcpus.into_iter().map(|v| Arc::new(Mutex::new(v))).collect(),
            devices: own,
            virtio,
            vsock: self.backends.vsock.clone(),
            disk_marks: DiskMarks::default(),
            freed: Mutex::default(),
            dirty_log: DirtyLog::new(vm.clone()),
            vm,
            description,
        };
        // From here on dropping `machine` stops and joins the threads there are.
        start_vcpus(&machine, &buses, &nodes)?;
        Ok(machine)
    }
}

/// # Errors
/// [`BuildError::Cpus`].
fn check_cpus(asked: u32, host: &Host) -> Result<(), BuildError> {
    let max = host.capabilities().max_vcpus.min(MAX_CPUS);
    match (1..=max).contains(&asked) {
        true => Ok(()),
        false => Err(BuildError::Cpus { asked, max }),
    }
}

/// # Errors
/// [`BuildError`]: nodes that do not come to this memory and these processors.
fn check_nodes(numa: Option<&Topology>, memory: u64, cpus: u32) -> Result<(), BuildError> {
    match numa {
        Some(numa) => Ok(numa.check(memory, cpus)?),
        None => Ok(()),
    }
}

/// The guest's memory: its own, or what was shared.
fn guest_ram(
    (bytes, hugepages): (u64, bool),
    shared: Option<SharedRam>,
    options: MemoryOptions,
    nodes: &Nodes,
) -> Result<GuestRam, BuildError> {
    let mut ram = match shared {
        Some(shared) => GuestRam::adopt(bytes, hugepages, shared)?,
        None => GuestRam::on_nodes(bytes, hugepages, options, &nodes.parts())?,
    };
    nodes.settle(&mut ram)?;
    if let Some(note) = ram.note() {
        tracing::info!(note, "the guest's memory");
    }
    Ok(ram)
}

/// Entries of each vCPU's dirty ring; 0 where the guest is logged by bitmap.
fn ring_entries(
    dirty: Tracking,
    wanted: Option<u32>,
    cpus: u32,
    host: &Host,
) -> Result<u32, BuildError> {
    match dirty {
        Tracking::Log => Ok(0),
        Tracking::Ring if !host.has_dirty_rings() => Err(BuildError::NoDirtyRing),
        Tracking::Auto if !host.prefers_dirty_rings() => Ok(0),
        Tracking::Auto | Tracking::Ring => {
            Ok(wanted.unwrap_or_else(|| host.dirty_ring_entries(cpus)))
        }
    }
}

/// The devices that every machine has, on the bus of their ports.
fn own_devices(
    vm: &Vm,
    output: Box<dyn Write + Send>,
    wish: &EndWish,
) -> Result<(Devices, Bus), BuildError> {
    let serial_irq = vm.irq_line(COM1_IRQ)?;
    let line = serial_irq
        .try_clone()
        .map_err(io_error("the serial port's interrupt"))?;
    let serial = Arc::new(Mutex::new(Serial::new(Box::new(line), output)));
    let i8042 = Arc::new(Mutex::new(I8042::new(Box::new(wish.reset_line()))));
    let sci = vm.irq_line(ACPI_PM_IRQ)?;
    let power_off = Box::new(wish.power_off_line());
    let acpi_pm = Arc::new(Mutex::new(AcpiPm::new(Box::new(sci), power_off)));
    let mut pio = Bus::new();
    pio.insert(COM1_BASE, COM1_LEN, serial.clone())?;
    pio.insert(I8042_BASE, I8042_LEN, i8042.clone())?;
    pio.insert(ACPI_PM_BASE, ACPI_PM_LEN, acpi_pm.clone())?;
    let devices = Devices {
        serial,
        serial_irq,
        i8042,
        acpi_pm,
    };
    Ok((devices, pio))
}

/// What stops, resumes and ends the machine.
fn control(
    vcpus: &[Vcpu],
    wish: EndWish,
    virtio: &Arc<VirtioSet>,
    vm: &Vm,
) -> Result<Control, BuildError> {
    let kickers = vcpus.iter().map(Vcpu::kicker).collect();
    let exit_event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(io_error("the event of its end"))?;
    let (virtio, ram) = (Arc::clone(virtio), Arc::clone(vm.ram()));
    Ok(Control::new(kickers, wish, exit_event, virtio, ram))
}

/// Starts a thread for each vCPU; it waits for the machine to be resumed.
fn start_vcpus(
    machine: &Machine,
    buses: &Arc<(Bus, Bus)>,
    nodes: &Nodes,
) -> Result<(), BuildError> {
    for (index, vcpu) in machine.vcpus.iter().enumerate() {
        let (vcpu, buses) = (vcpu.clone(), buses.clone());
        let (control, failed) = (machine.control.clone(), machine.control.clone());
        let work = move || {
            control.vcpu_thread(index, &vcpu, &buses.0, &buses.1);
            Ok(())
        };
        let failure = move |why| failed.end(Exit::Failure(why));
        let name = format!("vcpu{index}");
        let spawn = || thread::spawn(thread::Kind::Vcpu, &name, work, failure);
        let thread = nodes
            .near(index, spawn)
            .map_err(io_error("a thread for a vCPU"))?;
        lock(&machine.threads).push(thread);
    }
    Ok(())
}

fn io_error(what: &'static str) -> impl Fn(io::Error) -> BuildError {
    move |source| BuildError::Io { what, source }
}
