//! Processors as a fork-join team, and what the work reports while it runs.
//!
//! Every parallel step is one call of [`Team::each`]: it hands rank *i* exclusive use of part *i*
//! and returns when all are done. Sharing is therefore visible to the borrow checker (parts are
//! disjoint `&mut`, inputs are `&`), and the kernels need no `unsafe`, neither on OS threads nor on
//! bare vCPUs.

use crate::dirty::Corruption;
use core::ops::Range;

/// The most ranks a team may have.
pub const MAX_RANKS: usize = 64;

/// A fixed group of processors.
pub trait Team: Sync {
    /// How many ranks there are, from 1 to [`MAX_RANKS`].
    fn size(&self) -> usize;

    /// Runs `work(i, &mut parts[i])` on rank `i` for every part and returns when all are done.
    /// `parts` holds at most [`Team::size`] elements; the calling thread is rank 0.
    fn each<T: Send, F: Fn(usize, &mut T) + Sync>(&self, parts: &mut [T], work: F);
}

/// A team of one: the calling thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct Solo;

impl Team for Solo {
    fn size(&self) -> usize {
        1
    }

    fn each<T: Send, F: Fn(usize, &mut T) + Sync>(&self, parts: &mut [T], work: F) {
        for (rank, part) in parts.iter_mut().enumerate() {
            work(rank, part);
        }
    }
}

/// The clock, and what the work tells its caller. Everything but the clock may be left as it is.
pub trait Hooks: Sync {
    /// A monotonic clock, in nanoseconds.
    fn nanos(&self) -> u64;

    /// Called by every rank after each few tens of microseconds of work at most. Must be cheap.
    fn tick(&self, _rank: usize) {}

    /// A kernel has finished step `done` of `total` of its timed part, which begins with step 0.
    fn progress(&self, _done: u32, _total: u32) {}

    /// The set-up is over and the steady state begins.
    fn ready(&self) {}

    /// `rank` has by now written `writes` pages.
    fn wrote(&self, _rank: usize, _writes: u64) {}

    /// `rank` has read a page that is not what was written.
    fn corrupt(&self, _rank: usize, _what: &Corruption) {}

    /// Whether the work should end at the next opportunity.
    fn stop(&self) -> bool {
        false
    }
}

/// The `part`-th of `parts` near-equal shares of `0..total`.
pub(crate) fn share(total: usize, parts: usize, part: usize) -> Range<usize> {
    // `total` counts elements of memory and `parts` is small: the product stays far below 2^64.
    let at = |i: usize| total * i / parts.max(1);
    at(part)..at(part + 1)
}

/// Up to [`MAX_RANKS`] parts without an allocator. The options are all `Some` up to the length.
pub(crate) struct Parts<T> {
    items: [Option<T>; MAX_RANKS],
    len: usize,
}

impl<T> Parts<T> {
    pub(crate) fn new(parts: impl Iterator<Item = T>) -> Self {
        let mut all = Self {
            items: [const { None }; MAX_RANKS],
            len: 0,
        };
        for (slot, part) in all.items.iter_mut().zip(parts) {
            *slot = Some(part);
            all.len += 1;
        }
        all
    }

    /// Runs `work` on every part, each on its own rank.
    pub(crate) fn run(&mut self, team: &impl Team, work: impl Fn(usize, &mut T) + Sync)
    where
        T: Send,
    {
        team.each(
            self.items.get_mut(..self.len).unwrap_or(&mut []),
            |rank, part| {
                if let Some(part) = part {
                    work(rank, part);
                }
            },
        );
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.items.iter().flatten()
    }
}

/// How many ranks to use for `units` units of work of which at least `least` should go to each
/// rank.
pub(crate) fn ranks_for(team: &impl Team, units: usize, least: usize) -> usize {
    team.size().min(units / least.max(1)).clamp(1, MAX_RANKS)
}

