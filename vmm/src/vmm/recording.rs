//! Recording a guest's dirty trace, as a stream of bytes for the client that asked for it.
//!
//! The recording has no thread of its own: it is made while its bytes are taken. A client that
//! stops taking them ends it, and the guest runs on without a dirty log.

use super::state::State;
use super::{Core, Guest};
use crate::api::Refusal;
use crate::api::types::RecordRequest;
use crate::record::Recording;
use ferry_migration::page::PageSet;
use ferry_migration::trace::{Header, Writer};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a recording may overlook that the guest has ended.
const LOOK: Duration = Duration::from_millis(50);

/// The trace's bytes, piece by piece: its header, its frames, its end.
pub(super) struct Frames {
    core: Arc<Core>,
    /// `None` once it is over.
    recording: Option<Box<dyn Recording>>,
    /// `None` once it was finished.
    writer: Option<Writer<Vec<u8>>>,
    pages: PageSet,
    interval: Duration,
    began: Instant,
    /// When the next frame is due and when the last one is, since the beginning.
    due: Duration,
    end: Duration,
    first: bool,
}

impl Frames {
    /// Begins a recording. The caller marks it in the state that it holds locked.
    pub(super) fn begin(
        core: &Arc<Core>,
        guest: &dyn Guest,
        request: &RecordRequest,
    ) -> Result<Self, Refusal> {
        let recording = guest.recording().map_err(Refusal::Failed)?;
        let began = Instant::now();
        let interval = Duration::from_millis(request.interval_ms);
        let header = Header {
            interval_us: request.interval_ms * 1000,
            ..recording.header()
        };
        let writer = Writer::new(Vec::new(), &header)
            .map_err(|e| Refusal::Failed(format!("the guest cannot be recorded: {e}")))?;
        Ok(Self {
            core: Arc::clone(core),
            pages: PageSet::new(header.layout.end()),
            recording: Some(recording),
            writer: Some(writer),
            interval,
            began,
            due: interval,
            end: Duration::from_millis(request.duration_ms),
            first: true,
        })
    }

    /// Waits for the next frame's time; false when the guest has ended or left before it.
    fn wait(&self) -> bool {
        loop {
            if !matches!(self.core.lock().state, State::Running | State::Paused) {
                return false;
            }
            let left = self.due.saturating_sub(self.began.elapsed());
            if left.is_zero() {
                return true;
            }
            std::thread::sleep(left.min(LOOK));
        }
    }

    /// The next frame; `None` when there is none, and the trace is to end.
    fn frame(&mut self) -> Option<()> {
        let recording = self.recording.as_mut()?;
        self.pages.clear();
        if let Err(why) = recording.sample(&mut self.pages) {
            tracing::warn!("the recording of the guest's dirty trace ends: {why}");
            return None;
        }
        let now = self.began.elapsed();
        // Writing to memory does not fail.
        self.writer.as_mut()?.frame(now, &self.pages).ok()?;
        if now >= self.end {
            self.recording = None;
        }
        // Frames that could not be taken in time are left out: the next one holds their pages.
        while self.due <= now {
            self.due += self.interval;
        }
        Some(())
    }

    fn finish(&mut self) -> Option<Vec<u8>> {
        self.recording = None;
        self.writer.take()?.finish(self.began.elapsed()).ok()
    }
}

impl Iterator for Frames {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        if self.first {
            self.first = false;
        } else if self.recording.is_none() || !self.wait() || self.frame().is_none() {
            return self.finish();
        }
        Some(std::mem::take(self.writer.as_mut()?.get_mut()))
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        // The dirty log first: the next who asks finds it free.
        self.recording = None;
        self.core.lock().recording = false;
    }
}
