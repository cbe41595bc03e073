//! The host's KVM: opening it, and what it can do.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use kvm_bindings::{
    KVM_CAP_ADJUST_CLOCK, KVM_CAP_DEBUGREGS, KVM_CAP_DIRTY_LOG_RING,
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_GET_TSC_KHZ,
    KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_IOEVENTFD, KVM_CAP_IRQCHIP, KVM_CAP_IRQFD,
    KVM_CAP_KVMCLOCK_CTRL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_MAX_VCPUS, KVM_CAP_MP_STATE,
    KVM_CAP_NESTED_STATE, KVM_CAP_NR_MEMSLOTS, KVM_CAP_PIT_STATE2, KVM_CAP_PIT2,
    KVM_CAP_SET_IDENTITY_MAP_ADDR, KVM_CAP_SET_TSS_ADDR, KVM_CAP_SREGS2, KVM_CAP_TSC_CONTROL,
    KVM_CAP_TSC_DEADLINE_TIMER, KVM_CAP_USER_MEMORY, KVM_CAP_VCPU_EVENTS, KVM_CAP_XCRS,
    KVM_CAP_XSAVE, KVM_CAP_XSAVE2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MAX_CPUID_ENTRIES,
    Msrs, kvm_msr_entry,
};
use kvm_ioctls::Kvm;
use serde::Serialize;

use super::cpuid::{self, CpuidEntry};
use super::dirty_ring::{self, ENTRY_BYTES};
use super::error::{IoctlError, Named};
use super::state::IA32_ARCH_CAPABILITIES;

/// The only version of the KVM API there is.
const API_VERSION: i32 = 12;

/// Why the host's KVM cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is no such device.
    #[error(
        "{path} does not exist: load the host's KVM module (kvm_intel or kvm_amd), or turn virtualisation on in its firmware"
    )]
    Missing {
        /// The device.
        path: PathBuf,
    },
    /// The user may not open it.
    #[error(
        "{path} may not be opened by this user: add the user to the group that owns it (often `kvm`), or run as root"
    )]
    Permission {
        /// The device.
        path: PathBuf,
    },
    /// It could not be opened for another reason.
    #[error("{path} could not be opened: {source}")]
    Open {
        /// The device.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Another API, or not KVM at all.
    #[error(
        "{path} speaks version {version} of the KVM API, but ferry needs version 12: use a current kernel"
    )]
    ApiVersion {
        /// The device.
        path: PathBuf,
        /// What it says.
        version: i32,
    },
    /// Something that no machine can do without is missing.
    #[error("this host's KVM lacks {0}, which ferry cannot do without: use a newer kernel")]
    Lacks(&'static str),
}

/// What this host's KVM can do, asked by `KVM_CHECK_EXTENSION`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[allow(clippy::struct_excessive_bools)]
#[non_exhaustive]
pub struct Capabilities {
    /// KVM_CAP_SET_TSS_ADDR.
    pub set_tss_addr: bool,
    /// KVM_CAP_SET_IDENTITY_MAP_ADDR.
    pub set_identity_map_addr: bool,
    /// KVM_CAP_PIT2 and KVM_CAP_PIT_STATE2: a timer in the kernel whose state can be carried.
    pub pit2: bool,
    /// KVM_CAP_IOEVENTFD.
    pub ioeventfd: bool,
    /// KVM_CAP_XSAVE.
    pub xsave: bool,
    /// KVM_CAP_XSAVE2: size of the area in bytes; 0 where there is only the 4 KiB one.
    pub xsave2_size: usize,
    /// KVM_CAP_XCRS.
    pub xcrs: bool,
    /// KVM_CAP_DEBUGREGS.
    pub debugregs: bool,
    /// KVM_CAP_SREGS2: PDPTRs travel too.
    pub sregs2: bool,
    /// KVM_CAP_GET_TSC_KHZ.
    pub get_tsc_khz: bool,
    /// KVM_CAP_TSC_CONTROL: the guest's TSC can run at another frequency than the host's.
    pub tsc_control: bool,
    /// KVM_CAP_TSC_DEADLINE_TIMER.
    pub tsc_deadline_timer: bool,
    /// KVM_CAP_ADJUST_CLOCK: the flags that KVM_GET_CLOCK and KVM_SET_CLOCK know.
    pub adjust_clock: u32,
    /// KVM_CAP_KVMCLOCK_CTRL: the guest can be told that it was paused.
    pub kvmclock_ctrl: bool,
    /// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: its flags; 0 where there is only the plain log.
    pub manual_dirty_log_protect: u32,
    /// Entries that a dirty ring can have (KVM_CAP_DIRTY_LOG_RING or _ACQ_REL); 0 for none.
    pub dirty_ring_entries: u32,
    /// KVM_CAP_DIRTY_LOG_RING_ACQ_REL.
    pub dirty_ring_acq_rel: bool,
    /// KVM_CAP_NESTED_STATE: size of the state of a nested hypervisor; 0 for none.
    pub nested_state_size: u32,
    /// KVM_CAP_EXIT_ON_EMULATION_FAILURE.
    pub exit_on_emulation_failure: bool,
    /// KVM_CAP_MAX_VCPUS.
    pub max_vcpus: u32,
    /// KVM_CAP_NR_MEMSLOTS.
    pub memory_slots: u32,
}