/// Splits `data` into `ranks` shares of whole units of `unit` elements and runs
/// `work(rank, first_unit, share)` on each; returns the sum of the results in rank order, so that
/// one team size always gives one result.
pub(crate) fn over_units<D: Send>(
    team: &impl Team,
    ranks: usize,
    data: &mut [D],
    unit: usize,
    work: impl Fn(usize, usize, &mut [D]) -> f64 + Sync,
) -> f64 {
    let units = data.len() / unit.max(1);
    let mut rest = data;
    let shares = (0..ranks).map(|rank| {
        let units = share(units, ranks, rank);
        let (mine, others) = core::mem::take(&mut rest).split_at_mut(units.len() * unit);
        rest = others;
        (units.start, mine, 0.0)
    });
    let mut parts = Parts::new(shares);
    parts.run(team, |rank, (first, mine, sum)| {
        *sum = work(rank, *first, mine)
    });
    parts.iter().map(|(_, _, sum)| sum).sum()
}

/// As [`over_units`], on two arrays that are cut into the same units (of `unit` elements each) and
/// written together.
pub(crate) fn over_pairs(
    team: &impl Team,
    ranks: usize,
    data: (&mut [f64], &mut [f64]),
    unit: usize,
    work: impl Fn(usize, usize, &mut [f64], &mut [f64]) -> f64 + Sync,
) -> f64 {
    let units = data.0.len().min(data.1.len()) / unit.max(1);
    let (mut left, mut right) = data;
    let shares = (0..ranks).map(|rank| {
        let units = share(units, ranks, rank);
        let (a, others) = core::mem::take(&mut left).split_at_mut(units.len() * unit);
        left = others;
        let (b, others) = core::mem::take(&mut right).split_at_mut(units.len() * unit);
        right = others;
        (units.start, a, b, 0.0)
    });
    let mut parts = Parts::new(shares);
    parts.run(team, |rank, (first, a, b, sum)| {
        *sum = work(rank, *first, a, b)
    });
    parts.iter().map(|(.., sum)| sum).sum()
}

/// As [`over_units`], and gives each rank a part of `scratch` of its own, of `each` elements.
pub(crate) fn over_units_with(
    team: &impl Team,
    ranks: usize,
    data: &mut [f64],
    unit: usize,
    scratch: (&mut [f64], usize),
    work: impl Fn(usize, usize, &mut [f64], &mut [f64]) + Sync,
) {
    let units = data.len() / unit.max(1);
    let (mut rest, (scratch, each)) = (data, scratch);
    let shares = scratch.chunks_exact_mut(each).take(ranks).enumerate();
    let shares = shares.map(|(rank, scratch)| {
        let units = share(units, ranks, rank);
        let (mine, others) = core::mem::take(&mut rest).split_at_mut(units.len() * unit);
        rest = others;
        (units.start, mine, scratch)
    });
    Parts::new(shares).run(team, |rank, (first, mine, scratch)| {
        work(rank, *first, mine, scratch)
    });
}

/// How many slices [`over_strips`] can cut a box into: they lie on the stack of rank 0, 128 KiB of
/// it.
const STRIP_SLICES: usize = 8192;

/// A rank's rows of a plane; there always are some. As an option it needs no value to begin with,
/// and so no second copy of the table on the stack.
pub(crate) type Strip<'a> = Option<&'a mut [f64]>;

