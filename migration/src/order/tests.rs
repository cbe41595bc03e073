use super::*;
use proptest::prelude::*;

const END: Gfn = 4096;

fn all() -> PageSet {
    let mut set = PageSet::new(END);
    set.insert_run(Run::new(0, END));
    set
}

/// Takes the next push out of the set.
fn take(push: &mut Push, remaining: &mut PageSet, limit: u64) -> Option<Run> {
    let run = push.next(remaining, limit)?;
    for gfn in run.first..run.end() {
        assert!(remaining.remove(gfn), "page {gfn} was pushed twice");
    }
    assert!(run.count >= 1 && run.count <= limit, "{run:?} of {limit}");
    Some(run)
}

/// The guest misses a page: it leaves at once.
fn fault(push: &mut Push, remaining: &mut PageSet, gfn: Gfn) {
    if remaining.remove(gfn) {
        push.fault(gfn);
    }
}

#[test]
fn demand_pushes_nothing_until_it_is_to_end() {
    let mut push = Push::new(PushOrder::Demand, 1);
    assert_eq!(push.next(&all(), 64), None);
    push.flush();
    assert_eq!(push.next(&all(), 64), Some(Run::new(0, 64)));
}

#[test]
fn flush_goes_by_address_and_comes_back_for_what_was_lost() {
    let (mut push, mut remaining) = (Push::new(PushOrder::Flush, 1), all());
    assert_eq!(take(&mut push, &mut remaining, 100), Some(Run::new(0, 100)));
    fault(&mut push, &mut remaining, 150);
    assert_eq!(
        take(&mut push, &mut remaining, 100),
        Some(Run::new(100, 50))
    );
    assert_eq!(
        take(&mut push, &mut remaining, 100),
        Some(Run::new(151, 100))
    );
    remaining.clear();
    remaining.insert(3);
    assert_eq!(take(&mut push, &mut remaining, 100), Some(Run::new(3, 1)));
    assert_eq!(take(&mut push, &mut remaining, 100), None);
}

#[test]
fn a_bubble_grows_on_both_sides_of_its_pivot() {
    let (mut push, mut remaining) = (Push::new(PushOrder::Bubble, 1), all());
    fault(&mut push, &mut remaining, 1000);
    let steps: Vec<_> = (0..6)
        .filter_map(|_| take(&mut push, &mut remaining, 16))
        .collect();
    let expected = [
        Run::new(1001, 8),
        Run::new(992, 8),
        Run::new(1009, 16),
        Run::new(976, 16),
        Run::new(1025, 16),
        Run::new(960, 16),
    ];
    assert_eq!(steps, expected);
}

#[test]
fn a_page_at_a_time_is_the_order_of_the_paper() {
    let (mut push, mut remaining) = (Push::new(PushOrder::Bubble, 1), all());
    fault(&mut push, &mut remaining, 10);
    let order: Vec<Gfn> = (0..6)
        .filter_map(|_| take(&mut push, &mut remaining, 1))
        .map(|r| r.first)
        .collect();
    assert_eq!(order, [11, 9, 12, 8, 13, 7]);
}

#[test]
fn two_streams_have_a_bubble_each_and_stop_where_they_meet() {
    let (mut push, mut remaining) = (Push::new(PushOrder::Bubble, 4), all());
    fault(&mut push, &mut remaining, 1000);
    fault(&mut push, &mut remaining, 2000);
    // Taking turns, the newest first.
    assert_eq!(take(&mut push, &mut remaining, 64), Some(Run::new(2001, 8)));
    assert_eq!(take(&mut push, &mut remaining, 64), Some(Run::new(1001, 8)));
    while remaining.contains(1500) {
        assert!(take(&mut push, &mut remaining, 64).is_some());
    }
    while take(&mut push, &mut remaining, 64).is_some() {}
    assert!(remaining.is_empty());
}

#[test]
fn a_stream_that_runs_ahead_takes_its_bubble_along() {
    let (mut push, mut remaining) = (Push::new(PushOrder::Bubble, 2), all());
    fault(&mut push, &mut remaining, 3000);
    fault(&mut push, &mut remaining, 1000);
    fault(&mut push, &mut remaining, 1100);
    fault(&mut push, &mut remaining, 1200);
    // The stream at 3000 was not forgotten for the one that moves.
    let near = |run: Run, gfn: Gfn| run.first.abs_diff(gfn) < 100;
    let (a, b) = (
        take(&mut push, &mut remaining, 64).unwrap(),
        take(&mut push, &mut remaining, 64).unwrap(),
    );
    assert!(near(a, 1200) && near(b, 3000), "{a:?} {b:?}");
}

#[test]
fn a_bubble_follows_its_stream() {
    for (faults, up) in [([1000, 1100], true), ([1100, 1000], false)] {
        let (mut push, mut remaining) = (Push::new(PushOrder::Bubble, 1), all());
        for gfn in faults {
            fault(&mut push, &mut remaining, gfn);
        }
        let pivot = faults[1];
        let sides: Vec<bool> = (0..4)
            .filter_map(|_| take(&mut push, &mut remaining, 1))
            .map(|run| run.first > pivot)
            .collect();
        assert_eq!(sides, [up, up, up, !up]);
    }
}

#[test]
fn every_second_turn_is_the_newest_streams() {
    let (mut push, mut remaining) = (Push::new(PushOrder::Bubble, 8), all());
    let pivots = [500, 1500, 2500, 3500];
    for gfn in pivots {
        fault(&mut push, &mut remaining, gfn);
    }
    let nearest = |run: Run| {
        pivots
            .into_iter()
            .min_by_key(|p| p.abs_diff(run.first))
            .unwrap()
    };
    let turns: Vec<Gfn> = (0..6)
        .filter_map(|_| take(&mut push, &mut remaining, 8))
        .map(nearest)
        .collect();
    assert_eq!(turns, [3500, 2500, 3500, 1500, 3500, 500]);
}

proptest! {
    /// Whatever is missed, lost and pushed: nothing twice, and everything in the end.
    #[test]
    fn every_page_crosses_once(
        order in prop_oneof![Just(PushOrder::Demand), Just(PushOrder::Flush), Just(PushOrder::Bubble)],
        pivots in 0usize..6,
        limit in 1u64..200,
        holes in proptest::collection::vec((0..END, 1u64..700), 0..6),
        events in proptest::collection::vec((0..END, 0u8..4), 0..300),
    ) {
        let (mut push, mut remaining) = (Push::new(order, pivots), all());
        for (first, count) in holes {
            remaining.remove_run(Run::new(first, count));
        }
        for (gfn, pushes) in events {
            fault(&mut push, &mut remaining, gfn);
            for _ in 0..pushes {
                take(&mut push, &mut remaining, limit);
            }
        }
        push.flush();
        while take(&mut push, &mut remaining, limit).is_some() {}
        prop_assert!(remaining.is_empty());
    }
}
