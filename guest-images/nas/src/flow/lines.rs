//! The systems of a time step, line by line, in packs.

use super::{COMPONENTS, Flow, Method};
use crate::lines::{
    Point, gather_across, gather_along, packs, points, scatter_across, scatter_along,
};
use crate::team::{Hooks, Team, over_strips, over_units_with};

/// All components of a right side.
const ALL: [usize; COMPONENTS] = [0, 1, 2, 3, 4];

/// Memory of each rank's own, in elements: a pack's properties, right sides and what the method
/// works in.
pub(super) fn scratch<const P: usize, const L: usize, M: Method<P, L>>(points: usize) -> usize {
    points * (P + COMPONENTS + M::WORK) * L
}

/// A rank's scratch memory, taken apart.
struct Pack<'s, const P: usize, const L: usize> {
    properties: &'s mut [Point<P, L>],
    /// Of the inner points.
    right: &'s mut [Point<COMPONENTS, L>],
    work: &'s mut [f64],
}

impl<'s, const P: usize, const L: usize> Pack<'s, P, L> {
    fn new(scratch: &'s mut [f64], len: usize) -> Self {
        let (properties, rest) = scratch.split_at_mut(len * P * L);
        let (right, work) = rest.split_at_mut(len * COMPONENTS * L);
        let (properties, right) = (points(properties), points(right));
        let right = right.get_mut(..len - 2).unwrap_or(&mut []);
        Self {
            properties,
            right,
            work,
        }
    }
}

impl<const P: usize, const L: usize, M, T, H> Flow<'_, P, L, M, T, H>
where
    M: Method<P, L>,
    T: Team,
    H: Hooks,
{
    /// The systems along the first two axes, one plane after the other.
    pub(super) fn solve_in_planes(&mut self) {
        let (row, plane) = self.sizes();
        let points = self.grid.points;
        let (method, hooks, ranks) = (self.method, self.hooks, self.ranks());
        let auxiliary_row = points * M::AUXILIARIES;
        let auxiliary = &*self.auxiliary;
        let inner = &mut self.right[plane..plane * (points - 1)];
        let scratch = (&mut *self.scratch, scratch::<P, L, M>(points));
        over_units_with(
            self.team,
            ranks,
            inner,
            plane,
            scratch,
            |rank, first, planes, scratch| {
                let Pack {
                    properties,
                    right,
                    work,
                } = Pack::<P, L>::new(scratch, points);
                let (all, inside) = (0..points, 1..points - 1);
                let tick = || hooks.tick(rank);
                let planes = planes.chunks_exact_mut(plane);
                let auxiliaries = auxiliary
                    .chunks_exact(auxiliary_row * points)
                    .skip(first + 1);
                for (plane, auxiliary) in planes.zip(auxiliaries) {
                    for rows in packs::<L>(inside.clone()) {
                        let from = &auxiliary[rows.start * auxiliary_row..rows.end * auxiliary_row];
                        let to = &mut plane[rows.start * row..rows.end * row];
                        let shape = (auxiliary_row, points);
                        gather_along(properties, from, shape, &all, &M::properties(0));
                        gather_along(right, to, (row, points), &inside, &ALL);
                        method.solve(0, properties, right, work, &tick);
                        scatter_along(right, to, (row, points), &inside);
                        tick();
                    }
                    for xs in packs::<L>(inside.clone()) {
                        let from = auxiliary.chunks_exact(auxiliary_row);
                        gather_across(properties, from, points, &xs, &M::properties(1));
                        let rows = plane.chunks_exact(row).skip(1);
                        gather_across(right, rows, points, &xs, &ALL);
                        method.solve(1, properties, right, work, &tick);
                        let rows = plane.chunks_exact_mut(row).skip(1);
                        scatter_across(right, rows, points, &xs);
                        tick();
                    }
                }
            },
        );
    }

    /// The systems along the third axis.
    pub(super) fn solve_across_planes(&mut self) {
        let (row, plane) = self.sizes();
        let points = self.grid.points;
        let (method, hooks) = (self.method, self.hooks);
        let auxiliary_row = points * M::AUXILIARIES;
        let auxiliary = &*self.auxiliary;
        let scratch = (&mut *self.scratch, scratch::<P, L, M>(points));
        let inside = 1..points - 1;
        let shape = (plane, row);
        over_strips(
            self.team,
            self.right,
            shape,
            inside.clone(),
            scratch,
            |rank, first, strips, scratch| {
                let Pack {
                    properties,
                    right,
                    work,
                } = Pack::<P, L>::new(scratch, points);
                let tick = || hooks.tick(rank);
                let len = strips
                    .iter()
                    .flatten()
                    .next()
                    .map_or(0, |strip| strip.len());
                for (j, at) in (first..).zip((0..len).step_by(row)) {
                    let line = at..at + row;
                    for xs in packs::<L>(inside.clone()) {
                        let rows = auxiliary
                            .chunks_exact(auxiliary_row)
                            .skip(j)
                            .step_by(points);
                        gather_across(properties, rows, points, &xs, &M::properties(2));
                        let rows = strips
                            .iter()
                            .flatten()
                            .skip(1)
                            .map(|strip| &strip[line.clone()]);
                        gather_across(right, rows, points, &xs, &ALL);
                        method.solve(2, properties, right, work, &tick);
                        let rows = strips.iter_mut().flatten().skip(1);
                        let rows = rows.map(|strip| &mut strip[line.clone()]);
                        scatter_across(right, rows, points, &xs);
                        tick();
                    }
                }
            },
        );
    }
}
