//! A round: its batches, on the channels that are worth it, and the barrier that ends it.

use super::data_channels::{More, worth_data_channels};
use super::engine::Source;
use super::error::SourceError;
use super::parts::InFlight;
use crate::first_pass::FirstPass;
use crate::page::PageSet;
use crate::policy::SendOrder;
use crate::port::{Link, SourceVm};
use crate::report::Round;
use crate::sender::{BatchMode, Batches, Sent};
use crate::wire::{FrameType, Header};
use std::time::Duration;

impl<L: Link, G: SourceVm<L>> Source<'_, '_, L, G> {
    /// A report has at most this many rounds.
    const ROUNDS_KEPT: usize = 1000;

    /// Sends `pages` as one round and ends it with a barrier.
    pub(super) fn send_round(
        &mut self,
        pages: PageSet,
        order: SendOrder,
        paused: bool,
    ) -> Result<Sent, SourceError> {
        self.send_round_in(pages, order, paused, self.transport.pacer.batch_pages())
    }

    /// As [`send_round`](Self::send_round), in batches of so many pages.
    pub(super) fn send_round_in(
        &mut self,
        pages: PageSet,
        order: SendOrder,
        paused: bool,
        batch: u64,
    ) -> Result<Sent, SourceError> {
        self.flight.round += 1;
        let started = self.now();
        self.record.progress.round = self.flight.round;
        self.record.progress.round_pages = pages.len();
        self.record.progress.round_sent = 0;
        let mode = BatchMode {
            round: self.flight.round,
            paused,
            tell: false,
            warmer: 0,
            data_channels: 1,
        };
        // How often the first pages are dirtied is not known yet.
        let learns = order == SendOrder::ColdFirst && self.memory.sent_once.is_empty();
        let sent = if learns {
            self.send_first_pass(pages, mode, batch)?
        } else {
            let batches = self.batches(pages, order, batch);
            self.send_batches(batches, mode, None)?
        };
        if self.record.rounds.len() >= Self::ROUNDS_KEPT {
            // The first and the last tell the story.
            self.record.rounds.remove(Self::ROUNDS_KEPT / 2);
            self.record.rounds_omitted += 1;
        }
        self.record.rounds.push(Round {
            n: self.flight.round,
            pages: sent.pages(),
            bytes: sent.bytes,
            ms: 0.0,
            dirtied: 0,
            dirtied_regions: Vec::new(),
            follows: false,
        });
        self.barrier(self.flight.round)?;
        let ended = self.now();
        // Data channels send at the same time, and each looks for zero pages while others send:
        // more than the time that went by cannot have been the link's.
        let link = (sent.link + sent.coding).min(ended.saturating_sub(started));
        self.flight.in_flight.push_back(InFlight {
            round: self.flight.round,
            sent,
            link,
            started,
            ended,
            disks: self.disks.take_since_round(),
        });
        Ok(sent)
    }

    /// What a round sends, on the channels that are worth it.
    fn send_batches(
        &mut self,
        batches: Batches,
        mode: BatchMode,
        more: Option<More<'_>>,
    ) -> Result<Sent, SourceError> {
        let few = !worth_data_channels(batches.left() + batches.to_come());
        if few || self.transport.data_channels.is_empty() {
            self.send_here(batches, mode, more)
        } else {
            self.send_on_data_channels(batches, mode, more)
        }
    }

    /// A first pass that learns meanwhile what the guest writes to, and sends that last.
    fn send_first_pass(
        &mut self,
        pages: PageSet,
        mode: BatchMode,
        batch: u64,
    ) -> Result<Sent, SourceError> {
        let failed = |e| SourceError::guest("reading the dirty log", e);
        let guest = self.guest;
        let mut pass = FirstPass::new(pages);
        // All are pending: from here on the log tells which of them are written. Each is cleared
        // once more as it leaves.
        self.clear(&pass)?;
        let mut log = PageSet::new(self.memory.layout.end());
        let step = pass.next(&log);
        let to_come = pass.left().len();
        let first = self
            .batches(step, SendOrder::Address, batch)
            .before(to_come);
        let mut more = || {
            log.clear();
            guest.collect_dirty(&mut log).map_err(failed)?;
            Ok(pass.next(&log))
        };
        self.send_batches(first, mode, Some(&mut more))
    }

    /// Marks the end of a round on every channel.
    pub(super) fn barrier(&mut self, round: u32) -> Result<(), SourceError> {
        for (data_channel, _) in &mut self.transport.data_channels {
            data_channel.send(Header::bare(FrameType::RoundEnd, round), &[])?;
        }
        self.transport.alive_at = self.now();
        self.session
            .control
            .send(Header::bare(FrameType::RoundEnd, round), &[])?;
        Ok(())
    }

    /// Everything on the control channel, in this thread: there is no other, or little to send.
    fn send_here(
        &mut self,
        mut batches: Batches,
        mode: BatchMode,
        mut more: Option<More<'_>>,
    ) -> Result<Sent, SourceError> {
        let mut total = Sent::default();
        let mut runs = Vec::with_capacity(64);
        loop {
            if !batches.next(&mut runs) {
                match &mut more {
                    Some(more) if batches.to_come() > 0 => batches.append(more()?),
                    _ => return Ok(total),
                }
                continue;
            }
            self.session.check()?;
            let mode = BatchMode {
                warmer: batches.warmer(),
                ..mode
            };
            let waited = self.pace(mode);
            let mut sent = self.transport.sender.send(
                &mut self.session.control,
                self.guest,
                &runs,
                mode,
                self.session.setup.clock,
            )?;
            self.transport
                .pacer
                .charge(sent.bytes, self.session.setup.clock);
            sent.link += waited;
            self.delivered(&runs, sent);
            total.add(sent);
            self.take_acks()?;
            self.keep_alive()?;
            self.tell_progress();
            if self.session.setup.steering.has_news() {
                // What was not sent stays pending.
                if self.steer() {
                    return Ok(total);
                }
                batches.resize(self.transport.pacer.batch_pages());
            }
            let lasted = self.now().saturating_sub(self.record.memory_began);
            if !mode.paused && self.helm.is_time_up(lasted) {
                return Ok(total);
            }
        }
    }

    /// Waits for the user's cap. Not in the pause: there it would cost the guest.
    fn pace(&self, mode: BatchMode) -> Duration {
        if mode.paused {
            return Duration::ZERO;
        }
        let (owner, steering) = (self.session.setup.owner, self.session.setup.steering);
        self.transport.pacer.wait(self.session.setup.clock, &|| {
            owner.is_cancelled() || steering.has_news()
        })
    }

    /// Pages to be sent, in batches of at most so many but for those that seem to hold nothing.
    fn batches(&self, pages: PageSet, order: SendOrder, batch: u64) -> Batches {
        let empty = Some(&self.memory.empty).filter(|empty| !empty.is_empty());
        Batches::new(pages, order, &self.memory.heat, batch).with_empty(empty.cloned())
    }

    /// Waits until the destination has done everything that it was sent: a round without pages.
    pub(super) fn settle(&mut self) -> Result<(), SourceError> {
        self.flight.round += 1;
        self.barrier(self.flight.round)?;
        let now = self.now();
        self.flight.in_flight.push_back(InFlight {
            round: self.flight.round,
            sent: Sent::default(),
            link: Duration::ZERO,
            started: now,
            ended: now,
            disks: (0, Duration::ZERO),
        });
        self.take_ack()
    }
}
