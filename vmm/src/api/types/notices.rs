//! `GET /v1/events`: what happens to the guest and its VMM.

use super::StateName;
use ferry_migration::report::Event;
use serde::{Deserialize, Serialize};
use std::time::{SystemTime, UNIX_EPOCH};

/// One line of `GET /v1/events`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Notice {
    /// When, in milliseconds since 1970 (UTC), by the host's clock.
    pub unix_ms: u64,
    /// What.
    #[serde(flatten)]
    pub what: What,
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum What {
    /// Where the guest is. Comes first, and again with each change.
    State {
        /// The state.
        state: StateName,
        /// The state in one sentence, with what can be done about it.
        explanation: String,
        /// Where the guest is being migrated to, or was; `null` when it is here alone.
        to: Option<String>,
        /// The migration that it is about; `null` when it is about none.
        migration: Option<String>,
    },
    /// At a destination: what became of a connection, or of a migration that arrives.
    Arrival {
        /// What.
        outcome: ArrivalOutcome,
        /// In one sentence.
        explanation: String,
    },
    /// The listener was behind, and so many events were dropped here. `GET /v1/status` tells what
    /// is now.
    Lost {
        /// How many.
        lost: u64,
    },
    /// What the stream of `PUT /v1/migrate` has too.
    #[serde(untagged)]
    Migration(Event),
}

/// What became of a migration that arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ArrivalOutcome {
    /// A connection was refused; nothing has changed.
    Refused,
    /// The source keeps its guest.
    Failed,
    /// A guest is complete here and was not handed over.
    InDoubt,
    /// The guest is here.
    Arrived,
    /// All pages that followed it are here.
    Complete,
    /// The connection was lost while pages follow.
    Interrupted,
    /// No guest can arrive any more.
    Unreachable,
}

impl Notice {
    /// Now.
    #[must_use]
    pub fn now(what: What) -> Self {
        Self {
            unix_ms: unix_ms(),
            what,
        }
    }
}

/// The host's clock, in milliseconds since 1970 (UTC).
#[must_use]
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_migration::report::Progress;

    #[test]
    fn a_line_is_flat_and_is_read_back() {
        let state = What::State {
            state: StateName::InDoubt,
            explanation: "e".into(),
            to: Some("tcp:b:1".into()),
            migration: None,
        };
        let progress = Progress {
            round: 3,
            mbps: 1.5,
            ..Progress::default()
        };
        let all = [
            (state, r#""event":"state","state":"in-doubt""#),
            (What::Lost { lost: 7 }, r#""event":"lost","lost":7"#),
            (
                What::Migration(Event::Progress(progress)),
                r#""event":"progress","phase":"connecting""#,
            ),
            (
                What::Arrival {
                    outcome: ArrivalOutcome::InDoubt,
                    explanation: "e".into(),
                },
                r#""event":"arrival","outcome":"in-doubt""#,
            ),
        ];
        for (what, part) in all {
            let notice = Notice { unix_ms: 5, what };
            let line = serde_json::to_string(&notice).unwrap();
            assert!(line.starts_with(r#"{"unix_ms":5,"#), "{line}");
            assert!(line.contains(part), "{line}");
            assert_eq!(serde_json::from_str::<Notice>(&line).unwrap(), notice);
        }
    }
}
