//! Slowing a guest's processors down, for one that dirties pages faster than the link carries them.

use super::PortError;
use std::time::Duration;

/// The processors of a running guest, each of which can be made to rest a share of its time.
pub trait Throttle: Sync {
    /// How many there are.
    fn vcpus(&self) -> usize;
    /// Pages that each has dirtied so far, counted from any moment on; `None` where the host does
    /// not tell them apart: all are then slowed alike.
    fn dirtied(&self) -> Option<Vec<u64>> {
        None
    }
    /// From now on each rests this share of its time, from 0 (full speed) to 0.99; processors that
    /// the list leaves out run at full speed. Returns at once, and never delays a pause.
    ///
    /// # Errors
    /// When they cannot be slowed. Full speed is always possible.
    fn slow(&self, shares: &[f64]) -> Result<(), PortError>;
    /// How long each has rested so far.
    fn rested(&self) -> Vec<Duration>;
}
