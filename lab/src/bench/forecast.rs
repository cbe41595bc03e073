//! What the model says of a cell, to stand beside what was measured. Nothing of the run goes in.

use super::cell::Cell;
use super::net::PAYLOAD;
use ferry_migration::model::{Pattern, Setup, Writer, migrate};
use ferry_migration::page::{PAGE_BYTES, RamLayout, Run};
use ferry_nas::dirty::{Fill, Pattern as Order};
use ferry_nas::workload::Workload as Kind;
use serde::{Deserialize, Serialize};

/// What a bare guest does not fill: below its working set, and its generations.
const UNFILLED: u64 = 4 << 20;

/// What a modelled move came to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// From the request to the end, in milliseconds.
    pub total_ms: f64,
    /// The pause.
    pub downtime_ms: f64,
    /// Bytes of the stream.
    pub bytes: f64,
}

/// The move as the model sees it; `None` where it cannot know: of a kernel, of a link without a
/// rate, of contents that coders make smaller, and of other VMMs.
pub fn forecast(cell: &Cell) -> Option<Forecast> {
    let options = cell.policy.ferry.as_ref()?;
    let Kind::Dirty(writer) = cell.guest.work.kind() else {
        return None;
    };
    if writer.part as u64 != PAGE_BYTES || (writer.rate == 0 && writer.working_set_pages > 0) {
        return None;
    }
    let pages = cell.guest.memory / PAGE_BYTES;
    let filled = match writer.fill {
        Fill::Random => pages.checked_sub(UNFILLED / PAGE_BYTES)?,
        Fill::None => writer.working_set_pages,
        Fill::Half | Fill::ZeroRich => return None,
    };
    let layout = RamLayout::new(vec![Run::new(0, pages)]).ok()?;
    let mut setup = Setup::new(layout, cell.link.rate? as f64 * PAYLOAD);
    // The model's working set lies in the middle, and what holds nothing around it.
    let below = (pages - filled) / 2;
    setup.empty.insert_run(Run::new(0, below));
    setup
        .empty
        .insert_run(Run::new(below + filled, pages - filled - below));
    let order = match writer.pattern {
        Order::Sequential => Pattern::Sequential,
        Order::Uniform => Pattern::Uniform,
        Order::Zipf { exponent } => Pattern::Zipf { exponent },
    };
    let rate = match writer.working_set_pages {
        0 => 0.0,
        _ => writer.rate as f64,
    };
    let mut guest = Writer::new(
        &setup.layout,
        order,
        writer.working_set_pages,
        rate,
        writer.seed,
    );
    let outcome = migrate(&setup, options, &mut guest);
    outcome.completed.then_some(Forecast {
        total_ms: outcome.total.as_secs_f64() * 1e3,
        downtime_ms: outcome.downtime.as_secs_f64() * 1e3,
        bytes: outcome.bytes as f64,
    })
}

#[cfg(test)]
mod tests {
    use super::super::spec::Spec;
    use super::*;

    fn of(work: &str, more: &str) -> Option<Forecast> {
        let text = format!(
            "[[guest]]\nname='g'\nwork='{work}'\nmemory='64M'\n[[link]]\nname='l'\n{more}\n\
             [[policy]]\nname='a'\nferry={{}}\n"
        );
        forecast(&Spec::parse("x", &text).unwrap().cells[0])
    }

    const LINK: &str = "rate='100Mbit'";

    #[test]
    fn an_idle_guest_crosses_once() {
        let full = of("idle:fill=random", LINK).unwrap();
        assert!(
            (full.bytes / f64::from(60 << 20) - 1.0).abs() < 0.01,
            "{full:?}"
        );
        let seconds = full.bytes / PAYLOAD / 12.5e6;
        assert!(
            (full.total_ms / 1e3 / seconds - 1.0).abs() < 0.05,
            "{full:?}"
        );
        let empty = of("idle:fill=none", LINK).unwrap();
        assert!(empty.bytes < f64::from(1 << 20), "{empty:?}");
        let busy = of("dirty:wss=16M,rate=2000", LINK).unwrap();
        assert!(busy.bytes > full.bytes, "{busy:?}");
    }

    #[test]
    fn the_models_own_bench_file_has_a_forecast_for_each_cell() {
        let text = include_str!("../../../tests/bench/model.toml");
        let cells = Spec::parse("model.toml", text).unwrap().cells;
        assert_eq!(cells.len(), 15);
        for cell in &cells {
            assert!(forecast(cell).is_some(), "{cell}");
        }
    }

    #[test]
    fn what_the_model_cannot_know_has_no_forecast() {
        for work in ["mg.S", "idle:fill=half", "dirty:part=64", "dirty:rate=0"] {
            assert_eq!(of(work, LINK), None, "{work}");
        }
        assert_eq!(of("idle:fill=random", ""), None);
    }
}
