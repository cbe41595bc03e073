//! How many data channels a migration opens, and how many of them it uses: pure decisions over what
//! was measured.
//!
//! A data channel is worth having where one stream does not fill the link: one sender and one
//! receiver are two processors at most, and at the receiver finding memory for a page takes longer
//! than copying it. On a link that one data channel fills, further data channels only take
//! processor time from the guest. The two cases cannot be told apart beforehand, nor by how long a
//! sender waits (it waits for a slow link as for a busy receiver). So they are tried: pages are
//! sent on as many data channels as are open, then on half of them, and so on while that is no
//! slower; and from time to time the other way, since what was measured once may have been another
//! process's noise.

use crate::options::{Options, PolicyKind};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The most data channels that are opened without being asked for.
const MOST: u16 = 4;
/// A cap below this (3.2 Gbit/s) is filled by one data channel on any processor.
const ONE_DATA_CHANNEL: u64 = 400_000_000;
/// Bytes of a measurement: what socket buffers take without delay is small beside it.
const WINDOW: u64 = 32 << 20;
/// Bytes after a change that are not measured: what other data channels still have in hand.
const SETTLE: u64 = 4 << 20;
/// Fewer data channels are kept where they carry at least this share of what more carried.
const ENOUGH: f64 = 0.95;
/// Windows after which more data channels are tried again; each time twice as many.
const AGAIN: u32 = 8;

/// The channels of a migration, as the report shows them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Channels {
    /// Data channels that were opened beside the control channel; 0: pages shared the control
    /// channel.
    pub opened: u16,
    /// How many of them were in use when the last large round ended.
    pub used: u16,
    /// Bytes written to each.
    pub bytes: Vec<u64>,
    /// Why so many, in one sentence.
    pub why: String,
}

/// How many data channels to open, and why, where the source has so many processors. 0 means that
/// pages share the control channel.
#[must_use]
pub fn to_open(options: &Options, processors: u16) -> (u16, String) {
    let none = |why: &str| (0, format!("one connection: {why}"));
    match options.channels {
        Some(0 | 1) => return none("as asked for"),
        Some(n) => return (n, format!("{n} data connections, as asked for")),
        None => {}
    }
    if options.policy == PolicyKind::Postcopy {
        return none("what the guest waits for is not to queue behind more than one stream");
    }
    if options.bandwidth.is_some_and(|cap| cap < ONE_DATA_CHANNEL) {
        return none("it carries all that the bandwidth cap lets through");
    }
    if processors < 2 {
        return none("there is one processor to send with");
    }
    let data_channels = processors.min(MOST);
    let why = format!("up to {data_channels} data connections, for {processors} processors");
    (data_channels, why)
}

/// A number of data channels that is being compared with another.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Trial {
    /// How many were used before.
    before: u16,
    /// What they carried, in bytes per second.
    rate: f64,
}

/// How many of the open data channels are used.
#[derive(Clone, Debug)]
pub struct DataChannels {
    open: u16,
    used: u16,
    fixed: bool,
    trial: Option<Trial>,
    /// Fewer than this are too few, as far as is known.
    floor: u16,
    /// Numbers of data channels were compared.
    compared: bool,
    /// Of the present window: bytes that are not measured, those that were, and since when.
    skip: u64,
    bytes: u64,
    since: Option<Duration>,
    windows: u32,
    again: u32,
}

impl DataChannels {
    /// `open` data channels, all in use; `fixed` for good.
    #[must_use]
    pub const fn new(open: u16, fixed: bool) -> Self {
        Self {
            open,
            used: open,
            fixed,
            trial: None,
            floor: 1,
            compared: false,
            skip: SETTLE,
            bytes: 0,
            since: None,
            windows: 0,
            again: AGAIN,
        }
    }

    /// How many are to be used.
    #[must_use]
    pub const fn used(&self) -> u16 {
        self.used
    }

    /// What speaks for that number, after `why` so many were opened.
    #[must_use]
    pub fn reason(&self, why: &str) -> String {
        if self.fixed || self.open == 0 {
            why.to_owned()
        } else if !self.compared {
            format!("{why}; too little was sent to compare fewer with them")
        } else if self.used < self.open {
            format!("{why}; {} carried as much as more did", self.used)
        } else {
            format!("{why}; fewer carried less")
        }
    }

    /// A round begins: the time since the last one tells nothing.
    pub const fn begin_round(&mut self) {
        self.reset();
    }

    const fn reset(&mut self) {
        self.skip = SETTLE;
        self.bytes = 0;
        self.since = None;
    }

    /// So many bytes of guest memory that was not zero have left by `now`, on whichever data
    /// channel. `true` when the number to use has changed.
    pub fn sent(&mut self, bytes: u64, now: Duration) -> bool {
        if self.fixed || self.open < 2 {
            return false;
        }
        if self.skip > 0 {
            self.skip = self.skip.saturating_sub(bytes);
            if self.skip == 0 {
                self.since = Some(now);
            }
            return false;
        }
        let since = *self.since.get_or_insert(now);
        self.bytes += bytes;
        if self.bytes < WINDOW {
            return false;
        }
        let seconds = now.saturating_sub(since).as_secs_f64().max(1e-6);
        let rate = self.bytes as f64 / seconds;
        let before = self.used;
        self.decide(rate);
        if self.used == before {
            self.bytes = 0;
            self.since = Some(now);
        } else {
            self.reset();
        }
        self.used != before
    }

