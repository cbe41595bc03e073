//! SP: the flow by a scheme whose systems are five scalar pentadiagonal ones for each line
//! (NAS-95-020, section 3).
//!
//! The flux Jacobian along an axis is diagonalised: its eigenvalues are the velocity, three times,
//! and the velocity plus and minus the speed of sound. What turns the variables of one axis into
//! those of the next is a product of two eigenvector matrices, written out.

use crate::flow::{
    COMPONENTS, Damping, Grid, Method, Parameters, aux, diffusion, dissipation, gas,
};
use crate::lines::{Point, points};
use crate::math::sqrt;
use crate::problem::Class;
use core::f64::consts::FRAC_1_SQRT_2;

/// Lines in a pack.
const LANES: usize = 4;
/// Properties of a point: the inverse of the density, the velocity along the axis, the speed of
/// sound.
const PROPERTIES: usize = 3;
/// Points between two ticks.
const BLOCK: usize = 32;
/// The auxiliary component of this method: the speed of sound.
const SOUND: usize = aux::COMMON;

pub(crate) struct Pentadiagonal {
    grid: Grid,
}

/// The eigenvalues, by what they add of the speed of sound to the velocity, and the variables that
/// they belong to.
const EIGENVALUES: [(f64, core::ops::Range<usize>); 3] = [(0.0, 0..3), (1.0, 3..4), (-1.0, 4..5)];

/// The upper two diagonals of each eigenvalue's system, after the elimination.
type Factors = Point<6, LANES>;
type Right = Point<COMPONENTS, LANES>;

impl Method<PROPERTIES, LANES> for Pentadiagonal {
    const AUXILIARIES: usize = aux::COMMON + 1;
    const WORK: usize = 6;

    fn new(grid: &Grid) -> Self {
        Self { grid: grid.clone() }
    }

    fn parameters(class: Class) -> Parameters {
        match class {
            Class::S => Parameters::new(
                12,
                100,
                0.015,
                [
                    2.747_031_545_133_948e-2,
                    1.036_074_670_528_541_7e-2,
                    1.623_574_506_509_553_2e-2,
                    1.584_055_722_445_561_5e-2,
                    3.484_904_060_936_246e-2,
                ],
                [
                    2.728_925_855_737_722_5e-5,
                    1.036_444_664_083_728_5e-5,
                    1.615_479_828_716_647e-5,
                    1.575_070_499_448_01e-5,
                    3.417_766_618_339_053e-5,
                ],
            ),
            Class::W => Parameters::new(
                36,
                400,
                0.0015,
                [
                    1.893_253_733_584e-3,
                    1.717_075_447_775e-4,
                    2.778_153_350_936e-4,
                    2.887_475_409_984e-4,
                    3.143_611_161_242e-3,
                ],
                [
                    7.542_088_599_534e-5,
                    6.512_852_253_086e-6,
                    1.049_092_285_688e-5,
                    1.128_838_671_535e-5,
                    1.212_845_639_773e-4,
                ],
            ),
            Class::A => Parameters::new(
                64,
                400,
                0.0015,
                [
                    2.479_982_239_930_019_5,
                    1.127_633_796_436_883_2,
                    1.502_897_788_877_049_2,
                    1.421_781_621_169_518,
                    2.129_211_303_513_828,
                ],
                [
                    1.090_014_029_782_055e-4,
                    3.734_395_176_928_209e-5,
                    5.009_278_540_654_163e-5,
                    4.767_109_393_952_825e-5,
                    1.362_161_339_921_3e-4,
                ],
            ),
            Class::B => Parameters::new(
                102,
                400,
                0.001,
                [
                    6.903_293_579_998e1,
                    3.095_134_488_084e1,
                    4.103_336_647_017e1,
                    3.864_769_009_604e1,
                    5.643_482_272_596e1,
                ],
                [
                    9.810_006_190_188e-3,
                    1.022_827_905_67e-3,
                    1.720_597_911_692e-3,
                    1.694_479_428_231e-3,
                    1.847_456_263_981e-2,
                ],
            ),
            Class::C => Parameters::new(
                162,
                400,
                0.00067,
                [
                    5.881_691_581_829e2,
                    2.454_417_603_569e2,
                    3.293_829_191_851e2,
                    3.081_924_971_891e2,
                    4.597_223_799_176e2,
                ],
                [
                    2.598_120_500_183e-1,
                    2.590_888_922_315e-2,
                    5.132_886_416_32e-2,
                    4.806_073_419_454e-2,
                    5.483_377_491_301e-1,
                ],
            ),
        }
    }

