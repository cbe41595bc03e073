//! What a connection in memory can suffer from, so that one channel waits for another's trouble.

use crate::sync::{lock, wait_while};
use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// Longer than any test takes, on any machine.
const NEVER: Duration = Duration::from_secs(120);
/// What is shorter is a header or a table of runs, and no page.
const PAGES: usize = 4096;

/// How many bytes the links that count for it have carried; others wait for them.
#[derive(Debug, Default)]
pub struct Carried {
    bytes: Mutex<u64>,
    change: Condvar,
}

impl Carried {
    fn add(&self, bytes: usize) {
        *lock(&self.bytes) += bytes as u64;
        self.change.notify_all();
    }

    fn wait_for(&self, bytes: u64) -> io::Result<()> {
        let held = lock(&self.bytes);
        let (_held, came) = wait_while(&self.change, held, Some(NEVER), |held| *held < bytes);
        if !came {
            return Err(io::Error::other("what was waited for did not come"));
        }
        Ok(())
    }
}

/// What a connection suffers from, on its way out.
#[derive(Clone, Debug)]
pub enum Trouble {
    /// None; its bytes count for the others, which wait.
    Counts(Arc<Carried>),
    /// It takes no page before those that count have carried so many bytes.
    Waits(Arc<Carried>, u64),
    /// After so many bytes, which count, it is gone.
    Dies(Arc<Carried>, u64),
    /// After so many bytes, which count, the peer takes nothing more: sending times out.
    Stalls(Arc<Carried>, u64),
}

impl Trouble {
    /// Before `bytes` go out, which make `sent` in all; says whether the connection is gone.
    pub(super) fn hits(&self, bytes: usize, sent: u64) -> io::Result<bool> {
        match self {
            Self::Counts(carried) | Self::Dies(carried, _) | Self::Stalls(carried, _) => {
                carried.add(bytes);
            }
            Self::Waits(carried, until) if bytes >= PAGES => carried.wait_for(*until)?,
            Self::Waits(..) => {}
        }
        match self {
            Self::Dies(_, after) => Ok(sent > *after),
            Self::Stalls(_, after) if sent > *after => Err(io::ErrorKind::TimedOut.into()),
            _ => Ok(false),
        }
    }
}
