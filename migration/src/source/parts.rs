//! The parts of the source engine that hold state: transport, memory, and what is on its way.

use super::page_server::FaultChannel;
use crate::bandwidth::Bandwidth;
use crate::data_channels::{Channels, DataChannels};
use crate::options::Options;
use crate::page::{Heat, PageSet, RamLayout};
use crate::port::Link;
use crate::sender::{Pacer, Sender, Sent};
use crate::wire::Channel;
use std::collections::VecDeque;
use std::time::Duration;

/// What pages go out on.
pub(super) struct Transport<L: Link> {
    /// Of the control channel.
    pub(super) sender: Sender,
    pub(super) data_channels: Vec<(Channel<L>, Sender)>,
    pub(super) used: DataChannels,
    /// Why so many.
    pub(super) why: String,
    /// When something was last sent on all of them.
    pub(super) alive_at: Duration,
    /// Post-copy's page requests come in on these.
    pub(super) faults: Vec<FaultChannel<L>>,
    /// The destination says when pages that follow the guest are in place.
    pub(super) tells: bool,
    pub(super) pacer: Pacer,
}

impl<L: Link> Transport<L> {
    pub(super) fn new(options: &Options, now: Duration) -> Self {
        Self {
            sender: Sender::default(),
            data_channels: Vec::new(),
            used: DataChannels::new(0, true),
            why: String::new(),
            alive_at: now,
            faults: Vec::new(),
            tells: false,
            pacer: Pacer::new(options.bandwidth),
        }
    }

    /// Bytes sent on all channels but the control channel.
    pub(super) fn sent(&self) -> u64 {
        let data = self.data_channels.iter().map(|(channel, _)| channel.sent());
        let faults = self.faults.iter().map(|fault| fault.channel.sent());
        data.chain(faults).sum()
    }

    /// Drops the channels of a connection that was lost; returns the bytes that were sent on them.
    pub(super) fn close(&mut self) -> u64 {
        let sent = self.sent();
        self.data_channels.clear();
        self.faults.clear();
        sent
    }

    /// For the report.
    pub(super) fn channels(&self) -> Channels {
        let opened = u16::try_from(self.data_channels.len()).unwrap_or(u16::MAX);
        Channels {
            opened,
            used: self.used.used().min(opened),
            bytes: self
                .data_channels
                .iter()
                .map(|(channel, _)| channel.sent())
                .collect(),
            why: self.used.reason(&self.why),
        }
    }
}

/// What is known of the guest's memory.
pub(super) struct Memory {
    pub(super) layout: RamLayout,
    pub(super) pending: PageSet,
    pub(super) sent_once: PageSet,
    /// Pages that were not sent and held nothing when it was looked.
    pub(super) empty: PageSet,
    /// With `--verify`: pages whose hashes the destination has, and that were not written since.
    /// They were hashed once the policy first wanted to stop.
    pub(super) hashed: Option<PageSet>,
    pub(super) heat: Heat,
    /// Scratch of a collection.
    pub(super) fresh: PageSet,
    /// The dirty log as last read, once the policy watches it.
    pub(super) written: PageSet,
    pub(super) watched: bool,
    pub(super) collected_at: Duration,
    /// Pages found dirty since the round before, over which time, and after which round that was.
    pub(super) dirtied: (u64, Duration),
    pub(super) dirtied_round: u32,
}

impl Memory {
    pub(super) fn new(layout: RamLayout, now: Duration) -> Self {
        let end = layout.end();
        Self {
            pending: layout.all(),
            sent_once: PageSet::new(end),
            empty: PageSet::new(end),
            hashed: None,
            heat: Heat::new(end),
            fresh: PageSet::new(end),
            written: PageSet::new(end),
            watched: false,
            collected_at: now,
            dirtied: (0, Duration::ZERO),
            dirtied_round: 0,
            layout,
        }
    }
}

/// Rounds that are on their way, and what they measure.
#[derive(Default)]
pub(super) struct Flight {
    pub(super) round: u32,
    pub(super) in_flight: VecDeque<InFlight>,
    /// When the destination's answer was there, which was not read yet.
    pub(super) answered_at: Option<Duration>,
    pub(super) bandwidth: Bandwidth,
}

/// A round that was sent and not yet acknowledged.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    pub(super) round: u32,
    pub(super) sent: Sent,
    /// Of the time until `ended`, what the link took.
    pub(super) link: Duration,
    pub(super) started: Duration,
    /// When its last byte was handed to the link.
    pub(super) ended: Duration,
    /// Bytes of disks that went out right before it, and how long that took.
    pub(super) disks: (u64, Duration),
}
