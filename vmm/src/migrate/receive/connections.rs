//! What comes to a receiver: whether it may be a channel, which it is, and what it is for.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ferry_devices::sync::wait_timeout;
use ferry_devices::thread;
use ferry_migration::destination::{self, Destination};
use ferry_migration::net::Unsecured;
use ferry_migration::net::tls::Admission;
use ferry_migration::probe;
use ferry_migration::wire::{AbortCode, Channel, Preamble, Role, SessionId};

use super::engine::{await_source, drive};
use super::{Active, Engine, POLL, Shared, Stage};
use crate::migrate::arrival::Arrival;
use crate::migrate::host::MachineHost;
use crate::migrate::listener::Incoming;
use crate::migrate::newcomers::Address;
use crate::migrate::{MonotonicClock, StreamLink};

/// How long a new connection may take to say what it is.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long a new migration waits for one that is ending.
const SETTLING: Duration = Duration::from_secs(2);

pub(super) fn spawn(shared: &Arc<Shared>, incoming: Incoming) {
    let Incoming {
        mut link,
        address,
        socket,
    } = incoming;
    link.count(Arc::clone(&shared.received));
    let id = shared.newcomers.admit(address, socket);
    let worker = Arc::clone(shared);
    let work = move || {
        connection(&worker, link, (id, address));
        Ok(())
    };
    let failed = {
        let shared = Arc::clone(shared);
        move |why| {
            shared.newcomers.leave(id);
            shared.restore_token();
            shared.tell(Arrival::Failed(why));
        }
    };
    if let Err(error) = thread::spawn(thread::Kind::Migration, "ferry-receive", work, failed) {
        shared.newcomers.leave(id);
        tracing::warn!(%error, "a connection was closed");
    }
}

fn connection(shared: &Arc<Shared>, link: StreamLink, (id, address): (u64, Address)) {
    let admitted = admit(shared, link, address);
    let stays = shared.newcomers.leave(id);
    match admitted {
        Ok((channel, preamble, admission)) => {
            serve(shared, channel, &preamble, admission);
            if admission.is_some() {
                shared.restore_token();
            }
        }
        // Closed to make room: that was said then.
        Err(_) if !stays => {}
        Err(why) => {
            let from = address.map_or_else(|| "this host".to_owned(), |ip| ip.to_string());
            shared.tell(Arrival::Refused(format!(
                "a connection from {from} was refused: {why}"
            )));
        }
    }
}

/// A connection that may be a channel, what it says it is, and why it may be one; or a sentence.
fn admit(
    shared: &Shared,
    mut link: StreamLink,
    address: Address,
) -> Result<(Channel<StreamLink>, Preamble, Option<Admission>), String> {
    if !shared.gate.admits(address) {
        return Err("its address is none of --accept-from".into());
    }
    let admission = match &shared.gate.tls {
        None => None,
        Some(tls) => match link.secure_as_receiver(tls) {
            Ok(admission) => Some(admission),
            Err(Unsecured::Refused(why)) => {
                let why = why.to_string();
                destination::turn_away(link, HANDSHAKE, &why);
                return Err(why);
            }
            Err(error) => return Err(error.to_string()),
        },
    };
    let (channel, preamble) =
        destination::exchange_preamble(link, HANDSHAKE).map_err(|error| error.to_string())?;
    Ok((channel, preamble, admission))
}

/// Does what a connection is for, if it may.
fn serve(
    shared: &Arc<Shared>,
    channel: Channel<StreamLink>,
    preamble: &Preamble,
    admission: Option<Admission>,
) {
    // The others belong to a migration that is known here.
    let first = matches!(preamble.role, Role::Control | Role::Probe);
    let proven = match admission {
        None => true,
        Some(Admission::Session(secret)) => {
            let ours = {
                let active = shared.active();
                let active = active.as_ref().filter(|a| a.session == preamble.session);
                active.and_then(|a| a.secret)
            };
            !first && ours.is_some_and(|ours| ours.matches(&secret))
        }
        Some(_) => first,
    };
    if !proven {
        let why = "this connection does not prove that it belongs to a migration that arrives here";
        refuse(channel, AbortCode::UnknownSession, why);
        return shared.tell(Arrival::Refused(format!(
            "a connection was refused: it is secured, and does not prove that it belongs to migration {}",
            preamble.session
        )));
    }
    match preamble.role {
        Role::Control => control(shared, channel, preamble),
        Role::Data => data(shared, channel, preamble),
        Role::Recover => recover(shared, channel, preamble),
        Role::Fault => faults(shared, channel, preamble),
        Role::Probe => probe(shared, channel),
    }
}

fn refuse(mut channel: Channel<StreamLink>, code: AbortCode, why: &str) {
    channel.send_abort_as(code, why);
}

