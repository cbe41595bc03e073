//! The tables and plots of the STORD reproduction.

use super::{COMPARED, LINK, MEMORY, RATES, Results, SPLITS, seconds};
use crate::sim::percent;
use crate::sim::plot::{Lines, Series};
use ferry_migration::model::stord::ClosedForms;
use ferry_migration::page::PAGE_BYTES;
use ferry_terminal::rows::wrapped;
use ferry_terminal::units::grouped;

pub(super) fn fig5_table(r: &Results) -> String {
    let head: Vec<String> = SPLITS[1..].iter().map(|k| format!("k={k}")).collect();
    let head: Vec<&str> = ["rate", "pre-copy"]
        .into_iter()
        .chain(head.iter().map(String::as_str))
        .collect();
    let rows: Vec<Vec<String>> = RATES
        .iter()
        .map(|&rate| {
            let mut row = vec![format!("{rate} %"), seconds(r.of(rate, 1))];
            row.extend(SPLITS[1..].iter().map(|&k| percent(r.saved(rate, k))));
            row
        })
        .collect();
    let widths: Vec<usize> = [5, 9].into_iter().chain([6; 9]).collect();
    format!(
        "Fig. 5: total time saved against pre-copy, simulated\n{}",
        wrapped(&head, &widths, &rows)
    )
}

/// What the paper says of a rate.
const fn paper_says(rate: u32) -> &'static str {
    match rate {
        90 => "350 s → 120 s; 65 to 75 %",
        50 => "20 %",
        _ => "6 %, 10 %",
    }
}

pub(super) fn premises_table(r: &Results) -> String {
    let mut rows = Vec::new();
    for rate in COMPARED.0 {
        for split in COMPARED.1 {
            let (memory, saved) = r.in_memory(rate, split);
            rows.push(vec![
                format!("{rate} %, k={split}"),
                seconds(r.of(rate, split)),
                percent(r.saved(rate, split)),
                seconds(memory),
                percent(saved),
                paper_says(rate).to_owned(),
            ]);
        }
    }
    let head = [
        "",
        "in the set",
        "saved",
        "in memory",
        "saved",
        "the paper says",
    ];
    format!(
        "Where a round's writes fall decides (k=1 is pre-copy): evenly in the set that is being sent, as in the paper, or in all memory\n{}",
        wrapped(&head, &[10, 10, 7, 10, 7, 26], &rows)
    )
}

pub(super) fn closed_table(r: &Results) -> String {
    let memory = MEMORY as f64 / LINK;
    let mut rows = Vec::new();
    for rate in [90, 50, 20] {
        let share = f64::from(rate) / 100.0;
        for split in [2, 4, 10] {
            let closed = ClosedForms::new(share, split);
            let rounds = &r.of(rate, split).rounds;
            let pages = (MEMORY / PAGE_BYTES) as f64 * scale_of(r);
            let last = rounds
                .get(split as usize - 1)
                .map_or(0.0, |x| x.pages as f64 / pages);
            rows.push(vec![
                format!("{rate} %, k={split}"),
                format!("{:.1} s", closed.pre_copy * memory),
                format!("{:.1} s", r.total(rate, 1)),
                format!("{:.3}", closed.last_round),
                format!("{last:.3}"),
                format!("{:.3}", closed.rate),
                format!("{:.3}", closed.rate_whole),
                format!("{:.3}", first_shrink(r, rate, split)),
                format!("{:.1} s", closed.stord * memory),
                format!("{:.1} s", closed.stord_whole * memory),
                format!("{:.1} s", r.total(rate, split)),
            ]);
        }
    }
    let head = [
        "", "(2)", "pre-copy", "(3) f′", "round k", "(4) r′", "(4) to k", "one set", "(5) last",
        "(5) all", "STORD",
    ];
    let widths = [10, 8, 9, 7, 7, 7, 8, 7, 8, 8, 8];
    format!(
        "Closed forms (1)–(5) and the simulation ((1) is (2) cut off after n rounds; sizes in memories)\n{}\
         (1) and (2) agree with the simulation. (3) is not what a split sends, as the text says, but its last round (\"round k\"); as\n\
         that it is right for k = 2 and low for more. (4) as printed ends one term early: summed up to the k-th power it is exactly\n\
         what the first split leaves (\"one set\"). (5) with the last round alone adds up too\n\
         little; with f′ as the vector of the k rounds and (4) to the k-th power (\"(5) all\") it is the simulation's and the paper's\n\
         figure, 120 s at 90 %. As printed, its finite sum also has r′/(1 − r′) in place of r′.\n",
        wrapped(&head, &widths, &rows)
    )
}

