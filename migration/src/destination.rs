//! The destination engine.
//!
//! ```text
//!            HELLO, machine built     STATE, last pages, checked      COMMIT          guest runs
//!  Waiting ─────────────────▶ Filling ────────────────▶ Ready ────────────▶ Running ─────────▶ Complete
//!                                │                        │  │                │
//!                 any failure    │      ABORT from source │  │ connection     │ the guest cannot
//!                                ▼            ◀───────────┘  ▼ lost           ▼ be started
//!                            Discarded                     InDoubt ◀──────────┘
//!                                ▲          recover: ABORT   │ recover: COMMIT ──▶ Running
//!                                └───────────────────────────┘
//! ```
//!
//! Where the source shares the guest's memory itself (`Features::SHARED_MEMORY`), no page comes in
//! Filling. Where it offers the open files of the guest's devices too (`Features::SHARED_FILES`),
//! Waiting is left when those have come.
//!
//! In post-copy the pages follow the guest: Running waits for them.
//!
//! ```text
//!            every page in place, ARRIVED sent
//!  Running ─────────────────────────────────────▶ Complete
//!    │  ▲
//!    │  │ recover: COMMIT; MISSING is sent, the rest comes
//!    ▼  │
//!  Interrupted (connection lost: the guest runs on until it needs a page that is not here)
//! ```
//!
//! Entering Running is a step of its own: RUNNING is sent by the one after it, so that at this end
//! the guest is booked before the source can know that it has arrived.
//!
//! The guest runs only after a commit was read, and after the host has claimed it. Between Ready
//! and the commit nothing but the source's word (or an operator's) resolves it: the machine is
//! kept.
//!
//! Each phase is a type (`destination/phase.rs`) that has what it needs and nothing else, and a
//! step consumes it: only Filling has the guest's memory and a channel that writes there, only a
//! guest that was Ready can run, and only one that does not run can be discarded.
//!
//! The engine handles one frame per [`Destination::step`], so that a simulator can drive it; a
//! real destination calls [`Destination::run`].

mod blocks;
mod data_channels;
mod engine;
mod error;
mod faults;
mod filling;
mod guest;
mod hashes;
mod in_doubt;
mod missing_pages;
mod pages;
mod phase;
mod preamble;
mod push;
mod session;
mod state;
mod steps;
mod timeouts;
mod waiting;

pub use data_channels::{DataChannel, DataChannelSet};
pub use engine::Destination;
pub use error::BlocksError;
pub use error::DestinationError;
pub use faults::FaultChannel;
pub use missing_pages::MissingPages;
pub use preamble::{exchange_preamble, turn_away};
pub use state::{State, Step};
pub use timeouts::{FRAME_TIMEOUTS, Timeouts};
