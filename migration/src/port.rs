//! What the engines need from a virtual machine monitor: the traits to implement in order to
//! migrate a guest of your own.
//!
//! ```text
//! source:       SourceVm::collect_dirty → PageSet → Policy → batch → PageSource::transmit → Link
//! destination:  Link → PageSink::receive → memory;   STATE → DestinationVm::restore;   COMMIT → DestinationVm::run
//! ```
//!
//! The engines never hold a reference into guest memory, because a running guest writes to it:
//! pages go from [`PageSource`] to [`Link`] and from [`Link`] to [`PageSink`] behind these traits.
//!
//! A VMM without mapped memory, post-copy or disks implements [`Pausable`] and [`SimpleVm`] alone.

mod blocks;
mod destination;
mod free_memory;
mod pausable;
mod simple;
mod source;
mod throttle;

pub use blocks::{BLOCK_BYTES, BlockSink, BlockSource, blocks_in};
pub use destination::{
    AdoptMemory, DestinationDisks, DestinationVm, PageFault, PageSink, PostCopySink, PostCopyVm,
};
pub(crate) use destination::{post_copy, post_copy_vm};
pub use free_memory::{FreeMemory, FreedPages};
pub use pausable::{Pausable, given_away, pause};
pub use simple::SimpleVm;
pub(crate) use source::holes;
pub use source::{
    Committed, CommittedVm, NotStarted, PageSource, Paused, PausedVm, ShareMemory, SourceDisks,
    SourceVm,
};
pub use throttle::Throttle;

use std::io;
use std::time::Duration;

/// Why something behind a port failed: the message goes to the user as it is.
pub type PortError = Box<dyn std::error::Error + Send + Sync>;

/// A reliable, ordered stream of bytes in both directions.
pub trait Link: Send {
    /// Sends `head`, then `body`, in one write where possible.
    ///
    /// # Errors
    /// When the connection is gone, the peer takes nothing for too long (`TimedOut`), or the
    /// user interrupted a wait (`Interrupted`).
    fn send(&mut self, head: &[u8], body: &[u8]) -> io::Result<()>;

    /// Receives exactly `buf.len()` bytes.
    ///
    /// # Errors
    /// As [`Link::send`]; the end of the stream is `UnexpectedEof`.
    fn recv(&mut self, buf: &mut [u8]) -> io::Result<()>;

    /// Waits at most so long until bytes can be received (or the peer has hung up); says whether
    /// they can.
    ///
    /// # Errors
    /// When the connection is gone.
    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool>;

    /// Whether bytes can be received without waiting (also when the peer has hung up).
    ///
    /// # Errors
    /// As [`Link::wait_readable`].
    fn readable(&mut self) -> io::Result<bool> {
        self.wait_readable(Duration::ZERO)
    }

    /// Asks that no more than about `bytes` wait here unsent: what is sent on another channel must
    /// not queue behind them for long. Best effort.
    fn bound_queue(&mut self, bytes: u32) {
        let _ = bytes;
    }

    /// How long a send or receive may wait without a byte of progress; `None` is for ever.
    fn set_timeout(&mut self, timeout: Option<Duration>);

    /// How long all sends and receives from now on may take together, however the bytes trickle;
    /// `None` is for ever. They fail as for a timeout then. A link without deadlines has its
    /// timeout alone.
    fn set_deadline(&mut self, deadline: Option<Duration>) {
        let _ = deadline;
    }
}

/// Time, as the engines see it.
pub trait Clock: Sync {
    /// Monotonic time since some start.
    fn now(&self) -> Duration;
    /// Waits.
    fn sleep(&self, duration: Duration);
}
