use super::*;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

/// A guest as the controller sees one: memory that is used, the rest is available, and a balloon
/// that follows its target.
struct Guest {
    ram: u64,
    used: u64,
    actual: u32,
    target: u32,
    /// Pages that the driver gives between two samples. Taking back is only freeing, and done at
    /// once.
    pace: u32,
    statistics: Statistics,
    controller: Controller,
    sampling: Duration,
}

impl Guest {
    fn new(ram: u64, used: u64, pace: u32) -> Self {
        let settings = Settings::for_ram(ram);
        Self {
            ram: ram / PAGE,
            used,
            actual: 0,
            target: 0,
            pace,
            statistics: Statistics::default(),
            controller: Controller::new(settings, ram),
            sampling: settings.sampling(),
        }
    }

    fn available(&self) -> u64 {
        self.ram - self.used - u64::from(self.actual)
    }

    /// What is used becomes another amount; where there is not enough, the driver deflates by
    /// itself before a process dies.
    fn use_pages(&mut self, used: u64) {
        self.used = used.min(self.ram);
        let over = (self.used + u64::from(self.actual)).saturating_sub(self.ram);
        self.actual -= u32::try_from(over).unwrap();
    }

    fn sample(&mut self) -> Step {
        // Never more than there is: the driver's allocations fail.
        let gives = self.pace.min(u32::try_from(self.available()).unwrap());
        self.actual = self.target.min(self.actual.saturating_add(gives));
        self.statistics.available_memory = Some(self.available() * PAGE);
        let sample = Sample {
            statistics: &self.statistics,
            actual: self.actual,
            target: self.target,
            may_inflate: true,
        };
        let (target, step) = self.controller.step(&sample, self.sampling);
        if step == Step::Inflate {
            assert!(target > self.target);
            let more = u64::from(target - self.actual);
            assert!(self.available() - more >= self.controller.reserve);
        } else {
            assert!(target <= self.target);
        }
        self.target = target;
        step
    }

    fn samples(&mut self, count: u32) -> Vec<Step> {
        let moves: Vec<Step> = (0..count).map(|_| self.sample()).collect();
        moves.into_iter().filter(|s| *s != Step::Keep).collect()
    }
}

#[test]
fn what_is_not_used_goes_into_the_balloon() {
    let mut guest = Guest::new(1024 * MIB, 200 * MIB / PAGE, u32::MAX);
    let moves = guest.samples(20 * SAMPLES);
    assert!(moves.iter().all(|s| *s == Step::Inflate) && moves.len() > 2);
    // A twentieth is kept, and two bands of a quarter of that.
    let left = guest.available() * PAGE / MIB;
    assert!((51..=77).contains(&left), "{left} MiB");
    // More is needed than is available: within the interval it is there.
    guest.use_pages(guest.ram - u64::from(guest.actual) - 100);
    assert_eq!(guest.sample(), Step::Short);
    guest.sample();
    assert!(guest.available() >= guest.controller.reserve);
}

#[test]
fn a_guest_out_of_memory_is_left_alone() {
    let mut guest = Guest::new(512 * MIB, 100 * MIB / PAGE, u32::MAX);
    guest.samples(30 * SAMPLES);
    let full = guest.actual;
    // It takes pages back by itself, as Linux' driver does before it kills.
    guest.use_pages(guest.ram - u64::from(full) + 1000);
    assert_eq!(guest.sample(), Step::OutOfMemory);
    assert!(guest.target <= full / 2);
    assert_eq!(guest.samples((CALM_AFTER_OOM - 1) * SAMPLES), []);
    // It kills.
    guest.statistics.oom_kills = Some(7);
    guest.sample();
    guest.statistics.oom_kills = Some(8);
    let before = guest.actual;
    assert_eq!(guest.sample(), Step::OutOfMemory);
    assert!(guest.target <= before / 2);
    guest.use_pages(0);
    assert_eq!(guest.samples((CALM_AFTER_OOM - 1) * SAMPLES), []);
    assert_eq!(guest.samples(2 * SAMPLES).first(), Some(&Step::Inflate));
}

#[test]
fn one_that_swaps_stalls_or_reads_back_its_caches_is_not_inflated() {
    for tag in 0..3 {
        let mut guest = Guest::new(512 * MIB, 100 * MIB / PAGE, u32::MAX);
        guest.samples(3 * SAMPLES);
        let (before, mut moves) = (guest.actual, Vec::new());
        for round in 1..4 * u64::from(SAMPLES) {
            let counter = Some(round * 1000);
            match tag {
                0 => guest.statistics.swap_out = counter,
                1 => guest.statistics.allocation_stalls = counter,
                _ => guest.statistics.major_faults = counter,
            }
            moves.push(guest.sample());
        }
        assert!(!moves[1..].contains(&Step::Inflate), "{tag} {moves:?}");
        assert_eq!(moves.contains(&Step::Strained), tag != 2, "{tag} {moves:?}");
        assert_eq!(guest.actual < before, tag != 2);
    }
}

