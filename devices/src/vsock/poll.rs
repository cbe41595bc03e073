//! Waiting for many Unix sockets at once: an epoll descriptor, which is the device's one source.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;

/// Events that are taken at once; more are there the next time.
const BATCH: usize = 64;

/// What is waited for.
#[derive(Debug)]
pub struct Poll(OwnedFd);

impl Poll {
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    /// Readable when something has happened.
    pub fn readable(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// What has happened, by number.
    pub fn happened(&self) -> io::Result<Vec<(u64, EventFlags)>> {
        let mut buffer = [MaybeUninit::<Event>::uninit(); BATCH];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let (events, _) = match epoll::wait(&self.0, &mut buffer, Some(&now)) {
            Err(Errno::INTR) => return Ok(Vec::new()),
            other => other?,
        };
        // A copy: the structure is packed.
        Ok(events.iter().map(|e| ({ e.data }.u64(), e.flags)).collect())
    }

    /// Changes what is waited for at a descriptor; `None` is nothing, not even its end.
    pub fn change(
        &self,
        fd: impl AsFd,
        id: u64,
        before: Option<EventFlags>,
        wanted: Option<EventFlags>,
    ) -> io::Result<()> {
        let data = EventData::new_u64(id);
        match (before, wanted) {
            (None, None) => {}
            (None, Some(flags)) => epoll::add(&self.0, fd, data, flags)?,
            (Some(_), None) => epoll::delete(&self.0, fd)?,
            (Some(old), Some(new)) if old == new => {}
            (Some(_), Some(flags)) => epoll::modify(&self.0, fd, data, flags)?,
        }
        Ok(())
    }
}

/// A connection to a program of the host. Closing it ends the waiting.
#[derive(Debug)]
pub struct Watched {
    stream: UnixStream,
    id: u64,
    flags: Option<EventFlags>,
}

impl Watched {
    pub const fn new(stream: UnixStream, id: u64) -> Self {
        Self {
            stream,
            id,
            flags: None,
        }
    }

    pub const fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub fn watch(&mut self, poll: &Poll, wanted: Option<EventFlags>) -> io::Result<()> {
        poll.change(&self.stream, self.id, self.flags, wanted)?;
        self.flags = wanted;
        Ok(())
    }
}
