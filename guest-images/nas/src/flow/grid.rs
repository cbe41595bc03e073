//! The grid, the constants of the equations, and the exact solution.

use super::{COMPONENTS, Five};

/// Directions.
pub(crate) const AXES: usize = 3;

/// Properties of the gas.
pub(crate) mod gas {
    /// Ratio of the specific heats.
    pub(crate) const GAMMA: f64 = 1.4;
    /// γ − 1: from inner energy to pressure.
    pub(crate) const PRESSURE: f64 = 0.4;
    /// Viscosity.
    pub(crate) const VISCOSITY: f64 = 0.1;
    /// What γ times the ratio of the other constants makes of the viscosity for heat.
    pub(crate) const HEAT: f64 = 1.4 * 1.4;
    /// What the divergence adds to the viscosity along the line.
    pub(crate) const ALONG: f64 = 4.0 / 3.0;
}

/// The added second-order diffusion along an axis.
pub(crate) fn diffusion(axis: usize) -> f64 {
    if axis == 2 { 1.0 } else { 0.75 }
}

/// The artificial fourth-order dissipation: a quarter of the largest diffusion.
pub(crate) const DISSIPATION: f64 = 0.25;

/// Coefficients of the exact solution, by component: the constant, then those of x, y, z to the
/// first, second, third and fourth power.
const EXACT: [[f64; 13]; COMPONENTS] = [
    [
        2.0, 0.0, 0.0, 4.0, 5.0, 3.0, 0.5, 0.02, 0.01, 0.03, 0.5, 0.4, 0.3,
    ],
    [
        1.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 0.01, 0.03, 0.02, 0.4, 0.3, 0.5,
    ],
    [
        2.0, 2.0, 0.0, 0.0, 0.0, 2.0, 3.0, 0.04, 0.03, 0.05, 0.3, 0.5, 0.4,
    ],
    [
        2.0, 2.0, 0.0, 0.0, 0.0, 2.0, 3.0, 0.03, 0.05, 0.04, 0.2, 0.1, 0.3,
    ],
    [
        5.0, 4.0, 3.0, 2.0, 0.1, 0.4, 0.3, 0.05, 0.04, 0.03, 0.1, 0.3, 0.2,
    ],
];

/// A cube of points, and the time step.
#[derive(Clone, Debug)]
pub(crate) struct Grid {
    /// Points along an edge, the boundary included.
    pub(crate) points: usize,
    pub(crate) dt: f64,
    /// 1/h², for second differences.
    pub(crate) second: f64,
    /// 1/2h, for central first differences.
    pub(crate) first: f64,
}

impl Grid {
    pub(super) fn new(points: usize, dt: f64) -> Self {
        let cells = (points - 1) as f64;
        Self {
            points,
            dt,
            second: cells * cells,
            first: cells / 2.0,
        }
    }

    /// The exact solution at a point.
    pub(super) fn exact(&self, i: usize, j: usize, k: usize) -> Five {
        let cells = (self.points - 1) as f64;
        exact([i, j, k].map(|at| at as f64 / cells))
    }

    /// The field that a run begins with: the exact solution on the boundary, and inside what NPB
    /// blends of the six faces.
    pub(super) fn initial(&self, i: usize, j: usize, k: usize) -> Five {
        let last = self.points - 1;
        if [i, j, k].iter().any(|&at| at == 0 || at == last) {
            return self.exact(i, j, k);
        }
        let point = [i, j, k].map(|at| at as f64 / last as f64);
        let blended: [Five; AXES] = core::array::from_fn(|axis| {
            let (mut low, mut high) = (point, point);
            (low[axis], high[axis]) = (0.0, 1.0);
            let (low, high, part) = (exact(low), exact(high), point[axis]);
            core::array::from_fn(|m| part * high[m] + (1.0 - part) * low[m])
        });
        let [x, y, z] = blended;
        core::array::from_fn(|m| {
            let (x, y, z) = (x[m], y[m], z[m]);
            x + y + z - x * y - x * z - y * z + x * y * z
        })
    }
}

fn exact(point: [f64; AXES]) -> Five {
    EXACT.map(|c| {
        let powers = |axis: usize| {
            let x = point[axis];
            x * (c[1 + axis] + x * (c[4 + axis] + x * (c[7 + axis] + x * c[10 + axis])))
        };
        c[0] + powers(0) + powers(1) + powers(2)
    })
}

/// The weights of a fourth difference: of the point two before, one before, of itself, one and two
/// behind.
pub(crate) type Damping = [f64; 5];

/// The weights at inner point `at` of a line of `points`: one-sided at its ends, where there are no
/// two neighbours inside.
pub(crate) fn dissipation(at: usize, points: usize) -> Damping {
    let (from_start, from_end) = (at, points - 1 - at);
    let centre = if from_start == 1 || from_end == 1 {
        5.0
    } else {
        6.0
    };
    let one = |distance| if distance > 1 { -4.0 } else { 0.0 };
    let two = |distance| if distance > 2 { 1.0 } else { 0.0 };
    [
        two(from_start),
        one(from_start),
        centre,
        one(from_end),
        two(from_end),
    ]
    .map(|weight| DISSIPATION * weight)
}
