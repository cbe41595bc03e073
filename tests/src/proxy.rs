//! A TCP proxy between a source and a destination that understands nothing, counts everything, and
//! misbehaves at a chosen byte.
//!
//! Planned faults hit the first connection; later ones (data and fault channels, `recover`) pass
//! unharmed unless they are refused, or all are cut or stalled.

use crate::{TIMEOUT, until};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the source to the destination.
    Forth,
    /// From the destination to the source.
    Back,
}

/// What happens before a certain byte of a direction is passed on.
#[derive(Clone, Debug)]
pub enum Action {
    /// The connection is closed on both sides.
    Cut,
    /// The stream ends, the other direction goes on.
    Truncate,
    /// From now on nothing passes in this direction, until [`Proxy::thaw`].
    Freeze(Way),
    /// A bit of this byte is inverted.
    Flip(u8),
    /// These bytes come before it.
    Insert(Vec<u8>),
    /// Every chunk from here on is late by this much.
    Delay(Duration),
}

#[derive(Debug)]
struct Fault {
    way: Way,
    at: u64,
    action: Action,
}

#[derive(Debug, Default)]
struct Plan {
    faults: Vec<Fault>,
    frozen: [bool; 2],
    /// After how many bytes over all connections, from the source to the destination, nothing
    /// passes any more.
    stall_at: Option<u64>,
    /// Nothing passes on any connection.
    stalled: bool,
    hits: usize,
    delay: Duration,
    /// Each with its number.
    streams: Vec<(u64, [TcpStream; 2])>,
}

#[derive(Debug)]
struct Shared {
    to: SocketAddr,
    plan: Mutex<Plan>,
    thawed: Condvar,
    passed: [AtomicU64; 2],
    total: [AtomicU64; 2],
    connections: AtomicU64,
    allowed: AtomicU64,
    open: AtomicBool,
    opening: Mutex<Vec<u8>>,
}

/// How much of the first connection is kept for [`Proxy::opening`].
const KEPT: usize = 64 << 10;

/// A running proxy; dropping it closes everything.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    address: SocketAddr,
}

impl Proxy {
    /// In front of a receiver.
    pub fn to(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            to,
            plan: Mutex::default(),
            thawed: Condvar::new(),
            passed: Default::default(),
            total: Default::default(),
            connections: AtomicU64::new(0),
            allowed: AtomicU64::new(u64::MAX),
            open: AtomicBool::new(true),
            opening: Mutex::default(),
        });
        let worker = Arc::clone(&shared);
        std::thread::spawn(move || {
            while let Ok((source, _)) = listener.accept() {
                if !worker.open.load(Ordering::SeqCst) {
                    return;
                }
                worker.connect(source);
            }
        });
        Self { shared, address }
    }

    /// What a source is to connect to.
    pub fn uri(&self) -> String {
        format!("tcp:{}", self.address)
    }

    /// Plans a fault: `action` happens before byte `at` of the first connection.
    pub fn plan(&self, way: Way, at: u64, action: Action) {
        let mut plan = self.shared.plan.lock().unwrap();
        plan.faults.push(Fault { way, at, action });
        plan.faults.sort_by_key(|f| f.at);
    }

    /// Closes connections after the first `n`.
    pub fn allow(&self, n: u64) {
        self.shared.allowed.store(n, Ordering::SeqCst);
    }

    /// How many faults have happened.
    pub fn hits(&self) -> usize {
        self.shared.plan.lock().unwrap().hits
    }

    /// Waits until the fault number `n` has happened.
    pub fn wait_hits(&self, n: usize) {
        until(&format!("fault {n} has happened"), || self.hits() >= n);
    }

    /// Nothing passes in this direction any more.
    pub fn freeze(&self, way: Way) {
        self.shared.plan.lock().unwrap().frozen[way as usize] = true;
    }

    /// Ends a freeze.
    pub fn thaw(&self, way: Way) {
        self.shared.plan.lock().unwrap().frozen[way as usize] = false;
        self.shared.thawed.notify_all();
    }

    /// Once so many bytes have passed from the source to the destination nothing passes any more,
    /// on any connection and in no direction; all of them stay open. Ended by [`Proxy::go_on`], and
    /// by cutting any of them.
    pub fn stall_at(&self, total: u64) {
        self.shared.plan.lock().unwrap().stall_at = Some(total);
    }

    /// Ends a stall.
    pub fn go_on(&self) {
        self.shared.plan.lock().unwrap().stalled = false;
        self.shared.thawed.notify_all();
    }

    /// Closes all connections on both sides.
    pub fn cut(&self) {
        self.shared.plan.lock().unwrap().cut(|_| true);
        self.shared.thawed.notify_all();
    }

    /// Closes one connection on both sides; they are counted from 0, which is the control channel.
    pub fn cut_one(&self, number: u64) {
        self.shared.plan.lock().unwrap().cut(|n| n == number);
        self.shared.thawed.notify_all();
    }

    /// Bytes passed on in a direction of the first connection.
    pub fn passed(&self, way: Way) -> u64 {
        self.shared.passed[way as usize].load(Ordering::SeqCst)
    }

    /// Bytes passed on in a direction, over all connections.
    pub fn total(&self, way: Way) -> u64 {
        self.shared.total[way as usize].load(Ordering::SeqCst)
    }

    /// Connections that were opened.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// The first bytes that the source said.
    pub fn opening(&self) -> Vec<u8> {
        self.shared.opening.lock().unwrap().clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.open.store(false, Ordering::SeqCst);
        self.cut();
        // Wakes the accepting thread.
        let _ = TcpStream::connect(self.address);
    }
}

