//! `PageSet` against a naive oracle.
use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

const END: Gfn = 300;

#[derive(Clone, Debug)]
enum Op {
    Insert(Gfn),
    Remove(Gfn),
    Set(Gfn, bool),
    InsertRun(Run),
    RemoveRun(Run),
    Words(Gfn, Vec<u64>),
    Union(Vec<Gfn>),
    Subtract(Vec<Gfn>),
    Intersect(Vec<Gfn>),
    Difference(Vec<Gfn>),
    Clear,
}

fn op() -> impl Strategy<Value = Op> {
    let gfn = 0..END + 20;
    let list = proptest::collection::vec(0..END, 0..40);
    prop_oneof![
        gfn.clone().prop_map(Op::Insert),
        gfn.clone().prop_map(Op::Remove),
        (gfn.clone(), any::<bool>()).prop_map(|(g, there)| Op::Set(g, there)),
        (gfn.clone(), 0..200u64).prop_map(|(f, c)| Op::InsertRun(Run::new(f, c))),
        (gfn, 0..200u64).prop_map(|(f, c)| Op::RemoveRun(Run::new(f, c))),
        (0..6u64, proptest::collection::vec(any::<u64>(), 0..4))
            .prop_map(|(w, v)| Op::Words(w * 64, v)),
        list.clone().prop_map(Op::Union),
        list.clone().prop_map(Op::Subtract),
        list.clone().prop_map(Op::Intersect),
        list.prop_map(Op::Difference),
        Just(Op::Clear),
    ]
}

fn set_of(list: &[Gfn]) -> PageSet {
    let mut set = PageSet::new(END);
    for &gfn in list {
        set.insert(gfn);
    }
    set
}

proptest! {
    #[test]
    fn behaves_like_a_tree_set(ops in proptest::collection::vec(op(), 1..40)) {
        let mut set = PageSet::new(END);
        let mut oracle: BTreeSet<Gfn> = BTreeSet::new();
        for op in ops {
            match op {
                Op::Insert(gfn) => prop_assert_eq!(set.insert(gfn), gfn < END && oracle.insert(gfn)),
                Op::Remove(gfn) => prop_assert_eq!(set.remove(gfn), oracle.remove(&gfn)),
                Op::Set(gfn, there) => {
                    set.set(gfn, there);
                    oracle.remove(&gfn);
                    oracle.extend(there.then_some(gfn));
                }
                Op::InsertRun(run) => { set.insert_run(run); oracle.extend(run.first..run.end()); }
                Op::RemoveRun(run) => { set.remove_run(run); oracle.retain(|g| !(run.first..run.end()).contains(g)); }
                Op::Words(first, words) => {
                    set.insert_words(first, &words);
                    for (w, word) in words.iter().enumerate() {
                        for bit in 0..64 {
                            if word >> bit & 1 == 1 { oracle.insert(first + w as u64 * 64 + bit); }
                        }
                    }
                }
                Op::Union(list) => { set.union_with(&set_of(&list)); oracle.extend(list); }
                Op::Subtract(list) => { set.subtract(&set_of(&list)); oracle.retain(|g| !list.contains(g)); }
                Op::Intersect(list) => { set.intersect_with(&set_of(&list)); oracle.retain(|g| list.contains(g)); }
                Op::Difference(list) => {
                    let list = set_of(&list);
                    let common = oracle.iter().filter(|g| list.contains(**g)).count();
                    prop_assert_eq!(set.count_common(&list), common as u64);
                    set.become_difference(&list);
                    oracle = list.iter().filter(|g| !oracle.contains(g)).collect();
                }
                Op::Clear => { set.clear(); oracle.clear(); }
            }
            oracle.retain(|&g| g < END);
            prop_assert_eq!(set.len(), oracle.len() as u64);
            prop_assert_eq!(set.is_empty(), oracle.is_empty());
            prop_assert!(set.iter().eq(oracle.iter().copied()));
            prop_assert!(set.runs().flat_map(|r| r.first..r.end()).eq(oracle.iter().copied()));
        }
        for gfn in 0..END + 2 {
            prop_assert_eq!(set.contains(gfn), oracle.contains(&gfn));
            prop_assert_eq!(set.next(gfn), oracle.range(gfn..).next().copied());
            prop_assert_eq!(set.previous(gfn), oracle.range(..=gfn).next_back().copied());
            let expected = oracle.range(..=gfn).next_back().map(|&last| {
                let count = (0..5).take_while(|n| *n <= last && oracle.contains(&(last - n))).count() as u64;
                Run::new(last + 1 - count, count)
            });
            prop_assert_eq!(set.previous_run(gfn, 5), expected);
            let whole = oracle.range(..=gfn).next_back().map(|&last| {
                let count = (0..=last).take_while(|n| oracle.contains(&(last - n))).count() as u64;
                Run::new(last + 1 - count, count)
            });
            prop_assert_eq!(set.previous_run(gfn, u64::MAX), whole);
            let absent = (gfn..END).find(|g| !oracle.contains(g)).unwrap_or(END);
            prop_assert_eq!(set.next_absent(gfn), absent);
        }
    }

    #[test]
    fn runs_are_maximal(list in proptest::collection::vec(0..END, 0..200)) {
        let set = set_of(&list);
        let runs: Vec<Run> = set.runs().collect();
        for pair in runs.windows(2) {
            prop_assert!(pair[0].end() < pair[1].first);
        }
    }
}

