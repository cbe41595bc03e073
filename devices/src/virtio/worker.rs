//! The worker: waits for notifications of the driver and for the device's own source, and calls the
//! device.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};

use super::device::Device;
use super::memory::Memory;
use super::shared::Shared;

/// What an event's data says beside the numbers of the queues.
const CONTROL: u32 = u32::MAX;
const SOURCE: u32 = u32::MAX - 1;

/// What has happened since the last round of work.
struct Seen<'a, D, M> {
    shared: &'a Shared<D, M>,
    /// Queues that were notified, or have more buffers than one round takes.
    ready: Vec<bool>,
    source: bool,
}

impl<D: Device<M>, M: Memory> MutEventSubscriber for Seen<'_, D, M> {
    fn process(&mut self, events: Events, _: &mut EventOps) {
        match events.data() {
            CONTROL => {
                self.shared.control.drain();
            }
            SOURCE => self.source = true,
            queue => {
                let queue = usize::try_from(queue).unwrap_or(usize::MAX);
                if let (Some(event), Some(ready)) =
                    (self.shared.events.get(queue), self.ready.get_mut(queue))
                {
                    event.drain();
                    *ready = true;
                }
            }
        }
    }

    /// [`Watched`] adds what there is to wait for, and removes it.
    fn init(&mut self, _: &mut EventOps) {}
}

/// What is waited for besides `control`. A device at rest has its notifications left where they
/// are, and a source that is not wanted is not even asked for errors, which epoll(7) would report
/// for ever.
#[derive(Default)]
struct Watched {
    queues: bool,
    source: bool,
}

impl Watched {
    fn queues(
        &mut self,
        ops: &mut EventOps<'_>,
        on: bool,
        events: &[super::Event],
    ) -> event_manager::Result<()> {
        if std::mem::replace(&mut self.queues, on) == on {
            return Ok(());
        }
        (0u32..)
            .zip(events)
            .try_for_each(|(queue, event)| watch(ops, event.as_fd().as_raw_fd(), queue, on))
    }

    fn source(
        &mut self,
        ops: &mut EventOps<'_>,
        on: bool,
        source: Option<&OwnedFd>,
    ) -> event_manager::Result<()> {
        match source {
            Some(source) if std::mem::replace(&mut self.source, on) != on => {
                watch(ops, source.as_raw_fd(), SOURCE, on)
            }
            _ => Ok(()),
        }
    }
}

fn watch(ops: &mut EventOps<'_>, fd: RawFd, data: u32, on: bool) -> event_manager::Result<()> {
    let events = Events::with_data_raw(fd, data, EventSet::IN);
    if on {
        ops.add(events)
    } else {
        ops.remove(events)
    }
}

/// The worker's life. An error is a sentence: the device does nothing more, and its guest cannot go
/// on.
pub(super) fn run<D: Device<M>, M: Memory>(
    shared: &Shared<D, M>,
    source: Option<&OwnedFd>,
) -> Result<(), String> {
    rounds(shared, source).unwrap_or_else(|error| {
        Err(format!(
            "the guest's {} cannot wait for work ({error})",
            shared.kind.name
        ))
    })
}

fn rounds<D: Device<M>, M: Memory>(
    shared: &Shared<D, M>,
    source: Option<&OwnedFd>,
) -> event_manager::Result<Result<(), String>> {
    let mut manager = EventManager::new()?;
    let id = manager.add_subscriber(Seen {
        shared,
        ready: vec![false; shared.events.len()],
        source: false,
    });
    let mut ops = manager.event_ops(id)?;
    watch(&mut ops, shared.control.as_fd().as_raw_fd(), CONTROL, true)?;
    let mut watched = Watched::default();
    let mut again = false;
    loop {
        manager.run_with_timeout(if again { 0 } else { -1 })?;
        let seen = manager.subscriber_mut(id)?;
        let mut locked = shared.lock();
        if locked.stopped() {
            return Ok(Ok(()));
        }
        let source_ready = std::mem::take(&mut seen.source);
        if locked.live() {
            locked.work(&mut seen.ready, source_ready);
        } else {
            seen.ready.fill(false);
        }
        if let Some(why) = locked.device().failure() {
            return Ok(Err(why));
        }
        let live = locked.live();
        let wants_source = live && locked.device().wants_source();
        drop(locked);
        again = seen.ready.contains(&true);
        let mut ops = manager.event_ops(id)?;
        watched.queues(&mut ops, live, &shared.events)?;
        watched.source(&mut ops, wants_source, source)?;
    }
}
