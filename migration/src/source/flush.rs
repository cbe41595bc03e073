//! Flushing the guest's disks: while it runs, so that little is left for the pause.

use super::engine::Source;
use super::error::SourceError;
use super::record::PROGRESS_EVERY;
use crate::port::{Link, PortError, SourceDisks, SourceVm};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

/// A flush that takes less than this is short: the one in the pause will take about as long.
const SHORT_FLUSH: Duration = Duration::from_millis(2);
/// Flushes in a row at most, and for how long a flush counts as recent.
const FLUSHES: u32 = 4;
const FLUSHED: Duration = Duration::from_secs(1);

impl<L: Link, G: SourceVm<L>> Source<'_, '_, L, G> {
    /// Whether the disks were flushed a moment ago, or there is nothing to flush.
    pub(super) fn is_flushed(&self) -> bool {
        let recent = |at| self.now().saturating_sub(at) < FLUSHED;
        self.guest.disks().is_none() || self.record.flushed_at.is_some_and(recent)
    }

    /// Flushes the disks while the guest runs, again until that is short.
    pub(super) fn flush_live(&mut self) -> Result<(), SourceError> {
        for _ in 0..FLUSHES {
            self.session.check()?;
            let before = self.record.flush_took;
            self.flush(true)?;
            let took = self.record.flush_took;
            if took <= SHORT_FLUSH || self.record.flushes > 1 && took * 2 > before {
                break;
            }
        }
        Ok(())
    }

    /// Flushes the disks; what that takes is part of the predicted pause.
    pub(super) fn flush(&mut self, live: bool) -> Result<(), SourceError> {
        let Some(disks) = self.guest.disks() else {
            return Ok(());
        };
        let began = self.now();
        let result = if live && self.session.setup.threads {
            self.flush_aside(disks)?
        } else {
            disks.flush()
        };
        result.map_err(|e| SourceError::guest("flushing the guest's disks", e))?;
        let now = self.now();
        self.record.flush_took = now.saturating_sub(began);
        self.record.flushed_at = Some(now);
        self.record.flushes += 1;
        Ok(())
    }

    /// Flushes the disks on a thread of its own: a slow disk must not look like a dead source.
    fn flush_aside(
        &mut self,
        disks: &dyn SourceDisks,
    ) -> Result<Result<(), PortError>, SourceError> {
        std::thread::scope(|scope| {
            let (done, flushed) = std::sync::mpsc::channel();
            scope.spawn(move || {
                // The receiver is gone only when the connection failed meanwhile.
                let _ = done.send(disks.flush());
            });
            loop {
                match flushed.recv_timeout(PROGRESS_EVERY) {
                    Ok(result) => return Ok(result),
                    Err(RecvTimeoutError::Timeout) => {
                        self.take_acks()?;
                        self.keep_alive()?;
                        self.tell_progress();
                    }
                    Err(RecvTimeoutError::Disconnected) => {
                        return Ok(Err("the flushing thread panicked".into()));
                    }
                }
            }
        })
    }
}
