//! The end of a migration: what it means, said to the user and to the destination.

use super::abort::{AbortTold, tell_abort};
use super::engine::Source;
use super::error::SourceError;
use super::phases::{End, Moved};
use super::record::ms;
use crate::port::{Link, SourceVm};
use crate::report::{Phase, Report, Status};
use crate::wire::{FrameType, WireError};
use std::time::Duration;

impl<'g, L: Link, G: SourceVm<L>> Source<'_, 'g, L, G> {
    /// What the end means for who owns the guest. The guest runs already where it can: this only
    /// explains and tells.
    pub(super) fn finish(&mut self, end: Result<Moved<'g>, End<'g>>) -> Report {
        self.session.setup.steering.end();
        let mut retry_commit = false;
        let mut abort_untold = None;
        let (status, error, moved) = match end {
            Ok(Moved { committed, error }) => (Status::Completed, error, Some(committed)),
            Err(End::Here(error)) => {
                let lost = matches!(
                    error,
                    SourceError::Wire(WireError::Io(_))
                        | SourceError::Silent(_)
                        | SourceError::PauseTooLong
                );
                let error = self.explain(error);
                abort_untold = self.abort(&error, lost);
                (error.status(), Some(error), None)
            }
            Err(End::InDoubt { error, committed }) => {
                retry_commit = committed.is_some() && error.may_retry();
                let error = self.explain(error);
                self.enter(Phase::InDoubt);
                (Status::InDoubt, Some(error), None)
            }
            Err(End::Interrupted(error)) => {
                let error = self.explain(error);
                if !matches!(error, SourceError::Wire(_)) {
                    self.session.control.send_abort(&error.to_string());
                }
                self.enter(Phase::Interrupted);
                (Status::Interrupted, Some(error), None)
            }
        };
        self.disks.stop();
        let mut report = self.report(status, error.map(|error| error.to_string()));
        report.retry_commit = retry_commit;
        report.abort_untold = abort_untold;
        if let Some(committed) = moved {
            committed.release();
        }
        report
    }

    /// What the user wants to know: a connection that the peer closed often holds its reason.
    fn explain(&mut self, error: SourceError) -> SourceError {
        const LAST_WORDS: Duration = Duration::from_millis(200);
        self.session.wait_at_most(LAST_WORDS, None);
        if !matches!(error, SourceError::Wire(WireError::Io(_))) {
            return error;
        }
        // A wait that the user ended looks like a broken connection.
        if self.session.setup.owner.is_cancelled() {
            return SourceError::Cancelled;
        }
        let control = &mut self.session.control;
        if !control.link().readable().unwrap_or(false) {
            return error;
        }
        // Acknowledgements may still lie before it.
        for _ in 0..4 {
            match control.recv_header() {
                Ok(header)
                    if matches!(
                        header.kind,
                        FrameType::RoundAck | FrameType::BlocksStored | FrameType::Alive
                    ) => {}
                Ok(header) if header.kind == FrameType::Abort => {
                    return control.refuse(&header, "").into();
                }
                _ => break,
            }
        }
        error
    }

    /// Tells the peer that the guest stays here; on a new connection where the old one is `lost`.
    /// Returns what a destination that may be ready could not be told.
    fn abort(&mut self, error: &SourceError, lost: bool) -> Option<String> {
        let told = matches!(error, SourceError::Wire(error) if error.is_from_peer());
        let reason = error.for_peer();
        if !told {
            self.session.control.send_abort(&reason);
        }
        self.enter(Phase::Aborted);
        // The destination may be ready and wait for a commit that will never come.
        if self.record.paused_at.is_none() || !lost || told {
            return None;
        }
        match tell_abort(&mut self.session.setup, &reason) {
            AbortTold::Answered => None,
            AbortTold::Unanswered => Some(reason),
        }
    }

    fn report(&mut self, status: Status, error: Option<String>) -> Report {
        self.drop_unacknowledged();
        let bytes_wire = self.bytes_wire();
        let now = self.now();
        let record = &mut self.record;
        let total = record.ended.unwrap_or(now).saturating_sub(record.began);
        let d = &record.downtime;
        Report {
            guest_ended: false,
            schema: Report::SCHEMA,
            session: self.session.setup.session.to_string(),
            policy: record.policy.to_owned(),
            status,
            error,
            total_ms: ms(total),
            downtime_ms: d.quiesce_ms + d.last_pages_ms + d.verify_ms + d.state_ms + d.start_ms,
            downtime: d.clone(),
            rounds: std::mem::take(&mut record.rounds),
            rounds_omitted: record.rounds_omitted,
            pages: record.pages.clone(),
            codecs: record.codecs,
            channels: self.transport.channels(),
            disk: self.disks.report(),
            bytes_wire,
            mbps: bytes_wire as f64 / total.as_secs_f64().max(1e-6) / 1e6,
            faults: std::mem::take(&mut record.faults_there),
            verified: record.verified,
            why: record.why.take(),
            steered: std::mem::take(&mut self.helm.list),
            slowed: record.slowed.take(),
            freed: record.freed,
            retry_commit: false,
            abort_untold: None,
        }
    }
}
