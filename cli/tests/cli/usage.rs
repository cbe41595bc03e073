//! Commands without a guest.

use crate::support::{fails, ferry, guests_run, stderr};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};

#[test]
fn usage_errors_are_2_and_one_sentence() {
    for args in [
        &["nonsense"][..],
        &["status"],
        &["status", "--api"],
        &["migrate", "--api", "s"],
        &["migrate", "--api", "s", "tcp:a:1", "--downtime", "soon"],
        &["migrate", "--api", "s", "tcp:a:1", "--policy", "magic"],
        &["run"],
        &["run", "--kernel", "k"],
        &["run", "--kernel", "k", "--nas", "mg.A", "--memory", "1G"],
        &["run", "--nas", "mg.Z"],
        &["run", "--nas", "mg.A", "--memory", "lots"],
        &["run", "--nas", "mg.A", "--serial", "loud"],
        &["run", "--nas", "mg.A", "--console", "loud"],
        &["run", "--nas", "mg.A", "--memory", "1G,max=512M"],
        &["set", "web"],
        &["set", "web", "--memory", "lots"],
        &["nas", "dirty:"],
        &["receive", "carrier-pigeon"],
    ] {
        let text = fails(args, 2);
        assert!(text.contains("--help`"), "{args:?}: {text}");
    }
    assert_eq!(ferry(&[]).status.code(), Some(2));
}

#[test]
fn help_is_on_stdout_with_an_example() {
    let commands = [
        "run", "receive", "migrate", "cancel", "status", "pause", "resume", "stop", "recover",
        "set", "console", "doctor", "nas", "record", "sim",
    ];
    for command in commands {
        let out = ferry(&[command, "--help"]);
        assert!(out.status.success());
        assert!(
            String::from_utf8_lossy(&out.stdout).contains("Example"),
            "{command}"
        );
        assert!(out.stderr.is_empty());
    }
    assert!(ferry(&["--version"]).status.success());
}

#[test]
fn a_socket_without_a_vmm_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api");
    let api = path.to_str().unwrap();
    for command in ["status", "pause", "resume", "stop", "cancel", "recover"] {
        let text = fails(&[command, "--api", api], 1);
        assert!(text.contains("there is no socket"), "{text}");
    }
    drop(UnixListener::bind(&path).unwrap());
    // A process that a test beside this one is about to start may hold it for a moment.
    while UnixStream::connect(&path).is_ok() {
        std::thread::yield_now();
    }
    let text = fails(&["status", "--json", "--api", api], 1);
    assert!(
        text.contains("no ferry answers on") && text.contains("is the guest's VMM running?"),
        "{text}"
    );
    let text = fails(&["migrate", "--json", "--api", api, "tcp:127.0.0.1:1"], 1);
    assert!(text.contains("no ferry answers on"), "{text}");
    for wrong in [&["--channels", "0"][..], &["--split", "0"], &["--pivots=0"]] {
        let fixed = ["migrate", "--json", "--api", api, "tcp:127.0.0.1:1"];
        let text = fails(&[&fixed, wrong].concat(), 2);
        assert!(text.contains("1 to"), "{text}");
    }
}

#[test]
fn a_script_tells_why_nothing_began() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api");
    let code = |args: &[&str]| {
        let api = path.to_str().unwrap();
        let out = ferry(&[&["migrate", "--json", "--api", api], args].concat());
        let value: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        (
            out.status.code(),
            value["code"].as_str().unwrap().to_owned(),
        )
    };
    assert_eq!(code(&["tcp:a:1"]), (Some(1), "no-vmm".into()));
    assert_eq!(
        code(&["tcp:a:1", "--policy", "magic"]),
        (Some(2), "usage".into())
    );
    assert_eq!(
        code(&["tcp:a:1", "--split", "0"]),
        (Some(2), "usage".into())
    );
}

#[test]
fn a_command_that_is_no_text_is_a_usage_error() {
    use std::os::unix::ffi::OsStrExt;
    let odd = std::ffi::OsStr::from_bytes(b"\xff\xfe");
    let out = Command::new(env!("CARGO_BIN_EXE_ferry"))
        .arg(odd)
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(2), "{}", stderr(&out));
}

