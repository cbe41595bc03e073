//! The simulated link, its clock, and the destination at its other end.
//!
//! One thread: when the source waits for an answer, the destination engine is stepped until it
//! has given one or waits itself.

use super::host::{SimHost, SimSink};
use super::lock;
use super::world::{Connection, Side, World};
use crate::destination::{self, Destination, FaultChannel, State, Step};
use crate::port::{Clock, Link};
use crate::wire::{HEADER_BYTES, PREAMBLE_BYTES, Role};
use std::io::{self, Read};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Simulated time.
pub(super) struct SimClock {
    world: Arc<Mutex<World>>,
}

impl SimClock {
    pub const fn new(world: Arc<Mutex<World>>) -> Self {
        Self { world }
    }
}

impl Clock for SimClock {
    fn now(&self) -> Duration {
        lock(&self.world).now
    }

    fn sleep(&self, duration: Duration) {
        lock(&self.world).pass(duration);
    }
}

/// How long a shorter wait lasts on a link that has stalled: a thread may always sleep longer.
const OVERSLEPT: Duration = Duration::from_millis(10);

/// One end of a simulated connection.
pub(crate) struct SimLink {
    world: Arc<Mutex<World>>,
    /// The destination, to be stepped while the source waits; `None` at the destination's end.
    peer: Option<Arc<Mutex<Peer>>>,
    side: Side,
    connection: usize,
    timeout: Duration,
    /// By the simulated clock.
    deadline: Option<Duration>,
}

impl SimLink {
    /// Opens a connection to the destination.
    pub(super) fn connect(world: &Arc<Mutex<World>>, peer: &Arc<Mutex<Peer>>) -> io::Result<Self> {
        let connection = {
            let mut world = lock(world);
            if world.destination_dead || world.source_dead {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            world.connections.push(Connection::default());
            world.connections.len() - 1
        };
        let end = |side, peer| Self {
            world: Arc::clone(world),
            peer,
            side,
            connection,
            timeout: Duration::from_secs(1),
            deadline: None,
        };
        lock(peer)
            .waiting
            .push((connection, end(Side::Destination, None)));
        Ok(end(Side::Source, Some(Arc::clone(peer))))
    }

    pub fn send_weighed(&mut self, bytes: &[u8], weight: u64, guarded: usize) -> io::Result<()> {
        self.check_deadline()?;
        let mut world = lock(&self.world);
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_sub(world.now);
            if world.takes(weight) > left {
                world.send_in_part(self.side, self.connection, bytes);
                world.pass(left);
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        world.send(self.side, self.connection, bytes, weight, guarded)
    }

    fn check_deadline(&self) -> io::Result<()> {
        match self.deadline {
            Some(deadline) if lock(&self.world).now >= deadline => {
                Err(io::ErrorKind::TimedOut.into())
            }
            _ => Ok(()),
        }
    }

    /// Takes bytes if enough have arrived.
    fn take(&self, buf: &mut [u8]) -> io::Result<bool> {
        let mut world = lock(&self.world);
        if world.is_dead(self.side) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let connection = &mut world.connections[self.connection];
        let pipe = match self.side {
            Side::Source => &mut connection.to_source,
            Side::Destination => &mut connection.to_destination,
        };
        if pipe.len() < buf.len() {
            if connection.broken {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            return Ok(false);
        }
        pipe.read_exact(buf)?;
        Ok(true)
    }

    fn time_out(&self) -> io::Error {
        let mut world = lock(&self.world);
        let left = self
            .deadline
            .map(|deadline| deadline.saturating_sub(world.now));
        world.pass(left.map_or(self.timeout, |left| left.min(self.timeout)));
        io::ErrorKind::TimedOut.into()
    }
}

impl Link for SimLink {
    fn send(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
        let bytes = [head, body].concat();
        let length = bytes.len();
        self.send_weighed(&bytes, length as u64, length)
    }

    fn recv(&mut self, buf: &mut [u8]) -> io::Result<()> {
        loop {
            self.check_deadline()?;
            if self.take(buf)? {
                return Ok(());
            }
            match &self.peer {
                Some(peer) if Peer::drive(peer, self.connection) => {}
                _ => return Err(self.time_out()),
            }
        }
    }

    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
        if let Some(peer) = &self.peer {
            while Peer::drive(peer, self.connection) {}
        }
        let mut world = lock(&self.world);
        let connection = &world.connections[self.connection];
        let pipe = match self.side {
            Side::Source => &connection.to_source,
            Side::Destination => &connection.to_destination,
        };
        let ready = !pipe.is_empty() || connection.broken;
        if !ready {
            // Nothing can come any more: short waits last longer, or they are most of what runs.
            let times = if connection.stalled && !timeout.is_zero() {
                (OVERSLEPT.as_nanos() / timeout.as_nanos()).max(1)
            } else {
                1
            };
            (0..times).for_each(|_| world.pass(timeout));
        }
        Ok(ready)
    }

    fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout.unwrap_or(Duration::from_secs(3600));
    }

    fn set_deadline(&mut self, left: Option<Duration>) {
        let now = lock(&self.world).now;
        self.deadline = left.map(|left| now + left);
    }
}

/// The destination's process: accepts connections and runs the engine.
pub(super) struct Peer {
    world: Arc<Mutex<World>>,
    waiting: Vec<(usize, SimLink)>,
    engine: Option<Destination<SimLink, SimHost>>,
    /// The connection that the engine listens to; `None` after it ended.
    listening: Option<usize>,
    /// Fault channels, by connection.
    faults: Vec<(usize, FaultChannel<SimLink, SimSink>)>,
}

impl Peer {
    pub const fn new(world: Arc<Mutex<World>>) -> Self {
        Self {
            world,
            waiting: Vec::new(),
            engine: None,
            listening: None,
            faults: Vec::new(),
        }
    }

