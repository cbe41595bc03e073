//! The wire: what crosses between two hosts, byte by byte. All integers are little-endian.
//!
//! Every channel opens with a fixed [`Preamble`] in each direction (the source speaks first), so
//! that any two versions can at least say both versions. Then frames follow: a 32-byte
//! [`Header`], guarded by a CRC32C, and a payload.
//!
//! ```text
//!  source                                    destination
//!    │ preamble (role control) ───────────────▶ │
//!    │ ◀──────────────────────────── preamble   │
//!    │ HELLO layout, machine, features ───────▶ │  builds the machine, paused
//!    │ ◀─────────────────────────── HELLO-ACK   │  or ABORT with the reason
//!    │ PAGES… ZERO… ROUND-END n ──────────────▶ │  on the control or on data channels
//!    │ ◀───────────────────────── ROUND-ACK n   │  placed
//!    │            (rounds; then the guest is paused)
//!    │ PAGES… ROUND-END, STATE, [VERIFY…] ────▶ │  restores, checks
//!    │ ◀─────────────────────────────── READY   │
//!    │ (written down) COMMIT ─────────────────▶ │  runs the guest
//!    │ ◀───────────────────────────── RUNNING   │
//! ```
//!
//! The guest's disks move where they are asked for: see `wire/blocks.rs`.
//!
//! Either side may send ABORT with a reason at any time before the commit. After it the destination
//! may still answer that it did not start the guest and never will ([`AbortCode::NotStarted`]).
//!
//! In post-copy the pause sends no pages but the set of those that will follow, and they follow
//! after RUNNING, each once: pushed on the control or data channels, or asked for on a channel
//! of their own.
//!
//! ```text
//!    │ MISSING…, [VERIFY…], STATE ────────────▶ │  drops what is stale, restores
//!    │ ◀──────────── READY, COMMIT ──, RUNNING  │  as above; the guest runs
//!    │ PAGES… ZERO… ROUND-END, [VERIFY…] ─────▶ │  pushed
//!    │ ◀──────────────────────── PAGE-REQUEST   │  a fault, on its channel
//!    │ PAGES, ZERO or ON-ITS-WAY ─────────────▶ │  its answer
//!    │ ◀───────────────────────────── ARRIVED   │  every page is in place: the source may go
//! ```
//!
//! When a connection is lost in between, the source opens one of role recover, says COMMIT again,
//! and is answered with RUNNING and MISSING: the pages to send.

mod blocks;
mod channel;
mod frame;
mod hello;
mod kind;
mod preamble;
mod set;

pub use crate::port::SessionId;
pub use blocks::{MAX_BLOCKS, MAX_DISK_BLOCKS, MAX_DISKS};
pub use channel::{Channel, WireError, check_crc};
pub use frame::{
    FLAG_CRC, FLAG_TELL, HEADER_BYTES, Header, HeaderError, Limits, MAX_BATCH_PAGES,
    MAX_CODED_BYTES, MAX_CODED_PAGES, MAX_RUNS, RUN_BYTES, decode_runs, encode_runs,
};
pub use hello::{Arrived, Features, Hello, HelloAck, HelloError, Ready, Running};
pub use kind::{AbortCode, Encoding, FrameType};
pub use preamble::{PREAMBLE_BYTES, Preamble, PreambleError, Role, VERSION};
pub use set::{recv_set, send_set};
