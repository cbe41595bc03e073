//! What a guest and its user must not lose: files beside it, its disks' contents, the right disk.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_migration::options::{Compress, Options};
use ferry_migration::report::Status;
use ferry_tests::{Host, State, ferry, guests_run};
use ferry_vmm::api::client::Action;
use ferry_vmm::api::types::{SnapshotRequest, Then};
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::{Command, Output};

const WORK: &str = "dirty:wss=4M,rate=500";

fn image(path: &Path) -> String {
    fs::File::create(path).unwrap().set_len(4 << 20).unwrap();
    path.to_str().unwrap().to_owned()
}

fn receive(uri: &str, more: &[&str]) -> Host {
    let host = Host::start(&[&["receive", uri, "--serial", "stdio"], more].concat());
    host.says("waiting on");
    host
}

fn command(args: &[&str]) -> Output {
    Command::new(ferry()).args(args).output().unwrap()
}

/// An upgrade in place, twice over one path: each receiver takes the path of the one before.
#[test]
fn a_path_receives_one_guest_after_another() {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("unix:{}", dir.path().join("link").display());
    let mut guest = Host::run(WORK, "32M", 1);
    for _ in 0..3 {
        let next = receive(&uri, &[]);
        guest.migrate_well(&uri, &Host::options());
        guest.finish();
        next.reaches(State::Running);
        guest = next;
    }
}

#[test]
fn a_recording_that_is_refused_leaves_the_old_one() {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("old.trace");
    fs::write(&file, "precious").unwrap();
    let host = Host::run(WORK, "32M", 1);
    let api = host.api();
    let record = |to: &Path| {
        let to = to.to_str().unwrap();
        let args = ["record", "--api", api.to_str().unwrap(), to, "--duration"];
        command(&[&args[..], &["200ms"]].concat())
    };
    host.client().act(Action::Stop).unwrap();
    let refused = record(&file);
    assert!(!refused.status.success(), "{refused:?}");
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    let names = fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(names, 1, "nothing is left beside it");
}

#[test]
fn a_device_node_is_never_replaced_by_a_file() {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let node = dir.path().join("fifo");
    nix::unistd::mkfifo(&node, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let host = Host::run(WORK, "32M", 1);
    let request = SnapshotRequest {
        path: node.clone(),
        compress: Compress::None,
        live: false,
        force: true,
        then: Then::Resume,
        state_version: None,
    };
    let refused = host.client().snapshot(&request).unwrap_err().to_string();
    assert!(refused.contains(node.to_str().unwrap()), "{refused}");
    assert!(node.metadata().unwrap().file_type().is_fifo());
    assert_eq!(host.state(), State::Running);
}

/// Another file of the same size on one host is not the guest's disk, unless an operator insists.
#[test]
fn another_file_is_not_the_guests_disk() {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (its, other) = (image(&dir.path().join("a")), image(&dir.path().join("b")));
    let source = Host::run_with(WORK, "32M", 1, &["--disk", &its]);
    let destination = Host::receive_with(&["--disk", &other]);
    let report = source.migrate(destination.uri(), &Host::options());
    assert_eq!(report.status, Status::Failed, "{report:#?}");
    let error = report.error.unwrap();
    assert!(error.contains(&its) && error.contains(&other), "{error}");
    assert_eq!(source.state(), State::Running);
    let insisting = Host::receive_with(&["--disk", &other, "--force"]);
    source.migrate_well(insisting.uri(), &Host::options());
}

/// A disk that was grown under its guest moves with the size that the guest knows.
#[test]
fn a_grown_disk_moves() {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = image(&dir.path().join("a"));
    let source = Host::run_with(WORK, "32M", 1, &["--disk", &disk]);
    let file = fs::OpenOptions::new().write(true).open(&disk).unwrap();
    file.set_len(8 << 20).unwrap();
    let first = Host::receive_with(&["--disk", &disk]);
    source.migrate_well(first.uri(), &Host::options());
    let second = Host::receive_with(&["--disk", &disk]);
    first.migrate_well(second.uri(), &Host::options());
}

/// `unix:` paths are the caller's own, also where a VMM of another directory is asked to go there.
#[test]
fn a_relative_path_is_the_callers() {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = Host::run(WORK, "32M", 1);
    let uri = format!("unix:{}", dir.path().join("link").display());
    let destination = receive(&uri, &[]);
    let moved = Command::new(ferry())
        .current_dir(dir.path())
        .args(["migrate", "unix:link", "--api"])
        .arg(source.api())
        .output()
        .unwrap();
    assert!(moved.status.success(), "{moved:?}");
    destination.reaches(State::Running);
}

/// A block device with blocks of 4096 bytes: a disk is copied onto it, and both sides share it
/// afterwards.
#[test]
fn a_disk_moves_on_a_device_of_4096_byte_blocks() {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (from, behind) = (image(&dir.path().join("a")), image(&dir.path().join("b")));
    let bytes: Vec<u8> = (0..4 << 20).map(|i: u32| (i / 7 % 251) as u8).collect();
    fs::write(&from, &bytes).unwrap();
    let attach = ["--find", "--show", "--sector-size", "4096", &behind];
    let Ok(made) = Command::new("losetup").args(attach).output() else {
        eprintln!("NOT RUN: there is no losetup");
        return;
    };
    if !made.status.success() {
        eprintln!("NOT RUN: no loop device can be made: {made:?}");
        return;
    }
    let device = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    let moved = std::panic::catch_unwind(|| {
        let source = Host::run_with(WORK, "32M", 1, &["--disk", &from]);
        let first = Host::receive_with(&["--disk", &device]);
        let copy = Options {
            copy_disk: true,
            ..Host::options()
        };
        source.migrate_well(first.uri(), &copy);
        assert!(fs::read(&device).unwrap() == bytes, "the copy is another");
        let second = Host::receive_with(&["--disk", &device]);
        first.migrate_well(second.uri(), &Host::options());
        second.proves_running();
    });
    let detached = Command::new("losetup").args(["--detach", &device]).status();
    assert!(detached.unwrap().success());
    moved.unwrap();
}
