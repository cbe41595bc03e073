//! What KVM keeps for the VM as a whole: interrupt controllers, timer, clock.

use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use serde::{Deserialize, Serialize};

use super::RestoreError;
use crate::kvm::error::{IoctlError, Named};
use crate::kvm::vm::Vm;

/// State of the interrupt controllers, of the timer and of the paravirtual clock.
#[derive(Clone, Serialize, Deserialize)]
pub struct VmState {
    pub(super) pic_master: kvm_irqchip,
    pub(super) pic_slave: kvm_irqchip,
    pub(super) ioapic: kvm_irqchip,
    pub(super) pit: Option<kvm_pit_state2>,
    pub(super) clock: Option<kvm_clock_data>,
}

impl VmState {
    /// The paravirtual clock goes on from where it stood, and not from where it would stand by now.
    pub(crate) fn stop_clock(&mut self) {
        if let Some(clock) = &mut self.clock {
            clock.flags &= !KVM_CLOCK_REALTIME;
        }
    }
}

#[cfg(test)]
impl VmState {
    /// One with another value in every field.
    pub(crate) fn sample() -> Self {
        use super::patterned;
        Self {
            pic_master: patterned(8),
            pic_slave: patterned(9),
            ioapic: patterned(10),
            pit: Some(patterned(11)),
            clock: Some(patterned(12)),
        }
    }

    /// Each field by its name, as bytes that can be compared.
    pub(crate) fn fields(&self) -> Vec<(&'static str, Vec<u8>)> {
        use super::bytes;
        vec![
            ("pic_master", bytes(&self.pic_master)),
            ("pic_slave", bytes(&self.pic_slave)),
            ("ioapic", bytes(&self.ioapic)),
            ("pit", bytes(&self.pit)),
            ("clock", bytes(&self.clock)),
        ]
    }
}

impl std::fmt::Debug for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmState")
            .field("clock", &self.clock)
            .finish_non_exhaustive()
    }
}

impl Vm {
    /// Reads the state; all vCPUs must be stopped.
    ///
    /// # Errors
    /// The kernel's.
    pub fn save(&self) -> Result<VmState, IoctlError> {
        let caps = self.capabilities();
        // The clock first: where it carries the wall-clock time, the destination adds what passed
        // since, and where it does not, every microsecond here is one that the guest's clock has
        // seen.
        let clock = self.clock()?.map(with_realtime);
        // The timer before the controllers it interrupts, so that an edge on its way is seen in
        // one.
        let pit = caps
            .pit2
            .then(|| self.fd().get_pit2())
            .transpose()
            .named("KVM_GET_PIT2")?;
        Ok(VmState {
            pic_master: self.irqchip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: self.irqchip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: self.irqchip(KVM_IRQCHIP_IOAPIC)?,
            pit,
            clock,
        })
    }

    /// Writes a state that was saved elsewhere; the vCPUs' states must be in already.
    ///
    /// # Errors
    /// [`RestoreError`]; the machine must then not run.
    pub fn restore(&self, state: &VmState) -> Result<(), RestoreError> {
        let caps = self.capabilities();
        for (which, chip) in [
            (KVM_IRQCHIP_PIC_MASTER, &state.pic_master),
            (KVM_IRQCHIP_PIC_SLAVE, &state.pic_slave),
            (KVM_IRQCHIP_IOAPIC, &state.ioapic),
        ] {
            // The field says which chip the bytes are of: ours, not the sender's, decides.
            let chip = kvm_irqchip {
                chip_id: which,
                ..*chip
            };
            self.fd().set_irqchip(&chip).named("KVM_SET_IRQCHIP")?;
        }
        match &state.pit {
            Some(pit) if caps.pit2 => self.fd().set_pit2(pit).named("KVM_SET_PIT2")?,
            Some(_) => return Err(RestoreError::Lacks("a timer in the kernel (PIT)")),
            None => {}
        }
        if let (Some(saved), true) = (&state.clock, caps.adjust_clock != 0) {
            // With KVM_CLOCK_REALTIME, KVM adds the time that passed since; ferry does, where KVM
            // cannot. All other flags are output only, and older kernels refuse any they do not
            // know.
            let counts = saved.flags & KVM_CLOCK_REALTIME;
            let flags = counts & caps.adjust_clock;
            let passed = match counts != 0 && flags == 0 {
                true => realtime_ns().saturating_sub(saved.realtime),
                false => 0,
            };
            let clock = kvm_clock_data {
                clock: saved.clock.wrapping_add(passed),
                realtime: if flags == 0 { 0 } else { saved.realtime },
                flags,
                ..Default::default()
            };
            self.fd().set_clock(&clock).named("KVM_SET_CLOCK")?;
        }
        Ok(())
    }

    /// KVM_GET_CLOCK, where there is one.
    pub(super) fn clock(&self) -> Result<Option<kvm_clock_data>, IoctlError> {
        let there = self.capabilities().adjust_clock != 0;
        let clock = there.then(|| self.fd().get_clock());
        clock.transpose().named("KVM_GET_CLOCK")
    }

    pub(in crate::kvm) fn irqchip(&self, chip_id: u32) -> Result<kvm_irqchip, IoctlError> {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        self.fd().get_irqchip(&mut chip).named("KVM_GET_IRQCHIP")?;
        Ok(chip)
    }
}

/// A reading of the clock that was made just now, with the wall-clock time also where KVM did not
/// tell it (before Linux 5.16, or where the host's clock source is not the TSC).
fn with_realtime(mut clock: kvm_clock_data) -> kvm_clock_data {
    if clock.flags & KVM_CLOCK_REALTIME == 0 {
        clock.flags |= KVM_CLOCK_REALTIME;
        clock.realtime = realtime_ns();
    }
    clock
}

/// CLOCK_REALTIME of this host, in nanoseconds.
fn realtime_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::Host;
    use crate::memory::GuestRam;
    use std::sync::Arc;

    /// A snapshot's clock stands still while the file lies there; a migration's counts the pause.
    #[test]
    fn a_stopped_clock_goes_on_from_where_it_stood() {
        let Ok(host) = Host::open() else {
            eprintln!("NOT RUN: a_stopped_clock_goes_on_from_where_it_stood: no KVM");
            return;
        };
        let ram = Arc::new(GuestRam::new(1 << 20, crate::memory::Backing::Small).unwrap());
        let vm = Vm::new(&host, ram).unwrap();
        let mut state = vm.save().unwrap();
        let Some(clock) = &mut state.clock else {
            eprintln!("NOT RUN: a_stopped_clock_goes_on_from_where_it_stood: KVM has no clock");
            return;
        };
        // Saved an hour ago, on a host that tells the time.
        const HOUR: u64 = 3600 * 1_000_000_000;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now = u64::try_from(now.unwrap().as_nanos()).unwrap();
        (clock.flags, clock.realtime) = (KVM_CLOCK_REALTIME, now - HOUR);
        let saved = clock.clock;
        let restored = |state: &VmState| {
            vm.restore(state).unwrap();
            vm.save().unwrap().clock.unwrap().clock - saved
        };
        // By KVM, or by ferry where KVM cannot.
        let passed = restored(&state);
        assert!((HOUR..HOUR + HOUR / 2).contains(&passed), "{passed} ns");
        state.stop_clock();
        assert!(restored(&state) < HOUR / 2);
    }
}
