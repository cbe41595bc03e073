//! Guests whose pages follow them.

use super::*;

fn stress(setup: &Setup, pattern: Pattern) -> Writer {
    // A quarter of the memory, faster than the link.
    Writer::new(
        &setup.layout,
        pattern,
        setup.layout.pages() / 4,
        100_000.0,
        1,
    )
}

fn posted(setup: &Setup, order: PushOrder, pivots: u16, pattern: Pattern) -> Outcome {
    let options = Options {
        policy: PolicyKind::Postcopy,
        order,
        pivots,
        timeout: Duration::from_secs(20),
        ..Options::default()
    };
    migrate(setup, &options, &mut stress(setup, pattern))
}

fn small() -> Setup {
    Setup {
        // Small enough for the order to matter more than the batch that a fault waits for.
        push_pages: 8,
        ..Setup::new(RamLayout::new(vec![Run::new(0, 65_536)]).unwrap(), 125e6)
    }
}

#[test]
fn post_copy_sends_each_page_once_in_the_time_that_takes() {
    let setup = small();
    let once = 65_536.0 / setup.pages_per_second();
    for order in [PushOrder::Flush, PushOrder::Bubble] {
        for pattern in [Pattern::Uniform, Pattern::Sequential] {
            let outcome = posted(&setup, order, 4, pattern);
            assert_eq!((outcome.pages_sent, outcome.pages_resent), (65_536, 0));
            let total = outcome.total.as_secs_f64();
            assert!(
                (total / once - 1.0).abs() < 0.01,
                "{order:?} {pattern:?} {total} {once}"
            );
            assert!(outcome.downtime < Duration::from_millis(5));
            let faults = outcome.faults.unwrap();
            // Every page that was touched was touched for the first time once; the sweep touches
            // all.
            let touched = faults.count + faults.hidden;
            let all = 65_536 / 4;
            assert!(
                touched <= all && (pattern == Pattern::Uniform || touched == all),
                "{touched}"
            );
            assert!(faults.stalled < outcome.total && faults.worst < Duration::from_millis(10));
        }
    }
}

#[test]
fn bubbling_hides_more_than_flushing_and_demand_hides_nothing() {
    let setup = small();
    let share = |order, pattern| {
        posted(&setup, order, 4, pattern)
            .faults
            .unwrap()
            .hidden_share()
    };
    assert_eq!(share(PushOrder::Demand, Pattern::Sequential), 0.0);
    let (flush, bubble) = (
        share(PushOrder::Flush, Pattern::Sequential),
        share(PushOrder::Bubble, Pattern::Sequential),
    );
    assert!(bubble > flush + 0.1, "{flush} {bubble}");
}

#[test]
fn demand_paging_is_flushed_in_the_end() {
    let outcome = posted(&small(), PushOrder::Demand, 1, Pattern::Sequential);
    assert_eq!(outcome.pages_sent, 65_536);
    assert!(outcome.total > Duration::from_secs(4));
    let faults = outcome.faults.unwrap();
    assert_eq!(faults.count, 65_536 / 4);
    // A fault of demand paging: there and back, and the page.
    let each = faults.stalled.as_secs_f64() / faults.count as f64;
    assert!((each - (0.0002 + 4096.0 / 125e6)).abs() < 1e-5, "{each}");
}

#[test]
fn hybrid_sends_again_what_was_dirtied_and_faults_less() {
    let setup = small();
    let options = Options {
        policy: PolicyKind::Hybrid,
        ..Options::default()
    };
    let hybrid = migrate(&setup, &options, &mut stress(&setup, Pattern::Uniform));
    let pure = posted(&setup, PushOrder::Bubble, 4, Pattern::Uniform);
    assert_eq!(hybrid.pages_sent, 65_536 + hybrid.pages_resent);
    assert!((1..=65_536 / 4).contains(&hybrid.pages_resent));
    assert!(hybrid.downtime > pure.downtime);
    let (hybrid, pure) = (hybrid.faults.unwrap(), pure.faults.unwrap());
    assert!(hybrid.count + hybrid.hidden <= pure.count + pure.hidden);
}

#[test]
fn an_idle_guest_never_faults() {
    let setup = small();
    let mut guest = Writer::new(&setup.layout, Pattern::Uniform, 1, 0.0, 1);
    let options = Options {
        policy: PolicyKind::Postcopy,
        ..Options::default()
    };
    let outcome = migrate(&setup, &options, &mut guest);
    assert_eq!(outcome.faults.unwrap(), Faults::default());
    assert_eq!(outcome.pages_sent, 65_536);
}
