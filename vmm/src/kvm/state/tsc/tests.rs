//! Simulated hosts, and the real KVM.

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

    /// Counters that were read one after another are one counter again, whatever the guest wrote
    /// to them; those that are further apart stay so.
    #[test]
    fn counters_read_one_after_another_are_one_again(
        base: u64, adjusts: [u64; 2], late in 0..1u64 << 40, khz in 1u32..6_000_000,
    ) {
        let first = SavedTsc { value: base.wrapping_add(adjusts[0]), adjust: adjusts[0] };
        let read = base.wrapping_add(late);
        let second = SavedTsc { value: read.wrapping_add(adjusts[1]), adjust: adjusts[1] };
        let one_counter = late < u64::from(khz) * 1000;
        let expected = if one_counter { base } else { read };
        let found = second.at_reading_of(first, khz);
        prop_assert_eq!(found, expected.wrapping_add(adjusts[1]));
        prop_assert_eq!(first.at_reading_of(first, khz), first.value);
        let back = first.at_reading_of(second, khz);
        let expected = if one_counter { read } else { base };
        prop_assert_eq!(back, expected.wrapping_add(adjusts[0]));
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
            let skipped = vcpu.restore_tsc(state, &states[0], &moment).unwrap();
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

/// States of a KVM without offsets, and of older versions: each TSC is that of its own reading.
#[test]
fn counters_that_were_read_apart_get_one_offset() {
    let Ok(host) = Host::open() else {
        eprintln!("NOT RUN: counters_that_were_read_apart_get_one_offset: no KVM");
        return;
    };
    let (vm, vcpus) = pair(&host);
    if vcpus[0].tsc_offset().unwrap().is_none() {
        eprintln!("NOT RUN: counters_that_were_read_apart_get_one_offset: no offsets");
        return;
    }
    let clock = vm.save().unwrap();
    let states: Vec<_> = vcpus.iter().map(|vcpu| vcpu.save().unwrap()).collect();
    let (vm, vcpus) = pair(&host);
    let mut later = states[0].clone();
    let apart = states[0].tsc().unwrap().wrapping_add(5000);
    later.set_tsc(apart);
    let states = [states[0].clone(), later];
    for (vcpu, state) in vcpus.iter().zip(&states) {
        vcpu.restore(state).unwrap();
    }
    vm.restore(&clock).unwrap();
    let moment = vcpus[0].moment(&clock).unwrap();
    for (vcpu, state) in vcpus.iter().zip(&states) {
        vcpu.restore_tsc(state, &states[0], &moment).unwrap();
    }
    let offsets = [0, 1].map(|n: usize| vcpus[n].tsc_offset().unwrap());
    assert_eq!(offsets[0], offsets[1]);
}
