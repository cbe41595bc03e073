//! EP: Gaussian deviates by Marsaglia's polar method, tallied by annulus (NAS-95-020, section 2.1).

use crate::math::{index, inverse_sqrt, ln};
use crate::problem::{Check, Class, Facts, Outcome, Problem, Verification};
use crate::random::Random;
use crate::team::{Hooks, Parts, Team, ranks_for, share};

const SEED: u64 = 271_828_183;
/// Pairs between two ticks: some 25 µs.
const BATCH: u64 = 1 << 10;

/// In how many parts the work is counted.
const STEPS: u32 = 64;

struct Parameters {
    /// log2 of the number of pairs.
    log_pairs: u32,
    /// The published sums of the deviates.
    sums: (f64, f64),
}

fn parameters(class: Class) -> Parameters {
    let (log_pairs, sums) = match class {
        Class::S => (24, (-3.247_834_652_034_74e3, -6.958_407_078_382_297e3)),
        Class::W => (25, (-2.863_319_731_645_753e3, -6.320_053_679_109_499e3)),
        Class::A => (28, (-4.295_875_165_629_892e3, -1.580_732_573_678_431e4)),
        Class::B => (30, (4.033_815_542_441_498e4, -2.660_669_192_809_235e4)),
        Class::C => (32, (4.764_367_927_995_374e4, -8.084_072_988_043_731e4)),
    };
    Parameters { log_pairs, sums }
}

/// What one rank adds up.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    x: f64,
    y: f64,
    /// How many deviates fell into each square annulus; NPB prints these without verifying them.
    annuli: [u64; 10],
}

/// NPB counts the random numbers, two for each pair.
pub(crate) fn facts(class: Class) -> Facts {
    let numbers = 2u64 << parameters(class).log_pairs;
    Facts::of(numbers, 0, "random numbers generated")
}

pub(crate) fn run(problem: Problem, team: &impl Team, hooks: &impl Hooks) -> Outcome {
    run_from(SEED, problem, team, hooks)
}

fn run_from(seed: u64, problem: Problem, team: &impl Team, hooks: &impl Hooks) -> Outcome {
    let Parameters { log_pairs, sums } = parameters(problem.class);
    let batches = 1u64 << log_pairs.saturating_sub(BATCH.trailing_zeros());
    let ranks = ranks_for(team, index(batches), 1);
    hooks.progress(0, STEPS);
    hooks.ready();
    let start = hooks.nanos();

    let mut parts = Parts::new((0..ranks).map(|_| Tally::default()));
    parts.run(team, |rank, tally| {
        let mine = share(index(batches), ranks, rank);
        let mut random = Random::new(seed);
        random.skip(mine.start as u64 * BATCH * 2);
        for step in 0..STEPS {
            for _ in share(mine.len(), index(STEPS.into()), index(step.into())) {
                batch(&mut random, tally);
                hooks.tick(rank);
            }
            if rank == 0 {
                hooks.progress(step + 1, STEPS);
            }
        }
    });
    let (mut x, mut y, mut pairs) = (0.0, 0.0, 0);
    for tally in parts.iter() {
        x += tally.x;
        y += tally.y;
        pairs += tally.annuli.iter().sum::<u64>();
    }
    let nanos = hooks.nanos().saturating_sub(start);
    // Every accepted pair is in one annulus; the optimiser must not drop the counting, which is
    // part of the work.
    core::hint::black_box(pairs);

    let x = Check {
        name: "sum of x",
        value: x,
        reference: sums.0,
    };
    let y = Check {
        name: "sum of y",
        value: y,
        reference: sums.1,
    };
    let verification = Verification::new(Check::EPSILON, x).and(y);
    Outcome::new(problem, verification, (2u64 << log_pairs) as f64, nanos)
}

#[inline]
fn batch(random: &mut Random, tally: &mut Tally) {
    let Tally {
        x: sum_x,
        y: sum_y,
        annuli,
    } = tally;
    let (mut local_x, mut local_y) = (*sum_x, *sum_y);
    for _ in 0..BATCH {
        let x = 2.0 * random.next() - 1.0;
        let y = 2.0 * random.next() - 1.0;
        let t = x * x + y * y;
        if t <= 1.0 {
            // The square root of m/t, for m = −2·ln t, is m over the root of m·t. At t = 1 it is 0,
            // and the largest t below 1 gives a normal m.
            let m = -2.0 * ln(t);
            let scale = if m > 0.0 {
                m * inverse_sqrt(m * t)
            } else {
                0.0
            };
            let (x, y) = (x * scale, y * scale);
            if let Some(count) = annuli.get_mut(annulus(x, y)) {
                *count += 1;
            }
            local_x += x;
            local_y += y;
        }
    }
    (*sum_x, *sum_y) = (local_x, local_y);
}

/// The integer part of the larger magnitude.
#[inline(always)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the integer part is what is wanted; deviates are below 10"
)]
#[expect(clippy::cast_sign_loss, reason = "a magnitude is not negative")]
fn annulus(x: f64, y: f64) -> usize {
    let magnitude = |v: f64| f64::from_bits(v.to_bits() & !(1 << 63));
    let (x, y) = (magnitude(x), magnitude(y));
    // Through a signed integer: that conversion is one instruction.
    (if x > y { x } else { y }) as i64 as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Clock, Threads};
    use crate::problem::Kernel;

    #[test]
    fn another_seed_does_not_verify() {
        let problem = Problem {
            kernel: Kernel::Ep,
            class: Class::S,
        };
        assert!(!run_from(SEED + 2, problem, &Threads::new(2), &Clock::start()).verified);
    }
}
