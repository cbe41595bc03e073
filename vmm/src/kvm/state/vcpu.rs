//! One vCPU's state.

use kvm_bindings::{
    KVM_SREGS2_FLAGS_PDPTRS_VALID, KVMIO, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs,
    kvm_sregs, kvm_sregs2, kvm_vcpu_events, kvm_xcrs,
};
use serde::{Deserialize, Serialize};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

use super::msrs::IA32_TSC;
use super::xsave::LEGACY;
use super::{MAX_MSRS, MAX_XSAVE, RestoreError, SkippedMsr};
use crate::kvm::error::{IoctlError, Named};
use crate::kvm::vcpu::Vcpu;

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);

/// The fields of [`VcpuState`], by which a reader knows what a newer writer may require of it.
pub(crate) const VCPU_FIELDS: [&str; 11] = [
    "mp_state",
    "regs",
    "sregs",
    "pdptrs",
    "xsave",
    "xcrs",
    "debugregs",
    "msrs",
    "lapic",
    "events",
    "tsc_khz",
];

/// Everything that KVM knows about a stopped vCPU. Its CPUID is not in here: that belongs to the
/// machine's description, which the machine is built from before any state arrives. Nor is the
/// state of a nested hypervisor: ferry offers guests no VMX or SVM, so there is none.
#[derive(Clone, Serialize, Deserialize)]
pub struct VcpuState {
    pub(super) mp_state: kvm_mp_state,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    /// Only of a guest in 32-bit PAE paging.
    pub(super) pdptrs: Option<[u64; 4]>,
    #[serde(with = "serde_bytes")]
    pub(super) xsave: Vec<u8>,
    pub(super) xcrs: Option<kvm_xcrs>,
    pub(super) debugregs: Option<kvm_debugregs>,
    pub(super) msrs: Vec<(u32, u64)>,
    pub(super) lapic: kvm_lapic_state,
    pub(super) events: kvm_vcpu_events,
    pub(super) tsc_khz: Option<u32>,
}

impl VcpuState {
    /// Checks what a hostile sender could have made absurd, before any of it reaches KVM. KVM
    /// checks the values themselves.
    ///
    /// # Errors
    /// What is absurd, to complete the sentence "the state has …".
    pub fn check(&self) -> Result<(), &'static str> {
        if self.msrs.len() > MAX_MSRS {
            return Err("more MSRs than any CPU has");
        }
        let size = self.xsave.len();
        if !(LEGACY..=MAX_XSAVE).contains(&size) || !size.is_multiple_of(4) {
            return Err("vector registers of an impossible size");
        }
        Ok(())
    }

    /// The time stamp counter as the guest reads it, at the instant of the VM's clock.
    pub(super) fn tsc(&self) -> Option<u64> {
        self.msr(IA32_TSC)
    }

    pub(super) fn msr(&self, wanted: u32) -> Option<u64> {
        let found = self.msrs.iter().find(|(index, _)| *index == wanted);
        found.map(|(_, value)| *value)
    }

    pub(super) fn set_tsc(&mut self, value: u64) {
        for (_, tsc) in self.msrs.iter_mut().filter(|(index, _)| *index == IA32_TSC) {
            *tsc = value;
        }
    }

    /// RIP, for messages and tests.
    #[must_use]
    pub fn rip(&self) -> u64 {
        self.regs.rip
    }
}

#[cfg(test)]
impl VcpuState {
    /// One with another value in every field.
    pub(crate) fn sample() -> Self {
        use super::patterned;
        Self {
            mp_state: patterned(1),
            regs: patterned(2),
            sregs: patterned(3),
            pdptrs: Some([u64::MAX, 1 << 40, 3, 4]),
            xsave: (0..LEGACY).map(|at| at.to_le_bytes()[0] ^ 0xa5).collect(),
            xcrs: Some(patterned(4)),
            debugregs: Some(patterned(5)),
            msrs: vec![(0x10, u64::MAX), (0xc000_0080, 0xd01), (0x6e0, 0)],
            lapic: patterned(6),
            events: patterned(7),
            tsc_khz: Some(2_100_000),
        }
    }

