//! What is measured.

use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// The guest's memory in MiB.
pub const MEMORY_MIB: u64 = 1024;
/// The downtime that all are asked to stay within.
pub const DOWNTIME: Duration = Duration::from_millis(20);

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Case {
    /// Nothing, with memory full of incompressible data.
    Idle,
    /// Writes 5,000 pages a second over 16 MiB, in order.
    Writer,
}

impl Case {
    /// The guest's workload.
    pub const fn workload(self) -> &'static str {
        match self {
            Self::Idle => "idle:fill=random",
            Self::Writer => "dirty:wss=16M,rate=5000,pattern=sequential,fill=random",
        }
    }

    /// What ferry is to reach: the guest's gap in milliseconds.
    pub const fn gap_goal_ms(self) -> f64 {
        match self {
            Self::Idle => 10.0,
            Self::Writer => 8.0,
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Idle => "idle",
            Self::Writer => "writer",
        })
    }
}

/// Who moves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contestant {
    /// Pre-copy over one channel.
    Ferry,
    /// Pre-copy over one channel, or over four.
    Qemu {
        /// Over four.
        multifd: bool,
    },
}

impl fmt::Display for Contestant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ferry => "ferry",
            Self::Qemu { multifd: false } => "qemu precopy",
            Self::Qemu { multifd: true } => "qemu multifd×4",
        })
    }
}

impl Serialize for Contestant {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
