//! IS: ranks of integer keys by counting, through buckets (NAS-95-020, section 2.5; NPB 3 IS).
//!
//! Each rank scatters its own share of the keys into its own share of the buffer, bucket by bucket;
//! then each rank counts the keys of its own range of buckets out of all shares. So every write
//! goes to a disjoint slice.

use crate::problem::{Check, Class, Facts, Needs, Outcome, Problem, Verification};
use crate::random::Random;
use crate::team::{Hooks, MAX_RANKS, Parts, Team, over_units, ranks_for, share};

const SEED: u64 = 314_159_265;
const ITERATIONS: u32 = 10;
const TESTS: usize = 5;
/// Keys between two ticks: some 10 µs.
const BLOCK: usize = 1 << 12;

struct Parameters {
    log_keys: u32,
    log_max: u32,
    log_buckets: u32,
    /// Which keys' ranks are checked in every iteration, and what they are.
    test_index: [usize; TESTS],
    test_rank: [u32; TESTS],
    /// How iteration `i` moves each of them: rank + sign·(i − offset).
    moves: [i64; TESTS],
    offset: i64,
}

fn parameters(class: Class) -> Parameters {
    let (logs, test_index, test_rank, moves, offset) = match class {
        Class::S => (
            (16, 11, 9),
            [48427, 17148, 23627, 62548, 4431],
            [0, 18, 346, 64917, 65463],
            [1, 1, 1, -1, -1],
            0,
        ),
        Class::W => (
            (20, 16, 10),
            [357_773, 934_767, 875_723, 898_999, 404_505],
            [1249, 11698, 1_039_987, 1_043_896, 1_048_018],
            [1, 1, -1, -1, -1],
            2,
        ),
        Class::A => (
            (23, 19, 10),
            [2_112_377, 662_041, 5_336_171, 3_642_833, 4_250_760],
            [104, 17523, 123_928, 8_288_932, 8_388_264],
            [1, 1, 1, -1, -1],
            1,
        ),
        Class::B => (
            (25, 21, 10),
            [41869, 812_306, 5_102_857, 18_232_239, 26_860_214],
            [33_422_937, 10244, 59149, 33_135_281, 99],
            [-1, 1, 1, -1, 1],
            0,
        ),
        Class::C => (
            (27, 23, 10),
            [44_172_927, 72_999_161, 74_326_391, 129_606_274, 21_736_814],
            [61147, 882_988, 266_290, 133_997_595, 133_525_895],
            [1, 1, 1, -1, -1],
            0,
        ),
    };
    let (log_keys, log_max, log_buckets) = logs;
    Parameters {
        log_keys,
        log_max,
        log_buckets,
        test_index,
        test_rank,
        moves,
        offset,
    }
}

impl Parameters {
    fn keys(&self) -> usize {
        1 << self.log_keys
    }
    fn max(&self) -> usize {
        1 << self.log_max
    }
    fn buckets(&self) -> usize {
        1 << self.log_buckets
    }
    fn shift(&self) -> u32 {
        self.log_max - self.log_buckets
    }

    /// The rank that test `test` should have in `iteration`.
    fn expected(&self, test: usize, iteration: u32) -> i64 {
        // Class W counts from 2 for the first two tests only.
        let offset = if self.moves[test] > 0 || self.offset != 2 {
            self.offset
        } else {
            0
        };
        i64::from(self.test_rank[test]) + self.moves[test] * (i64::from(iteration) - offset)
    }
}

pub(crate) fn facts(class: Class) -> Facts {
    Facts::of(1 << parameters(class).log_keys, ITERATIONS, "keys ranked")
}

pub(crate) fn needs(class: Class, ranks: usize) -> Needs {
    let p = parameters(class);
    Needs {
        floats: 0,
        words: 2 * p.keys() + p.max() + ranks * p.buckets(),
    }
}

struct Sort<'a, T, H> {
    p: Parameters,
    ranks: usize,
    keys: &'a mut [u32],
    /// The keys by bucket, within each rank's share.
    sorted: &'a mut [u32],
    /// For each possible key: how many keys are not larger.
    counts: &'a mut [u32],
    /// For each rank and bucket: where the bucket ends within the rank's share.
    ends: &'a mut [u32],
    team: &'a T,
    hooks: &'a H,
}

pub(crate) fn run(
    problem: Problem,
    words: &mut [u32],
    team: &impl Team,
    hooks: &impl Hooks,
) -> Outcome {
    let mut sort = Sort::new(problem.class, words, team, hooks);
    sort.create();
    sort.measure(problem)
}

impl<'a, T: Team, H: Hooks> Sort<'a, T, H> {
    fn new(class: Class, words: &'a mut [u32], team: &'a T, hooks: &'a H) -> Self {
        let p = parameters(class);
        let (keys, rest) = words.split_at_mut(p.keys());
        let (sorted, rest) = rest.split_at_mut(p.keys());
        let (counts, ends) = rest.split_at_mut(p.max());
        let ranks = ranks_for(team, p.keys(), BLOCK);
        Self {
            p,
            ranks,
            keys,
            sorted,
            counts,
            ends,
            team,
            hooks,
        }
    }

