//! Reading and clearing the guest's dirty log.

use super::engine::Source;
use super::error::SourceError;
use crate::first_pass::FirstPass;
use crate::port::{Link, SourceVm};
use crate::report::Round;

impl<L: Link, G: SourceVm<L>> Source<'_, '_, L, G> {
    /// Unites the dirty log with what is pending.
    pub(super) fn collect(&mut self) -> Result<(), SourceError> {
        self.memory.fresh.clear();
        self.guest
            .collect_dirty(&mut self.memory.fresh)
            .map_err(|e| SourceError::guest("reading the dirty log", e))?;
        let now = self.now();
        if self.memory.watched {
            self.memory.written.clone_from(&self.memory.fresh);
        }
        // A page stays in the log until it is cleared for sending: what was pending is not news.
        self.memory.fresh.subtract(&self.memory.pending);
        self.memory.pending.union_with(&self.memory.fresh);
        if let Some(hashed) = &mut self.memory.hashed {
            hashed.subtract(&self.memory.pending);
        }
        self.memory.heat.record(&self.memory.fresh);
        // Counted in the one pass over the bitmap that is needed in any case.
        let regions = self.memory.fresh.len_by_part(Round::REGIONS);
        let (pages, over) = (
            regions.iter().sum::<u64>(),
            now.saturating_sub(self.memory.collected_at),
        );
        // The second collection of a round, after draining, finds only what is not pending yet:
        // taken alone it would make a guest that writes its working set all the time look calm, and
        // pre-copy would send round after round in search of a pause that it has.
        self.memory.dirtied = if self.memory.dirtied_round == self.flight.round {
            (self.memory.dirtied.0 + pages, self.memory.dirtied.1 + over)
        } else {
            (pages, over)
        };
        self.memory.dirtied_round = self.flight.round;
        self.memory.collected_at = now;
        if let Some(last) = self.record.rounds.last_mut() {
            last.dirty(&regions);
        }
        Ok(())
    }

    /// Takes pending pages off the dirty log, which then shows what is written to them: they are
    /// pending all the same.
    pub(super) fn watch(&mut self) -> Result<(), SourceError> {
        let log = if std::mem::replace(&mut self.memory.watched, true) {
            let mut log = self.memory.written.clone();
            log.intersect_with(&self.memory.pending);
            log
        } else {
            self.memory.pending.clone()
        };
        self.clear(&FirstPass::new(log))
    }

    pub(super) fn clear(&mut self, pass: &FirstPass) -> Result<(), SourceError> {
        let mut words = Vec::new();
        for part in pass.parts() {
            self.guest
                .clear_dirty(&part, &mut words)
                .map_err(|e| SourceError::guest("clearing the dirty log", e))?;
        }
        Ok(())
    }
}
