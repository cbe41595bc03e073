//! What a bare guest is told to do, checked before it is booted.

use ferry_nas::{team, workload};
use std::fmt;
use std::str::FromStr;

/// The most processors a bare guest can have.
pub const MAX_CPUS: usize = team::MAX_RANKS;

/// The text of a workload does not do. The message names the part and says what would.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

/// How a bare guest goes about its workload; [`Default`] leaves it to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Manner {
    /// How often a kernel runs; 0 is until it is told to stop.
    pub repeat: Option<u64>,
    /// Milliseconds between two lines about its progress: [`Manner::STAT_MS`].
    pub stat_ms: Option<u64>,
    /// Milliseconds between two bytes on COM1 that are no text, signs of life for those who listen
    /// there: [`Manner::BEAT_MS`].
    pub beat_ms: Option<u64>,
}

impl Manner {
    /// What a guest takes for [`Manner::stat_ms`].
    pub const STAT_MS: std::ops::RangeInclusive<u64> = 20..=60_000;
    /// What a guest takes for [`Manner::beat_ms`]. A byte costs it two exits.
    pub const BEAT_MS: std::ops::RangeInclusive<u64> = 1..=1000;
    /// That byte.
    pub const BEAT: u8 = 0;
}

/// A workload of the bare guest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Workload(workload::Workload);

impl Workload {
    /// Reads `mg.A`, `dirty:…` or `idle:…`; the guest's README lists the options.
    ///
    /// # Errors
    /// One sentence that names the part that does not do.
    pub fn parse(text: &str) -> Result<Self, Error> {
        workload::Workload::parse(text)
            .map(Self)
            .map_err(|error| Error(error.to_string()))
    }

    /// What it is, to look into.
    pub fn kind(&self) -> &workload::Workload {
        &self.0
    }

    /// The guest memory it needs on `cpus` processors, in bytes. The writer fills whatever more it
    /// is given.
    pub fn memory_needed(&self, cpus: usize) -> u64 {
        self.0.memory_needed(cpus)
    }

    /// The guest's command line. `tsc_khz` is the rate of the host's time-stamp counter; without it
    /// the guest measures it, for which the machine must have an interval timer.
    pub fn command_line(&self, cpus: usize, tsc_khz: Option<u64>) -> String {
        let mut text = format!("ferry.run={} ferry.cpus={cpus}", self.0);
        if let Some(khz) = tsc_khz {
            text.push_str(&format!(" ferry.tsc_khz={khz}"));
        }
        text
    }

    /// As [`Workload::command_line`], with what else a guest can be told.
    pub fn command_line_with(&self, cpus: usize, tsc_khz: Option<u64>, manner: Manner) -> String {
        let mut text = self.command_line(cpus, tsc_khz);
        if let Some(times) = manner.repeat {
            text.push_str(&format!(" ferry.repeat={times}"));
        }
        if let Some(ms) = manner.stat_ms {
            text.push_str(&format!(" ferry.stat_ms={ms}"));
        }
        if let Some(ms) = manner.beat_ms {
            text.push_str(&format!(" ferry.beat_ms={ms}"));
        }
        text
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Workload {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn memory_is_what_the_kernels_take_and_little_more() {
        for (text, mib) in [
            ("ep.A", 4..8),
            ("is.A", 66..76),
            ("mg.S", 4..10),
            ("mg.A", 430..445),
            ("mg.C", 3300..3500),
            ("cg.C", 450..520),
            ("ft.A", 320..335),
            ("ft.C", 5120..5150),
            ("bt.A", 42..52),
            ("bt.C", 681..700),
            ("sp.A", 44..54),
            ("sp.C", 713..730),
        ] {
            let needed = Workload::parse(text).unwrap().memory_needed(1) >> 20;
            assert!(mib.contains(&needed), "{text} {needed}");
        }
        let writer = Workload::parse("dirty:wss=100M").unwrap();
        assert!(writer.memory_needed(2) >= 100 << 20);
    }

    #[test]
    fn the_command_line_holds_the_workload() {
        let workload = Workload::parse("dirty:rate=0").unwrap();
        let manner = Manner {
            repeat: Some(3),
            stat_ms: Some(100),
            beat_ms: Some(2),
        };
        let line = workload.command_line_with(2, Some(1), manner);
        let run = line
            .split(' ')
            .find_map(|token| token.strip_prefix("ferry.run="))
            .unwrap();
        assert_eq!(Workload::parse(run), Ok(workload));
        assert!(
            line.ends_with(
                " ferry.cpus=2 ferry.tsc_khz=1 ferry.repeat=3 ferry.stat_ms=100 ferry.beat_ms=2"
            ),
            "{line}"
        );
    }

    #[test]
    fn errors_are_one_sentence_about_the_part() {
        let error = Workload::parse("dirty:wss=16M,rate=fast")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("`rate=fast`") && !error.contains('\n'),
            "{error}"
        );
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text in "(dirty:|idle:|)[a-z0-9=,.KMG]{0,40}", cpus in 0usize..100) {
            if let Ok(workload) = Workload::parse(&text) {
                prop_assert!(workload.memory_needed(cpus) > 0);
                let line = workload.command_line(cpus, None);
                prop_assert!(line.len() < 300 && line.split(' ').count() == 2);
            }
        }
    }
}
