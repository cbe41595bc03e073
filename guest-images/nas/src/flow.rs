//! The flow that BT and SP compute: the compressible Navier–Stokes equations in a cube, with a
//! forcing that makes a known polynomial their steady solution (NAS-95-020, section 3).
//!
//! Both step an implicit scheme of second order with artificial dissipation of fourth order,
//! factored so that each step solves systems along the lines of one direction after another. What
//! differs is the systems: a [`Method`].
//!
//! A point has five components (density, momentum in three directions, energy), kept by rows:
//! `u[k][j][component][i]`.

mod grid;
mod lines;
mod right;

pub(crate) use grid::{AXES, Damping, Grid, diffusion, dissipation, gas};

use crate::lines::Point;
use crate::math::sqrt;
use crate::problem::{Check, Class, Facts, Needs, Outcome, Problem, Verification};
use crate::team::{Hooks, Team, over_units, ranks_for};

/// Components of a point.
pub(crate) const COMPONENTS: usize = 5;
/// Five components of a row or of the whole field.
pub(crate) type Five = [f64; COMPONENTS];
/// Planes that make a fork worth its while.
const PLANES: usize = 2;

/// What is derived from each point before a step, as components of the auxiliary rows.
pub(crate) mod aux {
    /// The inverse of the density.
    pub(crate) const INVERSE: usize = 0;
    /// The velocity along the first axis; those along the others follow.
    pub(crate) const VELOCITY: usize = 1;
    /// Kinetic energy by mass.
    pub(crate) const KINETIC: usize = 4;
    /// All energy by mass.
    pub(crate) const ENERGY: usize = 5;
    /// How many all methods have.
    pub(crate) const COMMON: usize = 6;
}

/// A class of a method, and what NPB publishes of it.
pub(crate) struct Parameters {
    /// Points along an edge of the cube, the boundary included.
    pub(crate) points: usize,
    pub(crate) steps: u32,
    /// Length of a time step.
    pub(crate) dt: f64,
    /// Root mean squares of the right side after the last step, by component.
    pub(crate) residual: Five,
    /// Root mean squares of the deviation from the exact solution, by component.
    pub(crate) error: Five,
}

impl Parameters {
    pub(crate) const fn new(
        points: usize,
        steps: u32,
        dt: f64,
        residual: Five,
        error: Five,
    ) -> Self {
        Self {
            points,
            steps,
            dt,
            residual,
            error,
        }
    }
}

/// How a time step's systems are made and solved: `P` properties of each point go in, packs of `L`
/// lines are solved together.
pub(crate) trait Method<const P: usize, const L: usize>: Sync + Sized {
    /// How many auxiliary components it has: [`aux::COMMON`], and its own.
    const AUXILIARIES: usize;
    /// Memory to work in, in elements by point and line of a pack.
    const WORK: usize;

    /// The method on a grid.
    fn new(grid: &Grid) -> Self;

    /// The published classes.
    fn parameters(class: Class) -> Parameters;

    /// The operations of a step, as NPB counts them, for a cube of an edge of `points`.
    fn operations(points: f64) -> f64;

    /// The auxiliary components that the systems along `axis` are made from.
    fn properties(axis: usize) -> [usize; P];

    /// Fills in its own auxiliary components of a row.
    fn derive(&self, _auxiliary: &mut [f64], _u: &[f64]) {}

    /// Turns a row's right side into the variables of the systems along the first axis.
    fn transform(&self, _right: &mut [f64], _auxiliary: &[f64]) {}

    /// Solves the systems along `axis`: `right` has the inner points of each line, `properties` the
    /// boundary too. `tick` is to be called every few points.
    fn solve(
        &self,
        axis: usize,
        properties: &[Point<P, L>],
        right: &mut [Point<COMPONENTS, L>],
        work: &mut [f64],
        tick: &impl Fn(),
    );

    /// Adds the solution of all systems to a row.
    fn add(&self, u: &mut [f64], solution: &[f64], auxiliary: &[f64]);
}

/// The size of a class of the method that `new` makes.
pub(crate) fn facts<const P: usize, const L: usize, M: Method<P, L>>(
    _new: fn(&Grid) -> M,
    class: Class,
) -> Facts {
    let p = M::parameters(class);
    Facts::grid([p.points; 3], p.steps)
}

/// The memory that a class of the method that `new` makes needs on `ranks` processors.
pub(crate) fn needs<const P: usize, const L: usize, M: Method<P, L>>(
    _new: fn(&Grid) -> M,
    class: Class,
    ranks: usize,
) -> Needs {
    let points = M::parameters(class).points;
    let cube = points * points * points;
    Needs {
        floats: cube * (3 * COMPONENTS + M::AUXILIARIES)
            + ranks * lines::scratch::<P, L, M>(points),
        words: 0,
    }
}

