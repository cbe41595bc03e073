//! Connections that have not said yet what they are for.
//!
//! One that says it leaves this list and is not limited by it, so a source gets through whatever
//! else connects: when there are too many, the oldest silent one is closed, and not the newest
//! refused.

use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard};

use ferry_devices::sync::lock;
use rustix::net::{Shutdown, shutdown};

/// From one address: a source opens its channels one after the other, so it has one here.
const MOST_FROM_ONE: usize = 32;
/// From all addresses. Each is a thread for as long as it is here.
const MOST: usize = 64;

/// Where a connection comes from; `None` is this host, over a Unix socket.
pub(super) type Address = Option<IpAddr>;

#[derive(Debug)]
struct Newcomer {
    id: u64,
    address: Address,
    /// A second descriptor of its socket.
    socket: OwnedFd,
}

#[derive(Debug, Default)]
struct List {
    next: u64,
    /// The oldest first.
    waiting: VecDeque<Newcomer>,
}

/// The list of them.
#[derive(Debug, Default)]
pub(super) struct Newcomers(Mutex<List>);

impl Newcomers {
    fn lock(&self) -> MutexGuard<'_, List> {
        lock(&self.0)
    }

    /// Takes one more in, and closes the oldest where there are too many; returns what
    /// [`leave`](Self::leave) needs.
    pub(super) fn admit(&self, address: Address, socket: OwnedFd) -> u64 {
        let mut list = self.lock();
        if let Some(at) = list.in_excess(address)
            && let Some(oldest) = list.waiting.remove(at)
        {
            tracing::warn!(address = ?oldest.address, "too many silent connections; the oldest was closed");
            close(&oldest.socket);
        }
        let id = list.next;
        list.next += 1;
        list.waiting.push_back(Newcomer {
            id,
            address,
            socket,
        });
        id
    }

    /// It has said what it is for, or has gone. `false` when it was closed meanwhile.
    pub(super) fn leave(&self, id: u64) -> bool {
        let mut list = self.lock();
        let before = list.waiting.len();
        list.waiting.retain(|newcomer| newcomer.id != id);
        list.waiting.len() < before
    }
}

impl List {
    /// Which has to go before one more from this address.
    fn in_excess(&self, address: Address) -> Option<usize> {
        let from = |address| self.waiting.iter().filter(move |n| n.address == address);
        let crowd = if from(address).count() >= MOST_FROM_ONE {
            address
        } else if self.waiting.len() >= MOST {
            let addresses = self.waiting.iter().map(|n| n.address);
            addresses.max_by_key(|address| from(*address).count())?
        } else {
            return None;
        };
        self.waiting.iter().position(|n| n.address == crowd)
    }
}

/// Ends the waits of the thread that has the connection.
fn close(socket: &OwnedFd) {
    match shutdown(socket, Shutdown::Both) {
        // It has gone by itself.
        Ok(()) | Err(rustix::io::Errno::NOTCONN) => {}
        Err(error) => {
            let error = io::Error::from(error);
            tracing::debug!(%error, "a silent connection stays until its deadline");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    const fn address(last: u8) -> Address {
        Some(IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, last)))
    }

    /// A connection; the link has a descriptor of its own.
    struct Peer {
        id: u64,
        theirs: UnixStream,
        _link: UnixStream,
    }

    fn connect(newcomers: &Newcomers, address: Address) -> Peer {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        Peer {
            id: newcomers.admit(address, ours.try_clone().unwrap().into()),
            theirs,
            _link: ours,
        }
    }

    impl Peer {
        fn is_open(&self) -> bool {
            let read = (&self.theirs).read(&mut [0]);
            read.is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock)
        }
    }

    #[test]
    fn the_oldest_of_a_crowd_makes_room() {
        let newcomers = Newcomers::default();
        let crowd: Vec<_> = (0..MOST_FROM_ONE)
            .map(|_| connect(&newcomers, address(1)))
            .collect();
        let other = connect(&newcomers, address(2));
        let newest = connect(&newcomers, address(1));
        assert!(!crowd[0].is_open());
        assert!(crowd[1..].iter().all(Peer::is_open));
        assert!(other.is_open() && newest.is_open());
        assert!(!newcomers.leave(crowd[0].id));
        assert!(newcomers.leave(other.id) && newcomers.leave(newest.id));
    }

    #[test]
    fn many_addresses_do_not_keep_one_out() {
        let newcomers = Newcomers::default();
        let crowd: Vec<_> = (0..2 * MOST)
            .map(|n| connect(&newcomers, address(u8::try_from(n / 4).unwrap())))
            .collect();
        let newest = connect(&newcomers, address(255));
        assert!(newest.is_open());
        assert!(newcomers.leave(newest.id));
        let open = crowd.iter().filter(|peer| peer.is_open()).count();
        assert_eq!(open, MOST - 1);
    }

    /// A connection that has said what it is for is not closed to make room.
    #[test]
    fn one_that_has_spoken_stays() {
        let newcomers = Newcomers::default();
        let peer = connect(&newcomers, address(1));
        assert!(newcomers.leave(peer.id));
        let crowd: Vec<_> = (0..2 * MOST)
            .map(|_| connect(&newcomers, address(1)))
            .collect();
        assert!(peer.is_open());
        drop(crowd);
    }
}
