//! Processors as a fork-join team, and what the work reports while it runs.
//!
//! Every parallel step is one call of [`Team::each`]: it hands rank *i* exclusive use of part *i* and returns when
//! all are done. Sharing is therefore visible to the borrow checker (parts are disjoint `&mut`, inputs are `&`), and
//! the kernels need no `unsafe`, neither on OS threads nor on bare vCPUs.

use crate::dirty::Corruption;
use core::ops::Range;

/// The most ranks a team may have.
pub const MAX_RANKS: usize = 64;

/// A fixed group of processors.
pub trait Team: Sync {
    /// How many ranks there are, from 1 to [`MAX_RANKS`].
    fn size(&self) -> usize;

    /// Runs `work(i, &mut parts[i])` on rank `i` for every part and returns when all are done. `parts` holds at
    /// most [`Team::size`] elements; the calling thread is rank 0.
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

    /// A kernel has finished step `done` of `total`.
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

/// How many ranks to use for `units` units of work of which at least `least` should go to each rank.
pub(crate) fn ranks_for(team: &impl Team, units: usize, least: usize) -> usize {
    team.size().min(units / least.max(1)).clamp(1, MAX_RANKS)
}

/// Splits `data` into `ranks` shares of whole units of `unit` elements and runs `work(rank, first_unit, share)`
/// on each; returns the sum of the results in rank order, so that one team size always gives one result.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Threads;

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
