//! Writing a guest to a file, beside the VMM's states: meanwhile it is neither paused, resumed,
//! migrated nor recorded.

use super::state::{State, conflict};
use super::{Core, Inner};
use crate::api::Refusal;
use crate::api::types::{SnapshotReport, SnapshotRequest, Then};
use ferry_devices::sync::lock;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Of a guest without [`GuestSnapshots`](super::GuestSnapshots).
const NONE: &str = "this guest cannot be written to a file";

/// One sentence: what is, and what can be done.
pub(super) fn explanation(path: &Path) -> String {
    format!(
        "the guest is here and is being written to {}; `ferry cancel` ends that",
        path.display()
    )
}

impl Inner {
    /// # Errors
    /// The guest is being written to a file.
    pub(super) fn not_in_a_snapshot(&self, wish: &str) -> Result<(), Refusal> {
        self.snapshot.as_ref().map_or(Ok(()), |(path, _)| {
            Err(Refusal::Conflict(format!(
                "cannot {wish}: {}",
                explanation(path)
            )))
        })
    }
}

impl Core {
    /// Without the lock while the file is written.
    pub(super) fn snapshot(&self, request: &SnapshotRequest) -> Result<SnapshotReport, Refusal> {
        let cancelled = Arc::new(AtomicBool::new(false));
        let guest = {
            let _turn = lock(&self.turn);
            let mut inner = self.lock();
            inner.not_in_a_snapshot("write another snapshot")?;
            let guest = match (&inner.state, &inner.guest) {
                (State::Running | State::Paused, Some(guest)) => Arc::clone(guest),
                (state, _) => return Err(conflict("write a snapshot", state)),
            };
            if inner.recording {
                return Err(Refusal::Conflict(
                    "cannot write a snapshot: the guest's dirty trace is being recorded; end `ferry record` or wait for \
                     its end"
                        .into(),
                ));
            }
            if let Some(missing) = guest.missing() {
                return Err(Refusal::Conflict(format!(
                    "cannot write a snapshot: {} pages of the guest have not arrived here yet; try again when they have",
                    missing.pages
                )));
            }
            if guest.snapshots().is_none() {
                return Err(Refusal::Conflict(format!(
                    "cannot write a snapshot: {NONE}"
                )));
            }
            inner.snapshot = Some((request.path.clone(), Arc::clone(&cancelled)));
            guest
        };
        let run = AssertUnwindSafe(|| match guest.snapshots() {
            Some(snapshots) => snapshots.save(request, &cancelled),
            None => Err(NONE.into()),
        });
        let result = catch_unwind(run).unwrap_or_else(|_| {
            Err("writing the snapshot failed inside; the VMM's output says where".into())
        });
        let mut inner = self.lock();
        inner.snapshot = None;
        let report = result.map_err(Refusal::Failed)?;
        match request.then {
            Then::Resume => {}
            Then::Pause => {
                if matches!(inner.state, State::Running) {
                    inner.enter(State::Paused);
                }
            }
            Then::Stop => {
                let how = format!(
                    "after its snapshot was written to {}",
                    request.path.display()
                );
                self.stop(&mut inner, &how).map_err(Refusal::Conflict)?;
            }
        }
        Ok(report)
    }
}