/// An open KVM.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
    caps: Capabilities,
}

impl Host {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// [`OpenError`]: it is missing, closed to this user, or not a KVM that ferry can use.
    pub fn open() -> Result<Self, OpenError> {
        Self::open_at(Path::new("/dev/kvm"))
    }

    /// Opens the KVM device at `path`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_at(path: &Path) -> Result<Self, OpenError> {
        let path_buf = || path.to_owned();
        let c_path = CString::new(path.as_os_str().as_bytes()).map_err(|e| OpenError::Open {
            path: path_buf(),
            source: e.into(),
        })?;
        let kvm = Kvm::new_with_path(c_path).map_err(|e| match e.errno() {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => OpenError::Missing { path: path_buf() },
            libc::EACCES | libc::EPERM => OpenError::Permission { path: path_buf() },
            n => OpenError::Open {
                path: path_buf(),
                source: io::Error::from_raw_os_error(n),
            },
        })?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(OpenError::ApiVersion {
                path: path_buf(),
                version,
            });
        }
        for (cap, name) in [
            (KVM_CAP_USER_MEMORY, "memory slots (KVM_CAP_USER_MEMORY)"),
            (
                KVM_CAP_IRQCHIP,
                "an interrupt controller in the kernel (KVM_CAP_IRQCHIP)",
            ),
            (KVM_CAP_IRQFD, "interrupts by eventfd (KVM_CAP_IRQFD)"),
            (
                KVM_CAP_IMMEDIATE_EXIT,
                "a way to stop a vCPU without a race (KVM_CAP_IMMEDIATE_EXIT)",
            ),
            (KVM_CAP_MP_STATE, "the vCPU's run state (KVM_CAP_MP_STATE)"),
            (
                KVM_CAP_VCPU_EVENTS,
                "the vCPU's pending events (KVM_CAP_VCPU_EVENTS)",
            ),
        ] {
            if kvm.check_extension_raw(cap.into()) <= 0 {
                return Err(OpenError::Lacks(name));
            }
        }
        let caps = Capabilities::ask(&kvm);
        Ok(Self { kvm, caps })
    }

    /// What this KVM can do.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        &self.caps
    }

    /// Whether KVM can report dirty pages by rings.
    #[must_use]
    pub fn has_dirty_rings(&self) -> bool {
        self.caps.dirty_ring_entries > 0
    }

    /// Whether rings are the better choice here: see [`DirtyLog`](super::DirtyLog).
    #[must_use]
    pub fn prefers_dirty_rings(&self) -> bool {
        self.caps.manual_dirty_log_protect & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0
            && self.has_dirty_rings()
    }

    /// How many entries the ring of each of so many vCPUs should have.
    #[must_use]
    pub fn dirty_ring_entries(&self, cpus: u32) -> u32 {
        dirty_ring::default_entries(self.caps.dirty_ring_entries, cpus)
    }

    /// KVM_GET_SUPPORTED_CPUID: the CPU features that this host can give to a guest.
    ///
    /// # Errors
    /// The kernel's.
    pub fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, IoctlError> {
        let cpuid = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .named("KVM_GET_SUPPORTED_CPUID")?;
        Ok(cpuid.as_slice().iter().map(CpuidEntry::from).collect())
    }

    /// IA32_ARCH_CAPABILITIES that a guest with this CPU reads; `None` where it has no such
    /// register. Asked of a vCPU: what KVM tells of itself (KVM_CAP_GET_MSR_FEATURES) is more than
    /// some give.
    #[must_use]
    pub fn arch_capabilities(&self, cpuid: &[CpuidEntry]) -> Option<u64> {
        let vm = self.kvm.create_vm().ok()?;
        let vcpu = vm.create_vcpu(0).ok()?;
        vcpu.set_cpuid2(&cpuid::for_vcpu(cpuid, 0, 1)?).ok()?;
        let entry = kvm_msr_entry {
            index: IA32_ARCH_CAPABILITIES,
            ..Default::default()
        };
        let mut msrs = Msrs::from_entries(&[entry]).ok()?;
        let read = vcpu.get_msrs(&mut msrs).ok()?;
        msrs.as_slice()[..read.min(1)].first().map(|e| e.data)
    }

    /// The CPUID that a new guest on this host is given: what the host supports, less what cannot
    /// be migrated. The same for all vCPUs; see [`CpuidEntry`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn guest_cpuid(&self) -> Result<Vec<CpuidEntry>, IoctlError> {
        Ok(cpuid::for_guest(
            self.supported_cpuid()?,
            self.caps.tsc_deadline_timer,
        ))
    }

    /// Pretends that the KVM has not got these flags of its dirty log.
    #[cfg(test)]
    pub(super) fn hide_dirty_log_flags(&mut self, flags: u32) {
        self.caps.manual_dirty_log_protect &= !flags;
    }

    pub(super) fn kvm(&self) -> &Kvm {
        &self.kvm
    }
}

