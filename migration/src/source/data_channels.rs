//! Sending a round on several data channels.
//!
//! Each data channel takes the next batch when it is free, so that a slow one does not hold up the
//! others; the data channels that are not in use
//! (see [`crate::data_channels`]) wait for the round's end.

use super::engine::Source;
use super::error::SourceError;
use super::helm::Helm;
use super::owner::Ownership;
use super::parts::Flight;
use super::record::{PROGRESS_EVERY, Record};
use crate::data_channels::DataChannels;
use crate::page::{PAGE_BYTES, PageSet, Run};
use crate::port::{Clock, Link, SourceVm};
use crate::report::Event;
use crate::sender::{BATCH_PAGES, BatchMode, Batches, Pacer, SendError, Sender, Sent};
use crate::steering::Steering;
use crate::sync::{lock, wait_timeout};
use crate::wire::{Channel, FrameType, Header};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// How often a data channel that is not in use looks whether the user has cancelled.
const TICK: Duration = Duration::from_millis(100);
/// A round of at most so many pages goes out on the control channel: starting the data channels
/// would take as long.
const SMALL: u64 = 2 * BATCH_PAGES;

/// Low-water mark of a step of so many pages: below it, request the next step so that no channel
/// idles.
const fn low(said: u64) -> u64 {
    const MOST: u64 = 4 * BATCH_PAGES;
    if said / 2 < MOST { said / 2 + 1 } else { MOST }
}

/// Whether so many pages are worth starting the data channels for.
pub(super) const fn worth_data_channels(pages: u64) -> bool {
    pages > SMALL
}

/// Returns the next step of the pages that [`Batches::to_come`] counts; called on the engine's
/// thread.
pub(super) type More<'m> = &'m mut dyn FnMut() -> Result<PageSet, SourceError>;

/// What the data channels of a round share.
struct Shared<'a> {
    state: Mutex<State<'a>>,
    change: Condvar,
    pacer: &'a Pacer,
    clock: &'a dyn Clock,
    owner: &'a Ownership,
    /// Something is sent on each channel at least so often.
    alive: Duration,
    mode: BatchMode,
}

struct State<'a> {
    batches: Batches,
    data_channels: &'a mut DataChannels,
    /// Below so many pages left it is to be said what comes after them.
    low: u64,
    /// Nothing is left, or nothing more is to be sent.
    over: bool,
    sent_pages: u64,
    ended: usize,
}

impl State<'_> {
    /// These come after all others.
    fn append(&mut self, pages: PageSet) {
        self.low = low(pages.len());
        self.batches.append(pages);
    }

    /// Whether it is to be said what comes next.
    fn is_low(&self) -> bool {
        self.batches.to_come() > 0 && !self.over && self.batches.left() < self.low
    }
}

/// What a data channel has done.
struct Done {
    runs: Vec<Run>,
    sent: Sent,
    error: Option<SendError>,
}

/// What a data channel does next.
enum Turn {
    Send(BatchMode),
    Wait,
    End,
}

impl<'a> Shared<'a> {
    fn state(&self) -> MutexGuard<'_, State<'a>> {
        lock(&self.state)
    }

    /// What data channel `index` does next; a batch goes into `runs`.
    fn turn(&self, index: usize, runs: &mut Vec<Run>) -> Turn {
        let mut state = self.state();
        if state.over || self.owner.is_cancelled() {
            return Turn::End;
        }
        if index < usize::from(state.data_channels.used()) {
            let sends = state.batches.next(runs);
            if state.is_low() {
                self.change.notify_all();
            }
            if sends {
                return Turn::Send(BatchMode {
                    warmer: state.batches.warmer(),
                    data_channels: state.data_channels.used(),
                    ..self.mode
                });
            }
            if state.batches.to_come() == 0 {
                state.over = true;
                self.change.notify_all();
                return Turn::End;
            }
        }
        drop(wait_timeout(&self.change, state, TICK));
        Turn::Wait
    }

