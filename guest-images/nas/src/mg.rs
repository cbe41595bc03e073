//! MG: V-cycles on the discrete Poisson problem ∇²u = v on a periodic cube (NAS-95-020, section
//! 2.2).
//!
//! Grids are cubes of (2^k + 2)^3 points, with one layer of periodic copies around the 2^k interior
//! points, x fastest. `u` and `r` exist at every level, `v` at the finest only, as in NPB.

mod start;
mod stencil;

use crate::math::sqrt;
use crate::problem::{Check, Class, Facts, Needs, Outcome, Problem, Verification};
use crate::team::{Hooks, Team};
use start::charges;
use stencil::{Grid, interpolate, norm, residual, restrict, smooth, zero};

/// The largest log2 of an edge, that of class C.
const MAX_LEVEL: usize = 9;

/// The residual's coefficients by distance: centre, face (zero, and left out), edge, corner.
const A: stencil::Residual = stencil::Residual {
    centre: -8.0 / 3.0,
    edge: 1.0 / 6.0,
    corner: 1.0 / 12.0,
};

struct Parameters {
    /// log2 of the finest grid's edge.
    level: usize,
    iterations: u32,
    smoother: stencil::Smoother,
    /// The published norm of the final residual.
    norm: f64,
}

fn parameters(class: Class) -> Parameters {
    let (level, iterations, norm) = match class {
        Class::S => (5, 4, 0.530_770_700_573_4e-4),
        Class::W => (7, 4, 0.646_732_937_533_9e-5),
        Class::A => (8, 4, 0.243_336_530_906_9e-5),
        Class::B => (8, 20, 0.180_056_440_135_5e-5),
        Class::C => (9, 20, 0.570_673_228_574_0e-6),
    };
    let smoother = if class <= Class::A {
        stencil::Smoother {
            centre: -3.0 / 8.0,
            face: 1.0 / 32.0,
            edge: -1.0 / 64.0,
        }
    } else {
        stencil::Smoother {
            centre: -3.0 / 17.0,
            face: 1.0 / 33.0,
            edge: -1.0 / 61.0,
        }
    };
    Parameters {
        level,
        iterations,
        smoother,
        norm,
    }
}

/// Points of a grid at `level`.
const fn points(level: usize) -> usize {
    let edge = (1 << level) + 2;
    edge * edge * edge
}

/// Where `level` begins in an array of all levels, coarsest first.
fn offset(level: usize) -> usize {
    (1..level).map(points).sum()
}

pub(crate) fn facts(class: Class) -> Facts {
    let p = parameters(class);
    Facts::grid([1 << p.level; 3], p.iterations)
}

pub(crate) fn needs(class: Class) -> Needs {
    let level = parameters(class).level;
    Needs {
        floats: 2 * offset(level + 1) + points(level),
        words: 0,
    }
}

pub(crate) fn run(
    problem: Problem,
    floats: &mut [f64],
    kept: bool,
    team: &impl Team,
    hooks: &impl Hooks,
) -> Outcome {
    let mut grids = Multigrid::new(problem.class, floats, team, hooks);
    if kept {
        grids.clear();
    } else {
        grids.warm_up();
        grids.set_up();
    }
    grids.measure(problem)
}

struct Multigrid<'a, T, H> {
    p: Parameters,
    u: &'a mut [f64],
    r: &'a mut [f64],
    v: &'a mut [f64],
    team: &'a T,
    hooks: &'a H,
}

impl<'a, T: Team, H: Hooks> Multigrid<'a, T, H> {
    fn new(class: Class, floats: &'a mut [f64], team: &'a T, hooks: &'a H) -> Self {
        let p = parameters(class);
        let (u, rest) = floats.split_at_mut(offset(p.level + 1));
        let (r, v) = rest.split_at_mut(offset(p.level + 1));
        Self {
            p,
            u,
            r,
            v,
            team,
            hooks,
        }
    }

    fn grid<'g>(&self, level: usize) -> Grid<'g, T, H>
    where
        'a: 'g,
    {
        Grid {
            interior: 1 << level,
            team: self.team,
            hooks: self.hooks,
        }
    }

    /// Nothing is solved yet.
    fn clear(&mut self) {
        let grid = self.grid(self.p.level);
        zero(grid, &mut self.u[offset(self.p.level)..]);
    }

    fn set_up(&mut self) {
        self.clear();
        charges(self.grid(self.p.level), self.v);
    }

