//! FT: a 3-D diffusion equation by Fourier transforms (NAS-95-020, section 2.4).
//!
//! The box holds complex numbers, x fastest; a row is its real parts and then its imaginary parts.
//! The transform along each direction takes packs of lines ([`lines`](crate::lines)): along x and y
//! within each plane, along z through strips of all planes.

mod fourier;
mod sums;

use crate::lines::{Point, gather_across, gather_along, packs, points};
use crate::lines::{scatter_across, scatter_along};
use crate::math::{exp, ln, sqrt};
use crate::problem::{Check, Class, Facts, Needs, Outcome, Problem, Verification};
use crate::random::Random;
use crate::team::{Hooks, Team, over_pairs, over_strips, over_units, over_units_with, ranks_for};
use fourier::{Direction, Roots};
use sums::{SUMS_A, SUMS_B, SUMS_C, SUMS_S, SUMS_W};

const SEED: u64 = 314_159_265;
/// The published epsilon of this kernel.
const EPSILON: f64 = 1e-12;
/// How fast the field diffuses.
const ALPHA: f64 = 1e-6;
/// Points that the checksum adds up.
const SAMPLES: usize = 1024;
/// Lines in a pack: their numbers fill cache lines.
const LANES: usize = 8;
/// Rows between two ticks of what is only streamed.
const ROWS: usize = 8;
/// The components of a row, all of them.
const COMPLEX: [usize; 2] = [0, 1];
/// The most iterations of a class.
const MAX_STEPS: usize = 20;

type Complex = (f64, f64);

struct Parameters {
    width: usize,
    height: usize,
    depth: usize,
    /// The published checksum of each iteration.
    sums: &'static [Complex],
}

fn parameters(class: Class) -> Parameters {
    let (width, height, depth, sums): (_, _, _, &[Complex]) = match class {
        Class::S => (64, 64, 64, &SUMS_S),
        Class::W => (128, 128, 32, &SUMS_W),
        Class::A => (256, 256, 128, &SUMS_A),
        Class::B => (512, 256, 256, &SUMS_B),
        Class::C => (512, 512, 512, &SUMS_C),
    };
    Parameters {
        width,
        height,
        depth,
        sums,
    }
}

impl Parameters {
    fn points(&self) -> usize {
        self.width * self.height * self.depth
    }

    /// The longest line.
    fn longest(&self) -> usize {
        self.width.max(self.height).max(self.depth)
    }

    /// Memory of each rank's own: a pack of the longest lines, twice.
    fn scratch(&self) -> usize {
        2 * self.longest() * 2 * LANES
    }

    /// Operations of a run, as NPB counts them.
    fn operations(&self) -> f64 {
        let points = self.points() as f64;
        let log = ln(points);
        points * (14.8157 + 7.19641 * log + (5.23518 + 7.21113 * log) * self.sums.len() as f64)
    }
}

pub(crate) fn facts(class: Class) -> Facts {
    let p = parameters(class);
    // No class has more iterations than MAX_STEPS.
    let iterations = u32::try_from(p.sums.len()).unwrap_or(u32::MAX);
    Facts::grid([p.width, p.height, p.depth], iterations)
}

pub(crate) fn needs(class: Class, ranks: usize) -> Needs {
    let p = parameters(class);
    Needs {
        floats: 5 * p.points() + p.longest() + ranks * p.scratch(),
        words: 0,
    }
}

pub(crate) fn run(
    problem: Problem,
    floats: &mut [f64],
    team: &impl Team,
    hooks: &impl Hooks,
) -> Outcome {
    let mut field = Diffusion::new(problem.class, floats, team, hooks);
    // All of it but the iterations untimed, to touch everything.
    field.set_up(SEED);
    field.transform_state();
    field.evolve();
    field.measure(problem, SEED)
}

struct Diffusion<'a, T, H> {
    p: Parameters,
    /// The field's transform.
    state: &'a mut [f64],
    /// The field of an iteration.
    field: &'a mut [f64],
    /// What each component of the transform decays by in an iteration.
    decay: &'a mut [f64],
    roots: &'a mut [f64],
    scratch: &'a mut [f64],
    team: &'a T,
    hooks: &'a H,
}

impl<'a, T: Team, H: Hooks> Diffusion<'a, T, H> {
    fn new(class: Class, floats: &'a mut [f64], team: &'a T, hooks: &'a H) -> Self {
        let p = parameters(class);
        let (state, rest) = floats.split_at_mut(2 * p.points());
        let (field, rest) = rest.split_at_mut(2 * p.points());
        let (decay, rest) = rest.split_at_mut(p.points());
        let (roots, scratch) = rest.split_at_mut(p.longest());
        Self {
            p,
            state,
            field,
            decay,
            roots,
            scratch,
            team,
            hooks,
        }
    }

