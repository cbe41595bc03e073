//! The right side: fluxes, viscosity, diffusion and dissipation along the three directions, and the
//! forcing.

use super::grid::{AXES, diffusion, dissipation, gas};
use super::{COMPONENTS, Five, Flow, Grid, Method, aux};
use crate::team::{Hooks, Team, over_units};

/// The points of a row from some point on, as many as there are inside.
#[derive(Clone, Copy)]
struct Window<'f> {
    u: &'f [f64],
    auxiliary: &'f [f64],
    points: usize,
    from: usize,
}

impl<'f> Window<'f> {
    #[inline(always)]
    fn u(self, component: usize) -> &'f [f64] {
        &self.u[component * self.points + self.from..][..self.points - 2]
    }

    #[inline(always)]
    fn aux(self, component: usize) -> &'f [f64] {
        &self.auxiliary[component * self.points + self.from..][..self.points - 2]
    }
}

/// The field, to look at.
#[derive(Clone, Copy)]
struct Field<'f> {
    grid: &'f Grid,
    u: &'f [f64],
    auxiliary: &'f [f64],
    /// Components of an auxiliary row.
    auxiliaries: usize,
}

impl<'f> Field<'f> {
    fn auxiliary_row(self, k: usize, j: usize) -> &'f [f64] {
        let len = self.grid.points * self.auxiliaries;
        &self.auxiliary[(k * self.grid.points + j) * len..][..len]
    }

    fn row(self, k: usize, j: usize) -> &'f [f64] {
        let len = self.grid.points * COMPONENTS;
        &self.u[(k * self.grid.points + j) * len..][..len]
    }

    #[inline(always)]
    fn window(self, k: usize, j: usize, from: usize) -> Window<'f> {
        Window {
            u: self.row(k, j),
            auxiliary: self.auxiliary_row(k, j),
            points: self.grid.points,
            from,
        }
    }

    /// Adds what the equations say of the inner points of row `j` of plane `k`.
    fn add_row(self, k: usize, j: usize, out: &mut [f64]) {
        let here = self.window(k, j, 1);
        let neighbours = [
            [self.window(k, j, 0), self.window(k, j, 2)],
            [self.window(k, j - 1, 1), self.window(k, j + 1, 1)],
            [self.window(k - 1, j, 1), self.window(k + 1, j, 1)],
        ];
        for (axis, [before, behind]) in neighbours.into_iter().enumerate() {
            differences(self.grid, axis, out, before, here, behind);
        }
        let points = self.grid.points;
        for m in 0..COMPONENTS {
            let out = &mut out[m * points..][..points];
            let u = |k, j| &self.row(k, j)[m * points..][..points];
            damp_along(out, u(k, j));
            // The weights of what lies outside are zero.
            let around = |at: usize| [at.max(2) - 2, at - 1, at, at + 1, (at + 2).min(points - 1)];
            damp_across(out, dissipation(j, points), around(j).map(|j| u(k, j)));
            damp_across(out, dissipation(k, points), around(k).map(|k| u(k, j)));
        }
    }
}

