//! The figures of a run, and how they are taken.

use super::forecast::Forecast;
use super::interrupt;
use super::log::Seen;
use super::net::PAYLOAD;
use super::process::{Use, Watch, end_by_force};
use ferry_migration::report::Faults;
use ferry_terminal::output::Failure;
use serde::{Deserialize, Serialize};
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often processes are looked at; a look costs what three small reads cost.
const LOOK: Duration = Duration::from_millis(20);

/// What the VMM itself says about a migration; nothing where it says nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Told {
    /// From the request until the source may be discarded.
    pub total_ms: f64,
    /// How long the guest stood still; nothing where what it says cannot be.
    pub downtime_ms: Option<f64>,
    /// What it said of its downtime, where that cannot be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub odd: Option<String>,
    /// Bytes that were sent.
    #[serde(default)]
    pub wire_bytes: Option<u64>,
    /// Pages sent with their contents.
    #[serde(default)]
    pub pages_sent: Option<u64>,
    /// How many pages crossed more than once.
    #[serde(default)]
    pub pages_resent: Option<u64>,
    /// Pages announced as zero.
    #[serde(default)]
    pub pages_zero: Option<u64>,
    /// Page faults of post-copy; of QEMU only their number and the time that the vCPUs waited.
    pub faults: Option<Faults>,
    /// Pages dirtied per second over time: milliseconds since the request, and the rate until then.
    pub dirtied: Vec<(f64, f64)>,
    /// The VMM's own report, whole.
    pub report: serde_json::Value,
}

/// What a migration came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// The VMM's own figures.
    pub told: Told,
    /// What the guest saw.
    pub seen: Seen,
    /// The longest silence of the serial port at the move, to [`super::listener::BEAT_MS`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outside_ms: Option<f64>,
    /// Bytes that the link carried meanwhile, with all headers; on loopback other people's too.
    pub link_bytes: u64,
    /// Bytes that it carried back: acknowledgements and requests for pages. Loopback does not tell
    /// them apart: 0.
    pub back_bytes: u64,
    /// The source's process.
    pub source: Use,
    /// The destination's process.
    pub destination: Use,
    /// Whether the guest found all of its memory, or its results, intact at the destination.
    pub verified: bool,
    /// Whether the host's 2 MiB pages were at hand right before.
    #[serde(default)]
    pub warm: bool,
    /// What the model of the same ferry says of the cell, where it can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forecast: Option<Forecast>,
}

impl Figures {
    /// How far the report is from what the guest saw.
    pub fn error_ms(&self) -> Option<f64> {
        self.told
            .downtime_ms
            .map(|downtime| (downtime - self.seen.gap_ms).abs())
    }

    /// Where the VMM's own figures do not agree with the guest's clock and the link's counters.
    pub fn doubts(&self) -> Vec<String> {
        let mut doubts = Vec::new();
        match (self.told.downtime_ms, self.error_ms()) {
            // One that says nothing says nothing wrong.
            (None, _) => {
                doubts.extend(self.told.odd.as_ref().map(|odd| {
                    let gap = self.seen.gap_ms;
                    format!(
                        "it reports no downtime that can be ({odd}), and the guest saw {gap:.1} ms"
                    )
                }));
            }
            // What the machine does to an idle guest is no VMM's error.
            (Some(told), Some(error)) if error > self.seen.noise_ms.max(5.0) => {
                doubts.push(format!(
                    "it reports {told:.1} ms of downtime and the guest saw {:.1} ms",
                    self.seen.gap_ms
                ));
            }
            _ => {}
        }
        // A guest that loses more work than its processors are said to have waited has waited
        // longer.
        if let Some(stalled) = self.stalled_ms()
            && self.seen.lost_ms > stalled * 1.5 + 200.0 + 10.0 * self.seen.noise_ms
        {
            doubts.push(format!(
                "it reports that vCPUs waited for {stalled:.0} ms, and the guest lost {:.0} ms of work",
                self.seen.lost_ms
            ));
        }
        // Loopback's packets are so large that their headers do not count.
        let payload = if self.back_bytes > 0 {
            self.link_bytes as f64 * PAYLOAD
        } else {
            self.link_bytes as f64
        };
        let wire = self.told.wire_bytes.map(|bytes| bytes as f64);
        if let Some(wire) = wire
            && (wire > payload * 1.005 + 5e5 || wire < payload * 0.95 - 1e6)
        {
            doubts.push(format!(
                "it reports {:.1} MB sent and the link carried {:.1} MB without headers",
                wire / 1e6,
                payload / 1e6
            ));
        }
        doubts
    }

