//! CG: the smallest eigenvalue of a large sparse matrix by inverse iteration, each step solved by
//! 25 steps of the method of conjugate gradients (NAS-95-020, section 2.3).

mod matrix;

use crate::math::inverse_sqrt;
use crate::problem::{Check, Class, Facts, Needs, Outcome, Problem, Verification};
use crate::team::{Hooks, Team, over_pairs, over_units, ranks_for};
use matrix::Matrix;

/// The published epsilon of this kernel.
const EPSILON: f64 = 1e-10;
/// Steps of the inner method.
const INNER: u32 = 25;
/// Rows of the matrix between two ticks: some 10 µs.
const ROWS: usize = 32;
/// Elements of a vector between two ticks.
const BLOCK: usize = 1 << 12;

struct Parameters {
    /// The matrix's order.
    order: usize,
    /// Elements of each random vector that the matrix is made of.
    nonzeros: usize,
    iterations: u32,
    shift: f64,
    /// The published eigenvalue.
    zeta: f64,
}

fn parameters(class: Class) -> Parameters {
    let (order, nonzeros, iterations, shift, zeta) = match class {
        Class::S => (1400, 7, 15, 10.0, 8.597_177_507_864_8),
        Class::W => (7000, 8, 15, 12.0, 10.362_595_087_124),
        Class::A => (14_000, 11, 15, 20.0, 17.130_235_054_029),
        Class::B => (75_000, 13, 75, 60.0, 22.712_745_482_631),
        Class::C => (150_000, 15, 75, 110.0, 28.973_605_592_845),
    };
    Parameters {
        order,
        nonzeros,
        iterations,
        shift,
        zeta,
    }
}

impl Parameters {
    /// Operations of a run, as NPB counts them.
    fn operations(&self) -> f64 {
        let elements = (self.nonzeros * (self.nonzeros + 1)) as f64;
        let inner = f64::from(INNER) * (5.0 + elements);
        2.0 * f64::from(self.iterations) * self.order as f64 * (3.0 + elements + inner + 3.0)
    }
}

pub(crate) fn facts(class: Class) -> Facts {
    let p = parameters(class);
    Facts::of(p.order as u64, p.iterations, Facts::FLOATING_POINT)
}

pub(crate) fn needs(class: Class) -> Needs {
    let p = parameters(class);
    let matrix = matrix::needs(p.order, p.nonzeros);
    Needs {
        floats: matrix.floats + 5 * p.order,
        words: matrix.words,
    }
}

pub(crate) fn run(
    problem: Problem,
    floats: &mut [f64],
    words: &mut [u32],
    team: &impl Team,
    hooks: &impl Hooks,
) -> Outcome {
    let p = parameters(problem.class);
    let (vectors, floats) = floats.split_at_mut(5 * p.order);
    let (x, rest) = vectors.split_at_mut(p.order);
    let matrix = Matrix::make(&p, floats, words, x, hooks);
    Solver::new(&matrix, x, rest, team, hooks).measure(problem, &p)
}

/// The vectors, named as in the specification.
struct Solver<'a, T, H> {
    matrix: &'a Matrix<'a>,
    x: &'a mut [f64],
    z: &'a mut [f64],
    p: &'a mut [f64],
    q: &'a mut [f64],
    r: &'a mut [f64],
    team: &'a T,
    hooks: &'a H,
}

impl<'a, T: Team, H: Hooks> Solver<'a, T, H> {
    fn new(
        matrix: &'a Matrix<'a>,
        x: &'a mut [f64],
        rest: &'a mut [f64],
        team: &'a T,
        hooks: &'a H,
    ) -> Self {
        let order = x.len();
        let (z, rest) = rest.split_at_mut(order);
        let (p, rest) = rest.split_at_mut(order);
        let (q, r) = rest.split_at_mut(order);
        Self {
            matrix,
            x,
            z,
            p,
            q,
            r,
            team,
            hooks,
        }
    }

    fn measure(mut self, problem: Problem, p: &Parameters) -> Outcome {
        // One iteration untimed, to touch everything.
        self.x.fill(1.0);
        self.iterate();
        self.x.fill(1.0);
        let mut zeta = 0.0;
        self.hooks.progress(0, p.iterations);
        self.hooks.ready();
        let start = self.hooks.nanos();
        for iteration in 1..=p.iterations {
            zeta = p.shift + 1.0 / self.iterate();
            self.hooks.progress(iteration, p.iterations);
        }
        let nanos = self.hooks.nanos().saturating_sub(start);
        let check = Check {
            name: "zeta",
            value: zeta,
            reference: p.zeta,
        };
        let verification = Verification::new(EPSILON, check);
        Outcome::new(problem, verification, p.operations(), nanos)
    }

    /// Solves A·z = x, gives x·z, and makes the normalised z the next x.
    fn iterate(&mut self) -> f64 {
        self.solve();
        let (x_z, z_z) = (
            self.vector_sum(|this| (&mut *this.x, &*this.z), |x, z| *x * z),
            self.vector_sum(|this| (&mut *this.z, &[]), |z, _| *z * *z),
        );
        let scale = inverse_sqrt(z_z);
        self.vector_sum(
            |this| (&mut *this.x, &*this.z),
            |x, z| {
                *x = scale * z;
                0.0
            },
        );
        x_z
    }