/// Adds the differences along one axis.
#[inline(always)]
fn differences(
    grid: &Grid,
    axis: usize,
    out: &mut [f64],
    before: Window<'_>,
    here: Window<'_>,
    behind: Window<'_>,
) {
    let (points, first, second) = (grid.points, grid.first, grid.second);
    let inner = points - 2;
    let diffusion = diffusion(axis) * second;
    let viscosity = gas::VISCOSITY * second;
    let along = axis + 1;
    let (speed_before, speed_here, speed_behind) = (
        before.aux(aux::VELOCITY + axis),
        here.aux(aux::VELOCITY + axis),
        behind.aux(aux::VELOCITY + axis),
    );
    let (kinetic_before, kinetic_here, kinetic_behind) = (
        before.aux(aux::KINETIC),
        here.aux(aux::KINETIC),
        behind.aux(aux::KINETIC),
    );
    let (mass_before, mass_behind) = (before.u(0), behind.u(0));
    let (energy_before, energy_behind) = (before.u(4), behind.u(4));

    for m in 0..COMPONENTS {
        let out = &mut out[m * points + 1..][..inner];
        let (u_before, u_here, u_behind) = (before.u(m), here.u(m), behind.u(m));
        for i in 0..inner {
            out[i] += diffusion * (u_behind[i] - 2.0 * u_here[i] + u_before[i]);
        }
        if m == 0 {
            let (flow_before, flow_behind) = (before.u(along), behind.u(along));
            for i in 0..inner {
                out[i] -= first * (flow_behind[i] - flow_before[i]);
            }
        } else if m < 4 {
            let weight = viscosity * if m == along { gas::ALONG } else { 1.0 };
            let component = aux::VELOCITY + m - 1;
            let (v_before, v_here, v_behind) = (
                before.aux(component),
                here.aux(component),
                behind.aux(component),
            );
            for i in 0..inner {
                out[i] += weight * (v_behind[i] - 2.0 * v_here[i] + v_before[i])
                    - first * (u_behind[i] * speed_behind[i] - u_before[i] * speed_before[i]);
            }
            if m == along {
                let pressure = first * gas::PRESSURE;
                for i in 0..inner {
                    let inner_behind = energy_behind[i] - mass_behind[i] * kinetic_behind[i];
                    let inner_before = energy_before[i] - mass_before[i] * kinetic_before[i];
                    out[i] -= pressure * (inner_behind - inner_before);
                }
            }
        } else {
            let (e_before, e_here, e_behind) = (
                before.aux(aux::ENERGY),
                here.aux(aux::ENERGY),
                behind.aux(aux::ENERGY),
            );
            for i in 0..inner {
                let kinetic = kinetic_behind[i] - 2.0 * kinetic_here[i] + kinetic_before[i];
                let squares = speed_behind[i] * speed_behind[i]
                    - 2.0 * speed_here[i] * speed_here[i]
                    + speed_before[i] * speed_before[i];
                let heat = e_behind[i] - 2.0 * e_here[i] + e_before[i];
                out[i] +=
                    viscosity * ((1.0 - gas::HEAT) * kinetic + squares / 6.0 + gas::HEAT * heat);
                // Enthalpy: γ·E less the pressure's share of the kinetic energy.
                let flow_behind = gas::GAMMA * energy_behind[i]
                    - gas::PRESSURE * mass_behind[i] * kinetic_behind[i];
                let flow_before = gas::GAMMA * energy_before[i]
                    - gas::PRESSURE * mass_before[i] * kinetic_before[i];
                out[i] -= first * (flow_behind * speed_behind[i] - flow_before * speed_before[i]);
            }
        }
    }
}

/// Dissipation across rows: all points of a row have the same weights.
#[inline(always)]
fn damp_across(out: &mut [f64], weights: [f64; 5], rows: [&[f64]; 5]) {
    let inner = out.len() - 2;
    let out = &mut out[1..][..inner];
    let rows = rows.map(|row| &row[1..][..inner]);
    for i in 0..inner {
        out[i] -= weights[0] * rows[0][i]
            + weights[1] * rows[1][i]
            + weights[2] * rows[2][i]
            + weights[3] * rows[3][i]
            + weights[4] * rows[4][i];
    }
}

/// Dissipation along a row, with other weights at the two points on each end.
#[inline(always)]
fn damp_along(out: &mut [f64], row: &[f64]) {
    let points = row.len();
    let [two_before, before, centre, behind, two_behind] = dissipation(points / 2, points);
    for i in 3..points - 3 {
        out[i] -= two_before * row[i - 2]
            + before * row[i - 1]
            + centre * row[i]
            + behind * row[i + 1]
            + two_behind * row[i + 2];
    }
    for i in [1, 2, points - 3, points - 2] {
        let weights = dissipation(i, points);
        let places = [i.max(2) - 2, i - 1, i, i + 1, (i + 2).min(points - 1)];
        let sum: f64 = weights.iter().zip(places).map(|(w, at)| w * row[at]).sum();
        out[i] -= sum;
    }
}