    /// One iteration untimed, to touch everything. The old contents of the memory may be anything.
    fn warm_up(&mut self) {
        for level in 1..=self.p.level {
            let grid = self.grid(level);
            zero(grid, &mut self.u[offset(level)..][..points(level)]);
            zero(grid, &mut self.r[offset(level)..][..points(level)]);
        }
        self.set_up();
        self.residual();
        self.cycle();
        self.residual();
    }

    fn measure(mut self, problem: Problem) -> Outcome {
        let top = self.grid(self.p.level);
        self.hooks.progress(0, self.p.iterations);
        self.hooks.ready();
        let start = self.hooks.nanos();
        self.residual();
        for iteration in 1..=self.p.iterations {
            self.cycle();
            self.residual();
            self.hooks.progress(iteration, self.p.iterations);
        }
        let sum = norm(top, &mut self.r[offset(self.p.level)..]);
        let nanos = self.hooks.nanos().saturating_sub(start);

        let cells = (1u64 << (3 * self.p.level)) as f64;
        let check = Check {
            name: "norm of the residual",
            value: sqrt(sum / cells),
            reference: self.p.norm,
        };
        // NPB counts 58 operations per cell and iteration.
        Outcome::new(
            problem,
            Verification::new(Check::EPSILON, check),
            58.0 * f64::from(self.p.iterations) * cells,
            nanos,
        )
    }

    /// r = v − A·u at the finest level.
    fn residual(&mut self) {
        let at = offset(self.p.level);
        residual(
            self.grid(self.p.level),
            &mut self.r[at..],
            &self.u[at..],
            Some(self.v),
            &A,
        );
    }

    /// One V-cycle: the residual down to the coarsest grid, corrections back up.
    fn cycle(&mut self) {
        let top = self.p.level;
        for level in (2..=top).rev() {
            let grid = self.grid(level - 1);
            let (coarse, fine) = self.r.split_at_mut(offset(level));
            restrict(
                grid,
                &mut coarse[offset(level - 1)..],
                &fine[..points(level)],
            );
        }
        let bottom = self.grid(1);
        zero(bottom, &mut self.u[..points(1)]);
        smooth(
            bottom,
            &mut self.u[..points(1)],
            &self.r[..points(1)],
            &self.p.smoother,
        );
        for level in 2..=top {
            let grid = self.grid(level);
            let at = offset(level);
            let (coarse, fine) = self.u.split_at_mut(at);
            let (coarse, u) = (&coarse[offset(level - 1)..], &mut fine[..points(level)]);
            let r = &mut self.r[at..][..points(level)];
            if level < top {
                zero(grid, u);
            }
            interpolate(grid, u, coarse);
            residual(
                grid,
                r,
                u,
                if level < top { None } else { Some(&*self.v) },
                &A,
            );
            smooth(grid, u, r, &self.p.smoother);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Clock, Threads};
    use crate::problem::Kernel;

    const SMALL: Problem = Problem {
        kernel: Kernel::Mg,
        class: Class::S,
    };

    #[test]
    fn a_run_in_what_the_last_one_left_gives_the_same() {
        let (team, clock) = (Threads::new(2), Clock::start());
        let mut floats = vec![f64::NAN; needs(SMALL.class).floats];
        let mut value = |kept| run(SMALL, &mut floats, kept, &team, &clock).check.value;
        let first = value(false);
        assert_eq!([value(true), value(true)], [first; 2]);
    }

    #[test]
    fn a_moved_charge_does_not_verify() {
        let (team, clock) = (Threads::new(2), Clock::start());
        // Memory full of nonsense: the run must not depend on what was there.
        let mut floats = vec![f64::NAN; needs(SMALL.class).floats];
        let mut grids = Multigrid::new(SMALL.class, &mut floats, &team, &clock);
        grids.warm_up();
        grids.set_up();
        assert!(grids.measure(SMALL).verified);

        let mut grids = Multigrid::new(SMALL.class, &mut floats, &team, &clock);
        grids.set_up();
        // An interior one: the copies in the border are never read.
        let interior = |i: usize| {
            [i, i / 34, i / 34 / 34]
                .iter()
                .all(|at| (1..32).contains(&(at % 34)))
        };
        let charge = (0..)
            .zip(grids.v.iter())
            .position(|(i, &v)| v == 1.0 && interior(i))
            .unwrap();
        grids.v.swap(charge, charge + 1);
        assert!(!grids.measure(SMALL).verified);
    }
}
