//! Receives one guest: accepts the channels of its migration and drives the engine.
//!
//! ```text
//!  accept ── each connection ──▶ preamble ──▶ control, recover: to the engine, in its thread
//!                                       └▶ data, fault:      in a thread of their own
//! ```

use super::MonotonicClock;
use crate::destination::{
    self, DataChannelSet, Destination, DestinationError, MissingPages, State, Step, Timeouts,
};
use crate::port::{DestinationVm, Link};
use crate::probe::{self, Turn};
use crate::sync::{lock, wait_while};
use crate::wire::{Channel, Preamble, Role, SessionId, WireError};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// How often a wait looks whether the migration is over.
const TICK: Duration = Duration::from_millis(50);

type Connection<L> = (Channel<L>, Preamble);

/// What the threads of a migration's channels share.
struct Shared<L: Link, V: DestinationVm<L>> {
    timeouts: Timeouts,
    announced: Mutex<Announced<L, V>>,
    change: Condvar,
    over: AtomicBool,
    probing: Turn,
}

/// What the handshake has announced.
struct Announced<L: Link, V: DestinationVm<L>> {
    session: Option<SessionId>,
    data: Option<Arc<DataChannelSet<L, V::Sink>>>,
    missing: Option<Arc<MissingPages<L, V::Sink>>>,
}

/// Waits for a guest and drives its migration to the end; returns the VM, in which the guest runs.
///
/// `accept` returns the next connection, or `None` when there was none for so long; see
/// [`Listener::accept`](super::Listener::accept). Connections of other sources are refused
/// meanwhile. Where the connection is lost after the guest was complete, this waits for the
/// source's [`recover`](crate::source::recover) for as long as it takes: only the source knows
/// whose the guest is. A VMM that lets an operator decide drives a [`Destination`] itself.
///
/// # Errors
/// [`DestinationError`]: nothing was kept, and the source has the guest.
pub fn receive<L: Link, V: DestinationVm<L>>(
    mut accept: impl FnMut(Duration) -> io::Result<Option<L>> + Send,
    vm: V,
    timeouts: Timeouts,
) -> Result<V, DestinationError> {
    let shared = Shared::<L, V> {
        timeouts,
        announced: Mutex::new(Announced {
            session: None,
            data: None,
            missing: None,
        }),
        change: Condvar::new(),
        over: AtomicBool::new(false),
        probing: Turn::default(),
    };
    let (sender, connections) = mpsc::channel();
    std::thread::scope(|scope| {
        let shared = &shared;
        // Set also when the engine panics: the scope waits for its threads.
        let _over = Over(&shared.over);
        scope.spawn(move || {
            while !shared.over.load(Ordering::SeqCst) {
                match accept(TICK) {
                    Ok(Some(link)) => {
                        let sender = sender.clone();
                        scope.spawn(move || shared.connection(link, &sender));
                    }
                    Ok(None) => {}
                    Err(error) => {
                        tracing::warn!(%error, "a connection could not be accepted");
                        std::thread::sleep(TICK);
                    }
                }
            }
        });
        shared.drive(vm, &connections)
    })
}