    fn measure(mut self, problem: Problem, seed: u64) -> Outcome {
        let references = self.p.sums;
        let steps = u32::try_from(references.len()).unwrap_or(0);
        let mut sums = [(0.0, 0.0); MAX_STEPS];
        self.hooks.progress(0, steps);
        self.hooks.ready();
        let start = self.hooks.nanos();
        self.set_up(seed);
        self.transform_state();
        for (step, sum) in (1..=steps).zip(&mut sums) {
            self.evolve();
            self.transform_field_back();
            *sum = self.checksum();
            self.hooks.progress(step, steps);
        }
        let nanos = self.hooks.nanos().saturating_sub(start);
        let verification = verify(&sums[..references.len()], references);
        Outcome::new(problem, verification, self.p.operations(), nanos)
    }

    /// The decay of every component, and the field at the beginning: the random sequence in memory
    /// order, a number for each real and imaginary part in turn.
    fn set_up(&mut self, seed: u64) {
        let (width, height, hooks) = (self.p.width, self.p.height, self.hooks);
        let (planes, depth) = (2 * width * height, self.p.depth);
        let ranks = ranks_for(self.team, depth, 1);
        over_units(
            self.team,
            ranks,
            self.state,
            planes,
            |rank, first, share| {
                let mut random = Random::new(seed);
                random.skip((first * planes) as u64);
                for (y, row) in share.chunks_exact_mut(2 * width).enumerate() {
                    let (re, im) = row.split_at_mut(width);
                    for (re, im) in re.iter_mut().zip(im) {
                        *re = random.next();
                        *im = random.next();
                    }
                    if y % ROWS == 0 {
                        hooks.tick(rank);
                    }
                }
                0.0
            },
        );
        let pi = core::f64::consts::PI;
        let rate = -4.0 * ALPHA * pi * pi;
        over_units(
            self.team,
            ranks,
            self.decay,
            planes / 2,
            |rank, first, share| {
                for (at, row) in share.chunks_exact_mut(width).enumerate() {
                    let (y, z) = (at % height, first + at / height);
                    let across = frequency_squared(y, height) + frequency_squared(z, depth);
                    for (x, value) in row.iter_mut().enumerate() {
                        *value = exp(rate * (frequency_squared(x, width) + across));
                    }
                    hooks.tick(rank);
                }
                0.0
            },
        );
        Roots::fill(self.roots);
    }

    /// The state's transform, in its own place.
    fn transform_state(&mut self) {
        let lines = self.p.lines(self.roots, Direction::Forward, self.hooks);
        lines.in_planes(self.team, self.state, self.scratch);
        lines.across_planes(self.team, self.state, self.scratch);
    }

    fn transform_field_back(&mut self) {
        let lines = self.p.lines(self.roots, Direction::Back, self.hooks);
        lines.across_planes(self.team, self.field, self.scratch);
        lines.in_planes(self.team, self.field, self.scratch);
    }

    /// The state of the next iteration, and a copy of it as the field to be transformed back.
    fn evolve(&mut self) {
        let (width, decay, hooks) = (self.p.width, &*self.decay, self.hooks);
        let ranks = ranks_for(self.team, self.p.depth, 1);
        let unit = 2 * width * self.p.height;
        let both = (&mut *self.state, &mut *self.field);
        over_pairs(self.team, ranks, both, unit, |rank, first, state, field| {
            let rows = state.chunks_exact_mut(2 * width);
            let rows = rows.zip(field.chunks_exact_mut(2 * width));
            let decay = decay[first * unit / 2..].chunks_exact(width);
            for (y, ((state, field), decay)) in rows.zip(decay).enumerate() {
                for (state, field) in state
                    .chunks_exact_mut(width)
                    .zip(field.chunks_exact_mut(width))
                {
                    for ((state, field), decay) in state.iter_mut().zip(field).zip(decay) {
                        *state *= decay;
                        *field = *state;
                    }
                }
                if y % ROWS == 0 {
                    hooks.tick(rank);
                }
            }
            0.0
        });
    }

    /// The mean over the box's points of those that NPB samples.
    fn checksum(&self) -> Complex {
        let Parameters {
            width,
            height,
            depth,
            ..
        } = self.p;
        let (mut re, mut im) = (0.0, 0.0);
        for j in 1..=SAMPLES {
            let (x, y, z) = (j % width, 3 * j % height, 5 * j % depth);
            let row = &self.field[(z * height + y) * 2 * width..][..2 * width];
            re += row[x];
            im += row[width + x];
        }
        self.hooks.tick(0);
        let points = self.p.points() as f64;
        (re / points, im / points)
    }
}

/// The square of the frequency that is at index `at` of `len`: those of the second half are
/// negative.
fn frequency_squared(at: usize, len: usize) -> f64 {
    let magnitude = at.min(len - at) as f64;
    magnitude * magnitude
}

/// Compares each iteration's checksum with the published one, by the deviation of the complex
/// number. The real part of the last is the one to show.
fn verify(sums: &[Complex], references: &[Complex]) -> Verification {
    let square = |x: f64| x * x;
    let shown = Check {
        name: "real part of the last checksum",
        value: sums.last().map_or(f64::NAN, |sum| sum.0),
        reference: references.last().map_or(f64::NAN, |sum| sum.0),
    };
    let first = Verification::new(EPSILON, shown);
    let pairs = sums.iter().zip(references);
    pairs.fold(first, |all, (sum, reference)| {
        let difference = square(sum.0 - reference.0) + square(sum.1 - reference.1);
        all.and_error(sqrt(
            difference / (square(reference.0) + square(reference.1)),
        ))
    })
}