/// Runs all steps of a class by the method that `new` makes.
pub(crate) fn run<const P: usize, const L: usize, M: Method<P, L>>(
    new: fn(&Grid) -> M,
    problem: Problem,
    floats: &mut [f64],
    team: &impl Team,
    hooks: &impl Hooks,
) -> Outcome {
    run_with(
        new,
        &M::parameters(problem.class),
        problem,
        floats,
        team,
        hooks,
    )
}

fn run_with<const P: usize, const L: usize, M: Method<P, L>>(
    new: fn(&Grid) -> M,
    parameters: &Parameters,
    problem: Problem,
    floats: &mut [f64],
    team: &impl Team,
    hooks: &impl Hooks,
) -> Outcome {
    let grid = Grid::new(parameters.points, parameters.dt);
    let method = new(&grid);
    let mut flow = Flow::new(grid, &method, floats, team, hooks);
    flow.force();
    // One step untimed, to touch everything.
    flow.begin();
    flow.step();
    flow.begin();
    flow.measure(problem, parameters)
}

struct Flow<'a, const P: usize, const L: usize, M, T, H> {
    grid: Grid,
    method: &'a M,
    u: &'a mut [f64],
    right: &'a mut [f64],
    forcing: &'a mut [f64],
    auxiliary: &'a mut [f64],
    scratch: &'a mut [f64],
    team: &'a T,
    hooks: &'a H,
}

