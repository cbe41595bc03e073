#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic, missing_docs))]
//! ferry-migration
pub mod options;
pub mod page;
pub mod report;
