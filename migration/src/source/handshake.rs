//! Before memory moves: the handshake, what both sides can do, the channels.

use super::blocks::Disks;
use super::phases::{Agreed, Connecting, End, Live, Tracking};
use super::post_copy::FaultChannel;
use super::stop::{How, Stopping};
use super::{HANDOVER, Source, SourceError};
use crate::codec::Coding;
use crate::data_channels::{DataChannels, to_open};
use crate::options::{Compress, Handover, OnTimeout};
use crate::port::{Link, SourceVm};
use crate::report::Phase;
use crate::sender::Sender;
use crate::wire::{Channel, Features, FrameType, Header, Hello, HelloAck, Role};

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

impl<L: Link, G: SourceVm<L>> Source<'_, '_, L, G> {
    /// Agrees on what both sides can do and opens the channels; whether the destination takes the
    /// memory itself.
    fn handshake(&mut self) -> Result<bool, SourceError> {
        self.record.progress.phase = Phase::Connecting;
        if self.helm.options.on_timeout == OnTimeout::Throttle && self.guest.throttle().is_none() {
            return Err(SourceError::NoThrottle);
        }
        let timeouts = self.session.setup.timeouts;
        // A destination that trickles bytes holds nothing open.
        self.session
            .wait_at_most(timeouts.handshake, Some(timeouts.handshake));
        let session = self.session.setup.session;
        let sent = self.now();
        self.session.control.open(Role::Control, 0, session)?;
        self.session.rtt = self.now().saturating_sub(sent);
        let options = self.session.setup.options;
        let (channels, why) = to_open(options, self.guest.processors());
        self.transport.used = DataChannels::new(channels, options.channels.is_some());
        self.transport.why = why;
        let mut faults = 0;
        let mut required = Features::default();
        if options.copy_disk {
            self.disks = Disks::new(
                self.guest
                    .disks()
                    .map_or_else(Vec::new, |disks| disks.to_copy()),
            );
        }
        if !self.disks.is_empty() {
            required = required.or(Features::DISKS);
        }
        if options.verify {
            required = required.or(Features::VERIFY);
        }
        if channels > 0 {
            required = required.or(Features::CHANNELS);
        }
        match options.compress {
            Compress::Zstd => required = required.or(Features::ZSTD),
            Compress::Delta => required = required.or(Features::PATCH),
            // These use what the destination can do.
            Compress::Auto | Compress::Adaptive | Compress::None => {}
        }
        if options.needs_post_copy() {
            required = required.or(Features::POST_COPY);
        }
        if options.may_post_copy() {
            faults = self
                .guest
                .fault_channels()
                .clamp(1, Self::MOST_FAULT_CHANNELS);
        }
        let mut offered = Features::SUPPORTED;
        if faults == 0 {
            offered = offered.without(Features::POST_COPY);
        }
        if !self.share_memory()? {
            offered = offered.without(Features::SHARED_MEMORY.or(Features::SHARED_FILES));
        } else if options.handover == Handover::On {
            required = required.or(Features::SHARED_MEMORY);
        }
        if !self
            .guest
            .sharing()
            .is_some_and(|sharing| sharing.has_files())
        {
            offered = offered.without(Features::SHARED_FILES);
        }
        let hello = Hello {
            offered,
            required,
            layout: self.memory.layout.clone(),
            channels,
            faults,
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
            && offered.has(Features::SHARED_FILES)
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
            return Err(self
                .session
                .control
                .refuse(&header, "the answer to the handshake")
                .into());
        }
        let ack: HelloAck = self.session.control.recv_json(&header)?;
        if !ack.features.has(required) {
            return Err(SourceError::Features {
                missing: required.0 & !ack.features.0,
            });
        }
        self.guest
            .check_reader(ack.state)
            .map_err(|e| SourceError::guest("choosing a version of the machine's state", e))?;
        self.session.reads_state = ack.state;
        self.session.control.set_end(self.memory.layout.end());
        self.session.live_hashes = ack.features.and(offered).has(Features::LIVE_HASHES);
        if ack.features.and(offered).has(Features::SHARED_MEMORY) {
            self.session.wait_at_most(timeouts.transfer, None);
            self.record.policy = HANDOVER;
            HANDOVER.clone_into(&mut self.record.progress.policy);
            self.memory.pending.clear();
            return Ok(true);
        }
        let coding = Coding::new(
            options,
            ack.features,
            self.memory.layout.pages(),
            self.memory.layout.end(),
        );
        self.disks.agree(options, ack.features);
        self.transport.sender = Sender::new(coding.encoder());
        for index in 0..channels {
            let channel = self.open_channel(Role::Data, index)?;
            self.transport
                .data_channels
                .push((channel, Sender::new(coding.encoder())));
        }
        if !ack.features.and(offered).has(Features::POST_COPY) {
            faults = 0;
        }
        for index in 0..faults {
            let channel = self.open_channel(Role::Fault, index)?;
            self.transport.faults.push(FaultChannel::new(channel));
        }
        self.transport.alive_at = self.now();
        self.session.wait_at_most(timeouts.transfer, None);
        let post_copy = !self.transport.faults.is_empty();
        self.session
            .setup
            .steering
            .open(options, post_copy, self.guest.throttle().is_some());
        Ok(false)
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

    /// With more fault channels than this, answers wait for the link.
    pub(super) const MOST_FAULT_CHANNELS: u16 = 16;

    /// Opens one more channel of this migration.
    pub(super) fn open_channel(
        &mut self,
        role: Role,
        index: u16,
    ) -> Result<Channel<L>, SourceError> {
        let link = (self.session.setup.connect)(role, index).map_err(SourceError::Connect)?;
        let mut channel = Channel::new(link);
        channel.set_end(self.memory.layout.end());
        let timeouts = self.session.setup.timeouts;
        channel.link().set_timeout(Some(timeouts.handshake));
        channel.link().set_deadline(Some(timeouts.handshake));
        channel.open(role, index, self.session.setup.session)?;
        channel.link().set_deadline(None);
        channel.link().set_timeout(Some(timeouts.transfer));
        Ok(channel)
    }
}