    /// Each field by its name, as bytes that can be compared.
    pub(crate) fn fields(&self) -> Vec<(&'static str, Vec<u8>)> {
        use super::bytes;
        vec![
            ("mp_state", bytes(&self.mp_state)),
            ("regs", bytes(&self.regs)),
            ("sregs", bytes(&self.sregs)),
            ("pdptrs", bytes(&self.pdptrs)),
            ("xsave", self.xsave.clone()),
            ("xcrs", bytes(&self.xcrs)),
            ("debugregs", bytes(&self.debugregs)),
            ("msrs", bytes(&self.msrs)),
            ("lapic", bytes(&self.lapic)),
            ("events", bytes(&self.events)),
            ("tsc_khz", bytes(&self.tsc_khz)),
        ]
    }
}

impl std::fmt::Debug for VcpuState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuState")
            .field("mp_state", &self.mp_state)
            .field("regs", &self.regs)
            .field("msrs", &self.msrs.len())
            .field("xsave", &self.xsave.len())
            .finish_non_exhaustive()
    }
}

impl Vcpu {
    /// Reads the vCPU's state. The vCPU must be stopped with nothing pending ([`Vcpu::run`] said
    /// [`Interrupted`](crate::kvm::VmExit::Interrupted)).
    ///
    /// # Errors
    /// The kernel's.
    pub fn save(&self) -> Result<VcpuState, IoctlError> {
        let caps = self.vm().capabilities();
        let fd = self.fd();
        // First: reading it makes KVM act on an INIT or SIPI that waits, which changes most of the
        // registers below.
        let mp_state = fd.get_mp_state().named("KVM_GET_MP_STATE")?;
        let regs = fd.get_regs().named("KVM_GET_REGS")?;
        let sregs = fd.get_sregs().named("KVM_GET_SREGS")?;
        let pdptrs = if caps.sregs2 { self.pdptrs()? } else { None };
        let xsave = self.save_xsave()?;
        let xcrs = caps
            .xcrs
            .then(|| fd.get_xcrs())
            .transpose()
            .named("KVM_GET_XCRS")?;
        let debugregs = caps
            .debugregs
            .then(|| fd.get_debug_regs())
            .transpose()
            .named("KVM_GET_DEBUGREGS")?;
        // The MSRs before the local APIC: on hosts where a timer expires without the vCPU, its
        // deadline may run out right here. In this order the deadline and the interrupt may both be
        // in the state, and the guest gets one tick too many. The other way round neither may be,
        // and the guest waits for its next tick for ever.
        let msrs = self.save_msrs()?;
        let lapic = fd.get_lapic().named("KVM_GET_LAPIC")?;
        let tsc_khz = self.tsc_khz();
        // Last: pending exceptions and interrupts, which all of the above could still have changed.
        let events = fd.get_vcpu_events().named("KVM_GET_VCPU_EVENTS")?;
        Ok(VcpuState {
            mp_state,
            regs,
            sregs,
            pdptrs,
            xsave,
            xcrs,
            debugregs,
            msrs,
            lapic,
            events,
            tsc_khz,
        })
    }

