//! The fast Fourier transform of a pack of lines, by Stockham's radix-2 algorithm: it leaves the
//! results in order.

use crate::lines::Point;
use crate::math::turn;

/// Which way a transform goes. NPB's forward one has the positive exponent; neither is scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Forward,
    Back,
}

/// The roots of unity of the longest line, and so of all shorter ones: cosines and sines of the
/// first half turn.
pub(super) struct Roots<'a>(&'a [[f64; 2]]);

impl<'a> Roots<'a> {
    /// Fills in the roots of lines of as many points as `floats` has elements.
    pub(super) fn fill(floats: &mut [f64]) {
        let len = floats.len();
        for (k, root) in floats.as_chunks_mut().0.iter_mut().enumerate() {
            let (cosine, sine) = turn(k, len);
            *root = [cosine, sine];
        }
    }

    /// The roots that [`Roots::fill`] filled in.
    pub(super) fn new(floats: &'a [f64]) -> Self {
        Self(floats.as_chunks().0)
    }
}

/// Transforms the lines of `pack`, whose number of points is a power of two, with `other` to work
/// in; the result is in the one that is returned.
pub(super) fn transform<'p, const L: usize>(
    pack: &'p mut [Point<2, L>],
    other: &'p mut [Point<2, L>],
    roots: &Roots<'_>,
    direction: Direction,
) -> &'p mut [Point<2, L>] {
    let sign = match direction {
        Direction::Forward => 1.0,
        Direction::Back => -1.0,
    };
    let (mut from, mut to) = (pack, other);
    let half = from.len() / 2;
    // The roots of this line's length are every `step`-th.
    let step = roots.0.len() / half.max(1);
    let mut run = 1;
    while run <= half {
        let (low, high) = from.split_at(half);
        let pairs = low.chunks_exact(run).zip(high.chunks_exact(run));
        let roots = roots.0.iter().step_by(run * step);
        for (((low, high), out), &[re, im]) in pairs.zip(to.chunks_exact_mut(2 * run)).zip(roots) {
            let root = [re, sign * im];
            let (sums, differences) = out.split_at_mut(run);
            for (((low, high), sum), difference) in low.iter().zip(high).zip(sums).zip(differences)
            {
                butterfly(low, high, sum, difference, root);
            }
        }
        (from, to) = (to, from);
        run *= 2;
    }
    from
}

/// The sum of two points, and their difference times a root.
#[inline(always)]
fn butterfly<const L: usize>(
    a: &Point<2, L>,
    b: &Point<2, L>,
    sum: &mut Point<2, L>,
    difference: &mut Point<2, L>,
    root: [f64; 2],
) {
    for lane in 0..L {
        let (re, im) = (a[0][lane] - b[0][lane], a[1][lane] - b[1][lane]);
        sum[0][lane] = a[0][lane] + b[0][lane];
        sum[1][lane] = a[1][lane] + b[1][lane];
        difference[0][lane] = re * root[0] - im * root[1];
        difference[1][lane] = re * root[1] + im * root[0];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    /// The definition, a sum for each result.
    fn naive(line: &[[f64; 2]], sign: f64) -> Vec<[f64; 2]> {
        let len = line.len();
        let result = |k: usize| {
            let terms = line.iter().enumerate().map(|(j, [re, im])| {
                let angle = sign * core::f64::consts::TAU * ((j * k) % len) as f64 / len as f64;
                let (sine, cosine) = angle.sin_cos();
                [re * cosine - im * sine, re * sine + im * cosine]
            });
            terms.fold([0.0, 0.0], |a, b| [a[0] + b[0], a[1] + b[1]])
        };
        (0..len).map(result).collect()
    }

    #[test]
    fn agrees_with_the_definition_for_every_length_and_direction() {
        let mut roots = [0.0; 128];
        Roots::fill(&mut roots);
        let mut random = Random::new(314_159_265);
        for log in 1..=7 {
            let len = 1 << log;
            for (direction, sign) in [(Direction::Forward, 1.0), (Direction::Back, -1.0)] {
                let mut pack: Vec<Point<2, 3>> = vec![[[0.0; 3]; 2]; len];
                pack.iter_mut()
                    .flatten()
                    .flatten()
                    .for_each(|x| *x = random.next() - 0.5);
                let lines = pack.clone();
                let mut other = pack.clone();
                let result = transform(&mut pack, &mut other, &Roots::new(&roots), direction);
                for lane in 0..3 {
                    let line: Vec<_> = lines.iter().map(|p| [p[0][lane], p[1][lane]]).collect();
                    for (point, expected) in result.iter().zip(naive(&line, sign)) {
                        let (re, im) = (point[0][lane] - expected[0], point[1][lane] - expected[1]);
                        assert!(re.hypot(im) < 1e-13 * len as f64, "{len} {direction:?}");
                    }
                }
            }
        }
    }
}
