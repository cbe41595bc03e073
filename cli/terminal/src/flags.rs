//! Flags that more than one command takes.

mod names;
mod policy;
mod target;

pub use names::choice;
pub use policy::PolicyFlags;
pub use target::{FileToMake, Guest, Target, TargetAnd, Word};

use clap::builder::{PossibleValuesParser, TypedValueParser};

/// `on`, `off`, or `auto`, which is `None` and leaves the choice to the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switch(pub Option<bool>);

/// Reads a [`Switch`].
pub fn switch() -> impl TypedValueParser<Value = Switch> {
    PossibleValuesParser::new(["auto", "on", "off"]).map(|text| {
        Switch(match text.as_str() {
            "on" => Some(true),
            "off" => Some(false),
            _ => None,
        })
    })
}
