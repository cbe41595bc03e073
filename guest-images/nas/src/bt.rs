//! BT: the flow by a scheme whose systems are block-tridiagonal, with blocks of 5×5 (NAS-95-020,
//! section 3).

mod block;

use crate::flow::{COMPONENTS, Grid, Method, Parameters, aux};
use crate::lines::{Point, points};
use crate::problem::Class;
use block::{Block, Jacobians, Stencil, multiply_subtract, solve, vector_subtract};

/// Lines in a pack: what a register of the least processor holds, so that blocks stay in the
/// nearest cache.
const LANES: usize = 2;
/// Properties of a point: the inverse of the density, the three velocities, kinetic and all energy
/// by mass.
const PROPERTIES: usize = 6;
/// Points between two ticks: some 10 µs.
const BLOCK: usize = 16;

pub(crate) struct BlockTridiagonal {
    grid: Grid,
}

impl Method<PROPERTIES, LANES> for BlockTridiagonal {
    const AUXILIARIES: usize = aux::COMMON;
    const WORK: usize = COMPONENTS * COMPONENTS;

    fn new(grid: &Grid) -> Self {
        Self { grid: grid.clone() }
    }

    fn parameters(class: Class) -> Parameters {
        match class {
            Class::S => Parameters::new(
                12,
                60,
                0.01,
                [
                    1.703_428_370_954_131_2e-1,
                    1.297_525_207_003_409_6e-2,
                    3.252_792_698_948_605_4e-2,
                    2.643_642_127_516_68e-2,
                    1.921_178_413_174_443e-1,
                ],
                [
                    4.997_691_334_581_158e-4,
                    4.519_566_678_296_193e-5,
                    7.397_376_517_292_135e-5,
                    7.382_123_863_243_973e-5,
                    8.926_963_098_749_145e-4,
                ],
            ),
            Class::W => Parameters::new(
                24,
                200,
                0.0008,
                [
                    1.125_590_409_344e2,
                    1.180_007_595_731e1,
                    2.710_329_767_846e1,
                    2.469_174_937_669e1,
                    2.638_427_874_317e2,
                ],
                [
                    4.419_655_736_008,
                    4.638_531_260_002e-1,
                    1.011_551_749_967,
                    9.235_878_729_944e-1,
                    1.018_045_837_718e1,
                ],
            ),
            Class::A => Parameters::new(
                64,
                200,
                0.0008,
                [
                    1.080_634_671_463_726_4e2,
                    1.131_973_090_122_081_3e1,
                    2.597_435_451_158_246_5e1,
                    2.366_562_254_467_891e1,
                    2.527_896_321_174_834_5e2,
                ],
                [
                    4.234_841_604_052_502_5,
                    4.439_028_249_699_57e-1,
                    9.669_248_013_634_565e-1,
                    8.830_206_303_976_548e-1,
                    9.737_990_177_082_928,
                ],
            ),
            Class::B => Parameters::new(
                102,
                200,
                0.0003,
                [
                    1.423_359_722_928_725_4e3,
                    9.933_052_259_015_024e1,
                    3.564_602_564_453_528_5e2,
                    3.248_544_795_908_409e2,
                    3.270_754_125_465_936_3e3,
                ],
                [
                    5.296_984_714_093_686e1,
                    4.463_289_611_567_067,
                    1.312_257_334_221_017_4e1,
                    1.200_692_532_355_914_5e1,
                    1.245_957_615_103_598_6e2,
                ],
            ),
            Class::C => Parameters::new(
                162,
                200,
                0.0001,
                [
                    6.239_811_655_176_461_5e3,
                    5.079_323_919_042_396_4e2,
                    1.542_353_009_301_359_6e3,
                    1.330_238_792_929_119e3,
                    1.160_408_742_843_645_5e4,
                ],
                [
                    1.646_200_836_909_126_5e2,
                    1.149_710_790_382_431_3e1,
                    4.120_744_620_746_151e1,
                    3.708_765_105_969_417e1,
                    3.621_105_305_184_126_5e2,
                ],
            ),
        }
    }

    fn operations(points: f64) -> f64 {
        let square = points * points;
        3478.8 * square * points - 17655.7 * square + 28023.7 * points
    }

    fn properties(_axis: usize) -> [usize; PROPERTIES] {
        [
            aux::INVERSE,
            aux::VELOCITY,
            aux::VELOCITY + 1,
            aux::VELOCITY + 2,
            aux::KINETIC,
            aux::ENERGY,
        ]
    }

    fn solve(
        &self,
        axis: usize,
        properties: &[Point<PROPERTIES, LANES>],
        right: &mut [Point<COMPONENTS, LANES>],
        work: &mut [f64],
        tick: &impl Fn(),
    ) {
        let stencil = Stencil::new(&self.grid, axis);
        let (upper, _) = points::<COMPONENTS, LANES>(work).as_chunks_mut::<COMPONENTS>();
        let mut jacobians = properties.iter().map(|point| Jacobians::new(axis, point));
        let mut next = || jacobians.next().unwrap_or_default();
        let (mut left, mut here) = (next(), next());
        // The row before after the elimination; before the first there is nothing.
        let mut before: Option<(Block<LANES>, Point<COMPONENTS, LANES>)> = None;
        for (at, (right, upper)) in (1..).zip(right.iter_mut().zip(upper.iter_mut())) {
            let behind = next();
            let mut diagonal = stencil.diagonal(&here);
            if let Some((upper_before, right_before)) = &before {
                let lower = stencil.lower(&left);
                vector_subtract(&lower, right_before, right);
                multiply_subtract(&lower, upper_before, &mut diagonal);
            }
            *upper = stencil.upper(&behind);
            solve(&mut diagonal, upper, right);
            before = Some((*upper, *right));
            (left, here) = (here, behind);
            if at % BLOCK == 0 {
                tick();
            }
        }
        let mut behind = [[0.0; LANES]; COMPONENTS];
        for (right, upper) in right.iter_mut().zip(upper.iter()).rev() {
            vector_subtract(upper, &behind, right);
            behind = *right;
        }
    }

    fn add(&self, u: &mut [f64], solution: &[f64], _auxiliary: &[f64]) {
        let points = self.grid.points;
        let components = u
            .chunks_exact_mut(points)
            .zip(solution.chunks_exact(points));
        for (u, solution) in components {
            let inner = u.iter_mut().zip(solution).skip(1).take(points - 2);
            inner.for_each(|(u, solution)| *u += solution);
        }
    }
}