    pub const fn engine(&mut self) -> Option<&mut Destination<SimLink, SimHost>> {
        self.engine.as_mut()
    }

    pub fn state(&self) -> Option<State> {
        self.engine.as_ref().map(Destination::state)
    }

    /// Lets the destination do one thing on a connection; `false` when it waits.
    fn drive(peer: &Mutex<Self>, connection: usize) -> bool {
        let mut this = lock(peer);
        let (arrived, broken) = {
            let world = lock(&this.world);
            if world.destination_dead {
                return false;
            }
            let c = &world.connections[connection];
            (c.to_destination.len(), c.broken)
        };
        if let Some(at) = this
            .waiting
            .iter()
            .position(|(waiting, _)| *waiting == connection)
        {
            if arrived < PREAMBLE_BYTES && !broken {
                return false;
            }
            let (_, link) = this.waiting.remove(at);
            this.accept(link, connection);
            return true;
        }
        if let Some(at) = this.faults.iter().position(|(c, _)| *c == connection) {
            return this.drive_fault(at, arrived >= HEADER_BYTES || broken);
        }
        let ready = this
            .engine
            .as_ref()
            .is_some_and(Destination::needs_no_frame);
        if this.listening != Some(connection) || (arrived < HEADER_BYTES && !broken && !ready) {
            return false;
        }
        let step = this.engine.as_mut().map(Destination::step);
        if !matches!(step, Some(Ok(Step::Continue | Step::Running))) {
            this.listening = None;
        }
        true
    }

    /// Lets a fault channel do one thing; `false` when it waits.
    fn drive_fault(&mut self, at: usize, arrived: bool) -> bool {
        let missing_pages = self
            .engine
            .as_ref()
            .and_then(|e| e.missing_pages().cloned());
        let Some(missing_pages) = missing_pages else {
            return false;
        };
        let (_, data_channel) = &mut self.faults[at];
        let ready = if data_channel.is_asking() {
            arrived
        } else {
            !lock(&self.world).faults_heard.is_empty() || missing_pages.has_unasked()
        };
        if !ready || data_channel.ended() {
            return false;
        }
        let Some(sink) = missing_pages.wait_begun(Duration::ZERO) else {
            return false;
        };
        if let Err(error) = data_channel.step(&sink, Duration::ZERO) {
            missing_pages.lose(&error.to_string());
            return false;
        }
        true
    }

    fn accept(&mut self, link: SimLink, connection: usize) {
        let Ok((channel, preamble)) = destination::exchange_preamble(link, Duration::from_secs(1))
        else {
            return;
        };
        match preamble.role {
            Role::Recover => {
                if let Some(engine) = &mut self.engine {
                    // Its one word must have arrived with the preamble or soon after.
                    self.listening = None;
                    self.faults.clear();
                    engine.reattach(channel, &preamble);
                    self.listening = Some(connection);
                }
            }
            Role::Fault => {
                let missing_pages = self.engine.as_ref().and_then(|e| e.missing_pages());
                if let Some(missing_pages) = missing_pages {
                    let timeouts = destination::Timeouts::default();
                    let data_channel = Destination::<SimLink, SimHost>::fault_channel(
                        missing_pages,
                        channel,
                        preamble.channel,
                        timeouts,
                    );
                    self.faults.extend(
                        data_channel
                            .ok()
                            .map(|data_channel| (connection, data_channel)),
                    );
                }
            }
            _ if self.engine.is_none() => {
                let host = SimHost::new(Arc::clone(&self.world));
                self.engine = Some(Destination::new(
                    channel,
                    &preamble,
                    host,
                    destination::Timeouts::default(),
                    Arc::new(SimClock::new(Arc::clone(&self.world))),
                ));
                self.listening = Some(connection);
            }
            _ => {}
        }
    }

    /// Everything that has arrived is handled; silence becomes a time-out, as it would.
    pub fn drive_all(peer: &Mutex<Self>) {
        let count = lock(&lock(peer).world).connections.len();
        for connection in 0..count {
            while Self::drive(peer, connection) {}
        }
        let mut this = lock(peer);
        let dead = lock(&this.world).destination_dead;
        if this.listening.take().is_some()
            && !dead
            && let Some(engine) = &mut this.engine
        {
            // The engine's next receive meets silence.
            let _ = engine.step();
        }
    }
}
