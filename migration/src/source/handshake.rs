//! Before memory moves: the handshake, what both sides can do, the channels.

use super::blocks::Disks;
use super::post_copy::FaultChannel;
use super::{HANDOVER, Source, SourceError, State};
use crate::codec::Coding;
use crate::data_channels::{DataChannels, to_open};
use crate::options::{Compress, Handover};
use crate::port::{Link, SourceVm};
use crate::report::Phase;
use crate::sender::Sender;
use crate::wire::{Channel, Features, FrameType, Header, Hello, HelloAck, Role};

impl<L: Link, G: SourceVm<L>> Source<'_, '_, L, G> {
    pub(super) fn handshake(&mut self) -> Result<(), SourceError> {
        self.progress.phase = Phase::Connecting;
        let timeouts = self.setup.timeouts;
        self.control.link().set_timeout(Some(timeouts.handshake));
        let session = self.setup.session;
        let sent = self.now();
        self.control.open(Role::Control, 0, session)?;
        self.rtt = self.now().saturating_sub(sent);
        let options = self.setup.options;
        let (channels, why) = to_open(options, self.guest.processors());
        self.data_channels_used = DataChannels::new(channels, options.channels.is_some());
        self.data_channels_why = why;
        let mut faults = 0;
        let mut required = Features::default();
        if options.copy_disk {
            self.disks = Disks::new(self.guest.disks());
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
        if options.may_post_copy() {
            required = required.or(Features::POST_COPY);
            faults = self
                .guest
                .fault_channels()
                .clamp(1, Self::MOST_FAULT_CHANNELS);
        }
        let mut offered = Features::SUPPORTED;
        if !self.share_memory()? {
            offered = offered.without(Features::SHARED_MEMORY.or(Features::SHARED_FILES));
        } else if options.handover == Handover::On {
            required = required.or(Features::SHARED_MEMORY);
        }
        if !self.guest.has_files() {
            offered = offered.without(Features::SHARED_FILES);
        }
        let hello = Hello {
            offered,
            required,
            layout: self.layout.clone(),
            channels,
            faults,
            disks: self.disks.sizes(),
            policy: self.policy.to_owned(),
            machine: self
                .guest
                .description()
                .map_err(|e| SourceError::guest("describing the machine", e))?,
        };
        self.control
            .send(Header::bare(FrameType::Hello, 0), &hello.encode())?;
        let mut header = self.control.recv_header()?;
        if header.kind == FrameType::FilesWanted && offered.has(Features::SHARED_FILES) {
            self.guest
                .share_files(self.control.link())
                .map_err(|e| SourceError::guest("sharing its devices' files", e))?;
            self.control.send(Header::bare(FrameType::Files, 0), &[])?;
            header = self.control.recv_header()?;
        }
        if header.kind != FrameType::HelloAck {
            return Err(self
                .control
                .refuse(&header, "the answer to the greeting")
                .into());
        }
        let ack: HelloAck = self.control.recv_json(&header)?;
        if !ack.features.has(required) {
            return Err(SourceError::Features {
                missing: required.0 & !ack.features.0,
            });
        }
        self.control.set_end(self.layout.end());
        if ack.features.and(offered).has(Features::SHARED_MEMORY) {
            self.control.link().set_timeout(Some(timeouts.transfer));
            self.shared = true;
            self.policy = HANDOVER;
            HANDOVER.clone_into(&mut self.progress.policy);
            self.pending.clear();
            self.enter(State::Running);
            return Ok(());
        }
        let coding = Coding::new(
            options,
            ack.features,
            self.layout.pages(),
            self.layout.end(),
        );
        self.disks.agree(options, ack.features);
        self.sender = Sender::new(coding.encoder());
        for index in 0..channels {
            let channel = self.open_channel(Role::Data, index)?;
            self.data_channels
                .push((channel, Sender::new(coding.encoder())));
        }
        for index in 0..faults {
            let channel = self.open_channel(Role::Fault, index)?;
            self.faults.push(FaultChannel::new(channel));
        }
        self.data_channels_at = self.now();
        self.control.link().set_timeout(Some(timeouts.transfer));
        Ok(())
    }

    /// From here on memory moves.
    pub(super) fn start_tracking(&mut self) -> Result<(), SourceError> {
        // A log that could not be started may have been started in part.
        self.state = State::Running;
        self.guest
            .start_tracking()
            .map_err(|e| SourceError::guest("starting the dirty log", e))?;
        self.collected_at = self.now();
        if !self.disks.is_empty() {
            self.memory_began = self.now();
        }
        self.enter(State::Running);
        Ok(())
    }

    /// Has the guest's memory itself go out with the handshake, where that is wanted and can be.
    pub(super) fn share_memory(&mut self) -> Result<bool, SourceError> {
        let wanted = self.setup.options.handover;
        if wanted == Handover::Off {
            return Ok(false);
        }
        // Disks are copied from host to host: that is another kind of move.
        let shared = if self.disks.is_empty() {
            self.guest.share_memory(self.control.link())
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

    /// More fault channels than this serve nobody: answers wait for the link then.
    pub(super) const MOST_FAULT_CHANNELS: u16 = 16;

    /// Opens one more channel of this migration.
    pub(super) fn open_channel(
        &mut self,
        role: Role,
        index: u16,
    ) -> Result<Channel<L>, SourceError> {
        let link = (self.setup.connect)(role, index).map_err(SourceError::Connect)?;
        let mut channel = Channel::new(link);
        channel.set_end(self.layout.end());
        channel
            .link()
            .set_timeout(Some(self.setup.timeouts.handshake));
        channel.open(role, index, self.setup.session)?;
        channel
            .link()
            .set_timeout(Some(self.setup.timeouts.transfer));
        Ok(channel)
    }
}
