//! What a host can do, asked without changing anything: for `ferry doctor`.

use std::io;

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_GET_TSC_KHZ,
    KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_IRQCHIP, KVM_CAP_IRQFD, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_CAP_MAX_VCPUS, KVM_CAP_MP_STATE, KVM_CAP_NESTED_STATE, KVM_CAP_TSC_CONTROL,
    KVM_CAP_USER_MEMORY, KVM_CAP_VCPU_EVENTS, KVM_CAP_XSAVE2, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::state::offsets_work;

/// KVM's answers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)]
#[non_exhaustive]
pub struct KvmFacts {
    /// KVM_GET_API_VERSION; 12 on every Linux since 2.6.22.
    pub api_version: i32,
    /// Names of the capabilities that no guest can do without and that are missing.
    pub lacks: Vec<&'static str>,
    /// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
    pub manual_dirty_log: bool,
    /// Its second flag: all pages begin dirty, so enabling the log costs no write protection of
    /// everything.
    pub dirty_log_initially_set: bool,
    /// Entries of the largest dirty ring; 0 for none.
    pub dirty_ring_entries: u32,
    /// KVM_CAP_TSC_CONTROL.
    pub tsc_control: bool,
    /// Whether a guest's TSC can be set to what it was elsewhere (KVM_VCPU_TSC_OFFSET).
    pub tsc_offset: bool,
    /// The TSC's frequency in kHz that guests see by default; `None` where KVM cannot tell.
    pub tsc_khz: Option<u32>,
    /// KVM_CAP_XSAVE2: bytes of a processor's extended state; 0 where it is the classic 4 KiB.
    pub xsave_bytes: u32,
    /// KVM_CAP_NESTED_STATE: bytes of a nested hypervisor's state; 0 for none.
    pub nested_state_bytes: u32,
    /// KVM_CAP_MAX_VCPUS.
    pub max_vcpus: u32,
}

/// Why there are no answers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// The device cannot be opened.
    #[error("/dev/kvm cannot be opened ({0})")]
    Open(io::Error),
    /// A guest cannot be made or run.
    #[error("{call} failed ({cause})")]
    Call {
        /// The ioctl.
        call: &'static str,
        /// The kernel's reason.
        cause: io::Error,
    },
    /// It ran and did something else.
    #[error("a guest of two instructions ended with {0} instead of its output")]
    Odd(String),
}

fn call(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> ProbeError {
    move |e| ProbeError::Call {
        call,
        cause: io::Error::from_raw_os_error(e.errno()),
    }
}

fn open() -> Result<Kvm, ProbeError> {
    Kvm::new().map_err(|e| ProbeError::Open(io::Error::from_raw_os_error(e.errno())))
}

/// Asks KVM.
///
/// # Errors
/// [`ProbeError::Open`].
pub fn kvm() -> Result<KvmFacts, ProbeError> {
    let kvm = open()?;
    let number = |cap: u32| u32::try_from(kvm.check_extension_raw(cap.into())).unwrap_or(0);
    let needed = [
        (KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY"),
        (KVM_CAP_IRQCHIP, "KVM_CAP_IRQCHIP"),
        (KVM_CAP_IRQFD, "KVM_CAP_IRQFD"),
        (KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT"),
        (KVM_CAP_MP_STATE, "KVM_CAP_MP_STATE"),
        (KVM_CAP_VCPU_EVENTS, "KVM_CAP_VCPU_EVENTS"),
    ];
    let manual = number(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
    // The value of the ring's capability is its size in bytes, at 16 bytes an entry.
    let ring = number(KVM_CAP_DIRTY_LOG_RING).max(number(KVM_CAP_DIRTY_LOG_RING_ACQ_REL)) / 16;
    let tsc_khz = (number(KVM_CAP_GET_TSC_KHZ) > 0)
        .then(|| {
            kvm.create_vm()
                .and_then(|vm| vm.create_vcpu(0))
                .and_then(|cpu| cpu.get_tsc_khz())
                .ok()
        })
        .flatten();
    let vcpu = kvm.create_vm().and_then(|vm| vm.create_vcpu(0));
    let tsc_offset = vcpu.is_ok_and(|vcpu| offsets_work(&vcpu));
    Ok(KvmFacts {
        api_version: kvm.get_api_version(),
        lacks: needed
            .iter()
            .filter(|(cap, _)| number(*cap) == 0)
            .map(|(_, name)| *name)
            .collect(),
        manual_dirty_log: manual & 1 != 0,
        dirty_log_initially_set: manual & 2 != 0,
        dirty_ring_entries: ring,
        tsc_control: number(KVM_CAP_TSC_CONTROL) > 0,
        tsc_offset,
        tsc_khz,
        xsave_bytes: number(KVM_CAP_XSAVE2),
        nested_state_bytes: number(KVM_CAP_NESTED_STATE),
        max_vcpus: number(KVM_CAP_MAX_VCPUS),
    })
}

/// Where the test guest's only page is.
const PAGE: u64 = 0x1000;
/// `mov al, 0x42; out 0x10, al; hlt`, in real mode: runs on every kind of KVM.
const CODE: [u8; 5] = [0xb0, 0x42, 0xe6, 0x10, 0xf4];

/// Runs a guest of two instructions and sees it write to a port.
///
/// # Errors
/// [`ProbeError`].
pub fn run_instructions() -> Result<(), ProbeError> {
    let kvm = open()?;
    let vm = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(PAGE), 4096)])
        .map_err(|e| ProbeError::Odd(format!("no memory to run in ({e})")))?;
    memory
        .write_slice(&CODE, GuestAddress(PAGE))
        .map_err(|e| ProbeError::Odd(format!("no memory to run in ({e})")))?;
    let host = memory
        .get_host_address(GuestAddress(PAGE))
        .map_err(|e| ProbeError::Odd(format!("no memory to run in ({e})")))?;
    // Three pages that KVM on Intel processors needs for real mode; anywhere outside the guest's
    // memory. Others have no such call, so its failure decides nothing.
    let _ = vm.set_tss_address(0xfffb_d000);
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: PAGE,
        memory_size: 4096,
        userspace_addr: host as u64,
    };
    // SAFETY: the region is one page-aligned page that `memory` maps; `memory` is declared before
    // `cpu`, so it is unmapped after the last KVM_RUN, and nothing else uses it while the guest may
    // write to it.
    unsafe { vm.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
    let mut cpu = vm.create_vcpu(0).map_err(call("KVM_CREATE_VCPU"))?;
    let mut sregs = cpu.get_sregs().map_err(call("KVM_GET_SREGS"))?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    cpu.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
    let mut regs = cpu.get_regs().map_err(call("KVM_GET_REGS"))?;
    regs.rip = PAGE;
    // Bit 1 of RFLAGS is always set.
    regs.rflags = 2;
    cpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
    loop {
        match cpu.run() {
            Ok(VcpuExit::IoOut(0x10, [0x42])) => return Ok(()),
            Ok(other) => return Err(ProbeError::Odd(format!("{other:?}"))),
            Err(e) if e.errno() == libc::EINTR => {}
            Err(e) => return Err(call("KVM_RUN")(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_test_guest_runs_where_kvm_is() {
        if let Err(e) = open() {
            eprintln!("NOT RUN: {e}");
            return;
        }
        assert!(kvm().unwrap().max_vcpus > 0);
        run_instructions().unwrap();
    }
}
