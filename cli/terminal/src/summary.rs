//! A migration's report on one screen.

use crate::output::clean;
use crate::rows::{RoundRow, Rows, rounds};
use crate::units::{grouped, span, traffic};
use ferry_migration::report::{Faults, Report, Round, Slowed, Status};

/// The sentence that says how it ended.
pub fn sentence(report: &Report, uri: &str) -> String {
    let why = report.error.as_deref().map(clean).unwrap_or_default();
    let because = if why.is_empty() {
        String::new()
    } else {
        format!(" ({why})")
    };
    match report.status {
        Status::Completed if report.verified == Some(false) => {
            format!("the guest runs at {uri} on memory that is not as it was{because}")
        }
        Status::Completed => format!(
            "the guest runs at {uri}, moved in {} with {} of downtime",
            span(report.total_ms),
            span(report.downtime_ms)
        ),
        Status::Failed | Status::Cancelled if report.guest_ended => {
            format!("the migration to {uri} ended with its guest{because}")
        }
        Status::Failed => {
            format!("the migration to {uri} failed{because}; the guest runs on where it was")
        }
        Status::Cancelled => {
            format!("the migration to {uri} was cancelled{because}; the guest runs on where it was")
        }
        Status::Interrupted => format!(
            "the migration to {uri} was interrupted{because}: the guest runs there and misses pages that are only here; \
             `ferry recover` sends them"
        ),
        Status::InDoubt => format!(
            "the migration to {uri} ended in doubt{because}: neither side runs the guest by \
             itself; `ferry recover` asks the destination again, and `ferry status` says what else can be done"
        ),
    }
}

/// Changes of a running migration that are shown: the last ones.
const STEERED: usize = 10;

/// What post-copy's faults came to; `None` where there were none.
#[must_use]
pub fn faults(faults: &Faults) -> Option<String> {
    (faults.count > 0).then(|| {
        format!(
            "{}, median {}, 99 % within {}, worst {}, stalled {}",
            grouped(faults.count),
            span(faults.p50_us / 1e3),
            span(faults.p99_us / 1e3),
            span(faults.max_us / 1e3),
            span(faults.stalled_ms)
        )
    })
}

/// Everything else that people want to know.
pub fn table(report: &Report) -> String {
    let mut rows = Rows::default();
    pause_and_pages(report, &mut rows);
    coders_and_disks(report, &mut rows);
    if let Some(text) = faults(&report.faults) {
        rows.add("faults", text);
    }
    how_it_was_steered(report, &mut rows);
    let head = ["round", "pages", "wire", "time", "dirtied"];
    rounds(&head, &round_rows(report)) + &rows.text()
}

/// The pause, and what crossed by which channels.
fn pause_and_pages(report: &Report, rows: &mut Rows) {
    let mut row = |name: &str, value: String| rows.add(name, value);
    let d = &report.downtime;
    let verify = match report.verified {
        Some(_) => format!(" + verify {}", span(d.verify_ms)),
        None => String::new(),
    };
    row(
        "downtime",
        format!(
            "{} = quiesce {} + last pages {}{} + state {} + start {}",
            span(report.downtime_ms),
            span(d.quiesce_ms),
            span(d.last_pages_ms),
            verify,
            span(d.state_ms),
            span(d.start_ms)
        ),
    );
    let p = &report.pages;
    row(
        "pages",
        format!(
            "{} sent and {} zero ({} of them again), {} skipped, of {}",
            grouped(p.sent),
            grouped(p.zero),
            grouped(p.resent),
            grouped(p.skipped),
            grouped(p.total)
        ),
    );
    row(
        "wire",
        format!("{} at {:.1} MB/s", traffic(report.bytes_wire), report.mbps),
    );
    let channels = &report.channels;
    if channels.opened > 0 {
        row(
            "channels",
            format!(
                "{} of {}: {}",
                channels.used,
                channels.opened,
                clean(&channels.why)
            ),
        );
    }
}

/// What the coders saved, and the disks that moved along.
fn coders_and_disks(report: &Report, rows: &mut Rows) {
    let mut row = |name: &str, value: String| rows.add(name, value);
    let c = &report.codecs;
    if !c.is_empty() {
        let coders = [
            ("zstd", c.zstd),
            ("delta", c.delta),
            ("sparse", c.sparse),
            ("copied", c.copied),
        ];
        let used = coders.iter().filter(|(_, coder)| coder.pages > 0);
        let parts: Vec<String> = used
            .map(|(name, coder)| {
                format!(
                    "{name} {} pages, {} saved",
                    grouped(coder.pages),
                    traffic(coder.bytes_saved)
                )
            })
            .collect();
        row(
            "codecs",
            format!("{}, in {}", parts.join("; "), span(c.encode_ms)),
        );
    }
    if let Some(d) = &report.disk {
        row(
            "disks",
            format!(
                "{} sent and {} zero ({} of them again, {} in the pause), of {}; {} on the wire, {} rounds, {}",
                traffic(d.sent),
                traffic(d.zero),
                traffic(d.resent),
                traffic(d.in_pause),
                traffic(d.total),
                traffic(d.bytes_wire),
                d.rounds,
                span(d.ms)
            ),
        );
    }
}