#[test]
fn doctor_prints_one_object_and_says_whether_guests_run() {
    let out = ferry(&["doctor", "--json"]);
    let value: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(value["schema"], 1);
    assert_eq!(value["ready"].as_bool().unwrap(), out.status.success());
    assert!(["hardware", "software", "none"].contains(&value["kind"].as_str().unwrap()));
    assert!(value["checks"].as_array().unwrap().len() > 8);
    assert!(out.stderr.is_empty(), "{}", stderr(&out));
    let text = ferry(&["doctor"]);
    assert_eq!(text.status.code(), out.status.code());
}

#[test]
fn a_kernel_on_the_host_is_verified() {
    let out = ferry(&["nas", "is.S", "--json"]);
    assert!(out.status.success());
    let value: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(
        (value["kernel"].as_str(), value["verified"].as_bool()),
        (Some("is.S"), Some(true))
    );
}

#[test]
fn a_reader_that_leaves_is_no_panic() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ferry"))
        .arg("doctor")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert!(out.stderr.is_empty(), "{}", stderr(&out));
}

#[test]
fn bad_paths_are_said_before_anything_runs() {
    if !guests_run() {
        return;
    }
    let run = |rest: &[&str]| {
        let args = [&["run", "--serial", "null"], rest].concat();
        fails(&args, 1)
    };
    let text = run(&["--kernel", "/nonexistent/kernel", "--memory", "64M"]);
    assert!(text.contains("/nonexistent/kernel"), "{text}");
    let text = run(&["--kernel", "/etc/passwd", "--memory", "64M"]);
    assert!(text.contains("/etc/passwd"), "{text}");
    let text = run(&["--nas", "is.S", "--api", "/nonexistent/api"]);
    assert!(
        text.contains("there is no directory /nonexistent"),
        "{text}"
    );
    let text = run(&["--nas", "mg.A", "--memory", "16M"]);
    assert!(
        text.contains("mg.A needs") && text.contains("16 MiB"),
        "{text}"
    );
    let text = run(&["--nas", "is.S", "--cpus", "0"]);
    assert!(text.contains("1 to"), "{text}");
    let text = fails(
        &["run", "--nas", "is.S", "--serial", "file:/nonexistent/log"],
        1,
    );
    assert!(text.contains("/nonexistent/log"), "{text}");
}

/// Words that name no CPU, files that are none, and a CPU that no host has.
#[test]
fn a_cpu_that_cannot_be_given_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let refused = |cpu: &str, says: &str| {
        let args = ["run", "--nas", "is.S", "--serial", "null", "--cpu", cpu];
        let text = fails(&args, 1);
        assert!(text.contains(says), "{text}");
    };
    refused("host,-avx1024", "`avx1024` is no CPU feature");
    refused("host,avx2", "`avx2` takes no feature away");
    refused("x86-64-v9", "give x86-64-v2, x86-64-v3, x86-64-v4");
    refused("/nonexistent/cpu", "/nonexistent/cpu");
    std::fs::write(path("damaged"), r#"{"schema":1,"vendor":"Genu"#).unwrap();
    refused(&path("damaged"), "damaged is no file of a CPU");
    let text = fails(&["doctor", "--baseline", &path("damaged")], 1);
    assert!(text.contains("damaged"), "{text}");
    if !guests_run() {
        return;
    }
    let json = ferry(&["doctor", "--cpu-json"]).stdout;
    let mut cpu: serde_json::Value = serde_json::from_slice(&json).unwrap();
    std::fs::write(path("here"), &json).unwrap();
    let common = ferry(&["doctor", "--baseline", &path("here"), &path("here")]);
    let common: serde_json::Value = serde_json::from_slice(&common.stdout).unwrap();
    assert_eq!(common["vendor"], cpu["vendor"]);
    assert!(
        common["features"].as_array().unwrap().len() > 20,
        "{common}"
    );
    // No processor has had it since 2011.
    cpu["features"].as_array_mut().unwrap().push("3dnow".into());
    std::fs::write(path("more"), cpu.to_string()).unwrap();
    refused(&path("more"), "does not have: 3dnow;");
}
