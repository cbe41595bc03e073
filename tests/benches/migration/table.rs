//! The results, for people.

use super::case::{Case, Contestant};
use super::measure::{Figures, Run};

type Column = (&'static str, fn(&Figures) -> f64);

const MIB: f64 = (1 << 20) as f64;

/// Every column is better when it is smaller.
const COLUMNS: [Column; 12] = [
    ("total ms", |f| f.total_ms),
    ("gap ms", |f| f.gap_ms),
    ("after", |f| f.after_ms),
    ("noise", |f| f.noise_ms),
    ("down ms", |f| f.downtime_ms),
    ("|d-gap|", Figures::error_ms),
    ("wire MiB", |f| f.wire_bytes as f64 / MIB),
    ("lo MiB", |f| f.lo_bytes as f64 / MIB),
    ("CPU s/GiB", Figures::cpu_s_per_gib),
    ("src RSS", |f| f.source.own_kib as f64 / 1024.0),
    ("dst RSS", |f| f.destination.own_kib as f64 / 1024.0),
    ("pair RSS", fresh_pair_mib),
];

/// What a freshly started pair holds before the move beyond the guest's memory, in MiB.
fn fresh_pair_mib(figures: &Figures) -> f64 {
    let kib = figures.source.own_before_kib + figures.destination.own_before_kib;
    kib as f64 / 1024.0
}

/// Median and maximum.
fn spread(mut values: Vec<f64>) -> Option<(f64, f64)> {
    values.sort_by(f64::total_cmp);
    let max = *values.last()?;
    let half = values.len() / 2;
    let median = if values.len() % 2 == 1 {
        values[half]
    } else {
        f64::midpoint(values[half - 1], values[half])
    };
    Some((median, max))
}

struct Row<'a> {
    contestant: Contestant,
    figures: Vec<&'a Figures>,
}

impl Row<'_> {
    fn spread(&self, of: fn(&Figures) -> f64) -> (f64, f64) {
        spread(self.figures.iter().map(|f| of(f)).collect()).unwrap_or((f64::NAN, f64::NAN))
    }

    fn median(&self, of: fn(&Figures) -> f64) -> f64 {
        self.spread(of).0
    }

    fn print(&self) {
        let verified = self.figures.iter().filter(|f| f.verified).count();
        for (name, which) in [("median", 0), ("max", 1)] {
            let label = if which == 0 {
                format!(
                    "{} ({verified}/{} verified)",
                    self.contestant,
                    self.figures.len()
                )
            } else {
                String::new()
            };
            print!("{label:<31} {name:<6}");
            for (_, of) in COLUMNS {
                let (median, max) = self.spread(of);
                print!(" {:>10.1}", if which == 0 { median } else { max });
            }
            println!();
        }
    }
}

fn rows(runs: &[Run], case: Case) -> Vec<Row<'_>> {
    let all = [
        Contestant::Ferry,
        Contestant::Qemu { multifd: false },
        Contestant::Qemu { multifd: true },
    ];
    all.into_iter()
        .map(|contestant| Row {
            contestant,
            figures: runs
                .iter()
                .filter(|run| run.case == case && run.contestant == contestant)
                .map(|run| &run.figures)
                .collect(),
        })
        .filter(|row| !row.figures.is_empty())
        .collect()
}

/// Prints everything.
pub fn print(runs: &[Run]) {
    for case in [Case::Idle, Case::Writer] {
        let rows = rows(runs, case);
        if rows.is_empty() {
            continue;
        }
        println!("\n{case}: {}", case.workload());
        print!("{:<38}", "");
        COLUMNS.iter().for_each(|(name, _)| print!(" {name:>10}"));
        println!();
        rows.iter().for_each(Row::print);
        if let Some(ferry) = rows.iter().find(|row| row.contestant == Contestant::Ferry) {
            ratios(ferry, &rows);
            memory(ferry);
            goals(case, ferry);
        }
    }
    println!(
        "\nRSS in MiB: beyond the guest's memory, the most seen while it moved; \"pair\" before it, of both together."
    );
}

/// ferry over each of the others, by medians.
fn ratios(ferry: &Row<'_>, rows: &[Row<'_>]) {
    for other in rows
        .iter()
        .filter(|row| row.contestant != Contestant::Ferry)
    {
        print!("{:<38}", format!("ferry / {}", other.contestant));
        for (name, of) in COLUMNS {
            // A ratio of noises, or of errors near zero, would mean nothing.
            if matches!(name, "after" | "noise" | "|d-gap|") {
                print!(" {:>10}", "");
            } else {
                print!(" {:>10.2}", ferry.median(of) / other.median(of));
            }
        }
        println!();
    }
}

/// ferry's memory by kind: its guest lies in shared memory, so that the rest is its own.
fn memory(ferry: &Row<'_>) {
    let line = |name: &str, of: [fn(&Figures) -> f64; 4]| {
        let [anon, file, shmem, peak] = of.map(|of| ferry.median(of) / 1024.0);
        println!(
            "  {name}: before the move RssAnon {anon:.1} + RssFile {file:.1}, RssShmem {shmem:.1}; most RssAnon + RssFile {peak:.1} MiB"
        );
    };
    line(
        "source     ",
        [
            |f| f.source.rss_before.anon_kib as f64,
            |f| f.source.rss_before.file_kib as f64,
            |f| f.source.rss_before.shmem_kib as f64,
            |f| f.source.own_kib as f64,
        ],
    );
    line(
        "destination",
        [
            |f| f.destination.rss_before.anon_kib as f64,
            |f| f.destination.rss_before.file_kib as f64,
            |f| f.destination.rss_before.shmem_kib as f64,
            |f| f.destination.own_kib as f64,
        ],
    );
}

/// What ferry is to reach, by medians. Told, and no more: a busy machine is no defect.
fn goals(case: Case, ferry: &Row<'_>) {
    let goal = |name: &str, value: f64, limit: f64, unit: &str| {
        let verdict = if value <= limit { "met" } else { "MISSED" };
        println!("  goal {name:<26} {value:>8.1} of at most {limit:>6.1} {unit:<4} {verdict}");
    };
    let noise = ferry.median(|f| f.noise_ms);
    if noise > case.gap_goal_ms() / 2.0 {
        println!(
            "  this machine stops a guest for {noise:.1} ms in an ordinary second: gaps of that order are its own; repeat on a quiet one"
        );
    }
    goal("total", ferry.median(|f| f.total_ms), 1200.0, "ms");
    goal(
        "guest gap",
        ferry.median(|f| f.gap_ms),
        case.gap_goal_ms(),
        "ms",
    );
    goal(
        "|reported - gap|",
        ferry.median(Figures::error_ms),
        3.0,
        "ms",
    );
    let mib = |of: fn(&Figures) -> f64| ferry.median(of) / 1024.0;
    goal(
        "memory of the source",
        mib(|f| f.source.own_kib as f64),
        40.0,
        "MiB",
    );
    goal(
        "memory of the destination",
        mib(|f| f.destination.own_kib as f64),
        40.0,
        "MiB",
    );
}