impl Capabilities {
    fn ask(kvm: &Kvm) -> Self {
        let number = |cap: u32| u32::try_from(kvm.check_extension_raw(cap.into())).unwrap_or(0);
        let has = |cap: u32| number(cap) > 0;
        Self {
            set_tss_addr: has(KVM_CAP_SET_TSS_ADDR),
            set_identity_map_addr: has(KVM_CAP_SET_IDENTITY_MAP_ADDR),
            pit2: has(KVM_CAP_PIT2) && has(KVM_CAP_PIT_STATE2),
            ioeventfd: has(KVM_CAP_IOEVENTFD),
            xsave: has(KVM_CAP_XSAVE),
            xsave2_size: usize::try_from(number(KVM_CAP_XSAVE2)).unwrap_or(0),
            xcrs: has(KVM_CAP_XCRS),
            debugregs: has(KVM_CAP_DEBUGREGS),
            sregs2: has(KVM_CAP_SREGS2),
            get_tsc_khz: has(KVM_CAP_GET_TSC_KHZ),
            tsc_control: has(KVM_CAP_TSC_CONTROL),
            tsc_deadline_timer: has(KVM_CAP_TSC_DEADLINE_TIMER),
            adjust_clock: number(KVM_CAP_ADJUST_CLOCK),
            kvmclock_ctrl: has(KVM_CAP_KVMCLOCK_CTRL),
            manual_dirty_log_protect: number(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2),
            // The capability's value is the size of the ring in bytes.
            dirty_ring_entries: number(KVM_CAP_DIRTY_LOG_RING)
                .max(number(KVM_CAP_DIRTY_LOG_RING_ACQ_REL))
                / ENTRY_BYTES,
            dirty_ring_acq_rel: has(KVM_CAP_DIRTY_LOG_RING_ACQ_REL),
            nested_state_size: number(KVM_CAP_NESTED_STATE),
            exit_on_emulation_failure: has(KVM_CAP_EXIT_ON_EMULATION_FAILURE),
            max_vcpus: number(KVM_CAP_MAX_VCPUS),
            memory_slots: number(KVM_CAP_NR_MEMSLOTS),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_kvm_is_refused_with_a_sentence() {
        let missing = Host::open_at(Path::new("/nonexistent/kvm")).unwrap_err();
        assert!(matches!(missing, OpenError::Missing { .. }), "{missing}");
        let other = Host::open_at(Path::new("/dev/null")).unwrap_err();
        assert!(
            matches!(other, OpenError::ApiVersion { version: -1, .. }),
            "{other}"
        );
    }
}