/// Modelled pages for each of the paper's.
pub(super) fn scale_of(r: &Results) -> f64 {
    let first = r.of(20, 1).rounds.first().map_or(0, |round| round.pages);
    first as f64 / (MEMORY / PAGE_BYTES) as f64
}

/// What is dirty after the first split, as a share of the memory.
pub(super) fn first_shrink(r: &Results, rate: u32, split: u32) -> f64 {
    let outcome = r.of(rate, split);
    let pages = (MEMORY / PAGE_BYTES) as f64 * scale_of(r);
    let round = outcome.rounds.get(split as usize - 1);
    round.map_or(0.0, |round| round.pending as f64 / pages)
}

pub(super) fn literal_table(r: &Results) -> String {
    let rows: Vec<Vec<String>> = r
        .literal
        .iter()
        .map(|(rate, split, literal)| {
            let total = literal.outcome.total.as_secs_f64();
            let pages = (MEMORY / PAGE_BYTES) as f64 * scale_of(r);
            vec![
                format!("{rate} %, k={split}"),
                seconds(&literal.outcome),
                percent(1.0 - total / r.total(*rate, 1)),
                grouped(literal.lost),
                percent(literal.lost as f64 / pages),
                percent(r.saved(*rate, *split)),
            ]
        })
        .collect();
    let head = [
        "",
        "total",
        "saved",
        "stale pages",
        "of memory",
        "the safe form saves",
    ];
    format!(
        "The pseudo-code read literally (line 17: RD ∩ PM of the previous round); never selectable for a migration\n{}",
        wrapped(&head, &[10, 9, 7, 12, 10, 20], &rows)
    )
}

pub(super) fn fig4(r: &Results) -> Lines<'static> {
    let series = |k: u32| {
        let name = match k {
            1 => "pre-copy".to_owned(),
            _ => format!("STORD, k = {k}"),
        };
        let seconds_per_page = MEMORY as f64 / LINK / ((MEMORY / PAGE_BYTES) as f64 * scale_of(r));
        let rounds = &r.of(90, k).rounds;
        // Without the stop-and-copy: where it could have been.
        let live = &rounds[..rounds.len().saturating_sub(1)];
        let points = live.iter().map(|round| {
            let downtime = round.pending as f64 * seconds_per_page;
            (round.end + downtime, downtime)
        });
        Series {
            name,
            points: points.collect(),
        }
    };
    Lines {
        title: "Fig. 4: what stopping after each round would cost, dirty rate 90 %",
        x: "total migration time if stopped there (s)",
        y: "downtime (s)",
        log: (false, false),
        series: [1, 2, 4, 10].map(series).into(),
        levels: Vec::new(),
    }
}

pub(super) fn fig5(r: &Results) -> Lines<'static> {
    let series = |rate: u32| Series {
        name: format!("dirty rate {rate} %"),
        points: SPLITS
            .iter()
            .map(|&k| (f64::from(k), r.saved(rate, k) * 100.0))
            .collect(),
    };
    let level = |rate: u32, paper: f64| (paper, format!("paper, {rate} %: up to {paper:.0} %"));
    Lines {
        title: "Fig. 5: total time saved against pre-copy, by number of pieces",
        x: "pieces k (1 is pre-copy)",
        y: "saved (%)",
        log: (false, false),
        series: [90, 70, 50, 20].map(series).into(),
        levels: vec![level(90, 65.0), level(50, 20.0), level(20, 10.0)],
    }
}

pub(super) fn fig6(r: &Results) -> Lines<'static> {
    let stord = |k: u32| Series {
        name: format!("STORD, k = {k}"),
        points: RATES
            .iter()
            .map(|&rate| (f64::from(rate), r.saved(rate, k) * 100.0))
            .collect(),
    };
    let mecom = Series {
        name: format!("MECOM, a page costs {:.0} %", r.cost * 100.0),
        points: RATES
            .iter()
            .map(|&rate| (f64::from(rate), r.mecom_saved(rate) * 100.0))
            .collect(),
    };
    Lines {
        title: "Fig. 6: total time saved against pre-copy, by dirty rate",
        x: "dirty rate (%)",
        y: "saved (%)",
        log: (false, false),
        series: vec![stord(2), stord(4), stord(10), mecom],
        levels: Vec::new(),
    }
}