impl<const P: usize, const L: usize, M, T, H> Flow<'_, P, L, M, T, H>
where
    M: Method<P, L>,
    T: Team,
    H: Hooks,
{
    /// Sets every point of the field.
    fn set(&mut self, value: impl Fn(usize, usize, usize) -> Five + Sync) {
        let (row, plane) = self.sizes();
        let (points, hooks, ranks) = (self.grid.points, self.hooks, self.ranks());
        over_units(self.team, ranks, self.u, plane, |rank, first, planes| {
            for (k, plane) in (first..).zip(planes.chunks_exact_mut(plane)) {
                for (j, row) in plane.chunks_exact_mut(row).enumerate() {
                    for i in 0..points {
                        for (m, value) in value(i, j, k).into_iter().enumerate() {
                            row[m * points + i] = value;
                        }
                    }
                    hooks.tick(rank);
                }
            }
            0.0
        });
    }

    /// Sets the field to what a run begins with.
    pub(super) fn begin(&mut self) {
        let grid = self.grid.clone();
        self.set(|i, j, k| grid.initial(i, j, k));
    }

    /// The forcing: what must be added for the exact solution to stay as it is. Uses the field.
    pub(super) fn force(&mut self) {
        let grid = self.grid.clone();
        self.set(|i, j, k| grid.exact(i, j, k));
        self.derive();
        self.forcing.fill(0.0);
        // With nothing else to force it, the right side of a unit of time is what the exact
        // solution would change by.
        self.grid.dt = -1.0;
        self.right_side(|_, _| ());
        self.grid.dt = grid.dt;
        self.forcing.copy_from_slice(self.right);
    }

    /// The auxiliary components of every point.
    pub(super) fn derive(&mut self) {
        let (row, _) = self.sizes();
        let (points, u, method) = (self.grid.points, &*self.u, self.method);
        let (hooks, ranks) = (self.hooks, self.ranks());
        let unit = points * M::AUXILIARIES;
        over_units(
            self.team,
            ranks,
            self.auxiliary,
            unit,
            |rank, first, rows| {
                for (at, auxiliary) in (first..).zip(rows.chunks_exact_mut(unit)) {
                    let u = &u[at * row..][..row];
                    derive_row(auxiliary, u, points);
                    method.derive(auxiliary, u);
                    hooks.tick(rank);
                }
                0.0
            },
        );
    }

    /// The right side of the inner points, by time; `finish` is given each row, and its auxiliary
    /// one.
    pub(super) fn right_side(&mut self, finish: impl Fn(&mut [f64], &[f64]) + Sync) {
        let (row, plane) = self.sizes();
        let (points, hooks, ranks) = (self.grid.points, self.hooks, self.ranks());
        let (forcing, dt) = (&*self.forcing, self.grid.dt);
        let field = Field {
            grid: &self.grid,
            u: self.u,
            auxiliary: self.auxiliary,
            auxiliaries: M::AUXILIARIES,
        };
        let inner = &mut self.right[plane..plane * (points - 1)];
        over_units(self.team, ranks, inner, plane, |rank, first, planes| {
            for (k, plane) in (first + 1..).zip(planes.chunks_exact_mut(plane)) {
                for (j, out) in plane
                    .chunks_exact_mut(row)
                    .enumerate()
                    .skip(1)
                    .take(points - 2)
                {
                    out.copy_from_slice(&forcing[(k * points + j) * row..][..row]);
                    field.add_row(k, j, out);
                    out.iter_mut().for_each(|value| *value *= dt);
                    finish(out, field.auxiliary_row(k, j));
                    hooks.tick(rank);
                }
            }
            0.0
        });
    }
}

fn derive_row(auxiliary: &mut [f64], u: &[f64], points: usize) {
    let mut components = auxiliary.chunks_exact_mut(points);
    let mut next = || components.next().unwrap_or(&mut []);
    let (inverse, velocity) = (next(), [next(), next(), next()]);
    let (kinetic, energy) = (next(), next());
    let u = |m: usize| &u[m * points..][..points];
    for (inverse, mass) in inverse.iter_mut().zip(u(0)) {
        *inverse = 1.0 / mass;
    }
    kinetic.fill(0.0);
    for (axis, velocity) in velocity.into_iter().enumerate() {
        let momentum = u(axis + 1);
        for i in 0..points {
            velocity[i] = momentum[i] * inverse[i];
            kinetic[i] += 0.5 * velocity[i] * velocity[i];
        }
    }
    for ((energy, all), inverse) in energy.iter_mut().zip(u(4)).zip(inverse) {
        *energy = all * *inverse;
    }
    debug_assert_eq!(aux::COMMON, AXES + 3);
}
