//! Live migration of virtual machines: the algorithms, the protocol and the engines.
//!
//! The engines know no hypervisor, no device, no clock and no socket. A virtual machine monitor
//! implements the traits of [`port`] and calls [`source::migrate`] on one host and drives a
//! [`destination::Destination`] on the other. The feature `net` (on by default) joins them to
//! sockets, in a call for each side; the feature `testing` brings what stands in for hosts,
//! networks and time.
//!
//! Data flows one way. Source: `SourceVm::collect_dirty → PageSet → Policy → batch → Link`.
//! Destination: `Link → decode → PageSink`.
#![forbid(unsafe_code)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::panic,
        clippy::cast_possible_truncation,
        missing_docs
    )
)]

mod bandwidth;
pub mod codec;
pub mod data_channels;
pub mod destination;
mod first_pass;
pub mod model;
#[cfg(feature = "net")]
pub mod net;
mod numbers;
pub mod options;
pub mod order;
pub mod page;
pub mod policy;
pub mod port;
pub mod probe;
pub mod report;
pub mod rng;
mod sender;
pub mod snapshot;
pub mod source;
pub mod steering;
mod sync;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod trace;
mod verify;
pub mod wire;

#[cfg(all(doctest, feature = "net"))]
#[doc = include_str!("../README.md")]
struct Readme;
