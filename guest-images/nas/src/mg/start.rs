//! The right-hand side: twenty unit charges where the random field is largest and smallest.

use super::stencil::{Grid, wrap_faces, wrap_planes, zero};
use crate::random::Random;
use crate::team::{Hooks, Parts, Team, share};

const SEED: u64 = 314_159_265;
const CHARGES: usize = 10;

/// The ten largest values seen and where, by a key that grows with rank in the order.
#[derive(Clone, Copy)]
struct Extremes {
    best: [(u64, usize); CHARGES],
}

impl Extremes {
    fn new() -> Self {
        Self {
            best: [(0, 0); CHARGES],
        }
    }

    /// Keeps `best` in descending order.
    #[inline(always)]
    fn offer(&mut self, key: u64, place: usize) {
        if key > self.best[CHARGES - 1].0 {
            self.insert(key, place);
        }
    }

    #[cold]
    fn insert(&mut self, key: u64, place: usize) {
        let at = self.best.partition_point(|&(other, _)| other > key);
        self.best[at..].rotate_right(1);
        self.best[at] = (key, place);
    }
}

/// Sets `v` to +1 at the ten largest numbers of the field, −1 at the ten smallest, 0 elsewhere.
///
/// The field is the random sequence in memory order of the interior points; only its extremes are
/// needed, so it is never stored.
pub(super) fn charges<T: Team, H: Hooks>(grid: Grid<'_, T, H>, v: &mut [f64]) {
    let n = grid.interior;
    let ranks = grid.ranks();
    let mut parts = Parts::new((0..ranks).map(|_| (Extremes::new(), Extremes::new())));
    parts.run(grid.team, |rank, (largest, smallest)| {
        for plane in share(n, ranks, rank) {
            let mut random = Random::new(SEED);
            random.skip((plane * n * n) as u64);
            for row in 0..n {
                for x in 0..n {
                    let value = random.next_bits();
                    let place = ((plane + 1) * (n + 2) + row + 1) * (n + 2) + x + 1;
                    largest.offer(value, place);
                    smallest.offer(!value, place);
                }
                if row % 16 == 0 {
                    grid.hooks.tick(rank);
                }
            }
        }
    });
    let (mut largest, mut smallest) = (Extremes::new(), Extremes::new());
    for (high, low) in parts.iter() {
        high.best
            .iter()
            .for_each(|&(key, place)| largest.offer(key, place));
        low.best
            .iter()
            .for_each(|&(key, place)| smallest.offer(key, place));
    }
    zero(grid, v);
    for (charge, extremes) in [(-1.0, smallest), (1.0, largest)] {
        for (_, place) in extremes.best {
            v[place] = charge;
        }
    }
    let edge = n + 2;
    for plane in v[edge * edge..].chunks_exact_mut(edge * edge).take(n) {
        wrap_faces(plane, edge);
    }
    wrap_planes(grid, v);
}
