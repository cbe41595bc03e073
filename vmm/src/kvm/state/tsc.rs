//! The guest's time stamp counter across a move, by Linux's
//! `Documentation/virt/kvm/devices/vcpu.rst`, section 4.1.
//!
//! ```text
//!  guest's TSC of vCPU i = S + offset[i]     S: the host's TSC, scaled to the guest's frequency
//! ```
//!
//! A saved TSC is that of the instant at which the VM's clock was read, S + offset[i], on all vCPUs.
//! At the destination the clock is set first, and says by how much it has gone on since: by the time
//! of the move, or by nothing where it stood still (a snapshot). The TSC goes on by the same time:
//!
//! ```text
//!  offset[i] = saved[i] + ticks(clock here - saved clock) - S here
//! ```
//!
//! So what passed is in either exactly once, and vCPUs that had one offset have one again. S is what
//! KVM_GET_CLOCK tells; where the TSC is scaled, or KVM does not tell, it is measured by a reading of
//! the first vCPU's TSC between two of the clock. A KVM without offsets (KVM_VCPU_TSC_OFFSET, Linux
//! 5.16) gets the value itself, and guesses which vCPUs belong together. IA32_TSC_ADJUST counts what
//! the guest wrote, and neither way changes it. The deadline is a value of the guest's TSC and stays.

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Msrs, kvm_clock_data,
    kvm_device_attr, kvm_msr_entry,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::msrs::{IA32_TSC, IA32_TSC_DEADLINE};
use super::{RestoreError, SkippedMsr, VcpuState, VmState};
use crate::kvm::error::IoctlError;
use crate::kvm::vcpu::Vcpu;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kvm_device_attr);

/// An instant here, seen by a VM whose clock is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moment {
    /// How far the VM's clock has gone on since it was saved, in nanoseconds.
    since_ns: u64,
    /// What the offsets are added to; `None` where KVM has no offsets.
    scaled: Option<u64>,
}

impl Moment {
    /// What the TSC that was saved is by now.
    fn tsc(&self, saved: u64, khz: u32) -> u64 {
        saved.wrapping_add(ticks(self.since_ns, khz))
    }
}

/// Ticks of a TSC in so many nanoseconds. KVM's counter wraps, and so does this.
fn ticks(ns: u64, khz: u32) -> u64 {
    let ticks = u128::from(ns) * u128::from(khz) / 1_000_000;
    u64::try_from(ticks & u128::from(u64::MAX)).unwrap_or(0)
}

/// S at the instant of `clock`, by the first vCPU's TSC that was read between two readings of the
/// clock, `before` and `after`.
fn measured(clock: u64, (before, after): (u64, u64), tsc: u64, offset: u64, khz: u32) -> u64 {
    let read_at = before + after.saturating_sub(before) / 2;
    let since = ticks(read_at.saturating_sub(clock), khz);
    tsc.wrapping_sub(offset).wrapping_sub(since)
}

