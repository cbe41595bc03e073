//! When rounds no longer shrink, and which of them is then a good one to stop after (KubeVirt VEP
//! 248).
//!
//! A guest is *stalled* when nothing that was pending in the last rounds is below 96 % of the best
//! before them. Then the live phase has nothing to gain, but its rounds differ: stopping waits for
//! one near the best that was seen, and for less and less near as rounds go by.

use std::collections::VecDeque;

/// What was pending after each round.
#[derive(Debug)]
pub(super) struct Stall {
    /// The last rounds, as many as `window`; the newest last.
    recent: VecDeque<u64>,
    window: usize,
    /// The least before those.
    before: Option<u64>,
    /// The least of all.
    best: u64,
    /// The round that was seen last, and the one in which it stalled.
    round: Option<u32>,
    since: Option<u32>,
}

impl Stall {
    /// Less than this share of the best before is progress.
    const PROGRESS: f64 = 0.96;
    /// Each round the best moment may be worse by this share of the best.
    const RELAX: f64 = 0.05;

    /// Nothing below the best before in so many rounds is a stall.
    pub(super) const fn new(window: u32) -> Self {
        Self {
            recent: VecDeque::new(),
            window: window as usize,
            before: None,
            best: u64::MAX,
            round: None,
            since: None,
        }
    }

    /// So much is pending after a round: whether it is stalled, and this a moment to stop.
    pub(super) fn is_best_moment(&mut self, round: u32, pending: u64) -> bool {
        if self.round == Some(round) {
            // Asked again after draining: the last thing that is known of the round counts.
            if let Some(last) = self.recent.back_mut() {
                *last = pending;
            }
        } else {
            self.round = Some(round);
            self.recent.push_back(pending);
            if self.recent.len() > self.window
                && let Some(old) = self.recent.pop_front()
            {
                self.before = Some(self.before.map_or(old, |before| before.min(old)));
            }
        }
        self.best = self.best.min(pending);
        let least = self.recent.iter().copied().min().unwrap_or(pending);
        let stalled = self
            .before
            .is_some_and(|before| least as f64 >= before as f64 * Self::PROGRESS);
        if !stalled {
            self.since = None;
            return false;
        }
        let since = *self.since.get_or_insert(round);
        let relaxed = 1.0 + Self::RELAX * f64::from(round.saturating_sub(since));
        pending as f64 <= self.best as f64 * relaxed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In which round of these it stops.
    fn stops(pending: &[u64]) -> Option<usize> {
        let mut stall = Stall::new(3);
        (1_u32..)
            .zip(pending)
            .position(|(round, pending)| stall.is_best_moment(round, *pending))
            .map(|at| at + 1)
    }

    #[test]
    fn shrinking_is_no_stall() {
        assert_eq!(stops(&[1000, 900, 800, 700, 600, 500, 400, 300]), None);
        // A worse round in between is no stall either.
        assert_eq!(stops(&[1000, 2000, 900, 2000, 800, 2000, 700]), None);
    }

    #[test]
    fn a_flat_line_stops_after_the_window() {
        assert_eq!(stops(&[1000; 8]), Some(4));
        // Two per cent less is no progress.
        assert_eq!(stops(&[1000, 998, 996, 994, 992]), Some(4));
    }

    #[test]
    fn it_waits_for_a_round_near_the_best() {
        // Best 500; stalled from the fifth on, at 900; the seventh is within a tenth of the best.
        assert_eq!(stops(&[1000, 500, 900, 950, 900, 900, 540, 900]), Some(7));
    }

    #[test]
    fn it_waits_for_less_and_less() {
        let mut pending = vec![1000, 500];
        pending.extend([590; 20]);
        // 590 is 18 % above the best: near enough four rounds after it stalled.
        assert_eq!(stops(&pending), Some(9));
    }

    #[test]
    fn asking_again_counts_once() {
        let mut stall = Stall::new(3);
        for round in 1..=3 {
            assert!(!stall.is_best_moment(round, 1000));
            assert!(!stall.is_best_moment(round, 1000));
        }
        assert!(stall.is_best_moment(4, 1000));
        assert!(stall.is_best_moment(4, 1000));
    }
}
