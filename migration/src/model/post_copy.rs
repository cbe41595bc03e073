//! Post-copy in the model: the guest runs at the destination before its memory is there.
//!
//! The link carries batches of the push order's pages one after the other. A touch of a page that has
//! not arrived is a network fault: the vCPU waits while its request crosses, for the batch that is just
//! on the link, for the page, and for its way back. One vCPU is modelled; its faults are those of all of
//! them where several run in step.

use super::round::Rounds;
use super::{Activity, Outcome, Round, Setup};
use crate::options::Options;
use crate::order::{Push, PushOrder};
use crate::page::{PageSet, Run};
use crate::policy::{SendOrder, seconds};
use serde::Serialize;
use std::collections::VecDeque;
use std::time::Duration;

/// How post-copy goes about it.
#[derive(Clone, Debug)]
pub struct PostCopy {
    /// The push order.
    pub order: PushOrder,
    /// Pivots of bubbling; 1 is the slides' pseudo-code.
    pub pivots: usize,
    /// Pages that are pushed at once: what a fault may have to wait for.
    pub batch: u64,
    /// One pre-copy pass first.
    pub hybrid: bool,
    /// Demand paging: after how long without a push the rest is pushed after all.
    pub patience: Duration,
}

impl Default for PostCopy {
    fn default() -> Self {
        Self {
            order: PushOrder::default(),
            pivots: 4,
            batch: 8,
            hybrid: false,
            patience: Duration::from_secs(60),
        }
    }
}

/// Page faults of a modelled post-copy.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Faults {
    /// Faults that had to wait for the network.
    pub count: u64,
    /// Of those, how many hit a page that was on its way already.
    pub on_the_way: u64,
    /// First touches of pages that had been pushed in time.
    pub hidden: u64,
    /// How long the vCPU waited in all.
    #[serde(rename = "stalled_ms", serialize_with = "super::millis")]
    pub stalled: Duration,
    /// The longest wait.
    #[serde(rename = "worst_ms", serialize_with = "super::millis")]
    pub worst: Duration,
}

impl Faults {
    /// The share of first touches of pages that had been pushed before, whether they had arrived or were on their
    /// way: no request was needed.
    #[must_use]
    pub fn pushed_share(&self) -> f64 {
        let touches = self.hidden + self.count;
        if touches == 0 {
            1.0
        } else {
            (self.hidden + self.on_the_way) as f64 / touches as f64
        }
    }

    /// The share of first touches that pushing has kept from faulting.
    #[must_use]
    pub fn hidden_share(&self) -> f64 {
        let touches = self.hidden + self.count;
        if touches == 0 {
            1.0
        } else {
            self.hidden as f64 / touches as f64
        }
    }
}

/// The link and both ends of it, after the pause.
struct Transfer<'a> {
    setup: &'a Setup,
    push: Push,
    batch: u64,
    seconds_per_page: f64,
    half_trip: f64,
    /// Not sent yet, and not arrived yet.
    remaining: PageSet,
    missing: PageSet,
    /// What is on its way: when it arrives, in order.
    on_the_way: VecDeque<(f64, Run)>,
    /// When the link is free.
    free_at: f64,
    sent: u64,
}

impl Transfer<'_> {
    fn put(&mut self, run: Run, not_before: f64) -> f64 {
        self.remaining.remove_run(run);
        self.sent += run.count;
        self.free_at = self.free_at.max(not_before) + run.count as f64 * self.seconds_per_page;
        let arrival = self.free_at + self.half_trip;
        self.on_the_way.push_back((arrival, run));
        arrival
    }

    /// Pushes as long as the link is free before `time`; false when there is nothing to push.
    fn push_until(&mut self, time: f64) -> bool {
        while self.free_at < time {
            match self.push.next(&self.remaining, self.batch) {
                Some(run) => self.put(run, self.free_at),
                None => return false,
            };
        }
        true
    }

    fn arrive_until(&mut self, time: f64) {
        while let Some(&(at, run)) = self.on_the_way.front()
            && at <= time
        {
            self.missing.remove_run(run);
            self.on_the_way.pop_front();
        }
    }

    /// When a missing page that was asked for at `time` arrives, and whether it was on its way already.
    fn request(&mut self, gfn: u64, time: f64) -> (f64, bool) {
        let asked = time + self.half_trip;
        if self.remaining.contains(gfn) {
            self.push_until(asked);
        }
        if self.remaining.contains(gfn) {
            let arrival = self.put(Run::new(gfn, 1), asked);
            self.push.fault(gfn);
            return (arrival, false);
        }
        let covers = |run: &Run| (run.first..run.end()).contains(&gfn);
        let found = self.on_the_way.iter().find(|(_, run)| covers(run));
        (found.map_or(time, |(at, _)| *at), true)
    }

    fn last_arrival(&self) -> f64 {
        self.on_the_way.back().map_or(0.0, |(at, _)| *at)
    }
}

