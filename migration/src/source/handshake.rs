//! Before memory moves: the handshake, what both sides can do, the channels.

use super::blocks::Disks;
use super::engine::Source;
use super::error::SourceError;
use super::live::Live;
use super::page_server::FaultChannel;
use super::phases::{End, Tracking};
use super::stop::{How, Stopping};
use crate::codec::Coding;
use crate::data_channels::{DataChannels, to_open};
use crate::options::{Compress, Handover, OnTimeout};
use crate::port::{Link, SourceVm};
use crate::report::Phase;
use crate::sender::Sender;
use crate::wire::{Features, FrameType, Header, Hello, HelloAck, Role};

/// What the report calls a migration whose memory was handed over: no policy had anything to
/// decide.
const HANDOVER: &str = "handover";

/// The guest runs; nothing was agreed.
pub(super) struct Connecting<'s, 'a, 'g, L: Link, G: SourceVm<L>> {
    pub(super) source: &'s mut Source<'a, 'g, L, G>,
}

/// What both sides have agreed on.
pub(super) enum Agreed<'s, 'a, 'g, L: Link, G: SourceVm<L>> {
    /// Memory is sent.
    Send(Live<'s, 'a, 'g, L, G>),
    /// The destination maps the guest's memory itself.
    Share(Stopping<'s, 'a, 'g, L, G>),
}

impl<'s, 'a, 'g, L: Link, G: SourceVm<L>> Connecting<'s, 'a, 'g, L, G> {
    /// Shakes hands, copies the disks that move, and starts the dirty log.
    pub(super) fn shake_hands(self) -> Result<Agreed<'s, 'a, 'g, L, G>, End<'g>> {
        let Self { source } = self;
        if source.handshake().map_err(End::Here)? {
            source.enter(Phase::Live);
            return Ok(Agreed::Share(Stopping {
                source,
                tracking: None,
                how: How::Shared,
            }));
        }
        source.copy_disks().map_err(End::Here)?;
        let tracking = Tracking::start(source.guest).map_err(End::Here)?;
        source.memory.collected_at = source.now();
        if !source.disks.is_empty() {
            source.record.memory_began = source.now();
        }
        source.enter(Phase::Live);
        Ok(Agreed::Send(Live { source, tracking }))
    }
}

/// What the source offers and needs.
struct Offer {
    offered: Features,
    required: Features,
    /// Data channels, and channels for page faults.
    channels: u16,
    faults: u16,
}

impl<L: Link, G: SourceVm<L>> Source<'_, '_, L, G> {
    /// Agrees on what both sides can do and opens the channels; whether the destination takes the
    /// memory itself.
    fn handshake(&mut self) -> Result<bool, SourceError> {
        self.record.progress.phase = Phase::Connecting;
        if self.helm.options.on_timeout == OnTimeout::Throttle && self.guest.throttle().is_none() {
            return Err(SourceError::NoThrottle);
        }
        self.open_control()?;
        let offer = self.offer()?;
        let ack = self.say_hello(&offer)?;
        let agreed = ack.features.and(offer.offered);
        self.session.reads_state = ack.state;
        self.session.control.set_end(self.memory.layout.end());
        self.session.live_hashes = agreed.has(Features::LIVE_HASHES);
        if agreed.has(Features::SHARED_MEMORY) {
            let transfer = self.session.setup.timeouts.transfer;
            self.session.wait_at_most(transfer, None);
            self.record.policy = HANDOVER;
            HANDOVER.clone_into(&mut self.record.progress.policy);
            self.memory.pending.clear();
            return Ok(true);
        }
        self.open_channels(&offer, &ack)?;
        Ok(false)
    }

    /// Opens the control channel, and measures the round trip on it.
    fn open_control(&mut self) -> Result<(), SourceError> {
        let timeout = self.session.setup.timeouts.handshake;
        // A destination that trickles bytes holds nothing open.
        self.session.wait_at_most(timeout, Some(timeout));
        let session = self.session.setup.session;
        let sent = self.now();
        self.session.control.open(Role::Control, 0, session)?;
        self.session.rtt = self.now().saturating_sub(sent);
        Ok(())
    }

    /// What goes into HELLO, by the options and by what guest and host can do. The guest's memory
    /// itself goes with it where it can be shared.
    fn offer(&mut self) -> Result<Offer, SourceError> {
        let options = self.session.setup.options;
        let (channels, why) = to_open(options, self.guest.processors());
        self.transport.used = DataChannels::new(channels, options.channels.is_some());
        self.transport.why = why;
        if options.copy_disk {
            let disks = self.guest.disks();
            self.disks = Disks::new(disks.map_or_else(Vec::new, |disks| disks.to_copy()));
        }
        let mut required = self.required(channels);
        let faults = if options.may_post_copy() {
            let wanted = self.guest.fault_channels();
            wanted.clamp(1, Self::MOST_FAULT_CHANNELS)
        } else {
            0
        };
        let mut offered = Features::SUPPORTED;
        if faults == 0 {
            offered = offered.without(Features::POST_COPY);
        }
        if !self.share_memory()? {
            offered = offered.without(Features::SHARED_MEMORY.or(Features::SHARED_FILES));
        } else if options.handover == Handover::On {
            required = required.or(Features::SHARED_MEMORY);
        }
        let sharing = self.guest.sharing();
        if !sharing.is_some_and(|sharing| sharing.has_files()) {
            offered = offered.without(Features::SHARED_FILES);
        }
        Ok(Offer {
            offered,
            required,
            channels,
            faults,
        })
    }

    /// What the destination must be able to do: what the user asked for by name.
    fn required(&self, channels: u16) -> Features {
        let options = self.session.setup.options;
        let coder = match options.compress {
            Compress::Zstd => Features::ZSTD,
            Compress::Delta => Features::PATCH,
            // These use what the destination can do.
            Compress::Auto | Compress::Adaptive | Compress::None => Features::default(),
        };
        [
            (!self.disks.is_empty(), Features::DISKS),
            (options.verify, Features::VERIFY),
            (channels > 0, Features::CHANNELS),
            (options.needs_post_copy(), Features::POST_COPY),
        ]
        .into_iter()
        .filter(|(needed, _)| *needed)
        .fold(coder, |all, (_, feature)| all.or(feature))
    }

    /// Sends HELLO, hands over the files that the destination asks for, and checks its answer.
    fn say_hello(&mut self, offer: &Offer) -> Result<HelloAck, SourceError> {
        let hello = Hello {
            offered: offer.offered,
            required: offer.required,
            layout: self.memory.layout.clone(),
            channels: offer.channels,
            faults: offer.faults,
            disks: self.disks.sizes(),
            policy: self.record.policy.to_owned(),
            machine: self
                .guest
                .description()
                .map_err(|e| SourceError::guest("describing the machine", e))?,
        };
        self.session
            .control
            .send(Header::bare(FrameType::Hello, 0), &hello.encode())?;
        let mut header = self.session.recv()?;
        if header.kind == FrameType::FilesWanted
            && offer.offered.has(Features::SHARED_FILES)
            && let Some(sharing) = self.guest.sharing()
        {
            sharing
                .share_files(self.session.control.link())
                .map_err(|e| SourceError::guest("sharing its devices' files", e))?;
            self.session
                .control
                .send(Header::bare(FrameType::Files, 0), &[])?;
            header = self.session.recv()?;
        }
        if header.kind != FrameType::HelloAck {
            let expected = "the answer to the handshake";
            return Err(self.session.control.refuse(&header, expected).into());
        }
        let ack: HelloAck = self.session.control.recv_json(&header)?;
        if !ack.features.has(offer.required) {
            return Err(SourceError::Features {
                missing: offer.required.0 & !ack.features.0,
            });
        }
        self.guest
            .check_reader(ack.state)
            .map_err(|e| SourceError::guest("choosing a version of the machine's state", e))?;
        Ok(ack)
    }

    /// Opens the channels of pages and faults, and lets the user steer from here on.
    fn open_channels(&mut self, offer: &Offer, ack: &HelloAck) -> Result<(), SourceError> {
        let options = self.session.setup.options;
        let coding = Coding::new(
            options,
            ack.features,
            self.memory.layout.pages(),
            self.memory.layout.end(),
        );
        self.disks.agree(options, ack.features);
        self.transport.sender = Sender::new(coding.encoder());
        for index in 0..offer.channels {
            let channel = self.open_channel(Role::Data, index)?;
            self.transport
                .data_channels
                .push((channel, Sender::new(coding.encoder())));
        }
        if ack.features.and(offer.offered).has(Features::POST_COPY) {
            for index in 0..offer.faults {
                let channel = self.open_channel(Role::Fault, index)?;
                self.transport.faults.push(FaultChannel::new(channel));
            }
        }
        self.transport.alive_at = self.now();
        let transfer = self.session.setup.timeouts.transfer;
        self.session.wait_at_most(transfer, None);
        let post_copy = !self.transport.faults.is_empty();
        let throttles = self.guest.throttle().is_some();
        self.session
            .setup
            .steering
            .open(options, post_copy, throttles);
        Ok(())
    }

    /// Has the guest's memory itself go out with the handshake, where that is wanted and can be.
    fn share_memory(&mut self) -> Result<bool, SourceError> {
        let wanted = self.session.setup.options.handover;
        if wanted == Handover::Off {
            return Ok(false);
        }
        // Disks are copied from host to host: that is another kind of move.
        let shared = if self.disks.is_empty() {
            let link = self.session.control.link();
            let sharing = self.guest.sharing();
            sharing.map_or(Ok(false), |sharing| sharing.share_memory(link))
        } else {
            Ok(false)
        };
        match (shared, wanted) {
            (Ok(true), _) => Ok(true),
            (Ok(false), Handover::On) => Err(SourceError::NotShared(
                "that needs a destination on this host, given as unix:PATH, and no --copy-disk"
                    .into(),
            )),
            (Err(error), Handover::On) => Err(SourceError::NotShared(error.to_string())),
            (Ok(false), _) => Ok(false),
            (Err(error), _) => {
                tracing::warn!(%error, "the guest's memory is sent instead of being handed over");
                Ok(false)
            }
        }
    }
}
