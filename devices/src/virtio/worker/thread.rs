//! The worker's thread: waits for notifications, and calls the device.

use std::io;
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, poll};

use super::Shared;
use crate::virtio::device::{Device, Memory};

/// The worker's life.
pub(super) fn run<D: Device<M>, M: Memory>(shared: &Shared<D, M>, source: Option<&OwnedFd>) {
    let mut ready = vec![false; shared.events.len()];
    let (mut live, mut wants_source) = (false, false);
    loop {
        let again = ready.contains(&true);
        let source_ready = match wait(
            shared,
            source.filter(|_| live && wants_source),
            live,
            again,
            &mut ready,
        ) {
            Ok(ready) => ready,
            Err(error) => {
                tracing::error!(device = shared.kind.name, %error, "a device's worker cannot wait for work and ends");
                return;
            }
        };
        let mut locked = shared.lock();
        if locked.inner.stop {
            return;
        }
        if locked.live() {
            locked.work(&mut ready, source_ready);
        } else {
            ready.fill(false);
        }
        live = locked.live();
        wants_source = locked.inner.device.wants_source();
    }
}

/// Waits until there is something to do, and marks the queues that were notified. While the device rests that is only
/// `control`: notifications stay where they are.
fn wait<D: Device<M>, M: Memory>(
    shared: &Shared<D, M>,
    source: Option<&OwnedFd>,
    live: bool,
    again: bool,
    ready: &mut [bool],
) -> io::Result<bool> {
    let events = if live { &shared.events[..] } else { &[] };
    let mut fds: Vec<PollFd<'_>> = Vec::with_capacity(events.len() + 2);
    fds.push(PollFd::new(&shared.control, PollFlags::IN));
    fds.extend(events.iter().map(|e| PollFd::new(e, PollFlags::IN)));
    fds.extend(source.map(|s| PollFd::new(s, PollFlags::IN)));
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    match poll(&mut fds, again.then_some(&now)) {
        Ok(_) => {}
        Err(rustix::io::Errno::INTR) => return Ok(false),
        Err(error) => return Err(error.into()),
    }
    let fired: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    if fired[0] {
        shared.control.drain();
    }
    for ((event, fired), ready) in events.iter().zip(&fired[1..]).zip(ready) {
        if *fired {
            event.drain();
            *ready = true;
        }
    }
    Ok(source.is_some() && fired.last() == Some(&true))
}