/// A migration's control channel: runs the engine until it ends.
fn control(shared: &Arc<Shared>, mut channel: Channel<StreamLink>, preamble: &Preamble) {
    let secret = channel.link().secret();
    let busy = {
        // A source learns that its migration failed before its memory here is freed: one that
        // retries at once waits for that instead of being refused.
        let until = Instant::now() + SETTLING;
        let mut active = shared.active();
        loop {
            match active.as_ref().map(|a| a.stage) {
                None => {
                    *active = Some(Active {
                        session: preamble.session,
                        secret,
                        data_channels: None,
                        missing_pages: None,
                        stage: Stage::Receiving,
                        begun: Instant::now(),
                        policy: String::new(),
                        received_before: shared.received.load(Ordering::Relaxed),
                        parked: None,
                    });
                    break None;
                }
                Some(Stage::InDoubt) => {
                    break Some("a guest is in doubt here; end that with ferry recover first");
                }
                Some(Stage::Done { .. } | Stage::Following | Stage::Interrupted) => {
                    break Some("this receiver has its guest; start another");
                }
                Some(Stage::Receiving) if Instant::now() < until => {
                    let left = until.saturating_duration_since(Instant::now());
                    active = wait_timeout(&shared.changed, active, left);
                }
                Some(Stage::Receiving) => break Some("another migration is arriving here"),
            }
        }
    };
    if let Some(why) = busy {
        return refuse(channel, AbortCode::Busy, why);
    }
    let host = MachineHost::new(
        Arc::clone(&shared.serial),
        shared.backends.clone(),
        shared.dirty,
    )
    .behind(shared.gate.clone())
    .owned_by(Arc::clone(&shared.owner));
    let timeouts = destination::Timeouts::default();
    let clock = Arc::new(MonotonicClock::new());
    let engine = Destination::new(channel, preamble, host, timeouts, clock);
    drive(shared, Box::new(engine));
    await_source(shared, preamble.session);
}

/// A data channel: waits until its migration's handshake was taken, then fills memory.
fn data(shared: &Shared, channel: Channel<StreamLink>, preamble: &Preamble) {
    let Some(data_channels) = wait_for(shared, preamble.session, |active| {
        active.data_channels.clone()
    }) else {
        let why = "no migration here has announced this data channel";
        return refuse(channel, AbortCode::UnknownSession, why);
    };
    match data_channels.attach(channel, preamble.channel) {
        Ok(data_channel) => data_channel.run(),
        Err(error) => tracing::warn!(%error, "a data channel was closed"),
    }
}

/// What a migration's handshake announces, once it was taken.
fn wait_for<T>(
    shared: &Shared,
    session: SessionId,
    announced: impl Fn(&Active) -> Option<T>,
) -> Option<T> {
    let until = Instant::now() + HANDSHAKE;
    let mut active = shared.active();
    loop {
        match active.as_ref().filter(|a| a.session == session) {
            Some(a) => {
                if let Some(found) = announced(a) {
                    return Some(found);
                }
            }
            None => return None,
        }
        let left = until.checked_duration_since(Instant::now())?;
        active = wait_timeout(&shared.changed, active, left);
    }
}

/// A fault channel: waits until its migration's handshake was taken, then asks for the pages that
/// the guest waits for.
fn faults(shared: &Shared, channel: Channel<StreamLink>, preamble: &Preamble) {
    let Some(missing_pages) = wait_for(shared, preamble.session, |active| {
        active.missing_pages.clone()
    }) else {
        let why = "no migration here has announced this fault channel";
        return refuse(channel, AbortCode::UnknownSession, why);
    };
    let timeouts = destination::Timeouts::default();
    match Engine::fault_channel(&missing_pages, channel, preamble.channel, timeouts) {
        Ok(data_channel) => data_channel.run(&|| {
            let active = shared.active();
            active
                .as_ref()
                .is_some_and(|a| a.session == preamble.session)
        }),
        Err(error) => tracing::warn!(%error, "a fault channel was closed"),
    }
}

/// A source that measures the way here, while nothing else crosses it.
fn probe(shared: &Shared, channel: Channel<StreamLink>) {
    if shared.active().is_some() {
        let why = "this receiver has a guest, and measures no way";
        return refuse(channel, AbortCode::Busy, why);
    }
    let Some(_turn) = shared.probing.take() else {
        let why = "the way here is being measured by another source";
        return refuse(channel, AbortCode::Busy, why);
    };
    if let Err(error) = probe::answer(channel) {
        tracing::debug!(%error, "a probe has ended");
    }
}

/// A source that asks, or tells, what became of a guest.
fn recover(shared: &Arc<Shared>, channel: Channel<StreamLink>, preamble: &Preamble) {
    match parked(shared, preamble.session) {
        Ok(mut engine) => {
            engine.reattach(channel, preamble);
            drive(shared, engine);
            await_source(shared, preamble.session);
        }
        Err((code, why)) => refuse(channel, code, why),
    }
}

/// Takes the engine of a migration that has lost its connection, or is about to notice that.
fn parked(shared: &Shared, session: SessionId) -> Result<Box<Engine>, (AbortCode, &'static str)> {
    let until = Instant::now() + HANDSHAKE;
    let mut active = shared.active();
    if let Some(a) = active.as_ref().filter(|a| a.session == session)
        && a.stage == Stage::Following
        && let Some(missing_pages) = &a.missing_pages
    {
        // The source has dropped the old connection.
        missing_pages.lose("the source has opened another");
    }
    loop {
        let Some(a) = active.as_mut().filter(|a| a.session == session) else {
            let why = "this receiver does not know that migration";
            return Err((AbortCode::UnknownSession, why));
        };
        if let Some(engine) = a.parked.take() {
            return Ok(engine);
        }
        if Instant::now() >= until {
            let why = "that migration is being worked on here; retry in some seconds";
            return Err((AbortCode::Busy, why));
        }
        active = wait_timeout(&shared.changed, active, POLL);
    }
}
