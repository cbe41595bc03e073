//! KVM's part of state version 3: postcard, by position. Frozen; it goes when version
//! 5 comes.

use kvm_bindings::{
    kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_pit_state2,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use serde::{Deserialize, Serialize};

use super::{VcpuState, VmState};

/// [`VcpuState`].
#[derive(Serialize, Deserialize)]
pub(crate) struct VcpuV3 {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    pdptrs: Option<[u64; 4]>,
    xsave: Vec<u8>,
    xcrs: Option<kvm_xcrs>,
    debugregs: Option<kvm_debugregs>,
    msrs: Vec<(u32, u64)>,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    tsc_khz: Option<u32>,
}

/// [`VmState`].
#[derive(Serialize, Deserialize)]
pub(crate) struct VmV3 {
    pic_master: kvm_irqchip,
    pic_slave: kvm_irqchip,
    ioapic: kvm_irqchip,
    pit: Option<kvm_pit_state2>,
    clock: Option<kvm_clock_data>,
}

impl From<&VcpuState> for VcpuV3 {
    fn from(state: &VcpuState) -> Self {
        Self {
            mp_state: state.mp_state,
            regs: state.regs,
            sregs: state.sregs,
            pdptrs: state.pdptrs,
            xsave: state.xsave.clone(),
            xcrs: state.xcrs,
            debugregs: state.debugregs,
            msrs: state.msrs.clone(),
            lapic: state.lapic,
            events: state.events,
            tsc_khz: state.tsc_khz,
        }
    }
}

impl From<VcpuV3> for VcpuState {
    fn from(state: VcpuV3) -> Self {
        Self {
            mp_state: state.mp_state,
            regs: state.regs,
            sregs: state.sregs,
            pdptrs: state.pdptrs,
            xsave: state.xsave,
            xcrs: state.xcrs,
            debugregs: state.debugregs,
            msrs: state.msrs,
            lapic: state.lapic,
            events: state.events,
            tsc_khz: state.tsc_khz,
        }
    }
}

impl From<&VmState> for VmV3 {
    fn from(state: &VmState) -> Self {
        Self {
            pic_master: state.pic_master,
            pic_slave: state.pic_slave,
            ioapic: state.ioapic,
            pit: state.pit,
            clock: state.clock,
        }
    }
}

impl From<VmV3> for VmState {
    fn from(state: VmV3) -> Self {
        Self {
            pic_master: state.pic_master,
            pic_slave: state.pic_slave,
            ioapic: state.ioapic,
            pit: state.pit,
            clock: state.clock,
        }
    }
}