#[test]
fn what_a_guest_does_not_give_is_not_asked_for_again_and_again() {
    let mut guest = Guest::new(512 * MIB, 100 * MIB / PAGE, 0);
    let moves = guest.samples(20 * SAMPLES);
    assert!(moves.contains(&Step::Settle), "{moves:?}");
    assert!(moves.len() < 10, "{moves:?}");
    assert!(guest.samples(3 * SAMPLES).len() <= 2);
}

#[test]
fn without_statistics_nothing_is_done() {
    let mut controller = Controller::new(Settings::for_ram(1 << 30), 1 << 30);
    let statistics = Statistics {
        total_memory: Some(u64::MAX),
        ..Statistics::default()
    };
    for _ in 0..100 {
        let sample = Sample {
            statistics: &statistics,
            actual: 5,
            target: 9,
            may_inflate: true,
        };
        let next = controller.step(&sample, Duration::from_secs(1));
        assert_eq!(next, (9, Step::Keep));
    }
}

/// For whatever a guest needs, as long as it needs that: the reserve is available again after an
/// interval at most, as far as the balloon can give it; the balloon comes to rest; and on its way
/// there it goes in one direction.
fn keeps_the_reserve_and_rests(
    ram_mib: u64,
    needs: &[(u64, u64)],
    pace: u32,
) -> Result<(), TestCaseError> {
    let ram = ram_mib * MIB;
    let mut guest = Guest::new(ram, 0, pace);
    for &(share, noise) in needs {
        let used = guest.ram * share / 100;
        guest.use_pages(used);
        // What a phase began with is dealt with, and calm is over.
        let mut moves = guest.samples(SAMPLES);
        let promised = guest.controller.reserve.min(guest.ram - used);
        let keeps = |guest: &Guest| guest.available() >= promised || guest.actual == 0;
        // A driver that is still on its way to what it was asked for before runs into the reserve
        // later: the same sample takes back what is missing, and the next one finds it.
        let mut short = u32::from(!keeps(&guest));
        for sample in 0..2000u64 {
            // Noise that is smaller than the band, and reaches both its ends in any hundred
            // samples.
            let band = guest.controller.band();
            guest.used = used.saturating_sub((sample * 7919 + noise) % 100 * (band / 2) / 99);
            moves.push(guest.sample());
            short = if keeps(&guest) { 0 } else { short + 1 };
            prop_assert!(short <= 1, "{} {:?}", guest.available(), guest.statistics);
        }
        let tail = &moves[moves.len() - 100..];
        // A driver as slow as some pages a second is on its way still.
        if u64::from(pace) * 1000 > guest.ram {
            prop_assert!(tail.iter().all(|s| *s == Step::Keep), "{tail:?}");
        }
        let mut moves: Vec<Step> = moves.into_iter().filter(|s| *s != Step::Keep).collect();
        moves.dedup();
        prop_assert!(moves.len() <= 3, "{moves:?}");
        let settled = [
            guest.controller.reserve,
            guest.controller.goal() + 2 * guest.controller.band(),
        ];
        if u64::from(pace) * 1000 > guest.ram && guest.actual > 0 {
            prop_assert!((settled[0]..=settled[1] + guest.ram / 64).contains(&guest.available()));
        }
    }
    Ok(())
}

/// A long way of the noise to its end, and drivers that are slow.
#[test]
fn the_reserve_is_kept_where_it_once_seemed_not_to_be() {
    for (ram_mib, pace, needs) in [
        (2828, 1_169_063, &[(100, 178), (14, 5)][..]),
        (12751, 1040, &[(9, 148), (25, 669), (31, 714)]),
    ] {
        keeps_the_reserve_and_rests(ram_mib, needs, pace).unwrap();
    }
}

proptest! {
    #[test]
    fn the_reserve_is_kept_and_the_balloon_comes_to_rest(
        ram_mib in 64u64..16384,
        needs in proptest::collection::vec((0u64..=100, 0u64..1000), 1..6),
        pace in 256u32..2_000_000,
    ) {
        keeps_the_reserve_and_rests(ram_mib, &needs, pace)?;
    }

    /// Whatever a guest claims, the target stays below its RAM, and no arithmetic fails.
    #[test]
    fn no_lie_moves_the_balloon_beyond_the_ram(
        ram in 0u64..1 << 45,
        interval_ms: u32,
        reserve_bytes: u64,
        lies in proptest::collection::vec(
            (any::<[Option<u64>; 6]>(), any::<u32>(), any::<u32>(), any::<u64>(), any::<bool>()),
            1..40
        ),
    ) {
        let mut controller = Controller::new(Settings { interval_ms, reserve_bytes }, ram);
        for (n, actual, target, passed, may_inflate) in lies {
            let statistics = Statistics {
                available_memory: n[0],
                free_memory: n[1],
                swap_out: n[2],
                major_faults: n[3],
                oom_kills: n[4],
                allocation_stalls: n[5],
                ..Statistics::default()
            };
            let sample = Sample { statistics: &statistics, actual, target, may_inflate };
            let (next, step) = controller.step(&sample, Duration::from_nanos(passed));
            match step {
                Step::Inflate => prop_assert!(may_inflate && u64::from(next) * PAGE <= ram),
                _ => prop_assert!(next <= target),
            }
        }
    }
}
