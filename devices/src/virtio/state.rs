//! What of a virtio device travels. The machine's state carries the version of all of it.

use serde::{Deserialize, Serialize};

use crate::balloon::BalloonState;
use crate::block::BlockState;
use crate::console::ConsoleState;
use crate::net::NetState;
use crate::rng::RngState;
use crate::vsock::VsockState;

/// A virtqueue, as the driver set it up and as far as it was worked off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Descriptors.
    pub size: u16,
    /// Whether it is in use.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// The next entry of the available ring to look at.
    pub next_available: u16,
    /// The next entry of the used ring to fill.
    pub next_used: u16,
    /// Heads of chains that were taken from the available ring and nothing was done with: to be
    /// taken first.
    pub returned: Vec<u16>,
}

/// The registers of the MMIO transport.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// `Status`.
    pub status: u32,
    /// `DeviceFeaturesSel`.
    pub device_features_sel: u32,
    /// `DriverFeaturesSel`.
    pub driver_features_sel: u32,
    /// What the driver has accepted so far.
    pub driver_features: u64,
    /// `QueueSel`.
    pub queue_sel: u32,
    /// `InterruptStatus`.
    pub interrupt_status: u32,
    /// `ConfigGeneration`.
    pub config_generation: u32,
    /// The queues.
    pub queues: Vec<QueueState>,
}

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

/// All of a virtio device that has to travel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioState {
    /// The transport.
    pub transport: TransportState,
    /// The device behind it.
    pub device: DeviceState,
}

/// Why a device could not take over a state. It keeps the state that it had, or is reset.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// Another device's.
    #[error("a {here} was given the state of a {saved}: the machines have different devices")]
    Kind {
        /// What the state is of.
        saved: &'static str,
        /// What the device is.
        here: &'static str,
    },
    /// Not that many queues.
    #[error("the state of a {here} has {saved} queues, but the device has {have}: it is damaged")]
    Queues {
        /// What the device is.
        here: &'static str,
        /// Queues of the state.
        saved: usize,
        /// Queues of the device.
        have: usize,
    },
    /// Registers that cannot be.
    #[error("the state of a {here} has {what}: it is damaged, or of another version of ferry")]
    Registers {
        /// What the device is.
        here: &'static str,
        /// What is wrong.
        what: &'static str,
    },
    /// Features that the device here does not have.
    #[error(
        "the guest uses features {features:#x} of its {here} that the one here does not offer: \
         give it the same options as at the source"
    )]
    Features {
        /// What the device is.
        here: &'static str,
        /// The features that are missing.
        features: u64,
    },
    /// A queue that cannot be.
    #[error("queue {index} of a device's state has {what}: it is damaged")]
    Queue {
        /// Which queue.
        index: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// A disk of another size.
    #[error(
        "the guest's disk has {saved} sectors, but {path} has {here}: \
         give the same disk, or a copy of the same size"
    )]
    Capacity {
        /// Sectors of the guest's disk.
        saved: u64,
        /// Sectors of the disk here.
        here: u64,
        /// The disk here.
        path: String,
    },
    /// A disk that is read-only on one side.
    #[error(
        "the guest knows its disk as {}, but {path} was given as {}: say the same on both sides",
        if *.saved { "read-only" } else { "writable" },
        if *.saved { "writable" } else { "read-only" }
    )]
    ReadOnly {
        /// Whether the guest knows it as read-only.
        saved: bool,
        /// The disk here.
        path: String,
    },
}