/// Ends the threads of a migration.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl<L: Link, V: DestinationVm<L>> Shared<L, V> {
    fn announced(&self) -> MutexGuard<'_, Announced<L, V>> {
        lock(&self.announced)
    }

    /// Runs the engine, on one control channel after the other.
    fn drive(
        &self,
        vm: V,
        connections: &mpsc::Receiver<Connection<L>>,
    ) -> Result<V, DestinationError> {
        let gone = || WireError::Io(io::Error::other("connections are accepted no more"));
        let (channel, preamble) = connections.recv().map_err(|_| gone())?;
        let clock = Arc::new(MonotonicClock::new());
        let mut engine = Destination::new(channel, &preamble, vm, self.timeouts, clock);
        loop {
            let error = match engine.step() {
                Ok(Step::Complete) => return Ok(engine.into_host()),
                Ok(_) => {
                    self.announce(&engine);
                    continue;
                }
                Err(error) => error,
            };
            tracing::warn!(%error, state = ?engine.state(), "the migration was interrupted");
            let timeout = match engine.state() {
                State::InDoubt | State::Ready | State::Interrupted => Duration::MAX,
                // The guest runs here, complete; the source may not know it.
                State::Running | State::Complete => self.timeouts.commit,
                State::Waiting | State::Filling | State::Discarded => return Err(error),
            };
            let mut left = timeout;
            // A source that was only slow sends its word on the old connection; any other opens a
            // new one.
            let in_doubt = engine.state() == State::InDoubt;
            while !(in_doubt && engine.has_word()) {
                match connections.recv_timeout(TICK) {
                    Ok((channel, preamble)) => {
                        engine.reattach(channel, &preamble);
                        break;
                    }
                    Err(RecvTimeoutError::Timeout) if left.is_zero() => {
                        return Ok(engine.into_host());
                    }
                    Err(RecvTimeoutError::Timeout) => left = left.saturating_sub(TICK),
                    Err(RecvTimeoutError::Disconnected) => return Err(gone().into()),
                }
            }
            let mut announced = self.announced();
            (announced.data, announced.missing) = (None, engine.missing_pages().cloned());
            self.change.notify_all();
        }
    }

    fn announce(&self, engine: &Destination<L, V>) {
        let mut announced = self.announced();
        if announced.data.is_none() && engine.data_channels().is_some()
            || announced.missing.is_none() && engine.missing_pages().is_some()
        {
            announced.data = engine.data_channels().cloned();
            announced.missing = engine.missing_pages().cloned();
            self.change.notify_all();
        }
    }

    /// Answers a connection and does what it is for.
    fn connection(&self, link: L, engine: &mpsc::Sender<Connection<L>>) {
        let (mut channel, preamble) =
            match destination::exchange_preamble(link, self.timeouts.handshake) {
                Ok(connection) => connection,
                Err(error) => return tracing::warn!(%error, "a connection was refused"),
            };
        let known = {
            let mut announced = self.announced();
            match (preamble.role, announced.session) {
                (Role::Control, None) => {
                    announced.session = Some(preamble.session);
                    true
                }
                (Role::Control, Some(_)) => false,
                // Beside an arriving guest it would measure what that leaves.
                (Role::Probe, session) => session.is_none(),
                (_, session) => session == Some(preamble.session),
            }
        };
        if !known {
            return channel.send_abort("this receiver has another migration, or none");
        }
        let index = preamble.channel;
        match preamble.role {
            Role::Control => {
                let _ = engine.send((channel, preamble));
            }
            Role::Recover => {
                // The source has given the old connection up.
                if let Some(missing) = &self.announced().missing {
                    missing.lose("the source has opened another connection");
                }
                let _ = engine.send((channel, preamble));
            }
            Role::Probe => {
                let Some(_turn) = self.probing.take() else {
                    return channel.send_abort("the way here is being measured by another source");
                };
                if let Err(error) = probe::answer(channel) {
                    tracing::warn!(%error, "a probe has ended");
                }
            }
            Role::Data => {
                let Some(set) = self.wait_for(|announced| announced.data.clone()) else {
                    return channel.send_abort("no such data channel was announced");
                };
                match set.attach(channel, index) {
                    Ok(data) => data.run(),
                    Err(error) => tracing::warn!(%error, "a data channel was closed"),
                }
            }
            Role::Fault => {
                let Some(missing) = self.wait_for(|announced| announced.missing.clone()) else {
                    return channel.send_abort("no such fault channel was announced");
                };
                match Destination::<L, V>::fault_channel(&missing, channel, index, self.timeouts) {
                    Ok(fault) => fault.run(&|| !self.over.load(Ordering::SeqCst)),
                    Err(error) => tracing::warn!(%error, "a fault channel was closed"),
                }
            }
        }
    }

    /// What the handshake announces, once it was taken.
    fn wait_for<T>(&self, announced: impl Fn(&Announced<L, V>) -> Option<T>) -> Option<T> {
        let waits = |all: &mut Announced<L, V>| {
            announced(all).is_none() && !self.over.load(Ordering::SeqCst)
        };
        let timeout = Some(self.timeouts.handshake);
        let (guard, _) = wait_while(&self.change, self.announced(), timeout, waits);
        announced(&guard)
    }
}
