//! NAS-style kernels and a self-checking memory writer that run unchanged in a bare guest and on
//! the host.
//!
//! The kernels follow the definition of the NAS Parallel Benchmarks (Bailey et al., NAS-95-020) and
//! verify themselves against the published reference values of NPB 3.x, to the published epsilons.
//! The writer ([`dirty`]) dirties memory at a chosen rate and pattern and checks every page it ever
//! wrote, so that a page lost or mixed up in a migration is found by the guest itself.
//!
//! The crate allocates nothing and knows no machine. What it needs comes from the caller:
//!
//! - memory as plain slices ([`Workspace`], [`dirty::Memory`]),
//! - processors as a [`Team`], a fork-join pool that hands each rank its own disjoint part,
//! - a clock and a place to report to as [`Hooks`], whose [`Hooks::tick`] is called every few tens
//!   of microseconds of work, so that the caller can see the longest time the guest did not run.
//!
//! [`workload`] is the grammar of what a guest can be told to run, [`line`](mod@line) that of what
//! it prints: one source for the guest that writes and the host that reads.
#![cfg_attr(not(any(test, feature = "std")), no_std)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]
#![forbid(unsafe_code)]

mod bt;
mod cg;
pub mod dirty;
mod ep;
mod flow;
mod ft;
#[cfg(any(test, feature = "std"))]
pub mod host;
mod is;
pub mod line;
mod lines;
mod math;
mod mg;
mod problem;
mod random;
mod sp;
pub mod team;
pub mod workload;

pub use problem::{Check, Class, Facts, Kernel, Needs, Outcome, Problem, RunError, Workspace, run};
pub use team::{Hooks, Solo, Team};
