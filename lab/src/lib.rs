//! ferry's laboratory: benchmarks, models and demonstrations. No guest needs it to run or to move.
//!
//! It starts `ferry` as a process and talks to it over the control socket; the models run in this
//! process. The binary `ferry` has its four entry points as the commands `demo`, `bench`, `sim` and
//! `record`.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]
#![forbid(unsafe_code)]

pub mod bench;
pub mod demo;
mod findings;
mod nested;
mod plot;
pub mod record;
pub mod sim;
mod vmm_process;
