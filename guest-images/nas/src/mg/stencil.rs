//! The sweeps over a grid. All work row by row on sums across the four rows that share a face
//! (`near`) and the four that share an edge (`far`) with the row in hand, so that each neighbour is
//! added once, not three times.

use super::MAX_LEVEL;
use crate::team::{Hooks, Team, over_units, ranks_for};

/// Points of a row of the largest grid.
const MAX_ROW: usize = (1 << MAX_LEVEL) + 2;
/// Rows between two ticks: some 10 µs.
const ROWS: usize = 16;
/// Planes that make a fork worth its while.
const PLANES: usize = 16;

type Row = [f64; MAX_ROW];

/// A grid's shape and who works on it.
pub(super) struct Grid<'a, T, H> {
    pub(super) interior: usize,
    pub(super) team: &'a T,
    pub(super) hooks: &'a H,
}

impl<T, H> Clone for Grid<'_, T, H> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T, H> Copy for Grid<'_, T, H> {}

impl<T: Team, H: Hooks> Grid<'_, T, H> {
    fn edge(self) -> usize {
        self.interior + 2
    }

    fn points(self) -> usize {
        self.edge() * self.edge() * self.edge()
    }

    pub(super) fn ranks(self) -> usize {
        ranks_for(self.team, self.interior, PLANES)
    }

    /// Runs `row` on every interior row of `out`, with its plane and row number, and fills in the
    /// periodic copies.
    fn sweep(self, out: &mut [f64], row: impl Fn(&mut Scratch, usize, usize, &mut [f64]) + Sync) {
        let edge = self.edge();
        let interior = &mut out[edge * edge..][..self.interior * edge * edge];
        over_units(
            self.team,
            self.ranks(),
            interior,
            edge * edge,
            |rank, first, planes| {
                let mut scratch = Scratch {
                    near: [0.0; MAX_ROW],
                    far: [0.0; MAX_ROW],
                    copy: [0.0; MAX_ROW],
                };
                for (i, plane) in planes.chunks_exact_mut(edge * edge).enumerate() {
                    for (y, out) in plane
                        .chunks_exact_mut(edge)
                        .enumerate()
                        .skip(1)
                        .take(edge - 2)
                    {
                        row(&mut scratch, first + i + 1, y, out);
                        if y % ROWS == 0 {
                            self.hooks.tick(rank);
                        }
                    }
                    wrap_faces(plane, edge);
                    self.hooks.tick(rank);
                }
                0.0
            },
        );
        wrap_planes(self, out);
    }
}

/// Lines of one rank's own.
struct Scratch {
    near: Row,
    far: Row,
    copy: Row,
}

/// Row `y` of plane `z`.
#[inline(always)]
fn row(grid: &[f64], edge: usize, z: usize, y: usize) -> &[f64] {
    &grid[(z * edge + y) * edge..][..edge]
}

/// The sums across the rows around row `y` of plane `z`: faces into `near`, edges into `far`.
#[inline(always)]
fn cross(grid: &[f64], edge: usize, z: usize, y: usize, near: &mut [f64], far: &mut [f64]) {
    let at = |dz: usize, dy: usize| row(grid, edge, z + dz - 1, y + dy - 1);
    let (n0, n1, n2, n3) = (at(1, 0), at(1, 2), at(0, 1), at(2, 1));
    let (f0, f1, f2, f3) = (at(0, 0), at(0, 2), at(2, 0), at(2, 2));
    let (near, far) = (&mut near[..edge], &mut far[..edge]);
    for i in 0..edge {
        near[i] = n0[i] + n1[i] + n2[i] + n3[i];
        far[i] = f0[i] + f1[i] + f2[i] + f3[i];
    }
}

/// The three windows of a row: each point's left neighbour, itself, its right neighbour.
#[inline(always)]
fn around(row: &[f64], interior: usize) -> (&[f64], &[f64], &[f64]) {
    (
        &row[..interior],
        &row[1..][..interior],
        &row[2..][..interior],
    )
}

/// Coefficients of the operator A by distance; that of the faces is zero.
pub(super) struct Residual {
    pub(super) centre: f64,
    pub(super) edge: f64,
    pub(super) corner: f64,
}

