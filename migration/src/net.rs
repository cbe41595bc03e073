//! Sockets, the monotonic clock and random session identifiers, for a VMM that brings none of its
//! own.
//!
//! The engines know only the traits [`Link`] and [`Clock`]. This
//! module implements them with the standard library: [`StreamLink`] over TCP and Unix sockets, and
//! [`MonotonicClock`]. [`migrate`] and [`receive`] join them to the engines:
//!
//! ```no_run
//! use ferry_migration::net::{self, Listener, StreamLink};
//! use ferry_migration::{destination::Timeouts, options::Options};
//! # use ferry_migration::port::{DestinationVm, SourceVm};
//! # fn at_the_source(vm: impl SourceVm<StreamLink>) {
//! let connect = || StreamLink::connect_tcp("192.0.2.7:7000");
//! let report = net::migrate(&vm, connect, &Options::default());
//! # }
//! # fn at_the_destination(vm: impl DestinationVm<StreamLink>) -> Result<(), Box<dyn std::error::Error>> {
//! let listener = Listener::tcp("0.0.0.0:7000")?;
//! let vm = net::receive(|timeout| listener.accept(timeout), vm, Timeouts::default())?;
//! # Ok(())
//! # }
//! ```
//!
//! With the feature `tls` a [`StreamLink`] can be secured before it carries a channel: see `tls`.
//!
//! `examples/own_vmm.rs` is a whole VMM on top of it.

mod link;
mod listener;
mod receive;
mod socket;
#[cfg(feature = "tls")]
pub mod tls;

#[cfg(feature = "tls")]
pub use link::Unsecured;
pub use link::{StreamLink, Wait, connect};
pub use listener::Listener;
pub use receive::receive;
pub use socket::{Socket, Stream, TcpSocket, UnixSocket};

use crate::options::Options;
use crate::port::{Clock, Link, SourceVm};
use crate::report::Report;
use crate::source::{self, Ownership, Setup, Timeouts};
use crate::steering::Steering;
use crate::wire::SessionId;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::time::{Duration, Instant};

/// The host's monotonic clock.
#[derive(Clone, Copy, Debug)]
pub struct MonotonicClock(Instant);

impl MonotonicClock {
    /// A clock that begins at zero now.
    #[must_use]
    pub fn new() -> Self {
        Self(Instant::now())
    }
}

impl Default for MonotonicClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for MonotonicClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}

/// A random identifier for a new migration: 128 bits of `SipHash` under a key that the operating
/// system gave.
#[must_use]
pub fn session_id() -> SessionId {
    let random = RandomState::new();
    let mut id = [0; 16];
    for (half, bytes) in id.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&random.hash_one(half).to_le_bytes());
    }
    SessionId(id)
}

/// Moves a guest with the host's clock, a new session and the default timeouts; blocks until the
/// end.
///
/// `connect` opens a connection to the receiver; every channel of the migration calls it once. What
/// the report's status means for the guest is said at [`source::migrate`], which also takes a
/// cancel switch, a listener for progress and timeouts.
pub fn migrate<L: Link, V: SourceVm<L>>(
    vm: &V,
    mut connect: impl FnMut() -> io::Result<L>,
    options: &Options,
) -> Report {
    let setup = Setup {
        connect: &mut |_, _| connect(),
        clock: &MonotonicClock::new(),
        options,
        session: session_id(),
        owner: &Ownership::default(),
        steering: &Steering::default(),
        events: &mut |_| {},
        timeouts: Timeouts::default(),
        threads: true,
    };
    source::migrate(vm, setup)
}

#[cfg(test)]
mod tests;