#[test]
fn layouts_are_checked() {
    let ok = RamLayout::new(vec![Run::new(0, 10), Run::new(20, 5)]).unwrap();
    assert_eq!((ok.pages(), ok.end(), ok.all().len()), (15, 25, 15));
    assert!(ok.contains(Run::new(20, 5)) && ok.contains(Run::new(0, 10)));
    for bad in [
        Run::new(9, 2),
        Run::new(10, 1),
        Run::new(0, 0),
        Run::new(24, 2),
        Run::new(5, u64::MAX),
        Run::new(u64::MAX, u64::MAX),
    ] {
        assert!(!ok.contains(bad), "{bad:?}");
    }
    for bad in [
        vec![],
        vec![Run::new(0, 0)],
        vec![Run::new(5, 5), Run::new(9, 1)],
        vec![Run::new(1, u64::MAX)],
        vec![Run::new(0, 1); 65],
    ] {
        assert!(RamLayout::new(bad).is_err());
    }
}

#[test]
fn heat_counts_and_fades() {
    let mut heat = Heat::new(8);
    let hot = {
        let mut set = PageSet::new(8);
        set.insert(3);
        set
    };
    for _ in 0..10 {
        heat.record(&hot);
    }
    assert_eq!((heat.of(3), heat.of(2), heat.of(800)), (10, 0, 0));
    for _ in 0..300 {
        heat.record(&PageSet::new(8));
    }
    assert_eq!(heat.of(3), 0);
}

#[test]
fn parts_are_counted_from_the_lowest() {
    // Five words in at most three parts: two, two and one.
    let set = set_of(&[0, 63, 64, 127, 128, 299]);
    assert_eq!(set.len_by_part(3), [4, 1, 1]);
    assert_eq!(set.len_by_part(64), [2, 2, 1, 0, 1]);
    assert_eq!(set.len_by_part(1), [set.len()]);
    assert_eq!(set.len_by_part(0), [set.len()]);
    assert!(PageSet::new(0).len_by_part(64).is_empty());
}

proptest! {
    #[test]
    fn the_first_page_that_is_no_ram_is_found(
        regions in proptest::collection::vec((0..40u64, 1..60u64), 1..6),
        list in proptest::collection::vec(0..END, 0..20),
        runs in proptest::collection::vec((0..END, 1..90u64), 0..3),
    ) {
        let (mut at, mut all) = (0, Vec::new());
        for (gap, count) in regions {
            all.push(Run::new(at + gap, count));
            at += gap + count;
        }
        let layout = RamLayout::new(all).unwrap();
        let mut set = set_of(&list);
        runs.iter().for_each(|(first, count)| set.insert_run(Run::new(*first, *count)));
        let outside = set.iter().find(|gfn| !layout.contains(Run::new(*gfn, 1)));
        let found = layout.first_outside(&set);
        prop_assert_eq!(found.map(|run| run.first), outside);
        if let Some(run) = found {
            prop_assert!((run.first..run.end()).all(|gfn| set.contains(gfn) && !layout.contains(Run::new(gfn, 1))));
        }
    }
}