/// r = v − A·u, or r −= A·u without a `v`.
pub(super) fn residual<T: Team, H: Hooks>(
    grid: Grid<'_, T, H>,
    r: &mut [f64],
    u: &[f64],
    v: Option<&[f64]>,
    a: &Residual,
) {
    let (n, edge) = (grid.interior, grid.edge());
    grid.sweep(r, |Scratch { near, far, copy }, z, y, out| {
        cross(u, edge, z, y, near, far);
        let v = match v {
            Some(v) => row(v, edge, z, y),
            None => {
                copy[..edge].copy_from_slice(out);
                &copy[..edge]
            }
        };
        let (near_left, _, near_right) = around(near, n);
        let (far_left, far_here, far_right) = around(far, n);
        let (_, u, _) = around(row(u, edge, z, y), n);
        let (_, v, _) = around(v, n);
        let out = &mut out[1..][..n];
        for i in 0..n {
            out[i] = v[i]
                - a.centre * u[i]
                - a.edge * (far_here[i] + near_left[i] + near_right[i])
                - a.corner * (far_left[i] + far_right[i]);
        }
    });
}

/// Coefficients of the smoother S by distance; that of the corners is zero.
pub(super) struct Smoother {
    pub(super) centre: f64,
    pub(super) face: f64,
    pub(super) edge: f64,
}

/// u += S·r.
pub(super) fn smooth<T: Team, H: Hooks>(
    grid: Grid<'_, T, H>,
    u: &mut [f64],
    r: &[f64],
    c: &Smoother,
) {
    let (n, edge) = (grid.interior, grid.edge());
    grid.sweep(u, |Scratch { near, far, .. }, z, y, out| {
        cross(r, edge, z, y, near, far);
        let (near_left, near_here, near_right) = around(near, n);
        let (_, far_here, _) = around(far, n);
        let (left, here, right) = around(row(r, edge, z, y), n);
        let out = &mut out[1..][..n];
        for i in 0..n {
            out[i] += c.centre * here[i]
                + c.face * (left[i] + right[i] + near_here[i])
                + c.edge * (far_here[i] + near_left[i] + near_right[i]);
        }
    });
}

/// The residual onto the next coarser grid (`grid` is the coarse one), with full weighting.
pub(super) fn restrict<T: Team, H: Hooks>(grid: Grid<'_, T, H>, coarse: &mut [f64], fine: &[f64]) {
    let n = grid.interior;
    let fine_edge = 2 * n + 2;
    grid.sweep(coarse, |Scratch { near, far, .. }, z, y, out| {
        cross(fine, fine_edge, 2 * z, 2 * y, near, far);
        let here = row(fine, fine_edge, 2 * z, 2 * y);
        let (near, far) = (&near[..fine_edge], &far[..fine_edge]);
        for (j, out) in out.iter_mut().enumerate().take(n + 1).skip(1) {
            let i = 2 * j;
            *out = 0.5 * here[i]
                + 0.25 * (here[i - 1] + here[i + 1] + near[i])
                + 0.125 * (near[i - 1] + near[i + 1] + far[i])
                + 0.0625 * (far[i - 1] + far[i + 1]);
        }
    });
}

