//! The results as text.

use super::cell::Cell;
use super::goals::{Goal, Reached};
use super::journal::{Host, Run};
use super::net::Shaping;
use super::spec::Spec;
use super::statistics::{METRICS, Metric, Row, groups};
use ferry_guest_images::Workload;
use ferry_terminal::rows::aligned;
use std::fmt::Write;

/// The machine in a sentence.
pub fn machine(host: &Host) -> String {
    let peers = host.qemu.iter().chain(&host.cloud);
    let peers: String = peers.map(|peer| format!(", {peer}")).collect();
    format!(
        "{} × {}, {} MiB, Linux {}, {}; {}{peers}; clock {} kHz",
        host.cpus, host.processor, host.memory_mib, host.kernel, host.kvm, host.ferry, host.tsc_khz
    )
}

/// The columns with a value in any row; for a narrow terminal, of the `main` ones only.
pub fn columns(rows: &[Row<'_>], main: bool) -> Vec<&'static Metric> {
    let wanted = |metric: &&Metric| metric.main || !main;
    METRICS
        .iter()
        .filter(wanted)
        .filter(|metric| rows.iter().any(|row| row.median(metric).is_some()))
        .collect()
}

/// Whether the host's 2 MiB pages were at hand before the runs of a group.
fn warmth(rows: &[Row<'_>]) -> Option<String> {
    let runs = || rows.iter().flat_map(|row| row.good.iter());
    let (all, warm) = (runs().count(), runs().filter(|(_, f)| f.warm).count());
    match warm {
        _ if all == 0 => None,
        0 => Some("Cold: the host's 2 MiB pages were not fetched before the migrations.".into()),
        some if some == all => {
            Some("Warm: the host's 2 MiB pages were at hand right before each migration.".into())
        }
        some => Some(format!(
            "Warm in {some} of {all} runs: in the others the host's 2 MiB pages were not at hand before the migration."
        )),
    }
}

/// What is wrong in the runs of a group: failures, and reports of a VMM that contradict what was
/// measured.
pub fn remarks(rows: &[Row<'_>]) -> Vec<String> {
    let mut remarks = Vec::new();
    let noise = |row: &Row<'_>| {
        let noise = row.good.iter().map(|(_, figures)| figures.seen.noise_ms);
        noise.fold(0.0, f64::max)
    };
    let noise = rows.iter().map(noise).fold(0.0, f64::max);
    if noise > NOISY_MS {
        remarks.push(format!(
            "This machine stopped the guest for up to {noise:.1} ms in ordinary seconds: gaps of that order are its own."
        ));
    }
    remarks.extend(warmth(rows));
    let courses = rows.iter().filter_map(|row| {
        let course = row.typical()?.seen.course?;
        Some(format!("{}: {course}", row.cell.policy.name))
    });
    let courses = courses.collect::<Vec<_>>().join("; ");
    if !courses.is_empty() {
        remarks.push(format!("Where the kernel was moved: {courses}."));
    }
    for row in rows {
        for run in &row.failed {
            let why = run.error.as_deref().unwrap_or("no reason given");
            let name = &run.cell.policy.name;
            remarks.push(format!("FAILED: {name}, run {}: {why}", run.number));
        }
        for (run, figures) in &row.good {
            for doubt in figures.doubts() {
                let name = &run.cell.policy.name;
                remarks.push(format!("Doubt: {name}, run {}: {doubt}", run.number));
            }
        }
    }
    remarks
}

/// The best policy by each metric; `None` where there is only one.
pub fn best(rows: &[Row<'_>]) -> Option<String> {
    if rows.iter().filter(|row| !row.good.is_empty()).count() < 2 {
        return None;
    }
    let told = BEST.iter().filter_map(|(name, what)| {
        let metric = Metric::named(name)?;
        let medians = rows
            .iter()
            .filter_map(|row| Some((row, row.median(metric)?)));
        let (row, value) = medians.min_by(|a, b| a.1.total_cmp(&b.1))?;
        let policy = &row.cell.policy.name;
        Some(format!("{what} {policy} ({})", metric.show(Some(value))))
    });
    Some(told.collect::<Vec<_>>().join("; "))
}

/// What is told of the best.
const BEST: [(&str, &str); 5] = [
    ("total_ms", "shortest total, ms:"),
    ("gap_ms", "shortest gap, ms:"),
    ("lost_ms", "least work lost, ms:"),
    ("link_mib", "fewest bytes, MiB:"),
    ("cpu_s_per_gib", "least CPU, s/GiB:"),
];

/// From how many milliseconds on the machine's own pauses are told.
const NOISY_MS: f64 = 5.0;

/// A group's guest and link, said in full.
pub fn heading(rows: &[Row<'_>]) -> String {
    let Some(row) = rows.first() else {
        return String::new();
    };
    let Cell { guest, link, .. } = row.cell;
    let capped = row.good.iter().any(|(run, _)| run.shaping == Shaping::Cap);
    let link = match link.rate {
        None => format!("{}: this machine's own", link.name),
        Some(rate) => format!(
            "{}: {} Mbit/s by {}",
            link.name,
            rate / 125_000,
            if capped {
                "the senders' own caps (only root may shape a link)"
            } else {
                "tc at both ends, between two network namespaces"
            }
        ),
    };
    // One that has no name of its own is called by its work.
    let work = match Workload::parse(&guest.name) {
        Ok(work) if work == guest.work => String::new(),
        _ => format!("{}; ", guest.work),
    };
    format!(
        "{} ({work}{} MiB, {} vCPU) over {link}",
        guest.name,
        guest.mib(),
        guest.cpus
    )
}

/// How many of a row's runs did what they should.
pub fn health(row: &Row<'_>) -> String {
    let all = row.good.len() + row.failed.len();
    let failed = match row.failed.len() {
        0 => String::new(),
        n => format!(", {n} FAILED"),
    };
    let verified = row.verified();
    if verified == row.good.len() {
        format!("{verified}/{all} verified{failed}")
    } else {
        format!("{verified}/{all} VERIFIED ONLY{failed}")
    }
}

/// Everything.
///
/// `main` leaves out the columns that explain the others.
pub fn text(host: &Host, spec: &Spec, runs: &[Run], main: bool) -> String {
    let Spec {
        title,
        cells,
        goals,
        ..
    } = spec;
    let mut text = format!("{title}\n{}\n", machine(host));
    for rows in groups(cells, runs) {
        let columns = columns(&rows, main);
        let mut lines = vec![vec![String::new(), "runs".into(), String::new()]];
        lines[0].extend(columns.iter().map(|metric| metric.head.to_owned()));
        for row in &rows {
            let spread = |metric: &Metric| row.spread(metric);
            let mut median = vec![row.cell.policy.name.clone(), health(row), "median".into()];
            let mut most = vec![String::new(), String::new(), "max".into()];
            for metric in &columns {
                median.push(metric.show(spread(metric).map(|s| s.median)));
                most.push(metric.show(spread(metric).map(|s| s.max)));
            }
            lines.push(median);
            if row.good.len() > 1 {
                lines.push(most);
            }
        }
        let _ = write!(text, "\n{}\n{}", heading(&rows), aligned(&lines));
        if let Some(best) = best(&rows) {
            let _ = writeln!(text, "Best by medians: {best}");
        }
        for remark in remarks(&rows) {
            let _ = writeln!(text, "{remark}");
        }
    }
    if !goals.is_empty() {
        text.push_str("\nGoals, by medians\n");
        text.push_str(&goal_lines(goals, cells, runs));
    }
    text
}

/// A line for each goal, and one for all.
pub fn goal_lines(goals: &[Goal], cells: &[Cell], runs: &[Run]) -> String {
    let mut text = String::new();
    let (mut met, mut missed) = (0, 0);
    for goal in goals {
        let reached = goal.reached(cells, runs);
        match reached {
            Reached::Met(_) => met += 1,
            Reached::Missed(_) => missed += 1,
            Reached::Unknown => {}
        }
        let _ = writeln!(text, "  {}", goal.sentence(reached));
    }
    let unknown = goals.len() - met - missed;
    let _ = writeln!(text, "  {met} met, {missed} missed, {unknown} not run");
    text
}

/// What the columns mean.
pub fn legend() -> String {
    let lines: Vec<Vec<String>> = METRICS
        .iter()
        .map(|m| {
            vec![
                format!("  {}", m.head),
                m.name.to_owned(),
                m.meaning.to_owned(),
            ]
        })
        .collect();
    let head = lines
        .iter()
        .map(|l| l[0].chars().count())
        .max()
        .unwrap_or(0);
    let name = lines
        .iter()
        .map(|l| l[1].chars().count())
        .max()
        .unwrap_or(0);
    lines
        .iter()
        .map(|l| format!("{:<head$}  {:<name$}  {}\n", l[0], l[1], l[2]))
        .collect()
}
