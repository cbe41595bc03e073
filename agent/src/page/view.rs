//! What is known of a migration, as the drawing code takes it.

use crate::server::host_name;
use ferry_migration::report::{Event, Phase, Progress, Round};
use ferry_vmm::api::types::{Direction, MigrationRecord, RecordStatus, unix_ms};
use serde::Serialize;

/// Samples of a view: a line of as many points is as smooth as a screen shows it.
const SAMPLES: usize = 512;
/// Rounds of a migration that has no report: as many as a report has.
const ROUNDS: usize = 1000;

/// A migration: its record, and what its record does not have.
#[derive(Clone, Debug, Serialize)]
pub struct View {
    /// Version of this object; grows when a field is added.
    pub schema: u32,
    /// The guest's name, if it has one.
    pub guest: Option<String>,
    /// The host that it leaves.
    pub host: String,
    /// As `GET /v1/migrations/ID` of the guest's control socket.
    pub record: MigrationRecord,
    /// The rounds so far, for a migration without a report.
    pub rounds: Vec<Round>,
    /// Its progress over time, evenly thinned.
    pub samples: Vec<Sample>,
    /// What the policy chose last.
    pub choice: Option<String>,
    /// Why there is no report and none will come.
    pub lost: Option<String>,
    /// Of so many samples one is kept.
    #[serde(skip)]
    every: usize,
    /// Samples that were not kept since the last that was.
    #[serde(skip)]
    left_out: usize,
}

/// A moment of a migration.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sample {
    /// Since the request, in milliseconds.
    pub at_ms: f64,
    /// See [`Progress`].
    pub phase: Phase,
    /// See [`Progress`].
    pub pending_pages: u64,
    /// See [`Progress`].
    pub bytes_wire: u64,
    /// See [`Progress`].
    pub predicted_downtime_ms: Option<f64>,
}

impl Sample {
    fn of(progress: &Progress) -> Self {
        Self {
            at_ms: progress.elapsed_ms,
            phase: progress.phase,
            pending_pages: progress.pending_pages,
            bytes_wire: progress.bytes_wire,
            predicted_downtime_ms: progress.predicted_downtime_ms,
        }
    }
}

impl View {
    /// A migration that begins.
    #[must_use]
    pub fn new(guest: Option<String>, id: String, to: Option<String>) -> Self {
        let begun = MigrationRecord::begun(id, Direction::Outgoing);
        Self::of(guest, MigrationRecord { to, ..begun })
    }

    /// A migration that a VMM has kept.
    #[must_use]
    pub fn of(guest: Option<String>, record: MigrationRecord) -> Self {
        Self {
            schema: 1,
            guest,
            host: host_name(),
            record,
            rounds: Vec::new(),
            samples: Vec::new(),
            choice: None,
            lost: None,
            every: 1,
            left_out: 0,
        }
    }

    /// Whether nothing more will come.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.record.status != RecordStatus::UnderWay
    }

    /// Takes what the migration says.
    pub fn receive(&mut self, event: &Event) {
        match event {
            Event::Progress(progress) => self.progress(progress),
            Event::Round(round) => {
                if self.rounds.len() >= ROUNDS {
                    // The first and the last tell the story.
                    self.rounds.remove(ROUNDS / 2);
                }
                self.rounds.push(round.clone());
            }
            Event::Choice { why } => self.choice = Some(why.clone()),
            Event::Report(report) => {
                self.record.id.clone_from(&report.session);
                self.record.policy.clone_from(&report.policy);
                self.record.status = report.status.into();
                self.record.ended_unix_ms = Some(unix_ms());
                self.record.progress = None;
                self.record.report = Some((**report).clone());
                // The report has all of them.
                self.rounds.clear();
            }
            // What the user changed is in the report.
            _ => {}
        }
    }

    /// No report will come.
    pub fn lose(&mut self, why: String) {
        if !self.has_ended() {
            self.record.status = RecordStatus::InDoubt;
            self.record.ended_unix_ms = Some(unix_ms());
            self.record.progress = None;
            self.lost = Some(why);
        }
    }

    fn progress(&mut self, progress: &Progress) {
        self.record.id.clone_from(&progress.session);
        self.record.policy.clone_from(&progress.policy);
        self.record.progress = Some(progress.clone());
        let sample = Sample::of(progress);
        self.left_out += 1;
        let before = self.samples.last().map(|last| last.phase);
        if !turns(before, sample.phase) && self.left_out < self.every {
            return;
        }
        self.left_out = 0;
        self.samples.push(sample);
        if self.samples.len() > SAMPLES {
            let (mut at, mut before) = (0, None);
            self.samples.retain(|sample| {
                at += 1;
                let turns = turns(before.replace(sample.phase), sample.phase);
                turns || at % 2 == 1
            });
            self.every *= 2;
        }
    }
}

/// Whether a phase begins that begins once: that stays, whatever is left out.
fn turns(before: Option<Phase>, now: Phase) -> bool {
    before != Some(now) && !matches!(now, Phase::Live | Phase::Draining)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_migration::report::{Report, Status};

    fn view() -> View {
        View::new(Some("web".into()), "s".into(), Some("tcp:b:1".into()))
    }

    fn at(ms: u32, phase: Phase) -> Event {
        Event::Progress(Progress {
            elapsed_ms: ms.into(),
            phase,
            policy: "auto".into(),
            session: "7".into(),
            ..Progress::default()
        })
    }

    #[test]
    fn a_long_migration_is_thinned_and_its_turns_stay() {
        let mut view = view();
        for ms in 0..50_000 {
            view.receive(&at(ms, Phase::Live));
            view.receive(&Event::Round(Round {
                n: ms,
                ..Round::default()
            }));
        }
        view.receive(&at(50_000, Phase::Stopped));
        for ms in 50_001..50_500 {
            let often = [Phase::Live, Phase::Draining][ms as usize % 2];
            view.receive(&at(ms, often));
        }
        assert!(
            (SAMPLES / 2..=SAMPLES).contains(&view.samples.len()),
            "{}",
            view.samples.len()
        );
        let stopped = |sample: &Sample| (sample.at_ms, sample.phase) == (50_000.0, Phase::Stopped);
        assert!(view.samples.iter().any(stopped));
        let gaps = view.samples.windows(2).map(|w| w[1].at_ms - w[0].at_ms);
        assert!(gaps.fold(0.0, f64::max) <= 256.0);
        assert_eq!(view.rounds.len(), ROUNDS);
        assert_eq!((view.rounds[0].n, view.rounds[ROUNDS - 1].n), (0, 49_999));
        assert_eq!(view.record.policy, "auto");
    }

    #[test]
    fn a_report_ends_it_and_a_lost_one_does_not_undo_that() {
        let mut view = view();
        view.receive(&at(1, Phase::Live));
        view.receive(&Event::Round(Round::default()));
        let mut lost = view.clone();
        lost.lose("the VMM ended".into());
        assert_eq!(lost.record.status, RecordStatus::InDoubt);
        assert!(lost.has_ended() && lost.lost.is_some() && lost.rounds.len() == 1);

        let report = Report::bare("7".into(), "auto".into(), Status::Failed, "no".into());
        view.receive(&Event::Report(Box::new(report)));
        view.lose("the VMM ended".into());
        assert_eq!(view.record.status, RecordStatus::Failed);
        assert_eq!((view.lost, view.record.progress), (None, None));
    }
}