/// Models a post-copy, or the hybrid of one pre-copy pass and post-copy.
pub fn post_copy(
    setup: &Setup,
    options: &Options,
    how: &PostCopy,
    guest: &mut dyn Activity,
) -> Outcome {
    let cap = options.bandwidth.map(|cap| cap as f64);
    let rate = cap
        .map_or(setup.bandwidth, |cap| cap.min(setup.bandwidth))
        .max(1.0);
    let mut rounds = Rounds::new(setup, cap, guest);
    let mut stale_bytes = 0.0;
    if how.hybrid {
        rounds.collect();
        rounds.send(setup.layout.all(), SendOrder::Address);
        rounds.drain();
        rounds.collect();
        // The stale pages are named, as runs or as a bitmap.
        let runs = rounds.pending().runs().count() as f64 * 16.0;
        stale_bytes = runs.min(setup.layout.end() as f64 / 8.0);
    }
    let missing = rounds.pending().clone();
    let (began, live) = (rounds.now(), rounds.into_rounds());
    let state = setup.state_bytes as f64 + stale_bytes;
    let downtime = state / setup.bandwidth.max(1.0) + setup.pause_overhead.as_secs_f64();
    let sent_live: u64 = live.iter().map(|round| round.pages).sum();
    let mut transfer = Transfer {
        setup,
        push: Push::new(how.order, how.pivots),
        batch: how.batch.max(1),
        seconds_per_page: setup.page_bytes / rate,
        half_trip: setup.round_trip.as_secs_f64() / 2.0,
        remaining: missing.clone(),
        missing: missing.clone(),
        on_the_way: VecDeque::new(),
        free_at: began + downtime,
        sent: 0,
    };
    let faults = run(
        &mut transfer,
        &missing,
        began,
        downtime,
        how.patience,
        guest,
    );
    let end = transfer.free_at + transfer.half_trip;
    let mut list = live;
    list.push(Round {
        n: u32::try_from(list.len())
            .unwrap_or(u32::MAX)
            .saturating_add(1),
        pages: transfer.sent,
        end,
        pending: 0,
    });
    let sent = sent_live + transfer.sent;
    Outcome {
        policy: if how.hybrid { "hybrid" } else { "postcopy" }.to_owned(),
        completed: true,
        why: format!(
            "every page crossed once after the handover, pushed by {}",
            how.order.name()
        ),
        total: seconds(end),
        downtime: seconds(downtime),
        pages_sent: sent,
        pages_resent: if how.hybrid { transfer.sent } else { 0 },
        bytes: crate::policy::pages_in(sent as f64 * transfer.setup.page_bytes + state),
        rounds: list,
        faults: Some(faults),
    }
}

/// The guest runs until the last page has arrived. `began` is the pause's begin, in virtual and in guest time.
fn run(
    transfer: &mut Transfer<'_>,
    initially_missing: &PageSet,
    began: f64,
    downtime: f64,
    patience: Duration,
    guest: &mut dyn Activity,
) -> Faults {
    let mut faults = Faults::default();
    let mut touched = PageSet::new(initially_missing.end());
    // Virtual time is guest time and what the guest stood still.
    let mut stood = downtime;
    let patience = began + downtime + patience.as_secs_f64();
    loop {
        let touch = guest.peek();
        let mut time = touch.map_or(f64::INFINITY, |touch| touch.at + stood);
        if time >= patience {
            // Of demand paging: whatever was not touched is pushed now.
            transfer.free_at = transfer.free_at.max(patience);
            transfer.push.flush();
        }
        let pushing = transfer.push_until(time);
        if transfer.remaining.is_empty() && time >= transfer.last_arrival() {
            return faults;
        }
        let Some(touch) = touch else {
            if pushing {
                continue;
            }
            return faults;
        };
        transfer.arrive_until(time);
        if transfer.missing.contains(touch.gfn) {
            let (arrival, on_the_way) = transfer.request(touch.gfn, time);
            let wait = (arrival - time).max(0.0);
            faults.count += 1;
            faults.on_the_way += u64::from(on_the_way);
            faults.stalled += seconds(wait);
            faults.worst = faults.worst.max(seconds(wait));
            touched.insert(touch.gfn);
            stood += wait;
            time += wait;
            transfer.arrive_until(time);
        } else if touched.insert(touch.gfn) && initially_missing.contains(touch.gfn) {
            faults.hidden += 1;
        }
        guest.pop();
    }
}
