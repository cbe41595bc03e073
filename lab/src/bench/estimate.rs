//! How long a run is expected to take: by earlier runs of its cell, or by a rough reckoning.

use super::cell::Cell;
use super::journal::Run;
use super::paper::pass_seconds;
use ferry_migration::options::PolicyKind;
use ferry_migration::order::PushOrder;
use ferry_nas::workload::Workload as Kind;
use ferry_nas::{Class, Kernel, Problem};
use std::time::Duration;

/// Starting two processes, 2.5 s before the move and 1 s after it, in seconds.
const PROCESSES: f64 = 3.6;
/// Filling a GiB of memory, and verifying it, in seconds.
const PER_GIB: f64 = 2.4;
/// What this machine's loopback carries in a second.
const LOOPBACK: u64 = 1 << 30;
/// Passes over memory that a guest takes which writes.
const PASSES: f64 = 2.0;

/// How long a run of `cell` is expected to take: as long as the longest earlier run of it. Without
/// one, as long as is reckoned, corrected by how far reckoning was off for other cells.
pub fn expected(runs: &[Run], cell: &Cell) -> Duration {
    let took = || runs.iter().filter(|run| run.took_s > 0.0);
    let of_cell = took().filter(|run| run.cell == *cell);
    let known = of_cell.map(|run| run.took_s).reduce(f64::max);
    let seconds = known.unwrap_or_else(|| {
        let sum = |of: fn(&Run) -> f64| took().map(of).sum::<f64>();
        let expected = sum(|run| reckoned(&run.cell));
        let off = if expected > 0.0 {
            sum(|run| run.took_s) / expected
        } else {
            1.0
        };
        reckoned(cell) * off
    });
    // A file may say anything.
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

/// Seconds that a run of a cell takes, to a factor of two.
fn reckoned(cell: &Cell) -> f64 {
    let guest = &cell.guest;
    let memory = guest.memory;
    let (computing, writes) = match guest.work.kind() {
        // The run before the one that is moved is half over, and that one ends.
        Kind::Nas(problem) => (
            1.5 * run_seconds(*problem) / f64::from(guest.cpus.max(1)),
            true,
        ),
        Kind::Dirty(writer) => (0.0, writer.working_set_pages > 0),
    };
    let pass = pass_seconds(memory, cell.link.rate.unwrap_or(LOOPBACK));
    let mut passes = if writes { PASSES } else { 1.0 };
    let mut most = f64::INFINITY;
    if let Some(options) = &cell.policy.ferry {
        most = options.timeout.as_secs_f64();
        if options.policy == PolicyKind::Postcopy {
            passes = if options.order == PushOrder::Demand {
                5.0 * PASSES
            } else {
                1.0
            };
        }
    }
    PROCESSES + PER_GIB * memory as f64 / f64::from(1 << 30) + (passes * pass).min(most) + computing
}

/// Seconds that the timed part of a kernel takes on a processor of 2026.
fn run_seconds(problem: Problem) -> f64 {
    let class_a = match problem.kernel {
        Kernel::Is => 0.3,
        Kernel::Mg => 0.9,
        Kernel::Cg => 1.5,
        Kernel::Ft => 4.0,
        Kernel::Ep => 8.0,
        Kernel::Sp => 18.0,
        Kernel::Bt => 23.0,
        _ => 10.0,
    };
    class_a
        * match problem.class {
            Class::S => 0.01,
            Class::W => 0.1,
            Class::A => 1.0,
            Class::B => 4.5,
            Class::C => 18.0,
        }
}

/// A time for people.
pub fn about(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..90 => format!("about {seconds} s"),
        90..5400 => format!("about {} min", (seconds + 30) / 60),
        _ => format!("about {:.1} h", time.as_secs_f64() / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::super::net::Shaping;
    use super::super::spec::Spec;
    use super::*;

    const FILE: &str = "[[guest]]\nname='g'\nwork='idle:fill=none'\nmemory='32M'\n\
        [[guest]]\nname='k'\nwork='bt.A'\nmemory='64M'\n\
        [[link]]\nname='l'\n[[link]]\nname='slow'\nrate='10Mbit'\n[[policy]]\nname='a'\nferry={policy='precopy'}\n";

    #[test]
    fn what_was_made_corrects_the_reckoning() {
        let cells = Spec::parse("x", FILE).unwrap().cells;
        let [idle, slow, kernel, _] = &cells[..] else {
            panic!()
        };
        let of = |runs: &[Run], cell| expected(runs, cell).as_secs_f64();
        assert!(of(&[], slow) > of(&[], idle) + 20.0);
        assert!(of(&[], kernel) > of(&[], idle) + 20.0);
        let run = |cell: &Cell, took_s| Run {
            cell: cell.clone(),
            number: 1,
            shaping: Shaping::Loopback,
            load: String::new(),
            took_s,
            figures: None,
            error: None,
        };
        let twice = 2.0 * of(&[], idle);
        let runs = [run(idle, twice), run(idle, 1.0)];
        assert!((of(&runs, idle) - twice).abs() < 1e-6);
        let off = (twice + 1.0) / twice;
        assert!((of(&runs, kernel) - off * of(&[], kernel)).abs() < 1e-6);
        // What a file says that is no time.
        assert_eq!(expected(&[run(idle, f64::INFINITY)], idle), Duration::ZERO);
    }

    #[test]
    fn times_are_told_roughly() {
        for (seconds, text) in [
            (7, "about 7 s"),
            (150, "about 3 min"),
            (9000, "about 2.5 h"),
        ] {
            assert_eq!(about(Duration::from_secs(seconds)), text);
        }
    }
}