    /// The time that vCPUs waited for pages.
    pub fn stalled_ms(&self) -> Option<f64> {
        self.told.faults.as_ref().map(|faults| faults.stalled_ms)
    }
}

/// The machine's load averages.
pub fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let three: Vec<&str> = text.split(' ').take(3).collect();
    three.join(" ")
}

/// What the machine saw while something was done.
pub struct Watched<T> {
    /// What was done.
    pub result: T,
    /// The source's process.
    pub source: Use,
    /// The destination's process.
    pub destination: Use,
}

/// Runs `what` and watches both processes meanwhile. Kills them after `timeout`, or on an
/// interrupt, so that waits for them return.
pub fn watched<T>(
    [source, destination]: [u32; 2],
    guest_kib: u64,
    timeout: Duration,
    what: impl FnOnce() -> Result<T, Failure>,
) -> Result<Watched<T>, Failure> {
    let mut watches = [source, destination].map(|pid| Watch::new(pid, guest_kib));
    let stop = AtomicBool::new(false);
    let late = AtomicBool::new(false);
    let began = Instant::now();
    let look = || {
        while !stop.load(Ordering::Relaxed) {
            watches.iter_mut().for_each(Watch::look);
            if interrupt::wanted() || began.elapsed() > timeout {
                late.store(true, Ordering::Relaxed);
                end_by_force(source);
                end_by_force(destination);
                return;
            }
            std::thread::sleep(LOOK);
        }
    };
    let result = std::thread::scope(|scope| {
        scope.spawn(look);
        let result = what();
        stop.store(true, Ordering::Relaxed);
        result
    });
    interrupt::check()?;
    if late.load(Ordering::Relaxed) {
        return Err(Failure(format!(
            "the migration has not ended in {timeout:?}; its processes were ended"
        )));
    }
    let result = result?;
    let [source, destination] = watches.map(Watch::finish);
    Ok(Watched {
        result,
        source,
        destination,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_that_agree_raise_no_doubt_and_others_do() {
        let mut good = Figures::default();
        good.told.downtime_ms = Some(8.0);
        good.seen.gap_ms = 9.0;
        good.told.wire_bytes = Some(500_000_000);
        good.link_bytes = 524_000_000;
        good.back_bytes = 1_000_000;
        assert_eq!(good.doubts(), Vec::<String>::new());
        let doubt = |change: &dyn Fn(&mut Figures), part: &str| {
            let mut bad = good.clone();
            change(&mut bad);
            let doubts = bad.doubts();
            assert!(doubts.len() == 1 && doubts[0].contains(part), "{doubts:?}");
        };
        doubt(&|f| f.seen.gap_ms = 60.0, "the guest saw 60.0 ms");
        doubt(
            &|f| (f.told.downtime_ms, f.told.odd) = (None, Some("9 h".into())),
            "no downtime that can be",
        );
        doubt(&|f| f.told.wire_bytes = Some(520_000_000), "520.0 MB sent");
        doubt(&|f| f.told.wire_bytes = Some(300_000_000), "300.0 MB sent");
        doubt(
            &|f| {
                f.told.faults = Some(Faults {
                    stalled_ms: 100.0,
                    ..Faults::default()
                });
                f.seen.lost_ms = 2500.0;
            },
            "lost 2500 ms of work",
        );
        // On a machine that stops all processes now and then, a gap says little.
        let mut noisy = good.clone();
        (noisy.seen.noise_ms, noisy.seen.gap_ms) = (70.0, 60.0);
        assert!(noisy.doubts().is_empty());
    }
}
