//! Every kernel verifies on the host, alone and in a team.
#![allow(clippy::unwrap_used)]

use ferry_nas::{Class, Kernel, Problem, RunError, Solo, Workspace, host, run};

/// Runs one problem and expects the published result.
fn verifies(kernel: Kernel, class: Class, threads: usize) {
    let problem = Problem { kernel, class };
    let outcome = host::run_on_threads(problem, threads).unwrap();
    assert!(outcome.verified, "{threads} threads: {outcome:?}");
    println!(
        "{problem} on {threads}: {:.1} Mop/s in {:.3} s, error {:.1e}",
        outcome.mops, outcome.seconds, outcome.error
    );
}

/// Whether a run takes minutes in class A and seconds in class W.
fn long(kernel: Kernel) -> bool {
    matches!(kernel, Kernel::Bt | Kernel::Sp)
}

/// As NPB's own programs print them.
#[test]
fn sizes_and_iterations_are_the_published_ones() {
    let facts = |kernel, class| {
        let facts = Problem { kernel, class }.facts();
        (facts.size, facts.iterations, facts.operation)
    };
    let float = "floating point";
    for (kernel, class, size, iterations, operation) in [
        (
            Kernel::Ep,
            Class::S,
            [33_554_432, 1, 1],
            0,
            "random numbers generated",
        ),
        (Kernel::Is, Class::A, [8_388_608, 1, 1], 10, "keys ranked"),
        (Kernel::Cg, Class::A, [14_000, 1, 1], 15, float),
        (Kernel::Mg, Class::B, [256, 256, 256], 20, float),
        (Kernel::Ft, Class::W, [128, 128, 32], 6, float),
        (Kernel::Bt, Class::A, [64, 64, 64], 200, float),
        (Kernel::Sp, Class::S, [12, 12, 12], 100, float),
    ] {
        assert_eq!(
            facts(kernel, class),
            (size, iterations, operation),
            "{kernel:?}"
        );
    }
}

#[test]
fn class_s_verifies_on_one_and_more_threads() {
    for kernel in Kernel::ALL {
        for threads in [1, 2, 3] {
            verifies(kernel, Class::S, threads);
        }
    }
}

#[test]
fn class_w_verifies_on_one_and_more_threads() {
    for kernel in Kernel::ALL {
        let threads = if long(kernel) { &[2][..] } else { &[1, 2, 3] };
        for &threads in threads {
            verifies(kernel, Class::W, threads);
        }
    }
}

/// The larger ones take seconds, so on two threads only.
#[test]
fn class_a_verifies() {
    for kernel in Kernel::ALL.into_iter().filter(|&kernel| !long(kernel)) {
        verifies(kernel, Class::A, 2);
    }
}

/// The longest, for who has minutes: `cargo test --release -p ferry-nas -- --ignored`.
#[test]
#[ignore = "takes minutes"]
fn the_long_ones_verify_in_class_a() {
    for kernel in Kernel::ALL.into_iter().filter(|&kernel| long(kernel)) {
        verifies(kernel, Class::A, 2);
    }
}

#[test]
fn too_little_memory_is_refused_with_a_sentence() {
    let problem = Problem {
        kernel: Kernel::Mg,
        class: Class::S,
    };
    let workspace = Workspace {
        floats: &mut [0.0; 100],
        words: &mut [],
        kept: false,
    };
    let error = run(problem, workspace, &Solo, &host::Clock::start()).unwrap_err();
    assert!(matches!(error, RunError::Memory { .. }));
    assert!(error.to_string().contains("mg.S needs 2 MiB"), "{error}");
}
