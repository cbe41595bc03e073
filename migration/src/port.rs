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
mod session;
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
pub use session::SessionId;
pub use simple::SimpleVm;
pub(crate) use source::holes;
pub use source::{
    Committed, CommittedVm, NotStarted, PageSource, Paused, PausedVm, ShareMemory, SourceDisks,
    SourceVm, TakeBackError,
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

    /// Receives `length` bytes into a buffer that holds nothing else then.
    ///
    /// What the buffer held is received over, so that one in use for long is not filled with zeros
    /// each time. It grows while bytes arrive: a length that was lied about costs no more memory
    /// than what the liar really sends.
    ///
    /// # Errors
    /// As [`Link::recv`]; what the buffer holds is then of no use.
    fn recv_into(&mut self, length: usize, into: &mut Vec<u8>) -> io::Result<()> {
        const STEP: usize = 256 << 10;
        into.truncate(length);
        let mut received = 0;
        while received < length {
            if received == into.len() {
                into.resize(length.min(received + STEP), 0);
            }
            self.recv(&mut into[received..])?;
            received = into.len();
        }
        Ok(())
    }

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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes that were sent before.
    struct Sent<'a>(&'a [u8]);

    impl Link for Sent<'_> {
        fn send(&mut self, _: &[u8], _: &[u8]) -> io::Result<()> {
            Ok(())
        }

        fn recv(&mut self, buf: &mut [u8]) -> io::Result<()> {
            io::Read::read_exact(&mut self.0, buf)
        }

        fn wait_readable(&mut self, _: Duration) -> io::Result<bool> {
            Ok(true)
        }

        fn set_timeout(&mut self, _: Option<Duration>) {}
    }

    proptest! {
        #[test]
        fn what_a_buffer_held_is_received_over(lengths in prop::collection::vec(0..700_000_usize, 1..5)) {
            let sent: Vec<u8> = (0..=250).cycle().take(lengths.iter().sum()).collect();
            let mut link = Sent(&sent);
            let (mut buffer, mut at) = (vec![255; 1000], 0);
            for length in lengths {
                link.recv_into(length, &mut buffer).unwrap();
                prop_assert!(buffer == sent[at..at + length], "{length} bytes at {at}");
                at += length;
            }
        }
    }

    #[test]
    fn a_length_that_was_lied_about_costs_what_was_sent() {
        let mut buffer = Vec::new();
        let error = Sent(&[1; 600 << 10]).recv_into(4 << 30, &mut buffer);
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(buffer.capacity() <= 2 << 20, "{}", buffer.capacity());
    }
}