impl Vcpu {
    /// S at the instant of the clock in a saved state, by this first vCPU, for
    /// [`note_tsc`](Self::note_tsc). Where there is none, TSCs stay as they were read, within the
    /// same pause.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn scaled_tsc_at(&self, vm: &VmState) -> Result<Option<u64>, IoctlError> {
        match &vm.clock {
            Some(clock) => self.scaled_tsc(clock),
            None => Ok(None),
        }
    }

    /// Notes the TSC in a saved state as of the instant at which S was `scaled`.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn note_tsc(&self, state: &mut VcpuState, scaled: u64) -> Result<(), IoctlError> {
        if let Some(offset) = self.tsc_offset()? {
            state.set_tsc(scaled.wrapping_add(offset));
        }
        Ok(())
    }

    /// Now, by this first vCPU of a VM whose clock has just been restored from `saved`.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn moment(&self, saved: &VmState) -> Result<Moment, IoctlError> {
        let (now, saved) = match (self.vm().clock()?, &saved.clock) {
            (Some(now), Some(saved)) => (now, saved),
            _ => {
                return Ok(Moment {
                    since_ns: 0,
                    scaled: None,
                });
            }
        };
        Ok(Moment {
            since_ns: now.clock.saturating_sub(saved.clock),
            scaled: self.scaled_tsc(&now)?,
        })
    }

    /// Has the guest's TSC go on from a saved state, and arms its deadline: that is compared with
    /// the TSC at once. The vCPU's other state must be in, the local APIC's mode above all. Returns
    /// what this KVM would not take.
    ///
    /// # Errors
    /// [`RestoreError`]; the vCPU must then not run.
    pub(crate) fn restore_tsc(
        &self,
        state: &VcpuState,
        moment: &Moment,
    ) -> Result<Vec<SkippedMsr>, RestoreError> {
        let vcpu = self.id();
        let error = |source| RestoreError::Vcpu { vcpu, source };
        let khz = state.tsc_khz.or_else(|| self.tsc_khz()).unwrap_or(0);
        let tsc = state.tsc().map(|saved| moment.tsc(saved, khz));
        let mut left = tsc.map(|tsc| (IA32_TSC, tsc));
        if let (Some(tsc), Some(scaled)) = (tsc, moment.scaled) {
            let offset = tsc.wrapping_sub(scaled);
            self.set_tsc_offset(offset).map_err(error)?;
            left = None;
        }
        let deadline = state.msr(IA32_TSC_DEADLINE);
        let deadline = deadline.map(|deadline| (IA32_TSC_DEADLINE, deadline));
        let written = left.into_iter().chain(deadline);
        self.write_msrs(written).map_err(error)
    }

    /// S at the instant of a reading of the clock; `None` where KVM has no offsets.
    fn scaled_tsc(&self, clock: &kvm_clock_data) -> Result<Option<u64>, IoctlError> {
        let (Some(offset), Some(khz)) = (self.tsc_offset()?, self.tsc_khz()) else {
            return Ok(None);
        };
        if clock.flags & KVM_CLOCK_HOST_TSC != 0 && self.host_tsc_khz() == Some(khz) {
            return Ok(Some(clock.host_tsc));
        }
        let Some(before) = self.vm().clock()? else {
            return Ok(None);
        };
        let tsc = self.read_msrs(&[IA32_TSC])?;
        let (Some((_, tsc)), Some(after)) = (tsc.first(), self.vm().clock()?) else {
            return Ok(None);
        };
        let between = (before.clock, after.clock);
        Ok(Some(measured(clock.clock, between, *tsc, offset, khz)))
    }

    fn tsc_offset(&self) -> Result<Option<u64>, IoctlError> {
        offset(self.fd())
    }

    fn set_tsc_offset(&self, value: u64) -> Result<(), IoctlError> {
        set_offset(self.fd(), value)
    }
}

/// Whether an offset changes what the guest reads: a software KVM takes one and lets the guest read
/// the host's own counter. Of a vCPU that no guest uses.
pub(in crate::kvm) fn offsets_work(vcpu: &VcpuFd) -> bool {
    /// An hour or so.
    const FAR: u64 = 1 << 43;
    let tsc = || {
        let entry = kvm_msr_entry {
            index: IA32_TSC,
            ..Default::default()
        };
        let mut msrs = Msrs::from_entries(&[entry]).ok()?;
        let read = vcpu.get_msrs(&mut msrs).ok()?;
        (read == 1).then(|| msrs.as_slice()[0].data)
    };
    let moved = || {
        let (before, value) = (tsc()?, offset(vcpu).ok()??);
        set_offset(vcpu, value.wrapping_add(FAR)).ok()?;
        let after = tsc()?;
        set_offset(vcpu, value).ok()?;
        Some(after.wrapping_sub(before) >= FAR)
    };
    moved().unwrap_or(false)
}

/// KVM_VCPU_TSC_OFFSET, where there is one.
fn offset(vcpu: &VcpuFd) -> Result<Option<u64>, IoctlError> {
    let mut offset = 0u64;
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: KVM reads the attribute, and not what its address points to.
    if unsafe { ioctl_with_ref(vcpu, KVM_HAS_DEVICE_ATTR(), &attribute) } < 0 {
        return Ok(None);
    }
    // SAFETY: KVM writes a u64 to the attribute's address, which is that of one that lives through
    // the call.
    if unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) } < 0 {
        return Err(IoctlError::last(
            "KVM_GET_DEVICE_ATTR (KVM_VCPU_TSC_OFFSET)",
        ));
    }
    Ok(Some(offset))
}

