//! A VM: memory slots, interrupt controllers and timers in the kernel.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_EXIT_ON_EMULATION_FAILURE,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY,
    kvm_enable_cap, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::IoEventAddress;
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::cpuid::{self, CpuidEntry};
use super::dirty_ring::{self, DirtyRings};
use super::error::{IoctlError, Named};
use super::host::{Capabilities, Host};
use super::irq::IrqLine;
use super::vcpu::Vcpu;
use crate::memory::{GuestRam, RangeError};

/// The most vCPUs a machine can have: what 8-bit APIC ids can name, less the broadcast id.
pub const MAX_CPUS: u32 = 254;

/// Three pages that kvm_intel wants for a TSS, and one for an identity map, in the hole below 4
/// GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// Why a VM, or a vCPU in it, could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// A KVM ioctl was refused.
    #[error("the virtual machine could not be set up: {0}")]
    Ioctl(#[from] IoctlError),
    /// RAM that is not where its layout says.
    #[error("the virtual machine could not be set up: {0}")]
    Range(#[from] RangeError),
    /// More memory regions than slots.
    #[error("this host's KVM has {have} memory slots, but the guest's memory needs {need}")]
    Slots {
        /// Slots there are.
        have: u32,
        /// Slots needed.
        need: usize,
    },
    /// More entries than KVM takes.
    #[error(
        "the CPUID list of {0} entries is longer than KVM takes: the machine's description is damaged"
    )]
    Cpuid(usize),
    /// An eventfd or a mapping of the vCPU could not be made.
    #[error("the virtual machine could not be set up: {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// A virtual machine with its RAM.
#[derive(Debug)]
pub struct Vm {
    /// Where dirty pages are found by rings.
    rings: Option<DirtyRings>,
    fd: VmFd,
    caps: Capabilities,
    /// KVM_GET_MSR_INDEX_LIST of the host.
    msr_indices: Vec<u32>,
    // After `fd`, so that it is dropped after: the slots point into it.
    ram: Arc<GuestRam>,
}

impl Vm {
    /// A VM over `ram`, with the interrupt controllers and, where there is one, the timer. Its
    /// dirty pages are found by KVM's log.
    ///
    /// # Errors
    /// [`VmError`].
    pub fn new(host: &Host, ram: Arc<GuestRam>) -> Result<Self, VmError> {
        Self::with_dirty_rings(host, ram, 0)
    }

    /// As [`new`](Self::new); dirty pages are found by a ring of about `entries` for each vCPU,
    /// where that is not 0 and the host has rings. KVM wants to know before there is a vCPU, and it
    /// is for good.
    ///
    /// # Errors
    /// As there.
    pub fn with_dirty_rings(
        host: &Host,
        ram: Arc<GuestRam>,
        entries: u32,
    ) -> Result<Self, VmError> {
        let caps = host.capabilities().clone();
        let fd = host.kvm().create_vm().named("KVM_CREATE_VM")?;
        let list = host
            .kvm()
            .get_msr_index_list()
            .named("KVM_GET_MSR_INDEX_LIST")?;
        let max = caps.dirty_ring_entries;
        let rings =
            (entries > 0 && max > 0).then(|| DirtyRings::new(dirty_ring::fit(entries, max)));
        let vm = Self {
            rings,
            fd,
            caps,
            msr_indices: list.as_slice().to_vec(),
            ram,
        };
        // These three before any vCPU: kvm_intel fixes the addresses and the APICs when it makes
        // one.
        if vm.caps.set_identity_map_addr {
            vm.fd
                .set_identity_map_address(IDENTITY_MAP_ADDRESS)
                .named("KVM_SET_IDENTITY_MAP_ADDR")?;
        }
        if vm.caps.set_tss_addr {
            vm.fd
                .set_tss_address(TSS_ADDRESS)
                .named("KVM_SET_TSS_ADDR")?;
        }
        vm.fd.create_irq_chip().named("KVM_CREATE_IRQCHIP")?;
        if vm.caps.pit2 {
            // With the dummy speaker KVM answers port 0x61, which guests poll to calibrate.
            let config = kvm_pit_config {
                flags: KVM_PIT_SPEAKER_DUMMY,
                ..Default::default()
            };
            vm.fd.create_pit2(config).named("KVM_CREATE_PIT2")?;
        }
        if vm.caps.exit_on_emulation_failure {
            // A failed emulation then ends the machine with the instruction's bytes in the message,
            // where otherwise the guest would get an #UD that it did nothing to deserve.
            vm.enable(KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)?;
        }
        if let Some(rings) = &vm.rings {
            // They differ in what user space owes to weakly ordered processors, which it does
            // anyway.
            let cap = if vm.caps.dirty_ring_acq_rel {
                KVM_CAP_DIRTY_LOG_RING_ACQ_REL
            } else {
                KVM_CAP_DIRTY_LOG_RING
            };
            let bytes = u64::from(rings.entries()) * u64::from(dirty_ring::ENTRY_BYTES);
            vm.enable(cap, bytes)?;
        }
        let manual = vm.manual_dirty_log_flags();
        if manual != 0 {
            vm.enable(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, manual.into())?;
        }
        let need = vm.ram.regions().len();
        if usize::try_from(vm.caps.memory_slots).is_ok_and(|have| have < need) {
            return Err(VmError::Slots {
                have: vm.caps.memory_slots,
                need,
            });
        }
        vm.set_slots(0)?;
        Ok(vm)
    }

