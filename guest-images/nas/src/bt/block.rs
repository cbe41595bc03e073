//! The 5×5 blocks of a system: Jacobians of the equations' fluxes, and the algebra of elimination.

use crate::flow::{AXES, COMPONENTS, Grid, diffusion, gas};
use crate::lines::Point;

/// A block of each line of a pack.
pub(super) type Block<const L: usize> = [Point<COMPONENTS, L>; COMPONENTS];

/// The derivatives of the fluxes along an axis by the five components, at a point.
#[derive(Clone, Copy)]
pub(super) struct Jacobians<const L: usize> {
    /// Of convection and pressure.
    convection: Block<L>,
    /// Of viscosity and heat.
    viscosity: Block<L>,
}

impl<const L: usize> Default for Jacobians<L> {
    fn default() -> Self {
        Self {
            convection: [[[0.0; L]; COMPONENTS]; COMPONENTS],
            viscosity: [[[0.0; L]; COMPONENTS]; COMPONENTS],
        }
    }
}

impl<const L: usize> Jacobians<L> {
    /// `point` is the inverse of the density, the velocities, the kinetic and all energy by mass.
    #[inline(always)]
    pub(super) fn new(axis: usize, point: &Point<6, L>) -> Self {
        let mut all = Self::default();
        let (f, n) = (&mut all.convection, &mut all.viscosity);
        let heat = gas::HEAT * gas::VISCOSITY;
        for lane in 0..L {
            let inverse = point[0][lane];
            let velocity: [f64; AXES] = core::array::from_fn(|axis| point[1 + axis][lane]);
            let (kinetic, energy) = (point[4][lane], point[5][lane]);
            let speed = velocity[axis];

            f[0][1 + axis][lane] = 1.0;
            let mut heating = heat * energy;
            for (j, v) in velocity.into_iter().enumerate() {
                let row = &mut f[1 + j];
                row[0][lane] = -v * speed;
                row[1 + j][lane] = speed;
                row[1 + axis][lane] += if j == axis { 0.0 } else { v };
                let along = if j == axis { gas::ALONG } else { 1.0 };
                let drag = gas::VISCOSITY * along;
                n[1 + j][0][lane] = -drag * v * inverse;
                n[1 + j][1 + j][lane] = drag * inverse;
                n[4][1 + j][lane] = (drag - heat) * v * inverse;
                heating += (drag - heat) * v * v;

                f[4][1 + j][lane] = -gas::PRESSURE * v * speed;
            }
            n[4][0][lane] = -heating * inverse;
            n[4][4][lane] = heat * inverse;

            let row = &mut f[1 + axis];
            row[0][lane] += gas::PRESSURE * kinetic;
            row[1 + axis][lane] += speed;
            for (j, v) in velocity.into_iter().enumerate() {
                row[1 + j][lane] -= gas::PRESSURE * v;
            }
            row[4][lane] = gas::PRESSURE;

            f[4][0][lane] = speed * (2.0 * gas::PRESSURE * kinetic - gas::GAMMA * energy);
            f[4][1 + axis][lane] += gas::GAMMA * energy - gas::PRESSURE * kinetic;
            f[4][4][lane] = gas::GAMMA * speed;
        }
        all
    }
}

/// What the systems along an axis are made of, by time step.
pub(super) struct Stencil {
    /// Of a first difference.
    first: f64,
    /// Of a second one.
    second: f64,
    diffusion: f64,
}

impl Stencil {
    pub(super) fn new(grid: &Grid, axis: usize) -> Self {
        Self {
            first: grid.dt * grid.first,
            second: grid.dt * grid.second,
            diffusion: diffusion(axis),
        }
    }

    /// convection·C + viscosity·V + identity·I
    #[inline(always)]
    fn combine<const L: usize>(
        jacobians: &Jacobians<L>,
        convection: f64,
        viscosity: f64,
        identity: f64,
    ) -> Block<L> {
        let mut block = [[[0.0; L]; COMPONENTS]; COMPONENTS];
        for (i, row) in block.iter_mut().enumerate() {
            for (j, element) in row.iter_mut().enumerate() {
                for (lane, value) in element.iter_mut().enumerate() {
                    *value = convection * jacobians.convection[i][j][lane]
                        + viscosity * jacobians.viscosity[i][j][lane];
                    if i == j {
                        *value += identity;
                    }
                }
            }
        }
        block
    }

    /// The block below the diagonal, from the point before.
    #[inline(always)]
    pub(super) fn lower<const L: usize>(&self, before: &Jacobians<L>) -> Block<L> {
        let spread = -self.second * self.diffusion;
        Self::combine(before, -self.first, -self.second, spread)
    }

    /// The block on the diagonal.
    #[inline(always)]
    pub(super) fn diagonal<const L: usize>(&self, here: &Jacobians<L>) -> Block<L> {
        let spread = 1.0 + 2.0 * self.second * self.diffusion;
        Self::combine(here, 0.0, 2.0 * self.second, spread)
    }

    /// The block above the diagonal, from the point behind.
    #[inline(always)]
    pub(super) fn upper<const L: usize>(&self, behind: &Jacobians<L>) -> Block<L> {
        let spread = -self.second * self.diffusion;
        Self::combine(behind, self.first, -self.second, spread)
    }
}

/// c −= a·b
#[inline(always)]
pub(super) fn multiply_subtract<const L: usize>(a: &Block<L>, b: &Block<L>, c: &mut Block<L>) {
    for (a, c) in a.iter().zip(c) {
        for (a, b) in a.iter().zip(b) {
            for (b, c) in b.iter().zip(c.iter_mut()) {
                for lane in 0..L {
                    c[lane] -= a[lane] * b[lane];
                }
            }
        }
    }
}

