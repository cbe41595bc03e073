//! The `ferry` binary as users meet it: what it prints where, and how it exits.
#![allow(clippy::unwrap_used, clippy::panic)]

mod guest;
mod migrate;
mod names;
mod pretended;
mod support;
mod usage;
