//! Every kernel verifies on the host, alone and in a team.
#![allow(clippy::unwrap_used)]

use ferry_nas::{Class, Kernel, Problem, RunError, Solo, Workspace, host, run};

#[test]
fn class_s_and_w_verify_on_one_and_more_threads() {
    for kernel in Kernel::ALL {
        for class in [Class::S, Class::W] {
            for threads in [1, 2, 3] {
                let problem = Problem { kernel, class };
                let outcome = host::run_on_threads(problem, threads).unwrap();
                assert!(outcome.verified, "{threads} threads: {outcome:?}");
                println!(
                    "{problem} on {threads}: {:.1} Mop/s in {:.3} s",
                    outcome.mops, outcome.seconds
                );
            }
        }
    }
}

/// The larger ones take seconds, so on two threads only; the smaller ones run on one as well.
#[test]
fn class_a_verifies() {
    for kernel in Kernel::ALL {
        let problem = Problem {
            kernel,
            class: Class::A,
        };
        let outcome = host::run_on_threads(problem, 2).unwrap();
        assert!(outcome.verified, "{outcome:?}");
        println!(
            "{problem} on 2: {:.1} Mop/s in {:.3} s",
            outcome.mops, outcome.seconds
        );
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
    };
    let error = run(problem, workspace, &Solo, &host::Clock::start()).unwrap_err();
    assert!(matches!(error, RunError::Memory { .. }));
    assert!(error.to_string().contains("mg.S needs"), "{error}");
}
