use super::*;
use crate::memory::Backing;
use crate::migrate::engine_layout;
use proptest::prelude::*;
use std::io::Write as _;
use std::os::unix::net::UnixStream;

/// What comes to a page: all of it in one of the three ways in which pages come.
#[derive(Clone, Debug)]
enum Step {
    Decoded(Run, u8),
    Zero(Run),
    Raw(Vec<Run>, u8),
}

fn step() -> impl Strategy<Value = Step> {
    let run = || (400..640_u64, 1..16_u64).prop_map(|(first, count)| Run::new(first, count));
    prop_oneof![
        (run(), any::<u8>()).prop_map(|(run, byte)| Step::Decoded(run, byte)),
        run().prop_map(Step::Zero),
        (proptest::collection::vec(run(), 1..20), any::<u8>())
            .prop_map(|(runs, byte)| Step::Raw(runs, byte)),
    ]
}

/// Plays `steps`, and looks at what lies there; before step `cut` a second sink takes over.
fn arrives(steps: Vec<Step>, cut: usize, backing: Backing) -> Result<(), TestCaseError> {
    let ram = Arc::new(GuestRam::new(4 << 20, backing).unwrap());
    // Of 2 MiB pages more may be there than came.
    let exact = ram.backing() == Backing::Small;
    let layout = engine_layout(&ram).unwrap();
    let mut sink = RamSink::new(Arc::clone(&ram), &layout);
    let (here, there) = UnixStream::pair().unwrap();
    let mut link = StreamLink::unix(here).unwrap();
    let mut naive = vec![None; 1024];
    let page = |gfn: Gfn, byte: u8| [byte ^ gfn.to_le_bytes()[0]; PAGE_SIZE];
    let bytes = |run: Run, byte| -> Vec<u8> {
        (run.first..run.end())
            .flat_map(|gfn| page(gfn, byte))
            .collect()
    };
    for (n, step) in steps.into_iter().enumerate() {
        if n == cut {
            sink = RamSink::new(Arc::clone(&ram), &layout);
        }
        let (runs, now) = match step {
            Step::Decoded(run, byte) => {
                sink.write(run, &bytes(run, byte)).unwrap();
                (vec![run], Some(byte))
            }
            Step::Zero(run) => {
                sink.zero(run).unwrap();
                (vec![run], None)
            }
            Step::Raw(runs, byte) => {
                let body: Vec<u8> = runs.iter().flat_map(|run| bytes(*run, byte)).collect();
                std::thread::scope(|scope| {
                    scope.spawn(|| (&there).write_all(&body).unwrap());
                    sink.receive(&mut link, &runs).unwrap();
                });
                (runs, Some(byte))
            }
        };
        for gfn in runs.iter().flat_map(|run| run.first..run.end()) {
            naive[usize::try_from(gfn).unwrap()] = now;
        }
    }
    let mut found = [0; PAGE_SIZE];
    for (gfn, expected) in (0..).zip(&naive) {
        let absent = || ram.unpopulated(gfn, 1).is_some();
        prop_assert!(!exact || absent() == expected.is_none(), "page {}", gfn);
        sink.copy_page(gfn, &mut found).unwrap();
        prop_assert!(
            found == expected.map_or([0; PAGE_SIZE], |byte| page(gfn, byte)),
            "page {}",
            gfn
        );
        prop_assert!(!exact || absent() == expected.is_none(), "page {}", gfn);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever order pages come in and however, the last is what lies there, and what never
    /// came takes no memory. Twice: what the second sink finds in the memory is as good as what
    /// it placed itself.
    #[test]
    fn the_last_that_came_lies_there(steps in proptest::collection::vec(step(), 0..30), cut in 0..30_usize) {
        for backing in [Backing::Small, Backing::Auto] {
            arrives(steps.clone(), cut, backing)?;
        }
    }
}

#[test]
fn a_page_that_comes_after_the_end_is_not_an_error() {
    let ram = Arc::new(GuestRam::new(1 << 20, Backing::Small).unwrap());
    let layout = engine_layout(&ram).unwrap();
    let sink = RamSink::new(ram, &layout);
    let bytes = [1; PAGE_SIZE];
    let run = Run::new(3, 1);
    assert!(sink.place(run, &bytes).is_err());
    assert!(sink.place_zero(run).is_err());
    sink.end_faults();
    sink.place(run, &bytes).unwrap();
    sink.place_zero(run).unwrap();
    assert!(sink.next_fault(Duration::ZERO).unwrap().is_none());
}
