//! `ferry bench` as users run it: one small cell, once, with real guests.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output};

const FERRY: &str = env!("CARGO_BIN_EXE_ferry");

fn bench(arguments: &[&str]) -> Output {
    Command::new(FERRY)
        .arg("bench")
        .args(arguments)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Whether guests run here; says so if not.
fn kvm(what: &str) -> bool {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            eprintln!("NOT RUN: {what}: /dev/kvm cannot be opened ({error})");
            false
        }
    }
}

const FILE: &str = r#"
title = "A small one"
runs = 1

[[guest]]
name = "writer"
work = "dirty:wss=4M,rate=500,fill=random"
memory = "64M"

[[policy]]
name = "ferry postcopy"
ferry = { policy = "postcopy" }

[[goal]]
metric = "pages_resent"
guest = "writer"
link = "loopback"
policy = "ferry postcopy"
at_most = 0
"#;

fn lines(path: &Path) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn a_cell_is_measured_written_down_and_not_measured_twice() {
    if !kvm("a benchmark of one cell") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("small.toml");
    let out = dir.path().join("out");
    fs::write(&file, FILE).unwrap();
    let arguments = [file.to_str().unwrap(), "--out", out.to_str().unwrap()];
    let output = bench(&arguments);
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{stdout}{stderr}");
    assert!(
        stdout.contains("A small one") && stdout.contains("1/1 verified"),
        "{stdout}"
    );
    assert!(stdout.contains("1 met, 0 missed, 0 not run"), "{stdout}");

    let results = out.join("results.jsonl");
    let written = lines(&results);
    let run = &written[1];
    let figure = |path: &str| {
        run.pointer(path)
            .unwrap_or_else(|| panic!("no {path} in {run}"))
    };
    assert!(figure("/figures/told/total_ms").as_f64().unwrap() > 0.0);
    assert!(figure("/figures/seen/gap_ms").as_f64().unwrap() > 0.0);
    // Ten lines a second: two and a half before the move and one after it.
    assert!(figure("/figures/seen/series").as_array().unwrap().len() > 20);
    // All pages but the few that are zero crossed the link.
    let pages = figure("/figures/told/pages_sent").as_u64().unwrap();
    assert!(figure("/figures/link_bytes").as_u64().unwrap() > pages * 4096);
    assert_eq!(figure("/figures/verified"), true);
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("ferry postcopy"));

    // Again: nothing is left to be done.
    assert!(bench(&arguments).status.success());
    let again = lines(&results);
    assert_eq!(again.iter().filter(|line| line["line"] == "run").count(), 1);
}

/// The certificates are made for the run, and the guest arrives by them.
#[test]
fn a_secured_cell_is_measured() {
    if !kvm("a secured benchmark") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let output = bench(&[
        "--guest",
        "idle:fill=half",
        "--policy",
        "precopy,tls=true",
        "--runs",
        "1",
        "--cold",
        "--out",
        out.to_str().unwrap(),
    ]);
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{stdout}{stderr}");
    assert!(stdout.contains("1/1 verified"), "{stdout}");
    let run = &lines(&out.join("results.jsonl"))[1];
    assert_eq!(run["cell"]["policy"]["tls"], true, "{run}");
}

#[test]
fn a_qemu_that_is_no_qemu_fails_its_cell_and_the_rest_goes_on() {
    if !kvm("a benchmark whose peer dies") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    // It knows its version, and nothing else.
    let output = bench(&[
        "--guest",
        "idle:fill=none",
        "--memory",
        "32M",
        "--peer",
        "qemu:precopy",
        "--policy",
        "precopy",
        "--runs",
        "1",
        "--qemu",
        "/bin/true",
        "--out",
        out.to_str().unwrap(),
    ]);
    let stdout = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{stdout}");
    assert!(stdout.contains("0/1 verified, 1 FAILED"), "{stdout}");
    assert!(stdout.contains("FAILED: qemu precopy, run 1: "), "{stdout}");
    assert!(stdout.contains("1/1 verified"), "{stdout}");
}

#[test]
fn a_file_with_a_typo_is_refused_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("typo.toml");
    fs::write(&file, FILE.replace("fill=random", "fill=rnadom")).unwrap();
    let output = bench(&[file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let stderr = text(&output.stderr);
    assert!(
        stderr.contains("typo.toml, line 7, column 8: `fill=rnadom`"),
        "{stderr}"
    );
    assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
}

#[test]
fn nothing_to_measure_is_said_so() {
    let output = bench(&[]);
    let stderr = text(&output.stderr);
    assert!(stderr.contains("ferry bench goals"), "{stderr}");
    let output = bench(&["/no/such/file.toml"]);
    assert!(text(&output.stderr).contains("/no/such/file.toml cannot be read"));
}
