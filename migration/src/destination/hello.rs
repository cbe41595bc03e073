//! The handshake: what is coming, and whether this host can take it.

use super::blocks::Disks;
use super::data_channels::DataChannelSet;
use super::missing_pages::MissingPages;
use super::pages::PageReceiver;
use super::{Destination, DestinationError, State};
use crate::codec::Decoder;
use crate::options::Options;
use crate::page::AtomicPageSet;
use crate::port::{DestinationVm, Link};
use crate::wire::{Features, FrameType, Header, Hello, HelloAck, WireError};
use std::sync::Arc;

impl<L: Link, H: DestinationVm<L>> Destination<L, H> {
    /// What is coming. A source that offers the files of the guest's devices is asked for them before it is answered; no
    /// other knows the question.
    pub(super) fn hello(&mut self, header: &Header) -> Result<(), DestinationError> {
        let mut bytes = std::mem::take(&mut self.buffer);
        self.channel.recv_payload(header, &mut bytes)?;
        let hello = Hello::decode(&bytes).map_err(WireError::from)?;
        let missing = hello.required.0 & !Features::SUPPORTED.0;
        self.buffer = bytes;
        if missing != 0 {
            return Err(DestinationError::Features { missing });
        }
        let files = Features::SHARED_MEMORY.or(Features::SHARED_FILES);
        if hello.offered.has(files)
            && self
                .host
                .wants_files(self.channel.link())
                .map_err(DestinationError::Unfit)?
        {
            self.channel
                .send(Header::bare(FrameType::FilesWanted, 0), &[])?;
            self.greeting = Some(hello);
            return Ok(());
        }
        self.accept(hello)
    }

    /// Whether this host can take it; builds the machine and answers.
    pub(super) fn accept(&mut self, hello: Hello) -> Result<(), DestinationError> {
        // How long this host takes to build the machine is not the source's affair.
        self.channel.link().set_deadline(None);
        let most = hello.channels.max(hello.faults);
        if most > Options::MAX_CHANNELS {
            return Err(DestinationError::Channels(most));
        }
        self.policy = hello
            .policy
            .chars()
            .filter(|c| c.is_ascii_graphic())
            .take(32)
            .collect();
        self.verify = hello.required.has(Features::VERIFY);
        let mut agreed = hello.offered.and(Features::SUPPORTED);
        let adopted = if agreed.has(Features::SHARED_MEMORY) {
            self.host
                .adopt(self.channel.link(), &hello.layout, &hello.machine)
                .map_err(DestinationError::Unfit)?
        } else {
            None
        };
        self.shared = adopted.is_some();
        let post_copy = hello.required.has(Features::POST_COPY) && !self.shared;
        if post_copy {
            if hello.faults == 0 {
                return Err(DestinationError::NoFaultChannel);
            }
            self.host
                .check_post_copy()
                .map_err(DestinationError::Unfit)?;
        }
        let sinks = if hello.required.has(Features::DISKS) {
            Disks::check(&hello.disks)?;
            let sinks = self.host.take_disks(&hello.disks);
            sinks.map_err(DestinationError::Unfit)?
        } else {
            Vec::new()
        };
        let sink = match adopted {
            Some(sink) => sink,
            None if hello.required.has(Features::SHARED_MEMORY) => {
                return Err(DestinationError::NoMemory);
            }
            None => {
                agreed = agreed.without(Features::SHARED_MEMORY.or(Features::SHARED_FILES));
                self.host
                    .prepare(&hello.layout, &hello.machine)
                    .map_err(DestinationError::Unfit)?
            }
        };
        self.channel.set_end(hello.layout.end());
        if hello.required.has(Features::DISKS) {
            self.disks = Disks::new(&hello.disks, sinks, agreed)?;
        }
        let end = if agreed.has(Features::PATCH) {
            hello.layout.end()
        } else {
            0
        };
        let copies = Arc::new(AtomicPageSet::new(end));
        self.receiver = PageReceiver::new(Decoder::new(agreed, Arc::clone(&copies)));
        if post_copy {
            let clock = Arc::clone(&self.clock);
            let missing_pages =
                MissingPages::new(hello.layout.clone(), clock, self.verify, hello.faults);
            self.missing_pages = Some(Arc::new(missing_pages));
        }
        if hello.channels > 0 && !self.shared {
            let set = DataChannelSet::new(
                Arc::clone(&sink),
                hello.layout.clone(),
                (agreed, copies),
                hello.channels,
                self.timeouts.transfer,
                Arc::clone(&self.clock),
            );
            self.data_channels = Some(Arc::new(set));
        }
        self.layout = Some(hello.layout);
        self.sink = Some(sink);
        self.enter(State::Filling);
        let ack = HelloAck { features: agreed };
        self.channel.send_json(FrameType::HelloAck, &ack)?;
        self.channel
            .link()
            .set_timeout(Some(self.timeouts.transfer));
        Ok(())
    }
}