    /// The method of conjugate gradients on A·z = x, from z = 0.
    fn solve(&mut self) {
        self.z.fill(0.0);
        self.r.copy_from_slice(self.x);
        self.p.copy_from_slice(self.x);
        let mut rho = self.vector_sum(|this| (&mut *this.r, &[]), |r, _| *r * *r);
        for _ in 0..INNER {
            let p_q = self.multiply(|this| (&mut *this.q, &*this.p), |q, p| q * p);
            let alpha = rho / p_q;
            let before = core::mem::replace(&mut rho, self.advance(alpha));
            let beta = rho / before;
            self.vector_sum(
                |this| (&mut *this.p, &*this.r),
                |p, r| {
                    *p = r + beta * *p;
                    0.0
                },
            );
        }
        // The residual x − A·z explicitly: NPB prints it without verifying it, but it is part of
        // the work.
        self.multiply(|this| (&mut *this.r, &*this.z), |_, _| 0.0);
        let square = |r: &mut f64, x: f64| (x - *r) * (x - *r);
        let residual = self.vector_sum(|this| (&mut *this.r, &*this.x), square);
        core::hint::black_box(residual);
    }

    /// out = A·of, and the sum of `term(out[i], of[i])`.
    fn multiply(
        &mut self,
        pick: impl for<'s> Fn(&'s mut Self) -> (&'s mut [f64], &'s [f64]),
        term: impl Fn(f64, f64) -> f64 + Sync,
    ) -> f64 {
        let (matrix, team, hooks) = (self.matrix, self.team, self.hooks);
        let (out, of) = pick(self);
        let ranks = ranks_for(team, out.len(), ROWS);
        over_units(team, ranks, out, 1, |rank, first, out| {
            let mut sum = 0.0;
            for (block, rows) in out.chunks_mut(ROWS).enumerate() {
                for (i, value) in rows.iter_mut().enumerate() {
                    let row = first + block * ROWS + i;
                    *value = matrix.row_times(row, of);
                    sum += term(*value, of[row]);
                }
                hooks.tick(rank);
            }
            sum
        })
    }

    /// z += alpha·p, r −= alpha·q; the new r·r.
    fn advance(&mut self, alpha: f64) -> f64 {
        let (p, q, hooks) = (&*self.p, &*self.q, self.hooks);
        let ranks = ranks_for(self.team, p.len(), BLOCK);
        let both = (&mut *self.z, &mut *self.r);
        over_pairs(self.team, ranks, both, 1, |rank, first, z, r| {
            let mut sum = 0.0;
            for (block, (z, r)) in z.chunks_mut(BLOCK).zip(r.chunks_mut(BLOCK)).enumerate() {
                let range = first + block * BLOCK..first + block * BLOCK + z.len();
                let (p, q) = (&p[range.clone()], &q[range]);
                for (((z, r), p), q) in z.iter_mut().zip(r).zip(p).zip(q) {
                    *z += alpha * p;
                    *r -= alpha * q;
                    sum += *r * *r;
                }
                hooks.tick(rank);
            }
            sum
        })
    }

    /// Runs `term` on every element of one vector beside that of another (0 where there is none);
    /// the sum of the results.
    fn vector_sum(
        &mut self,
        pick: impl for<'s> Fn(&'s mut Self) -> (&'s mut [f64], &'s [f64]),
        term: impl Fn(&mut f64, f64) -> f64 + Sync,
    ) -> f64 {
        let (team, hooks) = (self.team, self.hooks);
        let (own, other) = pick(self);
        let ranks = ranks_for(team, own.len(), BLOCK);
        over_units(team, ranks, own, 1, |rank, first, own| {
            let mut sum = 0.0;
            for (block, own) in own.chunks_mut(BLOCK).enumerate() {
                let at = first + block * BLOCK;
                match other.get(at..at + own.len()) {
                    Some(other) => {
                        for (x, &y) in own.iter_mut().zip(other) {
                            sum += term(x, y);
                        }
                    }
                    None => own.iter_mut().for_each(|x| sum += term(x, 0.0)),
                }
                hooks.tick(rank);
            }
            sum
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Clock, Threads};
    use crate::problem::Kernel;

    #[test]
    fn a_changed_element_does_not_verify() {
        let problem = Problem {
            kernel: Kernel::Cg,
            class: Class::S,
        };
        let (p, needs) = (parameters(problem.class), needs(problem.class));
        for change in [0.0, 1e-3] {
            let mut floats = vec![f64::NAN; needs.floats];
            let mut words = vec![u32::MAX; needs.words];
            let (vectors, floats) = floats.split_at_mut(5 * p.order);
            let (x, rest) = vectors.split_at_mut(p.order);
            let clock = Clock::start();
            let mut matrix = Matrix::make(&p, floats, &mut words, x, &clock);
            matrix.values_mut()[1000] += change;
            let team = Threads::new(2);
            let solver = Solver::new(&matrix, x, rest, &team, &clock);
            let outcome = solver.measure(problem, &p);
            assert_eq!(outcome.verified, change == 0.0, "{outcome:?}");
        }
    }
}
