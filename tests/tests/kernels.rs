//! The NAS kernels in bare guests and on the host: every result is the published one.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_guest_images::{Class, Kernel, Line, Problem};
use ferry_tests::{Host, guests_run, run, until};

fn all(class: Class) -> impl Iterator<Item = String> {
    let name = move |kernel| Problem { kernel, class }.to_string();
    Kernel::ALL.into_iter().map(name)
}

/// The line of the result. A guest that prints a line now and then has not hung, however busy the
/// machine is.
fn result(host: &Host) -> String {
    loop {
        let lines = host.guest_lines();
        let is_result = |line: &&String| matches!(Line::parse(line), Some(Line::Result(_)));
        if let Some(line) = lines.iter().find(is_result) {
            return line.clone();
        }
        until("the guest printed another line", || {
            host.guest_lines().len() > lines.len()
        });
    }
}

/// Boots a guest with just the memory that it needs, and lets it run the kernel once.
fn in_a_guest(kernel: &str, cpus: u32) {
    let count = cpus.to_string();
    let mut host = Host::start(&[
        "run", "--nas", kernel, "--cpus", &count, "--serial", "stdio",
    ]);
    let line = result(&host);
    let Some(Line::Result(result)) = Line::parse(&line) else {
        unreachable!()
    };
    assert!(result.verified && result.kernel == kernel, "{line}");
    eprintln!(
        "{kernel} on {cpus}: {:.1} Mop/s, {:.3} s",
        result.mops, result.seconds
    );
    assert_eq!(host.ends(), Some(0), "{:#?}", host.said());
}

#[test]
fn class_s_verifies_in_guests_with_one_and_two_processors() {
    if !guests_run() {
        return;
    }
    all(Class::S).for_each(|kernel| {
        [1, 2]
            .into_iter()
            .for_each(|cpus| in_a_guest(&kernel, cpus))
    });
}

#[test]
fn class_w_verifies_in_guests_with_one_processor() {
    if !guests_run() {
        return;
    }
    all(Class::W).for_each(|kernel| in_a_guest(&kernel, 1));
}

#[test]
fn class_w_verifies_in_guests_with_two_processors() {
    if !guests_run() {
        return;
    }
    all(Class::W).for_each(|kernel| in_a_guest(&kernel, 2));
}

/// What one command prints for scripts agrees with what it says by its exit status.
fn on_the_host(kernel: &str, threads: u32) {
    let ran = run(&["nas", kernel, "--threads", &threads.to_string(), "--json"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{ran:?}");
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["kernel"], kernel);
    assert_eq!(report["verified"], true, "{report}");
    let [all, each] = ["mops", "mops_per_thread"].map(|name| report[name].as_f64().unwrap());
    assert!(
        all > 0.0 && (each * f64::from(threads) - all).abs() <= all * 1e-9,
        "{report}"
    );
}

#[test]
fn class_s_verifies_on_the_host() {
    for kernel in all(Class::S) {
        on_the_host(&kernel, 1);
        on_the_host(&kernel, 2);
    }
}

#[test]
fn class_w_verifies_on_the_host() {
    all(Class::W).for_each(|kernel| on_the_host(&kernel, 2));
}

/// People get what NPB's own programs print.
#[test]
fn a_result_has_the_fields_of_npb() {
    let ran = run(&["nas", "ft.S", "--threads", "2"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{ran:?}");
    let field = |name: &str| {
        let found = ran.stdout.lines().find_map(|line| {
            let (key, value) = line.split_once('=')?;
            (key.trim() == name).then(|| value.trim().to_owned())
        });
        found.unwrap_or_else(|| panic!("no {name} in {}", ran.stdout))
    };
    let number = |name: &str| field(name).parse::<f64>().unwrap();
    assert!(ran.stdout.starts_with("NAS Parallel Benchmarks, FT"));
    assert_eq!(field("class"), "S");
    assert_eq!(field("size"), "64 x 64 x 64");
    assert_eq!(field("iterations"), "6");
    assert_eq!(field("total threads"), "2");
    assert_eq!(field("operation type"), "floating point");
    assert_eq!(field("verification"), "SUCCESSFUL");
    assert!(number("time in seconds") >= 0.0);
    assert!((number("Mop/s total") / 2.0 - number("Mop/s/thread")).abs() < 0.02);
}

#[test]
fn what_cannot_be_run_is_refused_with_one_sentence() {
    let cases: [(&[&str], &[&str]); 6] = [
        (&["nas", "lu.A"], &["`lu`", "ep is cg mg ft bt sp"]),
        (&["nas", "ft.D"], &["`D`", "S W A B C"]),
        (&["run", "--nas", "lu.A"], &["`lu`", "ep is cg mg ft bt sp"]),
        (&["run", "--nas", "bt.s"], &["`s`", "S W A B C"]),
        (
            &["run", "--nas", "ft.C", "--memory", "1G"],
            &["ft.C needs 51", "1 GiB"],
        ),
        (
            &["run", "--nas", "bt.B", "--memory", "64M"],
            &["bt.B needs 17", "64 MiB"],
        ),
    ];
    for (args, parts) in cases {
        if args.contains(&"--memory") && !guests_run() {
            continue;
        }
        let ran = run(args);
        assert!(matches!(ran.code, Some(1 | 2)), "{ran:?}");
        for part in parts {
            assert!(ran.stderr.contains(part), "{args:?} {part}: {}", ran.stderr);
        }
    }
}

/// A process that may not have the memory of a class says how much that is.
#[test]
fn a_class_that_does_not_fit_the_host_says_what_it_needs() {
    let ferry = ferry_tests::ferry().display();
    let out = std::process::Command::new("sh")
        .args(["-c", &format!("ulimit -v 1000000; exec {ferry} nas ft.C")])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("ft.C needs 51"), "{said}");
}