/// Whether memory is equal, and what was decided on the way.
fn how_it_was_steered(report: &Report, rows: &mut Rows) {
    let mut row = |name: &str, value: String| rows.add(name, value);
    let verified = match report.verified {
        Some(true) => "yes, all memory is equal on both sides",
        Some(false) => "NO: memory differs between the sides",
        None => "not asked for (--verify)",
    };
    row("verified", verified.into());
    row("policy", clean(&report.policy));
    if let Some(why) = &report.why {
        row("why", clean(why));
    }
    if let Some(slowed) = &report.slowed {
        row("slowed", slowing(slowed));
    }
    if let Some(freed) = &report.freed {
        row(
            "memory",
            format!(
                "{} given back here while the rest followed; at most {} were on both hosts",
                traffic(freed.bytes),
                traffic(freed.twice_bytes)
            ),
        );
    }
    let hidden = report.steered.len().saturating_sub(STEERED);
    for (at, steered) in report.steered.iter().enumerate().skip(hidden) {
        let name = if at == hidden { "steered" } else { "" };
        let (when, change) = (span(steered.at_ms), &steered.change);
        row(
            name,
            format!("after {when}, in round {}: {change}", steered.round),
        );
    }
}

/// How the guest was slowed: the vCPUs that were, up to a line's worth of them.
fn slowing(slowed: &Slowed) -> String {
    const SHOWN: usize = 4;
    let mut vcpus: Vec<_> = slowed.vcpus.iter().enumerate().collect();
    vcpus.retain(|(_, vcpu)| vcpu.most_percent > 0.0);
    let more = vcpus.len().saturating_sub(SHOWN);
    let each = vcpus.iter().take(SHOWN).map(|(at, vcpu)| {
        let rested = span(vcpu.rested_ms);
        format!(
            "vCPU {at} by up to {:.0} %, {rested} at rest",
            vcpu.most_percent
        )
    });
    let each: Vec<String> = each.collect();
    let more = if more > 0 {
        format!("; and {more} more")
    } else {
        String::new()
    };
    let (from, time) = (span(slowed.from_ms), span(slowed.ms));
    format!("after {from}, for {time}: {}{more}", each.join("; "))
}