    fn decide(&mut self, rate: f64) {
        let fewer = self.used / 2;
        self.compared |= self.trial.is_some();
        match self.trial.take() {
            // More were tried: are they worth it?
            Some(trial) if trial.before < self.used => {
                if ENOUGH * rate <= trial.rate {
                    self.used = trial.before;
                    self.again = self.again.saturating_mul(2);
                } else {
                    self.floor = self.used;
                    self.again = AGAIN;
                }
                self.windows = 0;
            }
            // Fewer were tried: are they enough?
            Some(trial) if rate < ENOUGH * trial.rate => {
                self.used = trial.before;
                self.floor = trial.before;
                self.windows = 0;
            }
            Some(_) | None if fewer >= self.floor => {
                let before = self.used;
                self.used = fewer;
                self.trial = Some(Trial { before, rate });
            }
            Some(_) | None => {
                self.windows += 1;
                if self.windows < self.again {
                    return;
                }
                self.windows = 0;
                if self.used < self.open {
                    let before = self.used;
                    self.used = self.open.min(2 * self.used);
                    self.trial = Some(Trial { before, rate });
                } else {
                    // Perhaps fewer are enough by now; if not, that costs one window in many.
                    self.again = self.again.saturating_mul(2);
                    self.floor = 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(channels: Option<u16>) -> Options {
        Options {
            channels,
            ..Options::default()
        }
    }

    #[test]
    fn what_was_asked_for_is_opened() {
        assert_eq!(to_open(&options(Some(1)), 8).0, 0);
        for n in [2, 7, 64] {
            assert_eq!(to_open(&options(Some(n)), 1).0, n);
        }
    }

    #[test]
    fn by_itself_it_opens_as_many_as_there_are_processors() {
        for (processors, data_channels) in [(0, 0), (1, 0), (2, 2), (3, 3), (4, 4), (128, 4)] {
            assert_eq!(
                to_open(&options(None), processors).0,
                data_channels,
                "{processors}"
            );
        }
        let capped = |cap| Options {
            bandwidth: Some(cap),
            ..options(None)
        };
        assert_eq!(to_open(&capped(125_000_000), 4).0, 0);
        assert_eq!(to_open(&capped(1_250_000_000), 4).0, 4);
        let post_copy = Options {
            policy: PolicyKind::Postcopy,
            ..options(None)
        };
        assert_eq!(to_open(&post_copy, 4).0, 0);
        let asked = Options {
            channels: Some(3),
            ..post_copy
        };
        assert_eq!(to_open(&asked, 4).0, 3);
    }

    /// Sends so many MiB where `rate` says what so many data channels carry, in MB/s.
    fn send(
        data_channels: &mut DataChannels,
        mib: u64,
        now: &mut f64,
        rate: impl Fn(u16) -> f64,
    ) -> Vec<u16> {
        let mut used = vec![data_channels.used()];
        for _ in 0..mib {
            *now += f64::from(1 << 20) / (rate(data_channels.used()) * 1e6);
            if data_channels.sent(1 << 20, Duration::from_secs_f64(*now)) {
                used.push(data_channels.used());
            }
        }
        used
    }

    #[test]
    fn one_data_channel_fills_a_slow_link_and_is_left_alone() {
        let mut data_channels = DataChannels::new(4, false);
        let mut now = 0.0;
        assert_eq!(
            send(&mut data_channels, 128, &mut now, |_| 119.0),
            [4, 2, 1]
        );
        // Two are tried now and then, ever less often.
        let later = send(&mut data_channels, 32 << 10, &mut now, |_| 119.0);
        assert_eq!(data_channels.used(), 1);
        assert!(later.len() < 20, "{later:?}");
    }

    #[test]
    fn data_channels_that_carry_more_are_used() {
        for open in [2, 3, 4, 8] {
            let mut data_channels = DataChannels::new(open, false);
            send(&mut data_channels, 256, &mut 0.0, |n| 400.0 * f64::from(n));
            assert_eq!(data_channels.used(), open);
        }
        // Two processors there: more than two data channels carry no more.
        let mut data_channels = DataChannels::new(4, false);
        send(&mut data_channels, 512, &mut 0.0, |n| {
            400.0 * f64::from(n.min(2))
        });
        assert_eq!(data_channels.used(), 2);
        assert_eq!(
            data_channels.reason("x"),
            "x; 2 carried as much as more did"
        );
    }

    #[test]
    fn it_follows_the_link() {
        let mut data_channels = DataChannels::new(2, false);
        let mut now = 0.0;
        send(&mut data_channels, 128, &mut now, |_| 119.0);
        assert_eq!(data_channels.used(), 1);
        send(&mut data_channels, 2048, &mut now, |n| 500.0 * f64::from(n));
        assert_eq!(data_channels.used(), 2);
        send(&mut data_channels, 4096, &mut now, |_| 119.0);
        assert_eq!(data_channels.used(), 1);
    }

    /// What was asked for is used; time that stands still divides nothing by nothing.
    #[test]
    fn fixed_data_channels_stay_and_odd_times_are_harmless() {
        let mut data_channels = DataChannels::new(3, true);
        send(&mut data_channels, 512, &mut 0.0, |_| 100.0);
        assert_eq!(data_channels.used(), 3);
        for open in 0..3 {
            let mut data_channels = DataChannels::new(open, false);
            for _ in 0..100 {
                data_channels.sent(u64::MAX >> 8, Duration::ZERO);
                data_channels.begin_round();
                data_channels.sent(64 << 20, Duration::ZERO);
            }
            assert!(data_channels.used() <= open);
        }
    }
}
