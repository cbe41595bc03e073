//! Live migration of virtual machines: the algorithms, the protocol and the engines.
//!
//! This crate knows no hypervisor, no device, no clock and no socket. A virtual machine monitor
//! implements the traits of [`port`] and calls [`source::migrate`] on one host and drives a
//! [`destination::Destination`] on the other.
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
pub mod options;
pub mod order;
pub mod page;
pub mod policy;
pub mod port;
pub mod report;
pub mod rng;
mod sender;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod snapshot;
pub mod source;
pub mod trace;
pub mod wire;
