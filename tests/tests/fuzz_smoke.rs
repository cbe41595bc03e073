//! The bodies of the fuzz targets on a few thousand mutations of good input, the same ones every
//! time.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_devices::vsock::Op;
use ferry_migration::destination::State;
use ferry_migration::report::Status;
use ferry_migration::rng::Rng;
use ferry_tests::{fuzz_bodies, fuzz_seeds};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

fn mutations(seeds: &[Vec<u8>], count: u64, body: fn(&[u8])) {
    for seed in seeds {
        body(seed);
    }
    for n in 0..count {
        let mut random = Rng::new(n);
        let mut bytes = seeds[fuzz_seeds::below(&mut random, seeds.len())].clone();
        fuzz_seeds::mutate(&mut random, &mut bytes);
        body(&bytes);
    }
}

#[test]
fn codecs() {
    mutations(&fuzz_seeds::codec(), 6000, fuzz_bodies::codec);
}

#[test]
fn frames() {
    mutations(&fuzz_seeds::frame(), 6000, fuzz_bodies::frame);
}

#[test]
fn handshakes() {
    let seeds = fuzz_seeds::handshake();
    // Unchanged they are migrations that succeed; mutations of anything else would test little.
    for (at, seed) in seeds.iter().enumerate() {
        assert_eq!(
            fuzz_bodies::handshake(seed),
            Some(State::Complete),
            "seed {at}"
        );
    }
    let hello = seeds[0][1 + 64 + 32..].to_vec();
    mutations(&[&seeds[..], &[hello]].concat(), 6000, |bytes| {
        fuzz_bodies::handshake(bytes);
    });
}

#[test]
fn machine_states() {
    mutations(
        &fuzz_seeds::machine_state(),
        4000,
        fuzz_bodies::machine_state,
    );
}

#[test]
fn snapshots() {
    static READ: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];
    mutations(&fuzz_seeds::snapshot(), 6000, |bytes| {
        let depth = fuzz_bodies::snapshot(bytes).map_or(0, |pages| 1 + usize::from(pages > 0));
        READ[depth].fetch_add(1, Ordering::Relaxed);
    });
    // Some are refused as a whole, some opened without a page to be had, many read: all of the
    // reader is reached.
    let read = READ.each_ref().map(|count| count.load(Ordering::Relaxed));
    assert!(read.iter().all(|count| *count > 20), "{read:?}");
    eprintln!("refused, without a page, read: {read:?}");
}

#[test]
fn vsock_connections() {
    let seeds = fuzz_seeds::vsock();
    // Unchanged they reach connections of both sides, and what is refused.
    let wanted: [&[Op]; 3] = [
        &[Op::Response, Op::Data, Op::Shutdown],
        &[Op::Request, Op::Data, Op::CreditRequest],
        &[Op::Response, Op::Reset],
    ];
    for (seed, wanted) in seeds.iter().zip(wanted) {
        let taken = fuzz_bodies::vsock(seed);
        for op in wanted {
            assert!(taken.contains(op), "no {op:?} in {taken:?}");
        }
    }
    mutations(&seeds, 1000, |bytes| drop(fuzz_bodies::vsock(bytes)));
}

/// A device's thread that panics must fail the test, and not only itself.
fn fail_with_devices() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        if std::thread::current()
            .name()
            .is_some_and(|name| name.starts_with("virtio-") || name == "disk")
        {
            std::process::abort();
        }
    }));
}

#[test]
fn virtio_devices() {
    fail_with_devices();
    mutations(&fuzz_seeds::virtio(), 1500, fuzz_bodies::virtio);
}

#[test]
fn consoles() {
    fail_with_devices();
    mutations(&fuzz_seeds::console(), 1500, fuzz_bodies::console);
}

#[test]
fn virtio_states() {
    static TAKEN: AtomicU64 = AtomicU64::new(0);
    for (at, seed) in fuzz_seeds::virtio_state().iter().enumerate() {
        assert!(fuzz_bodies::virtio_state(seed), "seed {at} is refused");
    }
    mutations(&fuzz_seeds::virtio_state(), 1500, |bytes| {
        let taken = fuzz_bodies::virtio_state(bytes);
        TAKEN.fetch_add(u64::from(taken), Ordering::Relaxed);
    });
    let taken = TAKEN.load(Ordering::Relaxed);
    assert!((100..1400).contains(&taken), "{taken} were taken");
}

#[test]
fn data_channels() {
    for (at, seed) in fuzz_seeds::data_channels().iter().enumerate() {
        let state = fuzz_bodies::data_channels(seed, ferry_tests::TIMEOUT);
        assert_eq!(state, Some(State::Complete), "seed {at}");
    }
    mutations(&fuzz_seeds::data_channels(), 2000, |bytes| {
        fuzz_bodies::data_channels(bytes, Duration::from_millis(1));
    });
}

#[test]
fn sources() {
    let completed = |recovers: bool, policy: u8| {
        fuzz_seeds::source().iter().any(|seed| {
            (seed[0] & 0x10 > 0, seed[0] & 7) == (recovers, policy)
                && fuzz_bodies::source(seed).unwrap().status == Status::Completed
        })
    };
    for policy in 0..5 {
        assert!(completed(false, policy), "no answers suit policy {policy}");
    }
    assert!(completed(true, 3), "no answers suit a recovery");
    mutations(&fuzz_seeds::source(), 4000, |bytes| {
        fuzz_bodies::source(bytes);
    });
}

#[test]
fn kernels() {
    let seeds = fuzz_seeds::kernel();
    let boot = |seed: &Vec<u8>| fuzz_bodies::kernel(seed);
    let booted = seeds.iter().map(boot).collect::<Vec<_>>();
    assert_eq!(booted, [true, true, true, true, true, false]);
    mutations(&seeds, 4000, |bytes| {
        fuzz_bodies::kernel(bytes);
    });
}

#[test]
fn pairing_lines() {
    static TAKEN: AtomicU64 = AtomicU64::new(0);
    let seeds = fuzz_seeds::pairing();
    assert!(seeds[..2].iter().all(|seed| fuzz_bodies::pairing(seed)));
    mutations(&seeds, 6000, |bytes| {
        TAKEN.fetch_add(u64::from(fuzz_bodies::pairing(bytes)), Ordering::Relaxed);
    });
    // Most are refused, and some digits are as good as others.
    let taken = TAKEN.load(Ordering::Relaxed);
    assert!((10..3000).contains(&taken), "{taken} were taken");
}

#[test]
fn traces() {
    let seeds = fuzz_seeds::trace();
    assert!(seeds.iter().all(|seed| fuzz_bodies::trace(seed)));
    mutations(&seeds, 3000, |bytes| {
        fuzz_bodies::trace(bytes);
    });
}

#[test]
fn requests() {
    let seeds = fuzz_seeds::api();
    let answers: Vec<_> = seeds.iter().map(|seed| fuzz_bodies::api(seed)).collect();
    assert_eq!(answers, [3, 4, 1, 2, 2, 1, 2, 1, 2, 1, 2]);
    mutations(&seeds, 3000, |bytes| {
        fuzz_bodies::api(bytes);
    });
}