    fn operations(points: f64) -> f64 {
        let square = points * points;
        881.174 * square * points - 4683.91 * square + 11484.5 * points - 19272.4
    }

    fn properties(axis: usize) -> [usize; PROPERTIES] {
        [aux::INVERSE, aux::VELOCITY + axis, SOUND]
    }

    fn derive(&self, auxiliary: &mut [f64], _u: &[f64]) {
        let points = self.grid.points;
        let (common, sound) = auxiliary.split_at_mut(SOUND * points);
        let kinetic = &common[aux::KINETIC * points..][..points];
        let energy = &common[aux::ENERGY * points..][..points];
        for ((sound, kinetic), energy) in sound.iter_mut().zip(kinetic).zip(energy) {
            *sound = sqrt(gas::GAMMA * gas::PRESSURE * (energy - kinetic));
        }
    }

    fn transform(&self, right: &mut [f64], auxiliary: &[f64]) {
        let points = self.grid.points;
        let aux = |component: usize| &auxiliary[component * points..][..points];
        let (inverse, kinetic, sound) = (aux(aux::INVERSE), aux(aux::KINETIC), aux(SOUND));
        let [x, y, z] = [0, 1, 2].map(|axis| aux(aux::VELOCITY + axis));
        let [r0, r1, r2, r3, r4] = components(right, points);
        for i in 1..points - 1 {
            let (mass, energy) = (r0[i], r4[i]);
            let (mx, my, mz) = (r1[i], r2[i], r3[i]);
            let work = x[i] * mx + y[i] * my + z[i] * mz;
            let pressure =
                gas::PRESSURE / (sound[i] * sound[i]) * (kinetic[i] * mass - work + energy);
            let wave = FRAC_1_SQRT_2 * inverse[i] * (x[i] * mass - mx);
            let sum = FRAC_1_SQRT_2 * inverse[i] * sound[i] * pressure;
            r0[i] = mass - pressure;
            r1[i] = inverse[i] * (mz - z[i] * mass);
            r2[i] = inverse[i] * (y[i] * mass - my);
            r3[i] = sum - wave;
            r4[i] = sum + wave;
        }
    }

    fn solve(
        &self,
        axis: usize,
        properties: &[Point<PROPERTIES, LANES>],
        right: &mut [Right],
        work: &mut [f64],
        tick: &impl Fn(),
    ) {
        let factors = points::<6, LANES>(work);
        let stencil = Stencil::new(&self.grid, axis);
        // The two rows before, after the elimination; before the first there is nothing.
        let mut before = [([[0.0; LANES]; 6], [[0.0; LANES]; COMPONENTS]); 2];
        let rows = right.iter_mut().zip(factors.iter_mut());
        for (at, (row, window)) in (1..).zip(rows.zip(properties.windows(3))) {
            let (right, factors) = row;
            let weights = dissipation(at, properties.len());
            eliminate(&stencil, weights, window, &before, right, factors);
            before = [before[1], (*factors, *right)];
            if at % BLOCK == 0 {
                tick();
            }
        }
        let mut behind = [[[0.0; LANES]; COMPONENTS]; 2];
        for (right, factors) in right.iter_mut().zip(factors.iter()).rev() {
            for (system, (_, variables)) in EIGENVALUES.into_iter().enumerate() {
                for m in variables {
                    for lane in 0..LANES {
                        right[m][lane] -= factors[2 * system][lane] * behind[0][m][lane]
                            + factors[2 * system + 1][lane] * behind[1][m][lane];
                    }
                }
            }
            behind = [*right, behind[0]];
        }
        match axis {
            0 => right.iter_mut().for_each(from_first_to_second),
            1 => right.iter_mut().for_each(from_second_to_third),
            // The way back is part of `add`.
            _ => {}
        }
    }

    fn add(&self, u: &mut [f64], solution: &[f64], auxiliary: &[f64]) {
        let points = self.grid.points;
        let aux = |component: usize| &auxiliary[component * points..][..points];
        let (kinetic, sound) = (aux(aux::KINETIC), aux(SOUND));
        let [x, y, z] = [0, 1, 2].map(|axis| aux(aux::VELOCITY + axis));
        let solution = |m: usize| &solution[m * points..][..points];
        let [s0, s1, s2, s3, s4] = [0, 1, 2, 3, 4].map(solution);
        let [u0, u1, u2, u3, u4] = components(u, points);
        for i in 1..points - 1 {
            let density = u0[i];
            let waves = FRAC_1_SQRT_2 * density / sound[i] * (s3[i] + s4[i]);
            let mass = s2[i] + waves;
            let along = FRAC_1_SQRT_2 * density * (s3[i] - s4[i]);
            let (shear_x, shear_y) = (density * s1[i], density * s0[i]);
            u0[i] += mass;
            u1[i] += x[i] * mass - shear_x;
            u2[i] += y[i] * mass + shear_y;
            u3[i] += z[i] * mass + along;
            u4[i] += kinetic[i] * mass - x[i] * shear_x
                + y[i] * shear_y
                + z[i] * along
                + sound[i] * sound[i] * waves / gas::PRESSURE;
        }
    }
}