fn set_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), IoctlError> {
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: KVM reads a u64 from the attribute's address, which is that of one that lives through
    // the call.
    if unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) } < 0 {
        return Err(IoctlError::last(
            "KVM_SET_DEVICE_ATTR (KVM_VCPU_TSC_OFFSET)",
        ));
    }
    Ok(())
}

fn tsc_attribute(offset: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: u64::try_from(offset.expose_provenance()).unwrap_or(0),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::kvm::{Host, Vm};
    use crate::memory::{Backing, GuestRam};

    /// A host as KVM has it, without rounding but of time itself: its TSC and its clock at an
    /// instant of the world, in nanoseconds.
    #[derive(Debug, Clone, Copy)]
    struct Simulated {
        /// The TSC, scaled to the guest's frequency, when the world began.
        base: u64,
        /// The VM's clock then.
        clock: u64,
    }

    impl Simulated {
        fn scaled(&self, at: u64, khz: u32) -> u64 {
            let passed = u128::from(at) * u128::from(khz) / 1_000_000;
            let mask = u128::from(u64::MAX);
            u64::try_from((u128::from(self.base) + passed) & mask).unwrap()
        }
    }

    fn hosts() -> impl Strategy<Value = Vec<(Simulated, u64, u64, bool)>> {
        // Each stay: the host, how long the guest runs there, how long the move takes, and whether
        // the clock counts that.
        let simulated = (any::<u64>(), 0..1u64 << 50);
        let simulated = simulated.prop_map(|(base, clock)| Simulated { base, clock });
        let stay = (simulated, 0..1u64 << 42, 0..1u64 << 40, any::<bool>());
        prop::collection::vec(stay, 2..21)
    }

    proptest! {
        #[test]
        fn ticks_are_those_of_long_division(ns: u64, khz: u32) {
            let exact = u128::from(ns) * u128::from(khz);
            let ticks = u128::from(ticks(ns, khz));
            let wrapped = (exact / 1_000_000) % (1 << 64);
            prop_assert_eq!(ticks, wrapped);
        }

        /// After any moves the guest's TSC has counted the time that it ran and the moves that its
        /// clock counts, each once, to a tick for each step; and processors stay as far apart as
        /// they were.
        #[test]
        fn what_passes_is_counted_once(stays in hosts(), start: u64, apart: u64, khz in 1u32..6_000_000) {
            let mut at = 0u64;
            let (first, ..) = stays[0];
            let mut offsets = [start, start.wrapping_add(apart)].map(|tsc| tsc.wrapping_sub(first.scaled(0, khz)));
            let mut guest_ns = 0u128;
            let mut here = first;
            // What the guest's clock shows here beside the host's.
            let mut shift = 0u64;
            for (next, ran, moved, counts) in stays.iter().skip(1).copied() {
                at += ran;
                guest_ns += u128::from(ran);
                let saved_clock = here.clock.wrapping_add(at).wrapping_add(shift);
                let saved = offsets.map(|offset| here.scaled(at, khz).wrapping_add(offset));
                at += moved;
                let since_ns = if counts { moved } else { 0 };
                guest_ns += u128::from(since_ns);
                // KVM_SET_CLOCK.
                shift = saved_clock.wrapping_add(since_ns).wrapping_sub(next.clock.wrapping_add(at));
                let moment = Moment { since_ns, scaled: Some(next.scaled(at, khz)) };
                offsets = saved.map(|saved| moment.tsc(saved, khz).wrapping_sub(next.scaled(at, khz)));
                prop_assert_eq!(offsets[1].wrapping_sub(offsets[0]), apart);
                here = next;
            }
            let exact = guest_ns * u128::from(khz) / 1_000_000;
            let exact = u64::try_from(exact & u128::from(u64::MAX)).unwrap();
            let tsc = here.scaled(at, khz).wrapping_add(offsets[0]);
            let drift = tsc.wrapping_sub(start).wrapping_sub(exact).cast_signed();
            prop_assert!(drift.unsigned_abs() <= 3 * stays.len() as u64, "{} ticks", drift);
        }

        /// A measured S is the real one, to the time between the two readings of the clock.
        #[test]
        fn a_measured_counter_is_known_to_the_time_of_reading(
            host in (any::<u64>(), any::<u64>()), offset: u64, khz in 1u32..6_000_000,
            noted in 0..1u64 << 50, late in 0..1u64 << 30, took in 0..1u64 << 20, part in 0..=1u64 << 20,
        ) {
            let simulated = Simulated { base: host.0, clock: 0 };
            let read = noted + late + took.min(part);
            let tsc = simulated.scaled(read, khz).wrapping_add(offset);
            let between = (noted + late, noted + late + took);
            let found = measured(noted, between, tsc, offset, khz);
            let off = found.wrapping_sub(simulated.scaled(noted, khz)).cast_signed();
            prop_assert!(off.unsigned_abs() <= ticks(took, khz) + 2, "{} ticks", off);
        }
    }

    /// Two vCPUs, which have one offset, in a VM of their own.
    fn pair(host: &Host) -> (Arc<Vm>, Vec<Vcpu>) {
        let ram = Arc::new(GuestRam::new(1 << 20, Backing::Small).unwrap());
        let vm = Arc::new(Vm::new(host, ram).unwrap());
        let cpuid = host.guest_cpuid().unwrap();
        let vcpus = (0..2).map(|id| vm.create_vcpu(id, 2, &cpuid).unwrap());
        let vcpus = vcpus.collect();
        (vm, vcpus)
    }

    /// The real KVM, whichever it is: a TSC goes on by what the clock goes on by.
    #[test]
    fn a_restored_counter_goes_on_with_the_clock() {
        /// Long beside what the ioctls take on a busy machine.
        const AWAY: Duration = Duration::from_secs(2);
        let Ok(host) = Host::open() else {
            eprintln!("NOT RUN: a_restored_counter_goes_on_with_the_clock: no KVM");
            return;
        };
        let (vm, vcpus) = pair(&host);
        let (Some(khz), true) = (vcpus[0].tsc_khz(), host.capabilities().adjust_clock != 0) else {
            eprintln!("NOT RUN: a_restored_counter_goes_on_with_the_clock: KVM has no clock");
            return;
        };
        let clock = vm.save().unwrap();
        let mut states: Vec<_> = vcpus.iter().map(|vcpu| vcpu.save().unwrap()).collect();
        let scaled = vcpus[0].scaled_tsc_at(&clock).unwrap();
        eprintln!("offsets of the TSC: {}", scaled.is_some());
        for (vcpu, state) in vcpus.iter().zip(&mut states) {
            if let Some(scaled) = scaled {
                vcpu.note_tsc(state, scaled).unwrap();
            }
        }
        if scaled.is_some() {
            assert_eq!(states[0].tsc(), states[1].tsc(), "one instant");
        }
        std::thread::sleep(AWAY);
        let mut stood = clock.clone();
        stood.stop_clock();
        for (clock, counts) in [(&clock, true), (&stood, false)] {
            let (vm, vcpus) = pair(&host);
            for (vcpu, state) in vcpus.iter().zip(&states) {
                vcpu.restore(state).unwrap();
            }
            vm.restore(clock).unwrap();
            let moment = vcpus[0].moment(clock).unwrap();
            let away = u64::try_from(AWAY.as_nanos()).unwrap();
            assert_eq!(moment.since_ns >= away, counts, "{moment:?}");
            for (vcpu, state) in vcpus.iter().zip(&states) {
                let skipped = vcpu.restore_tsc(state, &moment).unwrap();
                assert!(skipped.iter().all(|s| s.index != IA32_TSC), "{skipped:?}");
            }
            if !offsets_work(vcpus[0].fd()) {
                // Its guests may read the host's own counter, whatever is written.
                eprintln!(
                    "NOT RUN: whether the TSC is what was written: this KVM's guests read the host's"
                );
                continue;
            }
            assert_eq!(
                vcpus[0].tsc_offset().unwrap(),
                vcpus[1].tsc_offset().unwrap()
            );
            let tsc = vcpus[0].read_msrs(&[IA32_TSC]).unwrap()[0].1;
            let passed = tsc.wrapping_sub(states[0].tsc().unwrap());
            let since = vm.clock().unwrap().unwrap().clock - clock.clock.unwrap().clock;
            let off = passed.abs_diff(ticks(since, khz));
            assert!(off < ticks(away / 4, khz), "{passed} ticks in {since} ns");
        }
    }
}