    /// A data channel: batches until there are no more.
    fn run<L: Link, G: SourceVm<L>>(
        &self,
        index: usize,
        (channel, sender): &mut (Channel<L>, Sender),
        guest: &G,
    ) -> Done {
        let mut done = Done {
            runs: Vec::new(),
            sent: Sent::default(),
            error: None,
        };
        let mut runs = Vec::with_capacity(64);
        let mut sent_at = self.clock.now();
        loop {
            let result = match self.turn(index, &mut runs) {
                Turn::End => break,
                Turn::Wait if self.clock.now().saturating_sub(sent_at) < self.alive => continue,
                Turn::Wait => channel
                    .send(Header::bare(FrameType::Alive, 0), &[])
                    .map_err(SendError::from),
                Turn::Send(mode) => self.batch((channel, sender), guest, &runs, mode, &mut done),
            };
            sent_at = self.clock.now();
            if let Err(error) = result {
                done.error = Some(error);
                self.state().over = true;
                break;
            }
        }
        self.state().ended += 1;
        self.change.notify_all();
        done
    }

    fn batch<L: Link, G: SourceVm<L>>(
        &self,
        (channel, sender): (&mut Channel<L>, &mut Sender),
        guest: &G,
        runs: &[Run],
        mode: BatchMode,
        done: &mut Done,
    ) -> Result<(), SendError> {
        let waited = if mode.paused {
            Duration::ZERO
        } else {
            self.pacer.wait(self.clock, &|| self.owner.is_cancelled())
        };
        let mut sent = sender.send(channel, guest, runs, mode, self.clock)?;
        self.pacer.charge(sent.bytes, self.clock);
        sent.link += waited;
        done.runs.extend_from_slice(runs);
        done.sent.add(sent);
        let now = self.clock.now();
        let mut state = self.state();
        state.sent_pages += sent.pages();
        if state.data_channels.sent(sent.data_pages * PAGE_BYTES, now) {
            self.change.notify_all();
        }
        Ok(())
    }
}

/// How often it is looked whether the round before is in place.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// What the engine's thread does while the data channels send: it says what comes next, tells the
/// progress, and sees when the round before is in place.
struct Supervisor<'s, 'm, L> {
    control: &'s mut Channel<L>,
    events: &'s mut dyn FnMut(Event),
    steering: &'s Steering,
    helm: &'s mut Helm,
    flight: &'s mut Flight,
    record: &'s mut Record,
    more: Option<More<'m>>,
    failure: Option<SourceError>,
    /// When progress was told last, and when the source last said that it lives.
    told: Duration,
    alive_at: Duration,
}

impl<L: Link> Supervisor<'_, '_, L> {
    /// Until all data channels have ended, or `over` says so of as many.
    fn run(&mut self, shared: &Shared<'_>, over: impl Fn(usize) -> bool) {
        let mut state = shared.state();
        while !over(state.ended) {
            if state.is_low()
                && let Some(more) = &mut self.more
            {
                drop(state);
                match more() {
                    Ok(pages) => {
                        shared.state().append(pages);
                        shared.change.notify_all();
                    }
                    Err(error) => self.fail(shared, error),
                }
                state = shared.state();
                continue;
            }
            state = wait_timeout(&shared.change, state, LOOK_EVERY);
            let now = shared.clock.now();
            self.steer(shared, &mut state, now);
            self.look_for_answer(now);
            if now.saturating_sub(self.told) >= PROGRESS_EVERY {
                self.told = now;
                self.record.progress.round_sent = state.sent_pages;
                (self.events)(Event::Progress(self.record.progress.clone()));
            }
            if now.saturating_sub(self.alive_at) >= shared.alive {
                self.alive_at = now;
                drop(state);
                let alive = Header::bare(FrameType::Alive, 0);
                if let Err(error) = self.control.send(alive, &[]) {
                    self.fail(shared, error.into());
                }
                state = shared.state();
            }
        }
    }