/// The five components of a row.
fn components(row: &mut [f64], points: usize) -> [&mut [f64]; COMPONENTS] {
    let mut all = row.chunks_exact_mut(points);
    core::array::from_fn(|_| all.next().unwrap_or_default())
}

/// What the systems along an axis are made of, by time step.
struct Stencil {
    /// Of a first difference.
    first: f64,
    /// Of a second one.
    second: f64,
    diffusion: f64,
    viscosity: f64,
    dt: f64,
}

impl Stencil {
    fn new(grid: &Grid, axis: usize) -> Self {
        Self {
            first: grid.dt * grid.first,
            second: grid.dt * grid.second,
            diffusion: diffusion(axis),
            // The largest of the coefficients that the equations of an axis have, heat's.
            viscosity: gas::HEAT * gas::VISCOSITY,
            dt: grid.dt,
        }
    }
}

/// Makes one row of each system and takes the two before it off, so that three diagonals are left,
/// the first of ones.
#[inline(always)]
fn eliminate(
    stencil: &Stencil,
    weights: Damping,
    window: &[Point<PROPERTIES, LANES>],
    before: &[(Factors, Right); 2],
    right: &mut Right,
    factors: &mut Factors,
) {
    let [left, here, next] = window else {
        return;
    };
    let [two_left, one_left, centre, one_right, two_right] = weights.map(|w| w * stencil.dt);
    let [(factors_two, right_two), (factors_one, right_one)] = before;
    for lane in 0..LANES {
        let spread = |point: &Point<PROPERTIES, LANES>| {
            stencil.second * (stencil.diffusion + stencil.viscosity * point[0][lane])
        };
        let (spread_left, spread_here, spread_right) = (spread(left), spread(here), spread(next));
        for (system, (sign, variables)) in EIGENVALUES.into_iter().enumerate() {
            let speed = |point: &Point<PROPERTIES, LANES>| {
                stencil.first * (point[1][lane] + sign * point[2][lane])
            };
            let (near, far) = (2 * system, 2 * system + 1);
            let below = one_left - speed(left) - spread_left - two_left * factors_two[near][lane];
            let diagonal = 1.0 + 2.0 * spread_here + centre
                - two_left * factors_two[far][lane]
                - below * factors_one[near][lane];
            let above = one_right + speed(next) - spread_right - below * factors_one[far][lane];
            let scale = 1.0 / diagonal;
            factors[near][lane] = above * scale;
            factors[far][lane] = two_right * scale;
            for m in variables {
                right[m][lane] = scale
                    * (right[m][lane] - two_left * right_two[m][lane] - below * right_one[m][lane]);
            }
        }
    }
}

/// From the variables of the systems along the first axis to those along the second.
#[inline(always)]
fn from_first_to_second(point: &mut Right) {
    for lane in 0..LANES {
        let [r0, r1, r2, r3, r4] = point.map(|component| component[lane]);
        let (shear, mean) = (FRAC_1_SQRT_2 * r2, 0.5 * (r3 + r4));
        point[0][lane] = -r1;
        point[1][lane] = r0;
        point[2][lane] = FRAC_1_SQRT_2 * (r3 - r4);
        point[3][lane] = mean - shear;
        point[4][lane] = mean + shear;
    }
}

/// From the variables of the systems along the second axis to those along the third.
#[inline(always)]
fn from_second_to_third(point: &mut Right) {
    for lane in 0..LANES {
        let [r0, r1, r2, r3, r4] = point.map(|component| component[lane]);
        let (shear, mean) = (FRAC_1_SQRT_2 * r0, 0.5 * (r3 + r4));
        point[0][lane] = FRAC_1_SQRT_2 * (r3 - r4);
        point[1][lane] = -r2;
        point[2][lane] = r1;
        point[3][lane] = mean - shear;
        point[4][lane] = mean + shear;
    }
}
