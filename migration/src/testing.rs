//! What tests need in place of hosts, networks and time.
//!
//! [`simulator`] runs the real engines in one thread over a simulated guest and link, with faults
//! injected and a seed that replays. [`MemoryLink`] and [`TestClock`] stand in for a socket and a
//! clock, [`TestSource`] and [`TestDestination`] for a VMM:
//!
//! ```
//! use ferry_migration::destination::Timeouts;
//! use ferry_migration::options::Options;
//! use ferry_migration::report::Status;
//! use ferry_migration::testing::{MemoryLink, TestDestination, TestSource};
//! use ferry_migration::{net, port::Link};
//! use std::sync::mpsc;
//!
//! let (source, destination) = (TestSource::new(64), TestDestination::new(64));
//! let (dial, listen) = mpsc::channel();
//! let report = std::thread::scope(|scope| {
//!     let there = destination.clone();
//!     let accept = move |time| Ok(listen.recv_timeout(time).ok());
//!     scope.spawn(move || net::receive(accept, there, Timeouts::default()));
//!     let connect = || {
//!         let (ours, theirs) = MemoryLink::pair();
//!         dial.send(theirs).map_err(std::io::Error::other).map(|()| ours)
//!     };
//!     net::migrate(&source, connect, &Options::default())
//! });
//! assert_eq!(report.status, Status::Completed);
//! assert!(destination.runs() && !source.runs());
//! assert!(source.memory() == destination.memory());
//! ```

mod clock;
mod link;
mod recorded;
pub mod simulator;
mod trouble;
mod vm;

pub use crate::codec::content;
pub use clock::TestClock;
pub use link::{Loopback, MemoryLink};
pub use recorded::{Gate, RecordedPeer, Seen};
pub use simulator::random_change;
pub use trouble::{Carried, Trouble};
pub use vm::{Memory, TestDestination, TestSource};