    /// Takes what the user has changed, and ends the round where that or the time asks for it: what
    /// was not sent stays pending.
    fn steer(&mut self, shared: &Shared<'_>, state: &mut State<'_>, now: Duration) {
        if self.steering.has_news() {
            let (pacer, at) = (shared.pacer, (self.record.began, self.flight.round));
            let how = (pacer, shared.clock);
            state.over |= self.helm.take(self.steering, how, at, self.events);
            state.batches.resize(pacer.batch_pages());
            shared.change.notify_all();
        }
        let lasted = now.saturating_sub(self.record.memory_began);
        if !shared.mode.paused && self.helm.is_time_up(lasted) {
            state.over = true;
            shared.change.notify_all();
        }
    }

    /// Notes when the destination's word about the round before is there.
    fn look_for_answer(&mut self, now: Duration) {
        if !self.flight.in_flight.is_empty()
            && self.flight.answered_at.is_none()
            && self.control.link().readable().unwrap_or(false)
        {
            self.flight.answered_at = Some(now);
        }
    }

    /// Ends the round.
    fn fail(&mut self, shared: &Shared<'_>, error: SourceError) {
        self.failure = Some(error);
        shared.state().over = true;
        shared.change.notify_all();
    }
}

impl<L: Link, G: SourceVm<L>> Source<'_, '_, L, G> {
    /// Sends the batches, and `more` of them, on as many data channels as are in use.
    pub(super) fn send_on_data_channels(
        &mut self,
        batches: Batches,
        mode: BatchMode,
        more: Option<More<'_>>,
    ) -> Result<Sent, SourceError> {
        self.transport.used.begin_round();
        let guest = self.guest;
        let count = self.transport.data_channels.len();
        let shared = Shared {
            state: Mutex::new(State {
                low: low(batches.left()),
                batches,
                data_channels: &mut self.transport.used,
                over: false,
                sent_pages: 0,
                ended: 0,
            }),
            change: Condvar::new(),
            pacer: &self.transport.pacer,
            clock: self.session.setup.clock,
            owner: self.session.setup.owner,
            alive: self.session.setup.timeouts.alive,
            mode,
        };
        let now = self.session.setup.clock.now();
        let mut supervisor = Supervisor {
            control: &mut self.session.control,
            events: &mut *self.session.setup.events,
            steering: self.session.setup.steering,
            helm: &mut self.helm,
            flight: &mut self.flight,
            record: &mut self.record,
            more,
            failure: None,
            told: now,
            alive_at: now,
        };
        let results: Vec<Done> = std::thread::scope(|scope| {
            let shared = &shared;
            let mut handles = Vec::with_capacity(count);
            for (index, data_channel) in self.transport.data_channels.iter_mut().enumerate() {
                let thread = std::thread::Builder::new().name("ferry-send".into());
                match thread.spawn_scoped(scope, move || shared.run(index, data_channel, guest)) {
                    Ok(handle) => handles.push(handle),
                    Err(error) => {
                        supervisor.fail(shared, SourceError::no_thread(error));
                        break;
                    }
                }
            }
            supervisor.run(shared, |ended| {
                ended == count || handles.iter().all(|handle| handle.is_finished())
            });
            handles
                .into_iter()
                .filter_map(|handle| handle.join().ok())
                .collect()
        });
        let mut failure = supervisor.failure;
        drop(shared);
        self.record.progress.round_sent = 0;
        let lost = results.len() < count;
        let mut total = Sent::default();
        for done in results {
            self.delivered(&done.runs, done.sent);
            total.add(done.sent);
            failure = failure.or_else(|| done.error.map(SourceError::from));
        }
        match failure {
            Some(error) => Err(error),
            // A thread that could not be started is `failure`.
            None if lost => Err(SourceError::guest(
                "sending on a data channel",
                "a sender thread panicked".into(),
            )),
            None => self.session.check().map(|()| total),
        }
    }
}
