//! Waiting: the handshake, what is coming and whether this host can take it.

use super::blocks::Disks;
use super::data_channels::DataChannelSet;
use super::error::DestinationError;
use super::hashes::Hashes;
use super::missing_pages::MissingPages;
use super::pages::PageReceiver;
use super::phase::{Compared, End, Filling, Phase, Stepped, ToFollow, Waiting};
use super::session::Parts;
use super::state::Step;
use crate::codec::Decoder;
use crate::options::Options;
use crate::page::AtomicPageSet;
use crate::port::{BlockSink, DestinationVm, Link, post_copy_vm};
use crate::wire::{Features, FrameType, Header, Hello, HelloAck, WireError};
use std::sync::Arc;
use std::time::Duration;

type Filled<L, H> = Box<Filling<L, <H as DestinationVm<L>>::Sink>>;

impl Waiting {
    pub fn step<L: Link, H: DestinationVm<L>>(
        self,
        parts: &mut Parts<'_, L, H>,
    ) -> Stepped<L, H::Sink> {
        let next = self.frame(parts).map_err(|error| {
            parts.discard(&error);
            End::new(Phase::Discarded, error)
        })?;
        Ok((next, Step::Continue))
    }

    fn frame<L: Link, H: DestinationVm<L>>(
        self,
        parts: &mut Parts<'_, L, H>,
    ) -> Result<Phase<L, H::Sink>, DestinationError> {
        let channel = &mut parts.session.channel;
        let header = channel.recv_header()?;
        let hello = match (self, header.kind) {
            (Self::Files(hello), FrameType::Files) => {
                return accept(*hello, parts).map(Phase::Filling);
            }
            (Self::Handshake, FrameType::Hello) => read(&header, parts)?,
            (Self::Files(_), _) => {
                let expected = "the files of the guest's devices";
                return Err(channel.refuse(&header, expected).into());
            }
            (Self::Handshake, _) => return Err(channel.refuse(&header, "a handshake").into()),
        };
        // No other source knows the question.
        let files = Features::SHARED_MEMORY.or(Features::SHARED_FILES);
        let channel = &mut parts.session.channel;
        let wanted = match parts.host.sharing().filter(|_| hello.offered.has(files)) {
            Some(sharing) => sharing.wants_files(channel.link()),
            None => Ok(false),
        };
        if wanted.map_err(DestinationError::Unfit)? {
            channel.send(Header::bare(FrameType::FilesWanted, 0), &[])?;
            return Ok(Phase::Waiting(Self::Files(Box::new(hello))));
        }
        accept(hello, parts).map(Phase::Filling)
    }
}

fn read<L: Link, H>(
    header: &Header,
    parts: &mut Parts<'_, L, H>,
) -> Result<Hello, DestinationError> {
    let bytes = parts.session.payload(header)?;
    let hello = Hello::decode(&bytes).map_err(WireError::from)?;
    parts.session.buffer = bytes;
    let missing = hello.required.0 & !Features::SUPPORTED.0;
    if missing != 0 {
        return Err(DestinationError::Features { missing });
    }
    let most = hello.channels.max(hello.faults);
    if most > Options::MAX_CHANNELS {
        return Err(DestinationError::Channels(most));
    }
    Ok(hello)
}

