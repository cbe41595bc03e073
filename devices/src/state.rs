//! What of each device travels, and the values in it: plain data, so that [`virtio`](crate::virtio)
//! and every device can name them without knowing each other.

use serde::{Deserialize, Serialize};

/// What is special to a kind of device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceState {
    /// A disk.
    Block(BlockState),
    /// A network card.
    Net(NetState),
    /// A source of random numbers.
    Rng(RngState),
    /// A balloon.
    Balloon(Box<BalloonState>),
    /// Sockets between guest and host.
    Vsock(VsockState),
    /// A console.
    Console(ConsoleState),
}

impl DeviceState {
    /// For people.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Block(_) => "disk",
            Self::Net(_) => "network card",
            Self::Rng(_) => "random number generator",
            Self::Balloon(_) => "balloon",
            Self::Vsock(_) => "vsock",
            Self::Console(_) => "console",
        }
    }
}

/// What has to travel of a disk: what the guest was told, so that another disk is noticed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Whether the guest knows it as read-only.
    pub read_only: bool,
}

/// What has to travel of a network card, beside its queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Its address.
    pub mac: MacAddress,
    /// The guest was asked to announce itself, and has not said that it did.
    pub announce: bool,
}

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MacAddress(pub [u8; 6]);

/// What has to travel: nothing, but for the queue. A type of its own for the day when there is
/// something.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}

/// What has to travel of a console, beside its queues.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Typed bytes that the driver has not taken, oldest first.
    #[serde(with = "serde_bytes")]
    pub input: Vec<u8>,
    /// Columns of the terminal; 0 when they are not known.
    pub columns: u16,
    /// Rows of the terminal; 0 when they are not known.
    pub rows: u16,
}

/// What has to travel of a balloon, beside its queues.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// Pages that the host asks for.
    pub target: u32,
    /// Pages in the balloon, as the driver says.
    pub actual: u32,
    /// The last statistics.
    pub statistics: Option<Statistics>,
    /// Whether the host moves the target by itself, and how.
    pub auto: Option<Settings>,
}

/// What a guest says about its memory (§5.5.6.3); a driver may leave any of it out, and may lie.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Bytes swapped in.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Page faults that needed I/O.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Bytes that are not used for anything.
    pub free_memory: Option<u64>,
    /// Bytes there are.
    pub total_memory: Option<u64>,
    /// Bytes that could be had without swapping.
    pub available_memory: Option<u64>,
    /// Bytes of caches that could be dropped.
    pub disk_caches: Option<u64>,
    /// Huge pages that were had.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that were not.
    pub hugetlb_failures: Option<u64>,
    /// Processes that were killed for want of memory (Linux 6.12).
    #[serde(default)]
    pub oom_kills: Option<u64>,
    /// Allocations that had to wait for memory (Linux 6.12).
    #[serde(default)]
    pub allocation_stalls: Option<u64>,
}

/// How the balloon is to be moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Between two steps of inflating, in milliseconds.
    pub interval_ms: u32,
    /// Bytes that stay available to the guest.
    pub reserve_bytes: u64,
}

/// What has to travel, beside the queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context.
    pub cid: u32,
    /// The guest is to be told that its connections are gone.
    pub reset: bool,
    /// Answers that the guest waits for.
    #[serde(default)]
    pub owed: Vec<Reset>,
    /// The port of the host's for the next connection that a program of the host makes.
    #[serde(default)]
    pub next_port: u32,
}

/// A RST that the guest is owed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reset {
    /// Whom the guest takes it from.
    pub cid: u64,
    /// Of that side.
    pub host_port: u32,
    /// Of the guest.
    pub guest_port: u32,
    /// `type` of the packet that it answers.
    pub kind: u16,
}