    /// Each key is the sum of four random numbers, scaled: a bell-shaped distribution.
    fn create(&mut self) {
        let (hooks, log_max) = (self.hooks, self.p.log_max);
        over_units(self.team, self.ranks, self.keys, 1, |rank, first, keys| {
            let mut random = Random::new(SEED);
            random.skip(4 * first as u64);
            for block in keys.chunks_mut(BLOCK / 4) {
                for key in block {
                    let sum: u64 = (0..4).map(|_| random.next_bits()).sum();
                    // max/4 times the sum of four fractions of 2^46.
                    *key = u32::try_from(sum >> (48 - log_max)).unwrap_or(0);
                }
                hooks.tick(rank);
            }
            0.0
        });
    }

    fn measure(mut self, problem: Problem) -> Outcome {
        // One iteration untimed, to touch everything.
        self.rank(1);
        let mut passed = 0;
        self.hooks.progress(0, ITERATIONS);
        self.hooks.ready();
        let start = self.hooks.nanos();
        for iteration in 1..=ITERATIONS {
            passed += self.rank(iteration);
            self.hooks.progress(iteration, ITERATIONS);
        }
        let nanos = self.hooks.nanos().saturating_sub(start);
        passed += u32::from(self.place_and_check());

        let reference = f64::from(ITERATIONS) * TESTS as f64 + 1.0;
        let check = Check {
            name: "rank checks passed",
            value: f64::from(passed),
            reference,
        };
        Outcome::new(
            problem,
            Verification::new(Check::EPSILON, check),
            f64::from(ITERATIONS) * self.p.keys() as f64,
            nanos,
        )
    }

    /// Ranks all keys once; returns how many of the published ranks were met.
    fn rank(&mut self, iteration: u32) -> u32 {
        let max = u32::try_from(self.p.max()).unwrap_or(u32::MAX);
        // The definition changes two keys in each iteration.
        self.keys[iteration as usize] = iteration;
        self.keys[(iteration + ITERATIONS) as usize] = max - iteration;
        let tested = self.p.test_index.map(|index| self.keys[index]);

        self.scatter();
        self.count();

        let mut passed = 0;
        for (test, key) in tested.into_iter().enumerate() {
            if key == 0 {
                continue;
            }
            let rank = i64::from(self.counts[key as usize - 1]);
            passed += u32::from(rank == self.p.expected(test, iteration));
        }
        passed
    }

    fn scatter(&mut self) {
        let (ranks, shift, hooks, total) = (self.ranks, self.p.shift(), self.hooks, self.p.keys());
        let keys = &*self.keys;
        let mut rest = &mut *self.sorted;
        let mut tables = self.ends.chunks_exact_mut(self.p.buckets());
        let shares = (0..ranks).map_while(|rank| {
            let range = share(total, ranks, rank);
            let (mine, others) = core::mem::take(&mut rest).split_at_mut(range.len());
            rest = others;
            Some((&keys[range], mine, tables.next()?))
        });
        Parts::new(shares).run(self.team, |rank, (keys, sorted, ends)| {
            ends.fill(0);
            for block in keys.chunks(BLOCK) {
                for &key in block {
                    ends[(key >> shift) as usize] += 1;
                }
                hooks.tick(rank);
            }
            // From sizes to starts; the scatter then moves each start to its end.
            let mut start = 0;
            for end in ends.iter_mut() {
                start += core::mem::replace(end, start);
            }
            for block in keys.chunks(BLOCK) {
                for &key in block {
                    let at = &mut ends[(key >> shift) as usize];
                    sorted[*at as usize] = key;
                    *at += 1;
                }
                hooks.tick(rank);
            }
        });
    }

    /// How many keys are in buckets below `bucket`.
    fn below(&self, bucket: usize) -> usize {
        if bucket == 0 {
            return 0;
        }
        self.ends
            .chunks_exact(self.p.buckets())
            .take(self.ranks)
            .map(|ends| ends[bucket - 1] as usize)
            .sum()
    }

    /// The bucket ranges of the ranks, balanced by keys: the distribution is far from flat.
    fn bounds(&self) -> [usize; MAX_RANKS + 1] {
        let mut bounds = [self.p.buckets(); MAX_RANKS + 1];
        bounds[0] = 0;
        let mut bucket = 0;
        for (rank, bound) in bounds.iter_mut().enumerate().take(self.ranks).skip(1) {
            let target = share(self.p.keys(), self.ranks, rank).start;
            while bucket < self.p.buckets() && self.below(bucket) < target {
                bucket += 1;
            }
            *bound = bucket;
        }
        bounds
    }