fn round_rows(report: &Report) -> Vec<RoundRow> {
    let last = report.rounds.len().saturating_sub(1);
    let row = |(at, round): (usize, &Round)| {
        // The last round of a guest that moved is the one in the pause; nothing is dirtied in it.
        let stop = at == last && report.status == Status::Completed;
        let (name, dirtied) = if round.follows {
            ("after".into(), "–".into())
        } else if stop {
            ("stop".into(), "–".into())
        } else {
            (round.n.to_string(), grouped(round.dirtied))
        };
        RoundRow {
            n: round.n,
            cells: vec![
                name,
                grouped(round.pages),
                traffic(round.bytes),
                span(round.ms),
                dirtied,
            ],
        }
    };
    report.rounds.iter().enumerate().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_migration::report::{Downtime, Faults, Freed, Pages};

    fn report() -> Report {
        Report {
            schema: 1,
            session: "6f1e".into(),
            policy: "precopy".into(),
            status: Status::Completed,
            error: None,
            total_ms: 2012.3,
            downtime_ms: 12.3,
            downtime: Downtime {
                quiesce_ms: 0.4,
                last_pages_ms: 8.6,
                verify_ms: 0.5,
                state_ms: 1.9,
                start_ms: 0.9,
            },
            rounds_omitted: 0,
            rounds: vec![
                Round {
                    n: 1,
                    pages: 131_072,
                    bytes: 412_345_678,
                    ms: 1920.0,
                    dirtied: 4210,
                    ..Round::default()
                },
                Round {
                    n: 2,
                    pages: 4210,
                    bytes: 17_260_000,
                    ms: 80.2,
                    dirtied: 311,
                    ..Round::default()
                },
                Round {
                    n: 3,
                    pages: 311,
                    bytes: 1_275_000,
                    ms: 9.1,
                    dirtied: 0,
                    ..Round::default()
                },
            ],
            pages: Pages {
                total: 131_072,
                sent: 37_289,
                resent: 4521,
                zero: 98_304,
                skipped: 0,
            },
            codecs: Default::default(),
            channels: Default::default(),
            steered: Vec::new(),
            slowed: None,
            freed: None,
            disk: None,
            bytes_wire: 430_880_678,
            mbps: 214.1,
            faults: Faults::default(),
            verified: Some(true),
            why: Some("pending pages fit the downtime target".into()),
            guest_ended: false,
            retry_commit: false,
            abort_untold: None,
        }
    }

    #[test]
    fn a_completed_migration() {
        assert_eq!(
            sentence(&report(), "tcp:b:7000"),
            "the guest runs at tcp:b:7000, moved in 2.01 s with 12.3 ms of downtime"
        );
        let expected = "\
round        pages         wire         time      dirtied
    1      131,072     412.3 MB       1.92 s        4,210
    2        4,210      17.3 MB      80.2 ms          311
 stop          311       1.3 MB       9.1 ms            –
downtime   12.3 ms = quiesce 0.40 ms + last pages 8.6 ms + verify 0.50 ms + state 1.9 ms + start 0.90 ms
pages      37,289 sent and 98,304 zero (4,521 of them again), 0 skipped, of 131,072
wire       430.9 MB at 214.1 MB/s
verified   yes, all memory is equal on both sides
policy     precopy
why        pending pages fit the downtime target
";
        assert_eq!(table(&report()), expected);
    }

    #[test]
    fn what_the_user_changed_is_shown() {
        use ferry_migration::report::{Change, Steered};
        let steered = |at_ms, change| Steered {
            at_ms,
            round: 3,
            change,
        };
        let downtime = Change {
            downtime: Some(std::time::Duration::from_secs(1)),
            ..Change::default()
        };
        let mut steered = vec![
            steered(1500.0, downtime),
            steered(2000.0, Change::switchover()),
        ];
        let text = |steered: &[Steered]| {
            table(&Report {
                steered: steered.to_vec(),
                ..report()
            })
        };
        let expected = "steered    after 1.50 s, in round 3: downtime 1000 ms\n           \
                        after 2.00 s, in round 3: switch over now\n";
        assert!(text(&steered).ends_with(expected), "{}", text(&steered));
        for _ in 0..2 * STEERED {
            steered.insert(0, steered[0].clone());
        }
        assert_eq!(text(&steered).matches("in round").count(), STEERED);
    }

    #[test]
    fn memory_that_was_given_back_is_shown() {
        let freed = Some(Freed {
            bytes: 430_000_000,
            twice_bytes: 8_388_608,
        });
        let text = table(&Report { freed, ..report() });
        let row = "memory     430.0 MB given back here while the rest followed; at most 8.4 MB were on both hosts\n";
        assert!(text.ends_with(row), "{text}");
    }

    #[test]
    fn how_much_the_guest_was_slowed_is_shown() {
        use ferry_migration::report::SlowedVcpu;
        let vcpu = |most_percent, rested_ms| SlowedVcpu {
            most_percent,
            rested_ms,
        };
        let mut vcpus = vec![vcpu(0.0, 0.0), vcpu(75.0, 1200.0)];
        let text = |vcpus: &[SlowedVcpu]| {
            slowing(&Slowed {
                from_ms: 3000.0,
                ms: 2000.0,
                vcpus: vcpus.to_vec(),
            })
        };
        assert_eq!(
            text(&vcpus),
            "after 3.00 s, for 2.00 s: vCPU 1 by up to 75 %, 1.20 s at rest"
        );
        vcpus.extend(vec![vcpu(10.0, 100.0); 9]);
        assert!(text(&vcpus).ends_with("; and 6 more"), "{}", text(&vcpus));
    }

    #[test]
    fn other_ends_say_where_the_guest_is() {
        let end = |status, error: Option<&str>| {
            sentence(
                &Report {
                    status,
                    error: error.map(Into::into),
                    ..report()
                },
                "tcp:b:7000",
            )
        };
        assert_eq!(
            end(
                Status::Failed,
                Some("the destination closed\nthe connection")
            ),
            "the migration to tcp:b:7000 failed (the destination closed the connection); the guest runs on where it was"
        );
        assert_eq!(
            end(Status::Cancelled, None),
            "the migration to tcp:b:7000 was cancelled; the guest runs on where it was"
        );
        assert!(end(Status::InDoubt, None).contains("`ferry recover`"));
        let ended = Report {
            status: Status::Failed,
            error: Some("the guest has shut down".into()),
            guest_ended: true,
            ..report()
        };
        assert_eq!(
            sentence(&ended, "tcp:b:7000"),
            "the migration to tcp:b:7000 ended with its guest (the guest has shut down)"
        );
    }

    #[test]
    fn differences_and_faults_are_shown() {
        let faults = Faults {
            count: 1500,
            p50_us: 210.0,
            p99_us: 900.0,
            max_us: 12_000.0,
            stalled_ms: 420.0,
            ..Faults::default()
        };
        let text = table(&Report {
            verified: Some(false),
            faults,
            ..report()
        });
        assert!(text.contains("verified   NO: memory differs"), "{text}");
        assert!(
            text.contains("faults     1,500, median 0.21 ms, 99 % within 0.90 ms, worst 12.0 ms, stalled 420.0 ms"),
            "{text}"
        );
    }
}