/// r −= a·v
#[inline(always)]
pub(super) fn vector_subtract<const L: usize>(
    a: &Block<L>,
    v: &Point<COMPONENTS, L>,
    r: &mut Point<COMPONENTS, L>,
) {
    for (a, r) in a.iter().zip(r) {
        for (a, v) in a.iter().zip(v) {
            for lane in 0..L {
                r[lane] -= a[lane] * v[lane];
            }
        }
    }
}

/// Solves a·X = c and a·x = r in place, by elimination without pivoting: the diagonal dominates.
/// Leaves nothing useful in `a`.
#[inline(always)]
pub(super) fn solve<const L: usize>(
    a: &mut Block<L>,
    c: &mut Block<L>,
    r: &mut Point<COMPONENTS, L>,
) {
    for pivot in 0..COMPONENTS {
        let scale = a[pivot][pivot].map(|value| 1.0 / value);
        let behind = pivot + 1..;
        scale_by(&mut a[pivot][behind.clone()], &scale);
        scale_by(&mut c[pivot], &scale);
        scale_by(&mut r[pivot..=pivot], &scale);
        let (a_pivot, c_pivot, r_pivot) = (a[pivot], c[pivot], r[pivot]);
        for row in (0..COMPONENTS).filter(|&row| row != pivot) {
            let factor = a[row][pivot];
            take_off(
                &mut a[row][behind.clone()],
                &factor,
                &a_pivot[behind.clone()],
            );
            take_off(&mut c[row], &factor, &c_pivot);
            take_off(&mut r[row..=row], &factor, &[r_pivot]);
        }
    }
}

#[inline(always)]
fn scale_by<const L: usize>(row: &mut [[f64; L]], by: &[f64; L]) {
    for element in row {
        for (value, by) in element.iter_mut().zip(by) {
            *value *= by;
        }
    }
}

/// row −= factor·other
#[inline(always)]
fn take_off<const L: usize>(row: &mut [[f64; L]], factor: &[f64; L], other: &[[f64; L]]) {
    for (element, other) in row.iter_mut().zip(other) {
        for lane in 0..L {
            element[lane] -= factor[lane] * other[lane];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    type One = [f64; COMPONENTS];
    type Function = fn(usize, One) -> One;

    /// The flux of the five components along an axis, without viscosity.
    fn flux(axis: usize, u: One) -> One {
        let speed = u[1 + axis] / u[0];
        let kinetic = 0.5 * (u[1] * u[1] + u[2] * u[2] + u[3] * u[3]) / u[0];
        let pressure = gas::PRESSURE * (u[4] - kinetic);
        let mut flux = u.map(|component| component * speed);
        flux[1 + axis] += pressure;
        flux[4] += pressure * speed;
        flux
    }

    /// What viscosity and heat spread along an axis: velocities, and energy.
    fn spread(axis: usize, u: One) -> One {
        let mut v = [0.0; COMPONENTS];
        let heat = gas::HEAT * gas::VISCOSITY;
        v[4] = heat * u[4] / u[0];
        for j in 0..AXES {
            let velocity = u[1 + j] / u[0];
            let drag = gas::VISCOSITY * if j == axis { gas::ALONG } else { 1.0 };
            v[1 + j] = drag * velocity;
            v[4] += 0.5 * (drag - heat) * velocity * velocity;
        }
        v
    }

    #[test]
    fn jacobians_are_the_derivatives_of_the_fluxes() {
        let u = [1.3, 0.7, -0.4, 0.9, 4.2];
        let kinetic = 0.5 * (u[1] * u[1] + u[2] * u[2] + u[3] * u[3]) / (u[0] * u[0]);
        let point = [
            1.0 / u[0],
            u[1] / u[0],
            u[2] / u[0],
            u[3] / u[0],
            kinetic,
            u[4] / u[0],
        ];
        for axis in 0..AXES {
            let all = Jacobians::<1>::new(axis, &point.map(|x| [x]));
            let pairs: [(Function, _); 2] = [(flux, all.convection), (spread, all.viscosity)];
            for (function, block) in pairs {
                for by in 0..COMPONENTS {
                    let moved = |step: f64| {
                        let mut u = u;
                        u[by] += step;
                        function(axis, u)
                    };
                    let (low, high) = (moved(-1e-5), moved(1e-5));
                    for of in 0..COMPONENTS {
                        let slope = (high[of] - low[of]) / 2e-5;
                        let found = block[of][by][0];
                        assert!(
                            (slope - found).abs() < 1e-7,
                            "{axis} {of} {by}: {slope} {found}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_solved_is_a_solution() {
        let mut random = Random::new(271_828_183);
        let mut draw = || {
            let mut block: Block<3> = [[[0.0; 3]; COMPONENTS]; COMPONENTS];
            block
                .as_flattened_mut()
                .as_flattened_mut()
                .fill_with(|| random.next());
            block
        };
        let (mut a, c) = (draw(), draw());
        (0..COMPONENTS).for_each(|i| a[i][i] = a[i][i].map(|x| x + 5.0));
        let r = draw()[0];
        let (mut left, mut solution, mut vector) = (a, c, r);
        solve(&mut left, &mut solution, &mut vector);
        let (mut rest, mut rest_vector) = (c, r);
        multiply_subtract(&a, &solution, &mut rest);
        vector_subtract(&a, &vector, &mut rest_vector);
        for value in rest.iter().flatten().chain(&rest_vector).flatten() {
            assert!(value.abs() < 1e-14, "{value}");
        }
    }
}