    /// The guest's RAM.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// What the KVM underneath can do.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        &self.caps
    }

    /// Makes vCPU number `id`, of which `per_package` share a package, as it is after reset: number
    /// 0 can run, the others wait for INIT and SIPI.
    ///
    /// # Errors
    /// [`VmError`].
    pub fn create_vcpu(
        self: &Arc<Self>,
        id: u32,
        per_package: u32,
        cpuid: &[CpuidEntry],
    ) -> Result<Vcpu, VmError> {
        let fd = self.fd.create_vcpu(id.into()).named("KVM_CREATE_VCPU")?;
        let list = cpuid::for_vcpu(cpuid, id, per_package).ok_or(VmError::Cpuid(cpuid.len()))?;
        fd.set_cpuid2(&list).named("KVM_SET_CPUID2")?;
        let ring = match &self.rings {
            Some(rings) => Some(rings.add(fd.as_raw_fd()).map_err(|source| VmError::Io {
                what: "mapping a vCPU's dirty ring",
                source,
            })?),
            None => None,
        };
        let mut vcpu = Vcpu::new(self.clone(), fd, self.fd.run_size(), id, ring)?;
        vcpu.probe_msrs(&self.msr_indices)?;
        Ok(vcpu)
    }

    /// An irqfd on interrupt line `gsi`.
    ///
    /// # Errors
    /// [`VmError`].
    pub fn irq_line(&self, gsi: u32) -> Result<IrqLine, VmError> {
        let event =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|source| VmError::Io {
                what: "an eventfd for an interrupt",
                source,
            })?;
        self.fd.register_irqfd(&event, gsi).named("KVM_IRQFD")?;
        Ok(IrqLine(event))
    }

    /// Has KVM signal `event` when the guest writes `value`, 4 bytes, to `address`: no exit to the
    /// vCPU's thread.
    ///
    /// # Errors
    /// [`VmError`].
    pub fn signal_writes(
        &self,
        event: &ferry_devices::virtio::Event,
        address: u64,
        value: u32,
    ) -> Result<(), VmError> {
        let event = event.try_clone().map_err(|source| VmError::Io {
            what: "duplicating an eventfd for a notification",
            source,
        })?;
        // SAFETY: the descriptor is an eventfd, given up by the owner that was just made for it.
        let event = unsafe { EventFd::from_raw_fd(OwnedFd::from(event).into_raw_fd()) };
        // KVM holds the eventfd itself, not this descriptor of it.
        self.fd
            .register_ioevent(&event, &IoEventAddress::Mmio(address), value)
            .named("KVM_IOEVENTFD")?;
        Ok(())
    }

    /// The rings, where dirty pages are found by them.
    pub(super) fn dirty_rings(&self) -> Option<&DirtyRings> {
        self.rings.as_ref()
    }

    /// The flags of manual dirty log protection that this VM runs with; 0 for the plain log.
    pub(super) fn manual_dirty_log_flags(&self) -> u32 {
        if self.rings.is_some() {
            // Then there is no log to protect by hand; and with INITIALLY_SET turning tracking on
            // would protect nothing, so that no write would ever get into a ring.
            return 0;
        }
        let known = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        let flags = self.caps.manual_dirty_log_protect & known;
        // INITIALLY_SET means nothing without the first.
        if flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 {
            0
        } else {
            flags
        }
    }

    /// Turns KVM's dirty log of all slots on or off; the guest may be running.
    pub(super) fn log_dirty_pages(&self, on: bool) -> Result<(), VmError> {
        self.set_slots(if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
    }

    pub(super) fn fd(&self) -> &VmFd {
        &self.fd
    }

    fn set_slots(&self, flags: u32) -> Result<(), VmError> {
        for (slot, region) in (0u32..).zip(self.ram.regions()) {
            let base = self.ram.host_address(region.first_gfn, region.pages)?;
            let slot = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.address(),
                memory_size: region.bytes(),
                userspace_addr: u64::try_from(base.as_ptr().addr()).unwrap_or(0),
            };
            // SAFETY: `host_address` vouches for `region.pages` pages at `base`, and `self` keeps
            // that mapping for as long as the VM exists. The regions do not overlap. The guest's
            // accesses go through vm-memory's volatile accesses and raw pointers on our side only.
            unsafe { self.fd.set_user_memory_region(slot) }.named("KVM_SET_USER_MEMORY_REGION")?;
        }
        Ok(())
    }

    fn enable(&self, cap: u32, arg: u64) -> Result<(), IoctlError> {
        let mut request = kvm_enable_cap {
            cap,
            ..Default::default()
        };
        request.args[0] = arg;
        self.fd.enable_cap(&request).named("KVM_ENABLE_CAP")
    }
}

/// A VM where an ioctl wants a descriptor.
pub(super) struct VmRef<'a>(pub(super) &'a Vm);

impl AsRawFd for VmRef<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.fd.as_raw_fd()
    }
}
