//! Steering a migration while it runs: one value that the engine looks at between two batches.
//!
//! ```text
//!  a user ── change() ─▶ checked ─▶ accepted ─▶ the engine takes it, applies it, tells it
//!                           │                     (event, report)
//!                           └─▶ refused, in a sentence
//!
//!  Before ──────▶ Disks ──────▶ Memory ──────▶ Over
//!  nothing        not the       everything     nothing: the guest is being handed over
//!                 switch-over
//! ```
//!
//! The engine leaves the live phase by `Steering::close`, which fails while something accepted
//! was not taken: what a user was promised is done, unless the migration fails first.

mod switch;

use crate::options::{OnTimeout, Options, OptionsError, PolicyKind};
use serde::{Deserialize, Deserializer, Serialize};
use std::fmt;
use std::time::Duration;
pub use switch::Steering;

/// What a user changes of a running migration; what is left out stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Change {
    /// Another policy, from the next round on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyKind>,
    /// Another cap in bytes per second; `Some(None)`, which is `null` in JSON, takes it away.
    #[serde(deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Option<u64>>,
    /// Another longest acceptable pause.
    #[serde(
        rename = "downtime_ms",
        with = "crate::options::optional_millis",
        skip_serializing_if = "Option::is_none"
    )]
    pub downtime: Option<Duration>,
    /// Another longest acceptable live phase, counted from its beginning.
    #[serde(
        rename = "timeout_ms",
        with = "crate::options::optional_millis",
        skip_serializing_if = "Option::is_none"
    )]
    pub timeout: Option<Duration>,
    /// Something else to do after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_timeout: Option<OnTimeout>,
    /// Another bound of how much the guest is slowed, in per cent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub throttle: Option<u8>,
    /// End the live phase now.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub switchover: bool,
}

/// A field that is there, though it be `null`.
fn given<'de, D: Deserializer<'de>>(field: D) -> Result<Option<Option<u64>>, D::Error> {
    Option::<u64>::deserialize(field).map(Some)
}

impl Change {
    /// The end of the live phase, and nothing else.
    #[must_use]
    pub fn switchover() -> Self {
        Self {
            switchover: true,
            ..Self::default()
        }
    }

    /// The options with this change.
    #[must_use]
    pub fn applied_to(&self, options: &Options) -> Options {
        Options {
            policy: self.policy.unwrap_or(options.policy),
            bandwidth: self.bandwidth.unwrap_or(options.bandwidth),
            downtime: self.downtime.unwrap_or(options.downtime),
            timeout: self.timeout.unwrap_or(options.timeout),
            on_timeout: self.on_timeout.unwrap_or(options.on_timeout),
            throttle: self.throttle.unwrap_or(options.throttle),
            ..options.clone()
        }
    }

    /// Whether the policy has to be asked again, so that a round under way is cut short.
    pub(crate) const fn concerns_policy(&self) -> bool {
        self.policy.is_some()
            || self.downtime.is_some()
            || self.timeout.is_some()
            || self.on_timeout.is_some()
            || self.switchover
    }
}

/// In words: `bandwidth 10.0 MB/s, downtime 500 ms`.
impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if let Some(policy) = self.policy {
            parts.push(format!("policy {}", policy.name()));
        }
        match self.bandwidth {
            Some(Some(rate)) => parts.push(format!("bandwidth {:.1} MB/s", rate as f64 / 1e6)),
            Some(None) => parts.push("no bandwidth cap".into()),
            None => {}
        }
        let times = [("downtime", self.downtime), ("timeout", self.timeout)];
        for (name, time) in times {
            parts.extend(time.map(|time| format!("{name} {} ms", time.as_millis())));
        }
        if let Some(action) = self.on_timeout {
            parts.push(format!("on timeout {}", action.name()));
        }
        if let Some(percent) = self.throttle {
            parts.push(format!("throttle {percent} %"));
        }
        if self.switchover {
            parts.push("switch over now".into());
        }
        f.write_str(&parts.join(", "))
    }
}

/// A change that was made.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Steered {
    /// When, since the request to migrate, in milliseconds.
    pub at_ms: f64,
    /// Rounds that had begun.
    pub round: u32,
    /// What was changed.
    pub change: Change,
}

/// Why a change was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SteeringError {
    /// Nothing is changed by it.
    #[error(
        "nothing is to be changed; give a bandwidth, downtime, timeout, on_timeout, throttle or policy"
    )]
    Nothing,
    /// Its values cannot be meant.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The handshake is not over, or the guest's memory is handed over as a whole.
    #[error(
        "the migration has not begun to send, so there is nothing to steer; try again in a moment"
    )]
    TooEarly,
    /// Disks are copied first.
    #[error(
        "the guest's disks are still being copied, and its memory comes after them; switch over then"
    )]
    Disks,
    /// The live phase is over.
    #[error(
        "the live phase is over: the guest is being handed over, and nothing can be changed any more"
    )]
    TooLate,
    /// The destination was not asked whether it can.
    #[error(
        "the two sides have not agreed on post-copy when the migration began; cancel it and begin with --policy {0}, or with --on-timeout postcopy"
    )]
    NoPostCopy(&'static str),
    /// The guest's VMM cannot.
    #[error("this guest cannot be slowed down; give another on_timeout")]
    NoThrottle,
    /// `auto` watches the guest from the beginning.
    #[error("auto chooses by what it watches from the beginning; name the policy itself")]
    Auto,
    /// The engine is behind.
    #[error("{0} changes are still to be made; try again in a moment")]
    Busy(usize),
}

