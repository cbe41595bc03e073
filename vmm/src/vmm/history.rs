//! The migrations of a VMM, kept after they have ended.

use crate::api::types::{
    Direction, IncomingReport, MigrationRecord, Migrations, RecordStatus, unix_ms,
};
use ferry_migration::report::Report;
use std::collections::VecDeque;

#[derive(Debug, Default)]
pub(super) struct History {
    /// The newest last.
    records: VecDeque<MigrationRecord>,
}

impl History {
    /// A guest leaves.
    pub(super) fn leave(&mut self, id: &str, to: &str, policy: &str) {
        let record = self.begin(id, Direction::Outgoing);
        record.to = Some(to.to_owned());
        record.policy = policy.to_owned();
    }

    /// A migration that leaves has ended.
    pub(super) fn left(&mut self, id: &str, report: &Report) {
        if let Some(record) = self.get_mut(id) {
            record.status = report.status.into();
            record.policy.clone_from(&report.policy);
            record.ended_unix_ms = Some(unix_ms());
            record.report = Some(report.clone());
        }
    }

    /// What was in doubt or interrupted is no longer so.
    pub(super) fn resolved(&mut self, id: &str, status: RecordStatus) {
        if let Some(record) = self.get_mut(id) {
            record.status = status;
            record.ended_unix_ms = Some(unix_ms());
        }
    }

    /// News of a migration that arrives.
    pub(super) fn arrives(
        &mut self,
        id: &str,
        policy: &str,
        status: RecordStatus,
        incoming: IncomingReport,
    ) {
        if self.get(id).is_none() {
            // Booked when there is news of it, and it began before.
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let ago = incoming.total_ms.max(0.0) as u64;
            let record = self.begin(id, Direction::Incoming);
            record.begun_unix_ms = record.begun_unix_ms.saturating_sub(ago);
        }
        if let Some(record) = self.get_mut(id) {
            record.status = status;
            record.policy = policy.to_owned();
            record.ended_unix_ms = (status != RecordStatus::UnderWay).then(unix_ms);
            record.incoming = Some(incoming);
        }
    }

    /// The newest migration of this name: a guest may come back by the one that it left by.
    pub(super) fn get(&self, id: &str) -> Option<&MigrationRecord> {
        self.records.iter().rev().find(|record| record.id == id)
    }

    pub(super) fn all(&self) -> Migrations {
        Migrations {
            migrations: self.records.iter().cloned().collect(),
        }
    }

    fn get_mut(&mut self, id: &str) -> Option<&mut MigrationRecord> {
        self.records.iter_mut().rev().find(|record| record.id == id)
    }

    fn begin(&mut self, id: &str, direction: Direction) -> &mut MigrationRecord {
        if self.records.len() >= Migrations::KEPT {
            self.records.pop_front();
        }
        let record = MigrationRecord::begun(id.to_owned(), direction);
        self.records.push_back(record);
        let last = self.records.len() - 1;
        &mut self.records[last]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_migration::report::Status;

    #[test]
    fn the_last_sixteen_are_kept() {
        let mut history = History::default();
        for n in 0..40 {
            let id = format!("m{n}");
            history.leave(&id, "tcp:b:1", "auto");
            let report = Report::bare(
                id.clone(),
                "precopy".into(),
                Status::Cancelled,
                "by hand".into(),
            );
            history.left(&id, &report);
        }
        let all = history.all().migrations;
        assert_eq!(all.len(), Migrations::KEPT);
        assert_eq!((all[0].id.as_str(), all[15].id.as_str()), ("m24", "m39"));
        assert_eq!(history.get("m23"), None);
        let last = history.get("m39").unwrap();
        assert_eq!(
            (last.status, last.policy.as_str()),
            (RecordStatus::Cancelled, "precopy")
        );
        assert!(last.report.is_some() && last.ended_unix_ms >= Some(last.begun_unix_ms));
    }

    #[test]
    fn one_that_arrives_is_under_way_until_all_is_here() {
        let mut history = History::default();
        let incoming = |missing_pages| IncomingReport {
            missing_pages,
            total_ms: 1500.0,
            ..IncomingReport::default()
        };
        history.arrives("a", "hybrid", RecordStatus::UnderWay, incoming(7));
        let record = history.get("a").unwrap().clone();
        assert_eq!(record.ended_unix_ms, None);
        assert!(record.begun_unix_ms + 1500 <= unix_ms());
        history.arrives("a", "hybrid", RecordStatus::Completed, incoming(0));
        let all = history.all().migrations;
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].begun_unix_ms, record.begun_unix_ms);
        assert_eq!(all[0].direction, Direction::Incoming);
        assert_eq!(all[0].incoming.as_ref().unwrap().missing_pages, 0);
        assert!(all[0].ended_unix_ms.is_some());
    }
}
