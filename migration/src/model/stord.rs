//! What the STORD paper says, apart from the algorithm that ferry runs ([`crate::policy::Stord`]):
//! its closed forms, and its pseudo-code read literally, which loses writes.
//!
//! The literal form exists to be counted here. It is no [`crate::policy::Policy`]: no migration can
//! be asked to use it.

use super::round::{Begin, Rounds};
use super::{Activity, MAX_ROUNDS, Outcome, Setup};
use crate::numbers::{pages_in, seconds};
use crate::page::PageSet;
use crate::policy::{SendOrder, Stord};
use std::time::Duration;

/// The paper's closed forms (section 2.3), in multiples of the memory size, for infinitely many
/// iterations.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct ClosedForms {
    /// (2): what pre-copy sends, 1 ÷ (1 − R).
    pub pre_copy: f64,
    /// (3): f′ for *k* pieces, what the last round of the first split sends.
    pub last_round: f64,
    /// (3) for infinitely many rounds.
    pub last_round_limit: f64,
    /// (4): r′, the rate at which a whole split shrinks.
    pub rate: f64,
    /// (4) with one more term: the printed sum ends at the power *k* − 1. Up to the *k*-th it is
    /// the rate at which the first split shrinks exactly, namely R times what the last round sends.
    pub rate_whole: f64,
    /// (5) with the last round alone: f′ ÷ (1 − r′).
    pub stord: f64,
    /// (5) with f′ as the vector of the k rounds, and (4) up to the k-th power: what STORD sends of
    /// a guest whose writes fall evenly in the set that is being sent. This is what the paper's
    /// figures show.
    pub stord_whole: f64,
}

impl ClosedForms {
    /// For a dirty rate of `share` (0.9 is 90 %) and a split into `pieces`.
    #[must_use]
    pub fn new(share: f64, pieces: u32) -> Self {
        let split = f64::from(pieces.max(1));
        let ratio = share / split;
        let first = 1.0 / split;
        let last_round_limit = first / (1.0 - ratio);
        let last_round = last_round_limit * (1.0 - ratio.powf(split));
        // R/k + (R/k)²(k−1) + (R/k)³(k−1)(k−2) + … up to the (k−1)-th power.
        let (mut rate, mut term) = (0.0, ratio);
        for index in 1..pieces.max(1) {
            rate += term;
            term *= ratio * (split - f64::from(index));
        }
        let rate_whole = rate + term;
        let stord_whole = rounds_of_a_set(share, pieces).iter().sum::<f64>() / (1.0 - rate_whole);
        if pieces <= 1 {
            // The series is empty; pre-copy's own rate is meant.
            rate = share;
        }
        Self {
            pre_copy: 1.0 / (1.0 - share),
            last_round,
            last_round_limit,
            rate,
            rate_whole,
            stord: last_round / (1.0 - rate),
            stord_whole,
        }
    }

    /// (1): what pre-copy sends in `rounds` iterations.
    #[must_use]
    pub fn pre_copy_after(share: f64, rounds: u32) -> f64 {
        (1.0 - share.powf(f64::from(rounds))) / (1.0 - share)
    }

    /// (5) for `sets` splits. As printed its numerator holds r′ ÷ (1 − r′) where a geometric sum
    /// has r′, and for r′ > 1 ÷ 2 it then grows without bound; this is the geometric sum.
    #[must_use]
    pub fn stord_after(&self, sets: u32) -> f64 {
        self.last_round * (1.0 - self.rate.powf(f64::from(sets))) / (1.0 - self.rate)
    }
}

/// What each of the k rounds of a set sends, in sizes of the set: 1 ÷ k, and of what the round
/// before dirtied the part that lies in pieces that are sent already.
fn rounds_of_a_set(share: f64, pieces: u32) -> Vec<f64> {
    let split = f64::from(pieces.max(1));
    let mut dirty = 0.0;
    (1..=pieces.max(1))
        .map(|index| {
            let sent = 1.0 / split + dirty;
            dirty = share * sent * f64::from(index) / split;
            sent
        })
        .collect()
}

/// What the pseudo-code of Table 1 comes to when its line 17 is read literally.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Literal {
    /// As of any migration.
    pub outcome: Outcome,
    /// Times that a page at the destination was dirtied and dropped from what is still to be sent.
    pub forgotten: u64,
    /// Pages that are stale at the destination when the guest starts there.
    pub lost: u64,
}

/// Runs the pseudo-code: a round sends the next piece and what was dirtied *of what the last round
/// sent* (line 17: RD ∩ PM); stops when what it believes to be left fits into `downtime`.
///
/// Two repairs, or it would not end: the stop condition is also looked at after the last piece of a
/// set (line 21 skips it there), and RD is empty when a new set begins (it *is* the new set).
pub fn literal(
    setup: &Setup,
    pieces: u32,
    downtime: Duration,
    guest: &mut dyn Activity,
) -> Literal {
    let enough = pages_in(downtime.as_secs_f64() * setup.pages_per_second());
    let mut rounds = Rounds::new(setup, Begin::default(), guest);
    let mut forgotten = 0;
    let mut set = setup.layout.all();
    let mut dirty = PageSet::new(setup.layout.end());
    rounds.collect();
    let left = 'sets: loop {
        // The next piece last.
        let mut list = Stord::split(&set, pieces);
        dirty.clear();
        loop {
            let mut sent = list.pop().unwrap_or_else(|| PageSet::new(set.end()));
            sent.union_with(&dirty);
            rounds.send(sent.clone(), SendOrder::Address);
            rounds.collect();
            dirty = rounds.fresh().clone();
            dirty.intersect_with(&sent);
            // Of the rest, what lies in a later piece is sent with it.
            let mut dropped = rounds.fresh().clone();
            dropped.subtract(&sent);
            list.iter().for_each(|piece| dropped.subtract(piece));
            forgotten += dropped.len();
            let mut left = dirty.clone();
            list.iter().for_each(|piece| left.union_with(piece));
            if left.len() <= enough || rounds.count() >= MAX_ROUNDS {
                break 'sets left;
            }
            if list.is_empty() {
                set = left;
                break;
            }
        }
    };
    let downtime = rounds.stop_with(&left);
    let lost = rounds.pending().len();
    let why = format!("what it remembers fits into the pause; {lost} pages are stale");
    Literal {
        outcome: rounds.outcome("stord as printed", true, why, seconds(downtime)),
        forgotten,
        lost,
    }
}
