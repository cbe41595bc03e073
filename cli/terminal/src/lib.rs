//! How ferry talks to a person: what a command takes (sizes, rates, times, policies) and how it
//! answers.
//!
//! Both the product's command line and the laboratory's use it, so that a report or a flag has one
//! form.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]
#![forbid(unsafe_code)]

pub mod flags;
pub mod names;
pub mod output;
pub mod progress;
pub mod rows;
pub mod summary;
pub mod timeline;
pub mod units;
