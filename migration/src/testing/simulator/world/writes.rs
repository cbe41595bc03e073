//! What the guest writes: to its pages and its disk, wherever it runs.

use super::{Odds, World, index};
use crate::page::Gfn;
use crate::testing::simulator::Rng;

/// The share of writes with which one to the disk goes.
const TO_DISK: Odds = Odds::new(0.05);

/// The next place in a working set of so many pages: by turns, or anywhere.
fn next_place(walked: &mut Option<usize>, length: usize, rng: &mut Rng) -> usize {
    match walked {
        Some(at) => {
            *at += 1;
            if *at == length {
                *at = 0;
            }
            *at
        }
        None => index(rng.below(length as u64)),
    }
}

/// How often the guest clears what it writes to, or gives it back.
#[derive(Clone, Copy)]
struct Habits {
    gives: Odds,
    clears: Odds,
}

impl Habits {
    /// What a page holds after a write at the source, `newest` being the last version that was
    /// written, and whether the page is given back.
    fn write(self, newest: &mut u64, rng: &mut Rng) -> (u64, bool) {
        let gives = !self.gives.is_none() && rng.hits(self.gives);
        if gives || rng.hits(self.clears) {
            return (0, gives);
        }
        *newest += 1;
        (*newest, false)
    }

    /// The block that a write to a disk of so many goes to, if one does, and whether it is cleared.
    fn write_disk(self, blocks: u64, rng: &mut Rng) -> Option<(usize, bool)> {
        let goes = blocks > 0 && rng.hits(TO_DISK);
        goes.then(|| (index(rng.below(blocks)), rng.hits(self.clears)))
    }
}

impl World {
    const fn habits(&self) -> Habits {
        Habits {
            gives: self.given_back,
            clears: self.zero_writes,
        }
    }

    pub(super) fn lacks_what_it_writes(&self) -> bool {
        let missing = self.missing.as_ref();
        missing.is_some_and(|missing| self.hot.iter().any(|gfn| missing.contains(*gfn)))
    }

    /// So many writes in a row, until one has to wait for its page.
    pub(super) fn run_at_destination(&mut self, writes: u64) {
        for _ in 0..writes {
            let gfn = self.next_written();
            if self.faults_on(gfn) {
                self.owed_writes = 0.0;
                return;
            }
            self.write(gfn);
        }
    }

    /// So many writes at the destination that nothing looks at: what follows is as if they were
    /// done.
    pub(super) fn pass_over(&mut self, writes: u64) {
        let drawn = 1 + u64::from(self.walked.is_none()) + u64::from(!self.given_back.is_none());
        self.rng.skip(writes * drawn);
        if let Some(at) = &mut self.walked {
            *at = index((*at as u64 + writes) % self.hot.len() as u64);
        }
    }

    /// So many writes in a row: most of what a simulation does, so the numbers are kept at hand.
    pub(super) fn run_at_source(&mut self, writes: u64) {
        let mut rng = self.rng.clone();
        let mut newest = self.next_version;
        let (habits, blocks) = (self.habits(), self.disks.source.len() as u64);
        for _ in 0..writes {
            let at = next_place(&mut self.walked, self.hot.len(), &mut rng);
            let gfn = self.hot[at];
            let (version, gives) = habits.write(&mut newest, &mut rng);
            self.write_at_source(gfn, version, gives);
            if let Some((block, clear)) = habits.write_disk(blocks, &mut rng) {
                self.disks.write(block, clear);
            }
        }
        self.rng = rng;
        self.next_version = newest;
    }

    fn write_at_source(&mut self, gfn: Gfn, version: u64, gives: bool) {
        self.source_memory[index(gfn)] = version;
        self.holes.set(gfn, gives);
        if let Some(log) = &mut self.log {
            log.insert(gfn);
        }
    }

    fn next_written(&mut self) -> Gfn {
        let at = next_place(&mut self.walked, self.hot.len(), &mut self.rng);
        self.hot[at]
    }

    /// One write of the guest, wherever it runs; sometimes it clears the page, or gives it back.
    pub fn write(&mut self, gfn: Gfn) {
        let habits = self.habits();
        if self.source_runs {
            let (version, gives) = habits.write(&mut self.next_version, &mut self.rng);
            return self.write_at_source(gfn, version, gives);
        }
        if !habits.gives.is_none() {
            // There is nothing to be given back to here; the numbers are drawn as at the source.
            self.rng.skip(1);
        }
        let gives_nothing = Habits {
            gives: Odds::new(0.0),
            ..habits
        };
        let (version, _) = gives_nothing.write(&mut self.next_version, &mut self.rng);
        if self.destination_runs {
            self.destination_memory[index(gfn)] = version;
        }
    }

    /// Some of the guest's writes go to its disk.
    fn write_disk(&mut self) {
        let blocks = self.disks.source.len() as u64;
        if self.source_runs
            && let Some((block, clear)) = self.habits().write_disk(blocks, &mut self.rng)
        {
            self.disks.write(block, clear);
        }
    }

    /// The guest gets to write something in the middle of whatever the engine is doing.
    pub fn sneak_a_write(&mut self) {
        if self.slowed > 0.0 && self.rng.chance(self.slowed) {
            return;
        }
        if self.write_rate > 0.0 && !self.paused_by_user && self.rng.chance(self.racing_writes) {
            let gfn = self.next_written();
            self.write(gfn);
            self.write_disk();
        }
    }
}
