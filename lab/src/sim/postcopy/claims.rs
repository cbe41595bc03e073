//! The slides' claims, and what the model says to them.

use super::{ORDERS, Results, SETS, Way, downtime, pages, total};
use crate::sim::findings::Finding;
use crate::sim::percent;
use ferry_migration::model::Faults;

fn extremes(values: &[f64]) -> (f64, f64) {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    (
        low,
        values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
    )
}

fn spread(values: &[f64]) -> String {
    let (low, high) = extremes(values);
    format!("{} … {}", percent(low), percent(high))
}

/// Each claim of the slides, and what the model finds.
pub fn findings(r: &Results) -> Vec<Finding> {
    let best = Way::Bubble(4);
    // Whether pushed page by page, as in the slides, or in batches.
    let shares = |way: Way, share: fn(&Faults) -> f64| -> (f64, f64) {
        let at = ORDERS.iter().position(|order| *order == way).unwrap_or(0);
        let patterns = r
            .patterns
            .iter()
            .filter_map(|(_, _, faults)| faults.get(at));
        let stress = r.of(way).iter().filter_map(|o| o.faults.as_ref());
        extremes(&patterns.chain(stress).map(share).collect::<Vec<_>>())
    };
    let slides = shares(Way::Slides, Faults::hidden_share);
    let pushed = shares(Way::Slides, Faults::pushed_share);
    let batches = shares(best, Faults::hidden_share);
    let stalled = |way: Way| {
        let at = SETS.iter().position(|set| *set == 64).unwrap_or(0);
        let outcome = r.of(way).get(at);
        outcome.map_or(0.0, |o| o.stalled().as_secs_f64())
    };
    let verdict = |holds: bool| {
        if holds {
            "Holds."
        } else {
            "Does not hold here."
        }
    };
    let less_total = r.less(best, total);
    let less_pages = r.less(best, pages);
    let down = |way: Way| {
        let times: Vec<f64> = r.of(way).iter().map(downtime).collect();
        extremes(&times)
    };
    let (pre, post, hybrid) = (down(Way::PreCopy), down(best), down(Way::Hybrid));
    vec![
        Finding::new(
            "Total time, against pre-copy",
            "more than 50 % less",
            format!("{} less", spread(&less_total)),
            format!(
                "{} Over the working sets, smallest to largest reduction. Post-copy takes memory ÷ link whatever the guest does; how far \
             pre-copy is above that depends on when it is stopped.",
                verdict(extremes(&less_total).1 > 0.5)
            ),
        ),
        Finding::new(
            "Pages transferred",
            "up to 75 % less",
            format!("{} less", spread(&less_pages)),
            format!(
                "{} Each page crosses once. Ferry's pre-copy stops when it sees no progress and so sends less in vain than Xen's, which \
             went through its rounds.",
                verdict(extremes(&less_pages).1 >= 0.75)
            ),
        ),
        Finding::new(
            "Downtime, pre-copy",
            "increases with the set",
            format!("{:.0} … {:.0} ms", pre.0, pre.1),
            verdict(pre.1 > 2.0 * pre.0),
        ),
        Finding::new(
            "Downtime, post-copy",
            "remains low",
            format!("{:.1} … {:.1} ms", post.0, post.1),
            format!(
                "{} CPU and device state only. In the slides' real workloads pre-copy's was lower: their pseudo-paging had to prepare \
             the guest's memory in the pause, which userfaultfd does not.",
                verdict(post.1 < 1.1 * post.0)
            ),
        ),
        Finding::new(
            "Downtime, hybrid",
            "(not shown)",
            format!("{:.1} … {:.1} ms", hybrid.0, hybrid.1),
            "The set of stale pages is sent in the pause, as runs or as a bitmap.",
        ),
        Finding::new(
            "Faults hidden, worst case: batches",
            "≥ 50 %",
            percent(batches.0),
            format!(
                "{} Over sweeps, uniform and Zipf's writers and all working sets. ferry pushes {} pages at a time: a fault waits for the \
             batch on the link, and the pages pushed meanwhile are its neighbours.",
                verdict(batches.0 >= 0.5),
                r.push_pages
            ),
        ),
        Finding::new(
            "… and page by page, as in the slides",
            "≥ 50 %",
            format!(
                "{} arrived, {} pushed",
                percent(slides.0),
                percent(pushed.0)
            ),
            format!(
                "A sweep that outruns the link catches up with what is pushed ahead of it: each page is on its way when it is touched, and \
                 the vCPU waits briefly for each. Whether the slides count such waits as faults they do not say{}.",
                if slides.0 < 0.5 && pushed.0 > 0.5 {
                    "; their 50 % lies between"
                } else {
                    ""
                }
            ),
        ),
        Finding::new(
            "Faults hidden, at most",
            "80 %",
            format!(
                "{} ({} page by page)",
                percent(batches.1),
                percent(slides.1)
            ),
            verdict(batches.1.max(slides.1) >= 0.8),
        ),
        Finding::new(
            "How long the guest stalls, 64 MiB",
            "(not shown)",
            format!(
                "flush {:.2} s, bubbling {:.2} s",
                stalled(Way::Flush),
                stalled(best)
            ),
            format!(
                "What counts for the guest is not how many faults it has but how long it waits: larger batches make fewer faults and longer \
                 waits. Page by page it would be {:.2} s.",
                stalled(Way::Slides)
            ),
        ),
        Finding::new(
            "Hidden: 1 pivot and 4",
            "(1 in the slides)",
            format!(
                "{} / {}",
                spread(&r.hidden(Way::Bubble(1))),
                spread(&r.hidden(best))
            ),
            "By the stress test's working set. Several pivots serve several streams of faults; one sweep is one stream.",
        ),
    ]
}
