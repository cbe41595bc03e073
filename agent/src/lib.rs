//! The agent: one process on each host, by which others ask it to prepare what a guest needs before
//! it can move there.
//!
//! ```text
//!  ferry migrate web hostb                         hostb: ferry agent
//!    │ GET /v1/host ───────────────────────────────▶ │  memory, processors, version
//!    │ POST /v1/receivers  web, memory, disks, taps ▶ │  checks; starts `ferry receive --pair`
//!    │ ◀──────────────────────── its URI, a token     │
//!    │ migrates as always, over TLS by the token ────▶ `ferry receive`
//!    │ DELETE /v1/receivers/web  where that failed ─▶ │
//! ```
//!
//! HTTP over TLS 1.3; both sides show certificates of one authority, those of `--tls`. The agent
//! owns no guest and no migration: receivers and guests are processes of their own, and go on when
//! it ends. What it does it does by the commands of the `ferry` that it is: they are its contract.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic, missing_docs))]

mod accept;
mod client;
mod commands;
pub mod page;
mod preflight;
mod receivers;
mod server;
mod settings;
mod types;

pub use client::{Agent, AgentError};
pub use server::{Listening, ServeError, serve};
pub use settings::{Settings, SettingsError};
pub use types::{Disk, Host, Network, Receiver, Wanted};

/// Where agents listen.
pub const PORT: u16 = 7007;