    /// Writes a state that was saved elsewhere (and [checked](VcpuState::check)), but for its time
    /// stamp counter: see `restore_tsc`. Returns the MSRs that this KVM would
    /// not take.
    ///
    /// # Errors
    /// [`RestoreError`]; the vCPU's state is then a mixture, and it must not run.
    pub fn restore(&self, state: &VcpuState) -> Result<Vec<SkippedMsr>, RestoreError> {
        let vcpu = self.id();
        let error = |source| RestoreError::Vcpu { vcpu, source };
        if let Some(index) = super::msrs::first_unknown(&state.msrs) {
            return Err(RestoreError::UnknownMsr { vcpu, index });
        }
        let caps = self.vm().capabilities();
        let fd = self.fd();
        // CPUID was set when the vCPU was made; it decides which of the bits below are allowed.
        // The TSC's frequency before its value: changing it later would shift the value.
        if let (true, Some(khz)) = (caps.tsc_control, state.tsc_khz)
            && self.tsc_khz() != Some(khz)
        {
            fd.set_tsc_khz(khz)
                .named("KVM_SET_TSC_KHZ")
                .map_err(error)?;
        }
        fd.set_mp_state(state.mp_state)
            .named("KVM_SET_MP_STATE")
            .map_err(error)?;
        // Segments and control registers, with the APIC's base and mode: the local APIC's registers
        // are laid out by its mode, so its state comes after.
        fd.set_sregs(&state.sregs)
            .named("KVM_SET_SREGS")
            .map_err(error)?;
        // Without SREGS2, KVM has just loaded the PDPTRs from guest memory, where they still are
        // unless the guest changed them there without reloading CR3.
        if let (true, Some(pdptrs)) = (caps.sregs2, state.pdptrs) {
            self.set_pdptrs(&state.sregs, pdptrs).map_err(error)?;
        }
        // Before the events: it drops pending exceptions.
        fd.set_regs(&state.regs)
            .named("KVM_SET_REGS")
            .map_err(error)?;
        match &state.xcrs {
            Some(xcrs) if caps.xcrs => fd.set_xcrs(xcrs).named("KVM_SET_XCRS").map_err(error)?,
            Some(_) => return Err(RestoreError::Lacks("extended control registers (XCR0)")),
            None => {}
        }
        self.restore_xsave(&state.xsave)?;
        match &state.debugregs {
            Some(regs) if caps.debugregs => {
                fd.set_debug_regs(regs)
                    .named("KVM_SET_DEBUGREGS")
                    .map_err(error)?;
            }
            Some(_) => return Err(RestoreError::Lacks("debug registers")),
            None => {}
        }
        fd.set_lapic(&state.lapic)
            .named("KVM_SET_LAPIC")
            .map_err(error)?;
        let skipped = self.restore_msrs(&state.msrs).map_err(error)?;
        // Last, as it was read last.
        fd.set_vcpu_events(&state.events)
            .named("KVM_SET_VCPU_EVENTS")
            .map_err(error)?;
        self.clock_was_paused();
        Ok(skipped)
    }

    fn pdptrs(&self) -> Result<Option<[u64; 4]>, IoctlError> {
        let mut sregs = kvm_sregs2::default();
        // SAFETY: KVM writes a kvm_sregs2 at this address, which is what there is.
        let r = unsafe { ioctl_with_mut_ref(self.fd(), KVM_GET_SREGS2(), &mut sregs) };
        if r < 0 {
            return Err(IoctlError::last("KVM_GET_SREGS2"));
        }
        let valid = sregs.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0;
        Ok(valid.then_some(sregs.pdptrs))
    }

    fn set_pdptrs(&self, s: &kvm_sregs, pdptrs: [u64; 4]) -> Result<(), IoctlError> {
        let sregs = kvm_sregs2 {
            cs: s.cs,
            ds: s.ds,
            es: s.es,
            fs: s.fs,
            gs: s.gs,
            ss: s.ss,
            tr: s.tr,
            ldt: s.ldt,
            gdt: s.gdt,
            idt: s.idt,
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            cr8: s.cr8,
            efer: s.efer,
            apic_base: s.apic_base,
            flags: KVM_SREGS2_FLAGS_PDPTRS_VALID.into(),
            pdptrs,
        };
        // SAFETY: KVM reads a kvm_sregs2 at this address, which is what there is.
        if unsafe { ioctl_with_ref(self.fd(), KVM_SET_SREGS2(), &sregs) } < 0 {
            return Err(IoctlError::last("KVM_SET_SREGS2"));
        }
        Ok(())
    }
}
