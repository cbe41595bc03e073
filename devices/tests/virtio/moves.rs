//! A guest that moves in the middle of its requests: none is lost, and none is done twice.

use std::os::unix::fs::FileExt;

use ferry_devices::block::Block;
use ferry_devices::virtio::AnyVirtio;
use proptest::prelude::*;

use crate::block::{OK, READ, WRITE, device, disk, image, pattern};
use crate::driver::{Driver, Memory, eventually, memory};

const REQUESTS: u64 = 20;

#[derive(Debug, Clone)]
struct Batch {
    /// For each request: a write or a read, and how many sectors.
    requests: Vec<(bool, u32)>,
    /// Whether the guest waits until the device has taken all requests before it moves.
    taken: bool,
    /// After how many answers the guest moves.
    answers: usize,
    /// Whether it is only paused.
    stays: bool,
}

fn batch() -> impl Strategy<Value = Batch> {
    let requests = prop::collection::vec(
        (any::<bool>(), 1..=128u32),
        1..usize::try_from(REQUESTS).unwrap(),
    );
    let answers = prop_oneof![3 => Just(0), 1 => 0..20usize];
    let rest = (any::<bool>(), answers, any::<bool>());
    (requests, rest).prop_map(|(requests, (taken, answers, stays))| Batch {
        taken,

        answers: answers.min(requests.len()),
        requests,
        stays,
    })
}

type Disk = Driver<Block<Memory>>;

/// Takes one answer, if there is one now, and spoils its buffer: a request that is done again would
/// be seen.
fn answered(
    d: &mut Disk,
    wait: bool,
    batch: &Batch,
    heads: &mut Vec<(u16, usize)>,
    round: usize,
) -> bool {
    let used = if wait { Some(d.wait(0)) } else { d.take(0) };
    let Some((head, _)) = used else {
        return false;
    };
    let at = heads.iter().position(|(h, _)| *h == head).unwrap();
    let (_, n) = heads.swap_remove(at);
    let (write, sectors) = batch.requests[n];
    let n = n as u64;
    assert_eq!(d.answer(n), OK);
    let buffer = Disk::buffer(n);
    if !write {
        let got = d.get(buffer, 512);
        let old = pattern(n * 128);
        // What the file had, or what an earlier batch wrote there.
        assert!(
            got == old || got.iter().all(|b| *b == got[0] && *b <= round as u8),
            "{n}"
        );
    }
    d.put(buffer, &vec![0xfe; sectors as usize * 512]);
    true
}

#[test]
fn requests_that_were_taken_and_not_begun_travel() {
    let file = image(64 * 128);
    let memory = memory();
    let mut d = Driver::start(
        device(&disk(&file, false), memory.clone()),
        memory,
        u64::MAX,
        256,
    );
    // The disk's threads may be faster than the pause, once; not for a minute.
    let mut travelled = 0;
    eventually("a pause finds requests that have not begun", || {
        let mut heads: Vec<u16> = (0..64)
            .map(|n| d.request(n, READ, n * 128, 65536))
            .collect();
        d.kick(0);
        while !d.rings[0].all_taken(&d.memory) {
            std::hint::spin_loop();
        }
        d.device.pause().unwrap();
        travelled = d.device.save().transport.queues[0].returned.len();
        if travelled > 0 {
            d.device.resume();
            d.device.pause().unwrap();
        }
        d.device.resume();
        while !heads.is_empty() {
            let (head, _) = d.wait(0);
            heads.swap_remove(heads.iter().position(|h| *h == head).unwrap());
        }
        travelled > 0
    });
    for n in 0..64 {
        assert_eq!(d.answer(n), OK);
        assert_eq!(d.get(Disk::buffer(n), 512), pattern(n * 128));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn no_request_is_lost_or_done_twice(batches in prop::collection::vec(batch(), 1..4)) {
        let file = image(REQUESTS * 128);
        let here = disk(&file, false);
        let memory = memory();
        let mut d = Driver::start(device(&here, memory.clone()), memory, u64::MAX, 128);
        // What the disk has at each request's place: the last batch that wrote there, and how far.
        let mut oracle: Vec<Vec<u8>> = (0..REQUESTS)
            .map(|n| (0..128).flat_map(|s| pattern(n * 128 + s)).collect())
            .collect();
        for (round, batch) in batches.iter().enumerate() {
            let mut heads = Vec::new();
            for (n, (write, sectors)) in batch.requests.iter().enumerate() {
                let len = *sectors as usize * 512;
                if *write {
                    let byte = round as u8 + 1;
                    d.put(Disk::buffer(n as u64), &vec![byte; len]);
                    oracle[n][..len].fill(byte);
                }
                let kind = if *write { WRITE } else { READ };
                heads.push((d.request(n as u64, kind, n as u64 * 128, *sectors * 512), n));
            }
            d.kick(0);
            if batch.taken {
                // From here on it is a race between the disk's threads and the pause, which is the
                // point.
                while !d.rings[0].all_taken(&d.memory) {
                    std::hint::spin_loop();
                }
            }
            for _ in 0..batch.answers {
                answered(&mut d, true, batch, &mut heads, round);
            }
            if batch.stays {
                d.device.pause().unwrap();
                // At rest: nothing moves.
                let (before, state) = (d.get(0, 0x100_0000), d.device.save());
                std::thread::yield_now();
                prop_assert_eq!(&d.get(0, 0x100_0000), &before);
                prop_assert_eq!(d.device.save(), state);
                d.device.resume();
            } else {
                d = d.migrate(|memory| device(&disk(&file, false), memory));
            }
            while !heads.is_empty() {
                answered(&mut d, true, batch, &mut heads, round);
            }
            prop_assert!(!answered(&mut d, false, batch, &mut heads, round), "one more than asked for");
            for (n, want) in oracle.iter().enumerate() {
                let mut got = vec![0; want.len()];
                file.as_file().read_exact_at(&mut got, n as u64 * 128 * 512).unwrap();
                prop_assert!(&got == want, "request {}", n);
            }
        }
    }
}
