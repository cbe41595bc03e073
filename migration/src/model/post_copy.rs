//! Post-copy in the model: the guest runs at the destination before its memory is there.
//!
//! The link carries batches of the push order's pages one after the other. A touch of a page that
//! has not arrived is a network fault: the vCPU waits while its request crosses, for the batch that
//! is just on the link, for the page, and for its way back. One vCPU is modelled; its faults are
//! those of all of them where several run in step.

use super::round::Rounds;
use super::{Activity, Setup};
use crate::numbers::seconds;
use crate::options::Options;
use crate::order::{Push, PushOrder, QUIET};
use crate::page::{PageSet, Run};
use serde::Serialize;
use std::collections::VecDeque;
use std::time::Duration;

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
    /// The share of first touches of pages that had been pushed before, whether they had arrived or
    /// were on their way: no request was needed.
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
    /// The batch that is being put together.
    batch: Vec<Run>,
    bandwidth: f64,
    half_trip: f64,
    /// Not sent yet, and not arrived yet.
    remaining: PageSet,
    missing: PageSet,
    /// What is on its way: when it arrives, in order.
    on_the_way: VecDeque<(f64, Run)>,
    /// When the link is free.
    free_at: f64,
    sent: u64,
    bytes: f64,
}

impl Transfer<'_> {
    /// Puts pages on the link, not before a time; when they arrive.
    fn put(&mut self, runs: &[Run], not_before: f64) -> f64 {
        let pages: u64 = runs.iter().map(|run| run.count).sum();
        let bytes: f64 = runs.iter().map(|run| self.setup.bytes(*run)).sum();
        self.sent += pages;
        self.bytes += bytes;
        self.free_at = self.free_at.max(not_before) + bytes / self.bandwidth;
        let arrival = self.free_at + self.half_trip;
        for run in runs {
            self.remaining.remove_run(*run);
            self.on_the_way.push_back((arrival, *run));
        }
        arrival
    }

    /// Pushes batches as long as the link is free before `time`.
    fn push_until(&mut self, time: f64) {
        while self.free_at < time {
            let mut batch = std::mem::take(&mut self.batch);
            batch.clear();
            let mut room = self.setup.push_pages.max(1);
            while room > 0
                && let Some(run) = self.push.next(&self.remaining, room)
            {
                self.remaining.remove_run(run);
                room -= run.count;
                batch.push(run);
            }
            let any = !batch.is_empty();
            if any {
                self.put(&batch, self.free_at);
            }
            self.batch = batch;
            if !any {
                return;
            }
        }
    }

    fn arrive_until(&mut self, time: f64) {
        while let Some(&(at, run)) = self.on_the_way.front()
            && at <= time
        {
            self.missing.remove_run(run);
            self.on_the_way.pop_front();
        }
    }

    /// When a missing page that was asked for at `time` arrives, and whether it was on its way
    /// already.
    fn request(&mut self, gfn: u64, time: f64) -> (f64, bool) {
        let asked = time + self.half_trip;
        if self.remaining.contains(gfn) {
            self.push_until(asked);
        }
        if self.remaining.contains(gfn) {
            let arrival = self.put(&[Run::new(gfn, 1)], asked);
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

/// The guest is handed over, and what is pending follows. Returns the downtime in seconds and the
/// faults.
pub(super) fn follow(
    rounds: &mut Rounds<'_>,
    options: &Options,
    order: PushOrder,
) -> (f64, Faults) {
    let setup = rounds.setup();
    let missing = rounds.pending().clone();
    // Where a part has crossed before, the stale pages are named: as runs, or as a bitmap.
    let stale = if rounds.count() > 0 {
        let runs = missing.runs().count() as f64 * 16.0;
        runs.min(setup.layout.end() as f64 / 8.0) * setup.stands_for
    } else {
        0.0
    };
    let began = rounds.now();
    let state = setup.state_bytes as f64 + stale;
    let downtime = state / setup.bandwidth.max(1.0) + setup.pause_overhead.as_secs_f64();
    let mut transfer = Transfer {
        setup,
        push: Push::new(order, usize::from(options.pivots)),
        batch: Vec::new(),
        bandwidth: rounds.live_bandwidth(),
        half_trip: setup.round_trip.as_secs_f64() / 2.0,
        remaining: missing.clone(),
        missing: missing.clone(),
        on_the_way: VecDeque::new(),
        free_at: began + downtime,
        sent: 0,
        bytes: 0.0,
    };
    let faults = run(
        &mut transfer,
        &missing,
        began + downtime,
        downtime,
        options,
        rounds.guest(),
    );
    let end = transfer.free_at + transfer.half_trip;
    let sent = (transfer.sent, transfer.bytes);
    rounds.followed(&missing, sent, end);
    (downtime, faults)
}

/// The guest runs, from `began` on, until the last page has arrived; it stood still for `stood`
/// seconds before.
fn run(
    transfer: &mut Transfer<'_>,
    initially_missing: &PageSet,
    began: f64,
    mut stood: f64,
    options: &Options,
    guest: &mut dyn Activity,
) -> Faults {
    let mut faults = Faults::default();
    let mut touched = PageSet::new(initially_missing.end());
    let timeout = began + options.timeout.as_secs_f64();
    let mut last_fault = began;
    loop {
        // Virtual time is guest time and what the guest stood still.
        let touch = guest.peek();
        let mut time = touch.map_or(f64::INFINITY, |touch| touch.at + stood);
        transfer.push_until(time);
        // Demand paging, as the engine ends it: when the guest is quiet, or the user's time is up.
        let timeout = timeout.min(last_fault + QUIET.as_secs_f64());
        if time >= timeout && !transfer.remaining.is_empty() {
            transfer.free_at = transfer.free_at.max(timeout);
            transfer.push.flush();
            transfer.push_until(time);
        }
        if transfer.remaining.is_empty() && time >= transfer.last_arrival() {
            return faults;
        }
        let Some(touch) = touch else { return faults };
        transfer.arrive_until(time);
        if transfer.missing.contains(touch.gfn) {
            let (arrival, on_the_way) = transfer.request(touch.gfn, time);
            let mut wait = (arrival - time).max(0.0);
            if !on_the_way {
                // The page's own time counts once for all that it stands for; a round trip and a
                // batch for each.
                let own = transfer.setup.bytes(Run::new(touch.gfn, 1)) / transfer.bandwidth;
                let each = (wait - own).max(0.0);
                wait += each * (transfer.setup.stands_for - 1.0);
            }
            faults.count += 1;
            faults.on_the_way += u64::from(on_the_way);
            faults.stalled += seconds(wait);
            faults.worst = faults.worst.max(seconds(wait));
            touched.insert(touch.gfn);
            stood += wait;
            time += wait;
            last_fault = time;
            transfer.arrive_until(time);
        } else if touched.insert(touch.gfn) && initially_missing.contains(touch.gfn) {
            faults.hidden += 1;
        }
        guest.pop();
    }
}