/// Builds the machine, if this host can take it, and answers.
fn accept<L: Link, H: DestinationVm<L>>(
    hello: Hello,
    parts: &mut Parts<'_, L, H>,
) -> Result<Filled<L, H>, DestinationError> {
    // How long this host takes to build the machine is not the source's affair.
    parts.session.channel.link().set_deadline(None);
    let policy = hello.policy.chars().filter(|c| c.is_ascii_graphic());
    parts.session.policy = policy.take(32).collect();
    let mut agreed = hello.offered.and(Features::SUPPORTED);
    let link = parts.session.channel.link();
    let sharing = parts.host.sharing();
    let adopted = match sharing.filter(|_| agreed.has(Features::SHARED_MEMORY)) {
        Some(sharing) => sharing.adopt(link, &hello.layout, &hello.machine),
        None => Ok(None),
    };
    let adopted = adopted.map_err(DestinationError::Unfit)?;
    let shared = adopted.is_some();
    let to_follow = to_follow(&hello, shared, parts)?;
    if to_follow.is_none() && !hello.required.has(Features::POST_COPY) {
        agreed = agreed.without(Features::POST_COPY);
    }
    let disks = take_disks(&hello, parts.host)?;
    let sink = match adopted {
        Some(sink) => sink,
        None if hello.required.has(Features::SHARED_MEMORY) => {
            return Err(DestinationError::NoMemory);
        }
        None => {
            agreed = agreed.without(Features::SHARED_MEMORY.or(Features::SHARED_FILES));
            let prepared = parts.host.prepare(&hello.layout, &hello.machine);
            prepared.map_err(DestinationError::Unfit)?
        }
    };
    let disks = match disks {
        Some(sinks) => Disks::new(&hello.disks, sinks, agreed)?,
        None => Disks::none(),
    };
    let patched = if agreed.has(Features::PATCH) {
        hello.layout.end()
    } else {
        0
    };
    let copies = Arc::new(AtomicPageSet::new(patched));
    let hashes = hello
        .required
        .has(Features::VERIFY)
        .then(|| Arc::new(Hashes::new(hello.layout.end())));
    let data_channels = (hello.channels > 0 && !shared).then(|| {
        Arc::new(DataChannelSet::new(
            Arc::clone(&sink),
            hello.layout.clone(),
            (agreed, Arc::clone(&copies), hashes.clone()),
            hello.channels,
            parts.session.timeouts.transfer,
            Arc::clone(&parts.session.clock),
        ))
    });
    parts.session.channel.set_end(hello.layout.end());
    let ack = HelloAck {
        features: agreed,
        state: parts.host.state_version(),
    };
    parts.session.channel.send_json(FrameType::HelloAck, &ack)?;
    Ok(Box::new(Filling {
        sink,
        shared,
        receiver: PageReceiver::new(Decoder::new(agreed, copies), hashes.clone()),
        data_channels,
        to_follow,
        disks,
        hashes: hashes.map(|hashes| Compared {
            hashes,
            took: Duration::ZERO,
        }),
        layout: hello.layout,
        round: 0,
        block_round: 0,
        sealed: false,
    }))
}

/// For post-copy: what the fault channels meet at.
fn to_follow<L: Link, H: DestinationVm<L>>(
    hello: &Hello,
    shared: bool,
    parts: &mut Parts<'_, L, H>,
) -> Result<Option<ToFollow<L, H::Sink>>, DestinationError> {
    let required = hello.required.has(Features::POST_COPY);
    // A source that only may need it opens fault channels where this side agrees.
    let wanted = hello.offered.has(Features::POST_COPY) && hello.faults > 0;
    if shared || !required && !wanted {
        return Ok(None);
    }
    if hello.faults == 0 {
        return Err(DestinationError::NoFaultChannel);
    }
    match post_copy_vm(parts.host).and_then(|vm| vm.check()) {
        Ok(()) => {}
        Err(error) if required => return Err(DestinationError::Unfit(error)),
        Err(error) => {
            tracing::info!(%error, "the guest comes without post-copy");
            return Ok(None);
        }
    }
    let clock = Arc::clone(&parts.session.clock);
    let verify = hello.required.has(Features::VERIFY);
    let missing_pages = MissingPages::new(hello.layout.clone(), clock, verify, hello.faults);
    Ok(Some(ToFollow {
        missing_pages: Arc::new(missing_pages),
        listed: None,
    }))
}

/// Where the guest's disks go, if they move with it.
fn take_disks<L: Link, H: DestinationVm<L>>(
    hello: &Hello,
    host: &mut H,
) -> Result<Option<Vec<Arc<dyn BlockSink>>>, DestinationError> {
    if !hello.required.has(Features::DISKS) {
        return Ok(None);
    }
    Disks::check(&hello.disks)?;
    let sinks = match host.disks() {
        Some(disks) => disks.take_disks(&hello.disks),
        None => Err("this destination takes no copies of disks".into()),
    };
    sinks.map(Some).map_err(DestinationError::Unfit)
}