impl SteeringError {
    /// A name for programs; an interface.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Nothing | Self::Options(_) => "invalid",
            Self::TooEarly | Self::Disks => "too-early",
            Self::TooLate => "too-late",
            Self::NoPostCopy(_) => "no-postcopy",
            Self::NoThrottle => "no-throttle",
            Self::Auto => "auto",
            Self::Busy(_) => "busy",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(post_copy: bool) -> Steering {
        let steering = Steering::default();
        steering.open(&Options::default(), post_copy, false);
        steering.memory();
        steering
    }

    fn downtime(ms: u64) -> Change {
        Change {
            downtime: Some(Duration::from_millis(ms)),
            ..Change::default()
        }
    }

    fn policy(kind: PolicyKind) -> Change {
        Change {
            policy: Some(kind),
            ..Change::default()
        }
    }

    #[test]
    fn json_has_what_was_given_and_null_takes_the_cap_away() {
        for (text, change) in [
            ("{}", Change::default()),
            (
                r#"{"bandwidth":null}"#,
                Change {
                    bandwidth: Some(None),
                    ..Change::default()
                },
            ),
            (
                r#"{"bandwidth":5000000}"#,
                Change {
                    bandwidth: Some(Some(5_000_000)),
                    ..Change::default()
                },
            ),
            (r#"{"downtime_ms":20}"#, downtime(20)),
            (r#"{"policy":"mplm"}"#, policy(PolicyKind::Mplm)),
            (r#"{"switchover":true}"#, Change::switchover()),
        ] {
            assert_eq!(
                serde_json::from_str::<Change>(text).unwrap(),
                change,
                "{text}"
            );
            assert_eq!(serde_json::to_string(&change).unwrap(), text);
        }
        assert!(serde_json::from_str::<Change>(r#"{"downtime":20}"#).is_err());
    }

    #[test]
    fn nothing_is_steered_before_the_beginning_and_after_the_end() {
        let steering = Steering::default();
        assert_eq!(steering.change(&downtime(1)), Err(SteeringError::TooEarly));
        steering.open(&Options::default(), false, false);
        assert_eq!(
            steering.change(&Change::switchover()),
            Err(SteeringError::Disks)
        );
        assert_eq!(steering.change(&downtime(1)), Ok(()));
        steering.memory();
        assert_eq!(steering.change(&Change::switchover()), Ok(()));
        // What was promised is taken first.
        assert!(steering.has_news() && !steering.close());
        assert_eq!(steering.take(), [downtime(1), Change::switchover()]);
        assert!(!steering.has_news() && steering.take().is_empty() && steering.close());
        assert_eq!(steering.change(&downtime(2)), Err(SteeringError::TooLate));
    }

    #[test]
    fn values_are_checked_as_those_of_a_request() {
        let steering = opened(false);
        assert_eq!(
            steering.change(&Change::default()),
            Err(SteeringError::Nothing)
        );
        let slow = Change {
            bandwidth: Some(Some(4095)),
            ..Change::default()
        };
        assert_eq!(
            steering.change(&slow),
            Err(SteeringError::Options(OptionsError::Bandwidth(4095)))
        );
        assert!(steering.take().is_empty());
    }

    #[test]
    fn post_copy_must_have_been_agreed_on() {
        for kind in [PolicyKind::Hybrid, PolicyKind::Postcopy] {
            let refused = opened(false).change(&policy(kind)).unwrap_err();
            assert_eq!(refused.code(), "no-postcopy", "{refused}");
            assert_eq!(opened(true).change(&policy(kind)), Ok(()));
        }
        let follow = Change {
            on_timeout: Some(OnTimeout::Postcopy),
            ..Change::default()
        };
        assert!(opened(false).change(&follow).is_err());
        let slow = Change {
            on_timeout: Some(OnTimeout::Throttle),
            ..Change::default()
        };
        assert_eq!(opened(true).change(&slow), Err(SteeringError::NoThrottle));
        // auto has not watched the guest.
        assert_eq!(
            opened(true).change(&policy(PolicyKind::Auto)),
            Err(SteeringError::Auto)
        );
    }

    #[test]
    fn an_engine_that_is_behind_bounds_what_is_accepted() {
        let steering = opened(false);
        let accepted = (0..1000)
            .filter(|ms| steering.change(&downtime(*ms)).is_ok())
            .count();
        assert_eq!(accepted, Steering::BACKLOG);
        assert_eq!(steering.take().len(), accepted);
        assert_eq!(steering.change(&downtime(1)), Ok(()));
    }

    #[test]
    fn a_change_has_words() {
        let change = Change {
            policy: Some(PolicyKind::Mplm),
            bandwidth: Some(Some(12_500_000)),
            downtime: Some(Duration::from_millis(500)),
            on_timeout: Some(OnTimeout::Stop),
            switchover: true,
            ..Change::default()
        };
        assert_eq!(
            change.to_string(),
            "policy mplm, bandwidth 12.5 MB/s, downtime 500 ms, on timeout stop, switch over now"
        );
    }
}