impl Plan {
    fn cut(&mut self, which: impl Fn(u64) -> bool) {
        // With the last handles gone a peer that goes on writing is reset rather than left to fill
        // a buffer.
        for (_, streams) in self.streams.extract_if(.., |(number, _)| which(*number)) {
            for stream in streams {
                // Closed already is as good.
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        self.frozen = [false; 2];
        self.stalled = false;
    }
}

impl Shared {
    fn connect(self: &Arc<Self>, source: TcpStream) {
        let number = self.connections.fetch_add(1, Ordering::SeqCst);
        if number >= self.allowed.load(Ordering::SeqCst) {
            return;
        }
        let Ok(destination) = TcpStream::connect(self.to) else {
            return;
        };
        source.set_nodelay(true).unwrap();
        destination.set_nodelay(true).unwrap();
        let pair = || {
            [
                source.try_clone().unwrap(),
                destination.try_clone().unwrap(),
            ]
        };
        self.plan.lock().unwrap().streams.push((number, pair()));
        for way in [Way::Forth, Way::Back] {
            let (shared, [source, destination]) = (Arc::clone(self), pair());
            std::thread::spawn(move || {
                let (from, to) = match way {
                    Way::Forth => (source, destination),
                    Way::Back => (destination, source),
                };
                shared.pump(number == 0, way, from, to);
            });
        }
    }

    fn pump(&self, first: bool, way: Way, mut from: TcpStream, mut to: TcpStream) {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let n = match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            let bytes = &mut buffer[..n];
            let sent = if first {
                self.pass(way, bytes, &mut to)
            } else {
                self.wait_while(|plan| plan.stalled) && self.write(way, bytes, &mut to)
            };
            if !sent {
                break;
            }
        }
        // A side that closes one direction may still get data in the other.
        let _ = to.shutdown(Shutdown::Write);
    }

    /// Passes bytes of the first connection on; `false` when that is over.
    fn pass(&self, way: Way, mut bytes: &mut [u8], to: &mut TcpStream) -> bool {
        if way == Way::Forth {
            let mut opening = self.opening.lock().unwrap();
            let room = (KEPT - opening.len()).min(bytes.len());
            opening.extend_from_slice(&bytes[..room]);
        }
        loop {
            // First of all: what is planned during a freeze happens after it.
            if !self.wait_while(|plan| plan.stalled || plan.frozen[way as usize]) {
                return false;
            }
            let at = self.passed[way as usize].load(Ordering::SeqCst);
            let end = at + bytes.len() as u64;
            let fault = {
                let mut plan = self.plan.lock().unwrap();
                let due = plan.faults.iter().position(|f| f.way == way && f.at < end);
                due.map(|i| plan.faults.remove(i))
            };
            let Some(fault) = fault else {
                return bytes.is_empty() || self.write_first(way, bytes, to);
            };
            let before = usize::try_from(fault.at.saturating_sub(at)).unwrap();
            let (head, rest) = bytes.split_at_mut(before);
            bytes = rest;
            if !head.is_empty() && !self.write_first(way, head, to) {
                return false;
            }
            let mut plan = self.plan.lock().unwrap();
            let mut goes_on = true;
            match fault.action {
                Action::Cut => {
                    plan.cut(|_| true);
                    goes_on = false;
                }
                Action::Truncate => goes_on = false,
                Action::Freeze(which) => plan.frozen[which as usize] = true,
                Action::Flip(bit) => bytes[0] ^= 1 << (bit % 8),
                Action::Delay(delay) => plan.delay = delay,
                Action::Insert(more) => goes_on = to.write_all(&more).is_ok(),
            }
            plan.hits += 1;
            if !goes_on {
                return false;
            }
        }
    }

    /// Waits while nothing may pass; `false` when that takes for ever.
    fn wait_while(&self, closed: impl Fn(&Plan) -> bool) -> bool {
        let plan = self.plan.lock().unwrap();
        let waited = self
            .thawed
            .wait_timeout_while(plan, TIMEOUT, |plan| closed(plan));
        !waited.unwrap().1.timed_out()
    }

    fn write_first(&self, way: Way, bytes: &[u8], to: &mut TcpStream) -> bool {
        let delay = self.plan.lock().unwrap().delay;
        if !delay.is_zero() {
            std::thread::sleep(delay);
        }
        let sent = self.write(way, bytes, to);
        if sent {
            self.passed[way as usize].fetch_add(bytes.len() as u64, Ordering::SeqCst);
        }
        sent
    }

    fn write(&self, way: Way, bytes: &[u8], to: &mut TcpStream) -> bool {
        let sent = to.write_all(bytes).is_ok();
        if sent {
            // In one step: a test that sees the bytes counted, and ends the stall, ends it for
            // good.
            let mut plan = self.plan.lock().unwrap();
            let n = bytes.len() as u64;
            let total = n + self.total[way as usize].fetch_add(n, Ordering::SeqCst);
            if way == Way::Forth && plan.stall_at.is_some_and(|at| total >= at) {
                plan.stall_at = None;
                plan.stalled = true;
            }
        }
        sent
    }
}