    fn count(&mut self) {
        let bounds = self.bounds();
        let (ranks, shift, hooks) = (self.ranks, self.p.shift(), self.hooks);
        let bases =
            core::array::from_fn::<usize, { MAX_RANKS }, _>(|rank| self.below(bounds[rank]));
        let layout = Layout {
            total: self.p.keys(),
            ranks,
            buckets: self.p.buckets(),
            ends: self.ends,
        };
        let sorted = &*self.sorted;
        let mut rest = &mut *self.counts;
        let shares = (0..ranks).map(|rank| {
            let (mine, others) =
                core::mem::take(&mut rest).split_at_mut((bounds[rank + 1] - bounds[rank]) << shift);
            rest = others;
            (bounds[rank], bounds[rank + 1], bases[rank], mine)
        });
        Parts::new(shares).run(self.team, |rank, (from, to, base, counts)| {
            let first_key = *from << shift;
            for block in counts.chunks_mut(BLOCK) {
                block.fill(0);
                hooks.tick(rank);
            }
            for owner in 0..ranks {
                for block in layout.segment(sorted, owner, *from, *to).chunks(BLOCK) {
                    for &key in block {
                        counts[key as usize - first_key] += 1;
                    }
                    hooks.tick(rank);
                }
            }
            let mut sum = u32::try_from(*base).unwrap_or(u32::MAX);
            for block in counts.chunks_mut(BLOCK) {
                for count in block {
                    sum += *count;
                    *count = sum;
                }
                hooks.tick(rank);
            }
        });
    }

    /// Puts every key where its rank says and checks that the result is sorted.
    fn place_and_check(&mut self) -> bool {
        let bounds = self.bounds();
        let (ranks, shift, hooks) = (self.ranks, self.p.shift(), self.hooks);
        let bases =
            core::array::from_fn::<usize, { MAX_RANKS + 1 }, _>(|rank| self.below(bounds[rank]));
        let layout = Layout {
            total: self.p.keys(),
            ranks,
            buckets: self.p.buckets(),
            ends: self.ends,
        };
        let sorted = &*self.sorted;
        let mut rest_of_counts = &mut *self.counts;
        let mut rest_of_keys = &mut *self.keys;
        let shares = (0..ranks).map(|rank| {
            let span = (bounds[rank + 1] - bounds[rank]) << shift;
            let (counts, others) = core::mem::take(&mut rest_of_counts).split_at_mut(span);
            rest_of_counts = others;
            let (keys, others) =
                core::mem::take(&mut rest_of_keys).split_at_mut(bases[rank + 1] - bases[rank]);
            rest_of_keys = others;
            (rank, counts, keys, true)
        });
        let mut parts = Parts::new(shares);
        parts.run(self.team, |rank, (at, counts, keys, ok)| {
            let (from, to, base) = (bounds[*at], bounds[*at + 1], bases[*at]);
            for owner in 0..ranks {
                for block in layout.segment(sorted, owner, from, to).chunks(BLOCK) {
                    for &key in block {
                        let count = &mut counts[key as usize - (from << shift)];
                        // A rank outside the share means that the counts are wrong: say so, do not
                        // panic.
                        match (*count as usize)
                            .checked_sub(base + 1)
                            .and_then(|place| keys.get_mut(place))
                        {
                            Some(slot) => *slot = key,
                            None => *ok = false,
                        }
                        *count = count.saturating_sub(1);
                    }
                    hooks.tick(rank);
                }
            }
        });
        if !parts.iter().all(|(_, _, _, ok)| *ok) {
            return false;
        }
        let mut last = 0;
        self.keys.chunks(BLOCK).all(|block| {
            hooks.tick(0);
            block
                .iter()
                .all(|&key| core::mem::replace(&mut last, key) <= key)
        })
    }
}

/// Where the buckets are after a scatter.
struct Layout<'a> {
    total: usize,
    ranks: usize,
    buckets: usize,
    ends: &'a [u32],
}

impl Layout<'_> {
    /// The keys of buckets `from..to` in the share of rank `owner`.
    fn segment<'k>(&self, sorted: &'k [u32], owner: usize, from: usize, to: usize) -> &'k [u32] {
        let ends = &self.ends[owner * self.buckets..][..self.buckets];
        let at = |bucket: usize| {
            if bucket == 0 {
                0
            } else {
                ends[bucket - 1] as usize
            }
        };
        let mine = &sorted[share(self.total, self.ranks, owner)];
        &mine[at(from)..at(to)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Clock, Threads};
    use crate::problem::Kernel;

    fn outcome(spoil: impl FnOnce(&mut [u32])) -> Outcome {
        let problem = Problem {
            kernel: Kernel::Is,
            class: Class::S,
        };
        let team = Threads::new(2);
        let clock = Clock::start();
        let mut words = vec![0; needs(problem.class, 2).words];
        let mut sort = Sort::new(problem.class, &mut words, &team, &clock);
        sort.create();
        spoil(sort.keys);
        sort.measure(problem)
    }

    #[test]
    fn a_changed_key_does_not_verify() {
        assert!(outcome(|_| ()).verified);
        assert!(!outcome(|keys| keys[1000] = (keys[1000] + 1024) % 2048).verified);
    }
}