/// Work on lines that cross all planes of a box.
///
/// The box is `data`, in planes of `plane` elements, each of rows of `row` elements. Every plane is
/// cut into the same strips of whole rows of `rows`, one strip a rank, and
/// `work(rank, first_row, strips, scratch)` runs on each, where `strips[k]` is the rank's strip of
/// plane `k` and `scratch` its own part of the scratch memory, of `each` elements.
pub(crate) fn over_strips(
    team: &impl Team,
    data: &mut [f64],
    (plane, row): (usize, usize),
    rows: Range<usize>,
    (scratch, each): (&mut [f64], usize),
    work: impl Fn(usize, usize, &mut [Strip<'_>], &mut [f64]) + Sync,
) {
    let planes = (data.len() / plane.max(1)).clamp(1, STRIP_SLICES);
    let ranks = ranks_for(team, rows.len(), 1).min(STRIP_SLICES / planes);
    let mut slices: [Strip<'_>; STRIP_SLICES] = [const { None }; STRIP_SLICES];
    for (k, plane) in data.chunks_exact_mut(plane).enumerate() {
        let (_, mut rest) = plane.split_at_mut(rows.start * row);
        for rank in 0..ranks {
            let mine = share(rows.len(), ranks, rank).len() * row;
            let (strip, others) = core::mem::take(&mut rest).split_at_mut(mine);
            rest = others;
            if let Some(slot) = slices.get_mut(rank * planes + k) {
                *slot = Some(strip);
            }
        }
    }
    let strips = slices.chunks_exact_mut(planes).take(ranks);
    let shares = strips.zip(scratch.chunks_exact_mut(each)).enumerate();
    let shares = shares.map(|(rank, (strips, scratch))| {
        let first = rows.start + share(rows.len(), ranks, rank).start;
        (first, strips, scratch)
    });
    Parts::new(shares).run(team, |rank, (first, strips, scratch)| {
        work(rank, *first, strips, scratch)
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Threads;

    #[test]
    fn strips_cover_the_rows_of_every_plane_once() {
        // 5 planes of 7 rows of 3 elements; rows 1 to 5 are worked on.
        for ranks in [1, 2, 3, 8] {
            let mut data = vec![0.0; 5 * 7 * 3];
            let mut scratch = vec![0.0; 8 * 2];
            over_strips(
                &Threads::new(ranks),
                &mut data,
                (21, 3),
                1..6,
                (&mut scratch, 2),
                |rank, first, strips, scratch| {
                    assert_eq!((strips.len(), scratch.len()), (5, 2));
                    scratch.fill(rank as f64 + 1.0);
                    for (k, strip) in strips.iter_mut().flatten().enumerate() {
                        for (j, row) in strip.chunks_exact_mut(3).enumerate() {
                            row.iter_mut()
                                .for_each(|x| *x += (10 * k + first + j) as f64);
                        }
                    }
                },
            );
            for (at, &value) in data.iter().enumerate() {
                let (k, j) = (at / 21, at % 21 / 3);
                let expected = if (1..6).contains(&j) { 10 * k + j } else { 0 };
                assert_eq!(value, expected as f64, "plane {k} row {j} on {ranks}");
            }
            let used = ranks.min(5);
            assert!(scratch[..2 * used].iter().all(|&x| x > 0.0));
        }
    }

    #[test]
    fn pairs_are_cut_alike() {
        let (mut a, mut b) = ([0.0; 40], [0.0; 40]);
        let sum = over_pairs(
            &Threads::new(3),
            3,
            (&mut a, &mut b),
            4,
            |_, first, a, b| {
                a.fill(first as f64);
                b.fill(first as f64);
                a.len() as f64
            },
        );
        assert_eq!(sum, 40.0);
        assert_eq!(a, b);
    }

    #[test]
    fn shares_cover_everything_once() {
        for total in [0, 1, 7, 64, 1000] {
            for parts in 1..=9 {
                let mut next = 0;
                for part in 0..parts {
                    let range = share(total, parts, part);
                    assert_eq!(range.start, next);
                    next = range.end;
                }
                assert_eq!(next, total);
            }
        }
    }

    #[test]
    fn every_unit_is_visited_once_by_one_rank() {
        let mut data = [0u32; 40];
        let sum = over_units(&Threads::new(3), 3, &mut data, 4, |_, first, share| {
            for (i, unit) in share.chunks_mut(4).enumerate() {
                unit.fill(u32::try_from(first + i).unwrap() + 1);
            }
            1.0
        });
        assert_eq!(sum, 3.0);
        assert!(
            data.chunks(4)
                .enumerate()
                .all(|(i, unit)| unit.iter().all(|&x| x as usize == i + 1))
        );
    }
}
