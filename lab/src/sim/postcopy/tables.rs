//! What was modelled, as text.

use super::{ORDERS, Results, SETS, WAYS, Way, downtime, total};
use crate::sim::percent;
use ferry_migration::model::Outcome;
use ferry_terminal::rows::wrapped;
use ferry_terminal::units::grouped;

/// What a table says of a move: total, pause, pages, faults, what was hidden, and the time stalled.
fn cells(o: &Outcome) -> [String; 6] {
    let f = o.faults.clone().unwrap_or_default();
    let only = |text: String| match o.faults {
        Some(_) => text,
        None => "–".to_owned(),
    };
    [
        format!("{:.2}", total(o)),
        format!("{:.1}", downtime(o)),
        grouped(o.pages_sent),
        only(grouped(f.count)),
        only(percent(f.hidden_share())),
        only(format!("{:.2}", f.stalled.as_secs_f64())),
    ]
}

const CELLS: [&str; 6] = [
    "total s",
    "pause ms",
    "pages",
    "faults",
    "hidden",
    "stalled s",
];
const WIDTHS: [usize; 6] = [8, 9, 10, 8, 7, 9];

/// The stress test: a row for each way and working set.
pub fn grid(r: &Results) -> String {
    let rows = WAYS.iter().flat_map(|way| {
        r.of(*way).iter().zip(SETS).map(|(o, set)| {
            let mut row = vec![way.name(), set.to_string()];
            row.extend(cells(o));
            row
        })
    });
    format!(
        "The stress test (demand paging: until no fault comes for a while, then the rest is pushed; stalled: how long the vCPU waited in all)\n{}",
        wrapped(
            &[&["", "WSS MiB"][..], &CELLS].concat(),
            &[&[23, 7][..], &WIDTHS].concat(),
            &rows.collect::<Vec<_>>()
        )
    )
}

/// What the orders of pushing hide of three writers' faults.
pub fn patterns(r: &Results) -> String {
    let rows = r.patterns.iter().map(|(choice, set, faults)| {
        let mut row = vec![format!("{choice:?}, {set} MiB").to_lowercase()];
        row.extend(faults.iter().map(|f| {
            format!(
                "{} + {}, {:.2} s",
                percent(f.hidden_share()),
                percent(f.pushed_share() - f.hidden_share()),
                f.stalled.as_secs_f64()
            )
        }));
        row
    });
    let head: Vec<String> = [String::new()]
        .into_iter()
        .chain(ORDERS.map(Way::name))
        .collect();
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    format!(
        "First touches of pages that had arrived + that were on their way, and how long the vCPU waited in all\n{}",
        wrapped(&head, &[20, 23, 23, 23, 23], &rows.collect::<Vec<_>>())
    )
}

/// Recorded guests, moved in each way.
pub fn traces(r: &Results) -> String {
    let rows = r.traces.iter().flat_map(|(name, outcomes)| {
        outcomes.iter().zip(WAYS).map(move |(o, way)| {
            let mut row = vec![name.clone(), way.name()];
            row.extend(cells(o));
            row
        })
    });
    format!(
        "Recorded guests on the same link (a trace holds writes: pages that are only read do not fault here)\n{}",
        wrapped(
            &[&["", ""][..], &CELLS].concat(),
            &[&[10, 23][..], &WIDTHS].concat(),
            &rows.collect::<Vec<_>>()
        )
    )
}