/// How the box's lines are transformed.
struct Lines<'a, H> {
    width: usize,
    height: usize,
    depth: usize,
    /// Of each rank's scratch memory.
    each: usize,
    roots: Roots<'a>,
    direction: Direction,
    hooks: &'a H,
}

impl Parameters {
    fn lines<'a, H>(&self, roots: &'a [f64], direction: Direction, hooks: &'a H) -> Lines<'a, H> {
        Lines {
            width: self.width,
            height: self.height,
            depth: self.depth,
            each: self.scratch(),
            roots: Roots::new(roots),
            direction,
            hooks,
        }
    }
}

impl<H: Hooks> Lines<'_, H> {
    fn row(&self) -> usize {
        2 * self.width
    }

    /// The lines along x and y.
    fn in_planes(&self, team: &impl Team, data: &mut [f64], scratch: &mut [f64]) {
        let (row, ranks) = (self.row(), ranks_for(team, self.depth, 1));
        let plane = row * self.height;
        let scratch = (scratch, self.each);
        over_units_with(
            team,
            ranks,
            data,
            plane,
            scratch,
            |rank, _, planes, scratch| {
                for plane in planes.chunks_exact_mut(plane) {
                    let (all, width) = (0..self.width, self.width);
                    for rows in plane.chunks_mut(row * LANES) {
                        self.pack(rank, self.width, scratch, |pack, gather| {
                            if gather {
                                gather_along(pack, rows, (row, width), &all, &COMPLEX);
                            } else {
                                scatter_along(pack, rows, (row, width), &all);
                            }
                        });
                    }
                    for xs in packs::<LANES>(0..width) {
                        self.pack(rank, self.height, scratch, |pack, gather| {
                            if gather {
                                gather_across(pack, plane.chunks_exact(row), width, &xs, &COMPLEX);
                            } else {
                                scatter_across(pack, plane.chunks_exact_mut(row), width, &xs);
                            }
                        });
                    }
                }
            },
        );
    }

    /// The lines along z.
    fn across_planes(&self, team: &impl Team, data: &mut [f64], scratch: &mut [f64]) {
        let (row, width) = (self.row(), self.width);
        let shape = (row * self.height, row);
        let scratch = (scratch, self.each);
        let rows = 0..self.height;
        over_strips(
            team,
            data,
            shape,
            rows,
            scratch,
            |rank, _, strips, scratch| {
                let len = strips
                    .iter()
                    .flatten()
                    .next()
                    .map_or(0, |strip| strip.len());
                for at in (0..len).step_by(row) {
                    let row = at..at + row;
                    for xs in packs::<LANES>(0..width) {
                        self.pack(rank, self.depth, scratch, |pack, gather| {
                            if gather {
                                let rows = strips.iter().flatten().map(|strip| &strip[row.clone()]);
                                gather_across(pack, rows, width, &xs, &COMPLEX);
                            } else {
                                let rows = strips
                                    .iter_mut()
                                    .flatten()
                                    .map(|strip| &mut strip[row.clone()]);
                                scatter_across(pack, rows, width, &xs);
                            }
                        });
                    }
                }
            },
        );
    }

    /// Transforms a pack of lines of `len` points: `exchange` gathers them, when it is told so, and
    /// else scatters them.
    #[inline(always)]
    fn pack(
        &self,
        rank: usize,
        len: usize,
        scratch: &mut [f64],
        mut exchange: impl FnMut(&mut [Point<2, LANES>], bool),
    ) {
        let (pack, other) = points::<2, LANES>(scratch).split_at_mut(self.each / (4 * LANES));
        let (pack, other) = (&mut pack[..len], &mut other[..len]);
        exchange(pack, true);
        exchange(
            fourier::transform(pack, other, &self.roots, self.direction),
            false,
        );
        self.hooks.tick(rank);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Clock, Threads};
    use crate::problem::Kernel;

    #[test]
    fn another_seed_does_not_verify() {
        let problem = Problem {
            kernel: Kernel::Ft,
            class: Class::S,
        };
        let (team, clock) = (Threads::new(2), Clock::start());
        let mut floats = vec![f64::NAN; needs(problem.class, 2).floats];
        for (seed, verified) in [(SEED, true), (SEED + 2, false)] {
            let field = Diffusion::new(problem.class, &mut floats, &team, &clock);
            let outcome = field.measure(problem, seed);
            assert_eq!(outcome.verified, verified, "{outcome:?}");
        }
    }

    #[test]
    fn a_wrong_checksum_in_the_middle_is_seen() {
        let mut sums = SUMS_S;
        assert!(verify(&sums, &SUMS_S).passed());
        sums[2].1 += 1e-8;
        assert!(!verify(&sums, &SUMS_S).passed());
    }
}