/// Adds the trilinear interpolation of `coarse` to `fine` (`grid` is the fine one), periodic copies
/// included.
pub(super) fn interpolate<T: Team, H: Hooks>(
    grid: Grid<'_, T, H>,
    fine: &mut [f64],
    coarse: &[f64],
) {
    let edge = grid.edge();
    let coarse_edge = grid.interior / 2 + 2;
    let all = &mut fine[..grid.points()];
    // Units of two planes: both halves of one coarse plane.
    over_units(
        grid.team,
        grid.ranks(),
        all,
        2 * edge * edge,
        |rank, first, planes| {
            let mut sums: [Row; 3] = [[0.0; MAX_ROW]; 3];
            for (i, pair) in planes.chunks_exact_mut(2 * edge * edge).enumerate() {
                let z = first + i;
                let (even, odd) = pair.split_at_mut(edge * edge);
                let rows = even
                    .chunks_exact_mut(2 * edge)
                    .zip(odd.chunks_exact_mut(2 * edge));
                for (y, (even, odd)) in rows.enumerate() {
                    let here = row(coarse, coarse_edge, z, y);
                    let (up, back, both) = (
                        row(coarse, coarse_edge, z, y + 1),
                        row(coarse, coarse_edge, z + 1, y),
                        row(coarse, coarse_edge, z + 1, y + 1),
                    );
                    let [two_up, two_back, four] = &mut sums;
                    let (two_up, two_back, four) = (
                        &mut two_up[..coarse_edge],
                        &mut two_back[..coarse_edge],
                        &mut four[..coarse_edge],
                    );
                    for i in 0..coarse_edge {
                        two_up[i] = up[i] + here[i];
                        two_back[i] = back[i] + here[i];
                        four[i] = both[i] + back[i] + two_up[i];
                    }
                    let (even_even, even_odd) = even.split_at_mut(edge);
                    let (odd_even, odd_odd) = odd.split_at_mut(edge);
                    spread(even_even, here, 1.0);
                    spread(even_odd, two_up, 0.5);
                    spread(odd_even, two_back, 0.5);
                    spread(odd_odd, four, 0.25);
                    if y % (ROWS / 4) == 0 {
                        grid.hooks.tick(rank);
                    }
                }
            }
            0.0
        },
    );
}

/// Adds `weight` times each coarse value to the point on it, and half the weight times each pair's
/// sum between them.
#[inline(always)]
fn spread(fine: &mut [f64], coarse: &[f64], weight: f64) {
    let pairs = coarse.iter().zip(&coarse[1..]);
    for (fine, (&left, &right)) in fine.chunks_exact_mut(2).zip(pairs) {
        fine[0] += weight * left;
        fine[1] += 0.5 * weight * (left + right);
    }
}

/// The sum of the squares of the interior points.
pub(super) fn norm<T: Team, H: Hooks>(grid: Grid<'_, T, H>, r: &mut [f64]) -> f64 {
    let (n, edge) = (grid.interior, grid.edge());
    let interior = &mut r[edge * edge..][..n * edge * edge];
    over_units(
        grid.team,
        grid.ranks(),
        interior,
        edge * edge,
        |rank, _, planes| {
            let mut sum = 0.0;
            for plane in planes.chunks_exact(edge * edge) {
                for (y, row) in plane.chunks_exact(edge).enumerate().skip(1).take(n) {
                    let (_, here, _) = around(row, n);
                    sum += here.iter().map(|x| x * x).sum::<f64>();
                    if y % ROWS == 0 {
                        grid.hooks.tick(rank);
                    }
                }
            }
            sum
        },
    )
}

/// Sets the whole grid to zero.
pub(super) fn zero<T: Team, H: Hooks>(grid: Grid<'_, T, H>, data: &mut [f64]) {
    let edge = grid.edge();
    over_units(
        grid.team,
        grid.ranks(),
        &mut data[..grid.points()],
        edge,
        |rank, _, rows| {
            for rows in rows.chunks_mut(edge * ROWS) {
                rows.fill(0.0);
                grid.hooks.tick(rank);
            }
            0.0
        },
    );
}

/// Fills in the periodic copies within a plane: left and right first, so that the corners come out
/// right.
pub(super) fn wrap_faces(plane: &mut [f64], edge: usize) {
    for row in plane.chunks_exact_mut(edge).skip(1).take(edge - 2) {
        row[0] = row[edge - 2];
        row[edge - 1] = row[1];
    }
    plane.copy_within((edge - 2) * edge..(edge - 1) * edge, 0);
    plane.copy_within(edge..2 * edge, (edge - 1) * edge);
}

/// Fills in the periodic copies of the first and last plane.
pub(super) fn wrap_planes<T: Team, H: Hooks>(grid: Grid<'_, T, H>, data: &mut [f64]) {
    let edge = grid.edge();
    let plane = edge * edge;
    for (from, to) in [(grid.interior, 0), (1, edge - 1)] {
        for start in (0..plane).step_by(edge * ROWS) {
            let len = (edge * ROWS).min(plane - start);
            data.copy_within(
                from * plane + start..from * plane + start + len,
                to * plane + start,
            );
            grid.hooks.tick(0);
        }
    }
}