impl<'a, const P: usize, const L: usize, M, T, H> Flow<'a, P, L, M, T, H>
where
    M: Method<P, L>,
    T: Team,
    H: Hooks,
{
    fn new(grid: Grid, method: &'a M, floats: &'a mut [f64], team: &'a T, hooks: &'a H) -> Self {
        let cube = grid.points * grid.points * grid.points;
        let (u, rest) = floats.split_at_mut(cube * COMPONENTS);
        let (right, rest) = rest.split_at_mut(cube * COMPONENTS);
        let (forcing, rest) = rest.split_at_mut(cube * COMPONENTS);
        let (auxiliary, scratch) = rest.split_at_mut(cube * M::AUXILIARIES);
        Self {
            grid,
            method,
            u,
            right,
            forcing,
            auxiliary,
            scratch,
            team,
            hooks,
        }
    }

    /// Elements of a row and of a plane of five components.
    fn sizes(&self) -> (usize, usize) {
        let row = self.grid.points * COMPONENTS;
        (row, row * self.grid.points)
    }

    fn ranks(&self) -> usize {
        ranks_for(self.team, self.grid.points, PLANES)
    }

    fn step(&mut self) {
        self.derive();
        self.right_side(|row, auxiliary| self.method.transform(row, auxiliary));
        self.solve_in_planes();
        self.solve_across_planes();
        self.add();
    }

    fn measure(mut self, problem: Problem, p: &Parameters) -> Outcome {
        self.hooks.progress(0, p.steps);
        self.hooks.ready();
        let start = self.hooks.nanos();
        for step in 1..=p.steps {
            self.step();
            self.hooks.progress(step, p.steps);
        }
        let nanos = self.hooks.nanos().saturating_sub(start);

        let error = self.error();
        self.derive();
        self.right_side(|_, _| ());
        let residual = self.residual();
        let check = |name, value, reference| Check {
            name,
            value,
            reference,
        };
        let mut verification = Verification::new(
            Check::EPSILON,
            check("norm of the density's residual", residual[0], p.residual[0]),
        );
        for m in 0..COMPONENTS {
            verification = verification
                .and(check("norm of a residual", residual[m], p.residual[m]))
                .and(check("norm of an error", error[m], p.error[m]));
        }
        let operations = f64::from(p.steps) * M::operations(p.points as f64);
        Outcome::new(problem, verification, operations, nanos)
    }

    /// u += what the systems' solution says.
    fn add(&mut self) {
        let (row, plane) = self.sizes();
        let (points, method, hooks) = (self.grid.points, self.method, self.hooks);
        let (right, auxiliary, ranks) = (&*self.right, &*self.auxiliary, self.ranks());
        let inner = &mut self.u[plane..plane * (points - 1)];
        over_units(self.team, ranks, inner, plane, |rank, first, planes| {
            for (k, plane) in (first + 1..).zip(planes.chunks_exact_mut(plane)) {
                for (j, u) in plane
                    .chunks_exact_mut(row)
                    .enumerate()
                    .skip(1)
                    .take(points - 2)
                {
                    let at = k * points + j;
                    let len = points * M::AUXILIARIES;
                    method.add(u, &right[at * row..][..row], &auxiliary[at * len..][..len]);
                    hooks.tick(rank);
                }
            }
            0.0
        });
    }

    /// The root mean squares of the right side by time.
    fn residual(&mut self) -> Five {
        let dt = self.grid.dt;
        self.norms(|this| &mut *this.right, |_, _, _, value| value / dt)
    }

    /// The root mean squares of the deviation from the exact solution.
    fn error(&mut self) -> Five {
        let grid = self.grid.clone();
        self.norms(
            |this| &mut *this.u,
            |m, (k, j), i, value| value - grid.exact(i, j, k)[m],
        )
    }

    /// The root mean squares of `term(component, (k, j), i, value)` over the inner points.
    fn norms(
        &mut self,
        data: impl Fn(&mut Self) -> &mut [f64],
        term: impl Fn(usize, (usize, usize), usize, f64) -> f64 + Sync,
    ) -> Five {
        let (row, plane) = self.sizes();
        let (points, ranks) = (self.grid.points, self.ranks());
        let (team, hooks) = (self.team, self.hooks);
        let inner = &mut data(self)[plane..plane * (points - 1)];
        let cells = (points - 2) as f64;
        core::array::from_fn(|m| {
            let sum = over_units(team, ranks, inner, plane, |rank, first, planes| {
                let mut sum = 0.0;
                for (k, plane) in (first + 1..).zip(planes.chunks_exact(plane)) {
                    for (j, row) in plane.chunks_exact(row).enumerate().skip(1).take(points - 2) {
                        let component = &row[m * points..][..points];
                        for (i, &value) in component.iter().enumerate().skip(1).take(points - 2) {
                            let term = term(m, (k, j), i, value);
                            sum += term * term;
                        }
                        hooks.tick(rank);
                    }
                }
                sum
            });
            sqrt(sum / (cells * cells * cells))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bt::BlockTridiagonal;
    use crate::host::{Clock, Threads};
    use crate::problem::Kernel;
    use crate::sp::Pentadiagonal;

    /// A method whose solution is nothing.
    struct Still;

    impl Method<1, 1> for Still {
        const AUXILIARIES: usize = aux::COMMON;
        const WORK: usize = 0;

        fn new(_grid: &Grid) -> Self {
            Self
        }

        fn parameters(_class: Class) -> Parameters {
            Parameters::new(12, 1, 0.5, [1.0; COMPONENTS], [1.0; COMPONENTS])
        }

        fn operations(_points: f64) -> f64 {
            0.0
        }

        fn properties(_axis: usize) -> [usize; 1] {
            [aux::INVERSE]
        }

        fn solve(
            &self,
            _axis: usize,
            properties: &[Point<1, 1>],
            right: &mut [Point<COMPONENTS, 1>],
            _work: &mut [f64],
            _tick: &impl Fn(),
        ) {
            assert_eq!(properties.len(), right.len() + 2);
            right.fill([[0.0; 1]; COMPONENTS]);
        }

        fn add(&self, u: &mut [f64], solution: &[f64], _auxiliary: &[f64]) {
            u.iter_mut().zip(solution).for_each(|(u, s)| *u += s);
        }
    }

    #[test]
    fn the_exact_solution_is_steady_and_what_a_run_begins_with_is_not() {
        let (team, clock) = (Threads::new(3), Clock::start());
        let mut floats = vec![f64::NAN; needs(Still::new, Class::S, 3).floats];
        let mut flow = Flow::new(Grid::new(12, 0.5), &Still, &mut floats, &team, &clock);
        flow.force();
        assert_eq!(flow.error(), [0.0; COMPONENTS]);
        flow.right_side(|_, _| ());
        assert!(flow.residual().iter().all(|&norm| norm < 1e-13));
        // Nothing is what a step of this method adds, to every point inside.
        flow.step();
        assert_eq!(flow.error(), [0.0; COMPONENTS]);

        flow.begin();
        flow.derive();
        flow.right_side(|_, _| ());
        let (error, residual) = (flow.error(), flow.residual());
        assert!(error.iter().chain(&residual).all(|&norm| norm > 1e-3));
    }

    /// Runs class S as it is published, and with a slightly other time step.
    fn verifies_with_its_own_time_step_only<const P: usize, const L: usize, M: Method<P, L>>(
        new: fn(&Grid) -> M,
        kernel: Kernel,
    ) {
        let class = Class::S;
        let (team, clock) = (Threads::new(2), Clock::start());
        // Memory full of nonsense: the run must not depend on what was there.
        let mut floats = vec![f64::NAN; needs(new, class, 2).floats];
        for (factor, verified) in [(1.0, true), (1.000_001, false)] {
            let mut parameters = M::parameters(class);
            parameters.dt *= factor;
            let problem = Problem { kernel, class };
            let outcome = run_with(new, &parameters, problem, &mut floats, &team, &clock);
            assert_eq!(outcome.verified, verified, "{outcome:?}");
        }
    }

    #[test]
    fn bt_with_another_time_step_does_not_verify() {
        verifies_with_its_own_time_step_only(BlockTridiagonal::new, Kernel::Bt);
    }

    #[test]
    fn sp_with_another_time_step_does_not_verify() {
        verifies_with_its_own_time_step_only(Pentadiagonal::new, Kernel::Sp);
    }
}
