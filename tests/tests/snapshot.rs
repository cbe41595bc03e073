//! Guests go to a file and come back, at once or on demand, and say themselves that nothing was
//! lost.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_guest_images::Line;
use ferry_migration::options::{Compress, Handover};
use ferry_migration::snapshot::{BlockReader, Snapshot};
use ferry_tests::{Host, State, can_pretend, guests_run, run};
use ferry_vmm::api::client::Action;
use ferry_vmm::api::types::{SnapshotReport, SnapshotRequest, Then};
use ferry_vmm::snapshot::RestoreReport;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const WORK: &str = "dirty:wss=8M,rate=4000";

fn request(path: &Path) -> SnapshotRequest {
    SnapshotRequest {
        path: path.to_owned(),
        compress: Compress::Auto,
        live: false,
        force: false,
        then: Then::Resume,
        state_version: None,
    }
}

/// A writer, and a directory with the path of the file it is to go to; `None` where no guest runs.
fn writer() -> Option<(tempfile::TempDir, PathBuf, Host)> {
    if !guests_run() {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest");
    Some((dir, path, Host::run(WORK, "64M", 1)))
}

/// Writes a snapshot, and checks what is said of it.
fn snapshot(host: &Host, request: &SnapshotRequest) -> SnapshotReport {
    let report = host.client().snapshot(request);
    let report = report.unwrap_or_else(|e| panic!("{e}; it said {:#?}", host.said()));
    let bytes = request.path.metadata().unwrap().len();
    assert_eq!((&report.path, report.bytes), (&request.path, bytes));
    assert!(
        report.data_pages > 0 && report.data_pages <= report.pages,
        "{report:#?}"
    );
    assert!(
        report.downtime_ms > 0.0 && report.downtime_ms <= report.total_ms,
        "{report:#?}"
    );
    let parts = report.quiesce_ms + report.pages_ms + report.state_ms;
    assert!(parts <= report.downtime_ms + 0.01, "{report:#?}");
    report
}

fn restore(path: &Path, more: &[&str]) -> Host {
    let args = ["restore", path.to_str().unwrap(), "--serial", "stdio"];
    Host::start(&[&args, more].concat())
}

/// Nothing but these is in the directory.
fn only(dir: &Path, names: &[&str]) {
    let mut found: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert_eq!(found, names);
}

/// Every way of writing and every way of reading; the guest that was written goes on as well, and
/// one that was restored can be migrated.
#[test]
fn writers_come_back() {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source = Host::run(WORK, "64M", 2);
    let file = |name: &str| dir.path().join(name);
    snapshot(&source, &request(&file("auto")));
    source.proves_running();
    let live = SnapshotRequest {
        compress: Compress::Zstd,
        live: true,
        ..request(&file("live"))
    };
    let report = snapshot(&source, &live);
    assert!(
        report.rounds >= 2 && report.codecs.zstd.pages > 0,
        "{report:#?}"
    );
    source.proves_running();
    let last = SnapshotRequest {
        compress: Compress::None,
        then: Then::Stop,
        ..request(&file("last"))
    };
    snapshot(&source, &last);
    assert_eq!(source.ends(), Some(0), "{:#?}", source.said());
    only(dir.path(), &["auto", "last", "live"]);

    // On demand; complete, it moves on.
    let restored = restore(&file("auto"), &[]);
    restored.says("the guest runs here");
    restored.says("all of the guest's memory is here");
    restored.proves_running();
    let mut restored = restored;
    let destination = Host::receive();
    restored.migrate_well(destination.uri(), &Host::options());
    assert_eq!(restored.ends(), Some(0));
    assert!(destination.verdict().writes > 0);
    // The same file again: another guest.
    let again = restore(&file("auto"), &["--eager"]);
    again.says("all of the guest's memory is here");
    assert!(again.verdict().writes > 0);
    for name in ["live", "last"] {
        assert!(restore(&file(name), &[]).verdict().writes > 0);
    }
}

/// The VM generation id in a file's memory; `None` for a guest without the device.
fn generation(path: &Path) -> Option<String> {
    const GFN: u64 = 0xef;
    let snapshot = Snapshot::open(std::fs::read(path).unwrap()).unwrap();
    let frame = snapshot.frame_of(GFN)?;
    let mut reader = BlockReader::default();
    let block = reader.read(&snapshot, frame).unwrap();
    let page = block.pieces().find_map(|(run, bytes)| {
        let at = run.first..run.first + run.count;
        let page = usize::try_from(GFN.checked_sub(at.start)?).unwrap() * 4096;
        at.contains(&GFN).then(|| bytes[page..page + 32].to_vec())
    });
    let page = page.filter(|page| page.starts_with(b"FERRY GENERATION"))?;
    Some(page[16..].iter().map(|b| format!("{b:02x}")).collect())
}

/// Each restore is a guest of its own, by an id in its memory that all its moves keep.
#[test]
fn a_copy_has_an_identity_of_its_own_and_a_moved_guest_keeps_its() {
    let Some((dir, first, source)) = writer() else {
        return;
    };
    let file = |name: &str| dir.path().join(name);
    let saved = |host: &Host, name: &str| {
        snapshot(host, &request(&file(name)));
        generation(&file(name)).unwrap()
    };
    snapshot(&source, &request(&first));
    let id = generation(&first).unwrap();
    assert_eq!(saved(&source, "again"), id, "writing it changes nothing");
    let mut seen = vec![id.clone()];
    for (name, more) in [("demand", &[][..]), ("eager", &["--eager"])] {
        let copy = restore(&first, more);
        copy.says("all of the guest's memory is here");
        let its = saved(&copy, name);
        assert!(!seen.contains(&its), "{its} in {seen:?}");
        seen.push(its);
        copy.proves_running();
        if name == "demand" {
            continue;
        }
        // It moves, by each way that its memory can go, and what is saved of it says who it is.
        let mut here = copy;
        for (to, handover) in [(Host::receive(), false), (Host::receive_unix(), true)] {
            let mut options = Host::options();
            if handover {
                options.handover = Handover::On;
            }
            here.migrate_well(to.uri(), &options);
            assert_eq!(here.ends(), Some(0));
            let name = if handover { "handed" } else { "moved" };
            assert_eq!(Some(&saved(&to, name)), seen.last());
            here = to;
        }
    }
    let same = restore(&first, &["--same-identity"]);
    same.says("all of the guest's memory is here");
    assert_eq!(saved(&same, "same"), id);
    assert!(same.verdict().writes > 0);

    // A state of an older version is of a guest with an id all the same.
    let older = SnapshotRequest {
        state_version: Some(3),
        ..request(&file("older"))
    };
    snapshot(&source, &older);
    let copy = restore(&older.path, &["--eager"]);
    copy.says("all of the guest's memory is here");
    assert!(!seen.contains(&saved(&copy, "newer")));
}

/// A kernel in the middle of its run: its result is the published one.
#[test]
fn a_kernel_comes_back_and_its_result_is_right() {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, compress, eager) in [
        ("demand", Compress::Adaptive, false),
        ("eager", Compress::None, true),
    ] {
        let path = dir.path().join(name);
        let mut source = Host::run_kernel("mg.S", "64M", 1);
        let stop = SnapshotRequest {
            compress,
            then: Then::Stop,
            ..request(&path)
        };
        snapshot(&source, &stop);
        assert_eq!(source.ends(), Some(0), "{:#?}", source.said());
        let more: &[&str] = if eager { &["--eager"] } else { &[] };
        let restored = restore(&path, more);
        restored.guest_line("a result", |line| matches!(line, Line::Result(_)));
        assert!(restored.result() > 0);
    }
}

#[test]
fn a_guest_that_stood_still_stands_still_again_and_nothing_is_overwritten() {
    let Some((dir, path, source)) = writer() else {
        return;
    };
    snapshot(
        &source,
        &SnapshotRequest {
            then: Then::Pause,
            ..request(&path)
        },
    );
    assert_eq!(source.state(), State::Paused);
    let before = std::fs::read(&path).unwrap();
    let error = source
        .client()
        .snapshot(&request(&path))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("exists already") && error.contains("--force"),
        "{error}"
    );
    assert!(std::fs::read(&path).unwrap() == before);
    // This one is of a paused guest.
    snapshot(
        &source,
        &SnapshotRequest {
            force: true,
            ..request(&path)
        },
    );
    assert_eq!(source.state(), State::Paused);
    only(dir.path(), &["guest"]);
    let nowhere = dir.path().join("no/such/guest");
    let error = source
        .client()
        .snapshot(&request(&nowhere))
        .unwrap_err()
        .to_string();
    assert!(error.contains("goes on as before"), "{error}");
    source.act(Action::Resume).unwrap();
    source.proves_running();

    let restored = restore(&path, &[]);
    restored.says("paused as it was");
    assert_eq!(restored.state(), State::Paused);
    restored.act(Action::Resume).unwrap();
    assert!(restored.verdict().writes > 0);
}

#[test]
fn the_report_of_a_restore_is_one_object() {
    let Some((dir, path, source)) = writer() else {
        return;
    };
    let saved = snapshot(&source, &request(&path));
    let api = dir.path().join("api");
    let path = path.to_str().unwrap();
    let refused = run(&["restore", path, "--json", "--api", api.to_str().unwrap()]);
    assert!(refused.stderr.contains("--serial null"), "{refused:?}");
    for more in [&["--eager"][..], &[]] {
        let args = ["restore", path, "--json", "--serial", "null"];
        let mut restored = Host::start(&[&args, more].concat());
        restored.says("the guest runs here");
        ferry_tests::until("all memory is there", || {
            restored.client().status().unwrap().missing.is_none()
        });
        restored.act(Action::Stop).unwrap();
        assert_eq!(restored.ends(), Some(0), "{:#?}", restored.said());
        let report: RestoreReport =
            serde_json::from_str(&restored.guest_lines().join("\n")).unwrap();
        assert_eq!(report.eager, !more.is_empty(), "{report:#?}");
        assert_eq!((&report.error, &report.why_eager), (&None, &None));
        assert_eq!(
            (report.pages, report.data_pages),
            (saved.pages, saved.data_pages)
        );
        assert_eq!(report.session, saved.session);
        let id = report.generation.as_deref().map(str::len);
        assert_eq!((id, report.new_identity), (Some(32), true), "{report:#?}");
        assert!(
            report.bytes_read > 0 && report.bytes_read < saved.bytes,
            "{report:#?}"
        );
        assert!(
            report.start_ms > 0.0 && report.start_ms <= report.total_ms,
            "{report:#?}"
        );
    }
}

/// Cut short, of another version, or damaged: refused in a sentence, or ended before the guest has
/// seen any of it.
#[test]
fn damaged_files_make_no_guest() {
    let Some((dir, path, source)) = writer() else {
        return;
    };
    snapshot(
        &source,
        &SnapshotRequest {
            compress: Compress::Zstd,
            ..request(&path)
        },
    );
    let whole = std::fs::read(&path).unwrap();
    let with = |name: &str, change: &dyn Fn(&mut Vec<u8>)| -> PathBuf {
        let mut bytes = whole.clone();
        change(&mut bytes);
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let half = with("half", &|bytes| bytes.truncate(bytes.len() / 2));
    let version = with("version", &|bytes| {
        bytes[8..12].copy_from_slice(&[7, 0, 7, 0])
    });
    let end = with("end", &|bytes| {
        let at = bytes.len() - 100;
        bytes[at] ^= 4;
    });
    let other = with("other", &|bytes| bytes[..4].copy_from_slice(b"oops"));
    let api = dir.path().join("api");
    for (path, why) in [
        (half, "cut short"),
        (version, "format 7, this ferry reads format 1"),
        (end, "damaged at byte"),
        (other, "is not a ferry snapshot"),
        (dir.path().join("nothing"), "cannot be opened"),
    ] {
        let path = path.to_str().unwrap();
        let ran = run(&[
            "restore",
            path,
            "--serial",
            "null",
            "--api",
            api.to_str().unwrap(),
        ]);
        assert_eq!(ran.code, Some(1), "{ran:?}");
        assert_eq!(ran.stderr.trim_end().lines().count(), 1, "{ran:?}");
        assert!(
            ran.stderr.contains(why) && ran.stderr.contains(path),
            "{ran:?}"
        );
    }
    // Every frame in the second half: whatever the guest does, one of them is met while it runs.
    let opened = Snapshot::open(whole.clone()).unwrap();
    let frames: Vec<u64> = opened.frames().collect();
    let pages = with("pages", &|_| {});
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&pages)
        .unwrap();
    for frame in &frames[frames.len() / 2..] {
        let at = usize::try_from(*frame).unwrap() + 50;
        file.write_all_at(&[!whole[at]], at as u64).unwrap();
    }
    // The one that is needed before the guest runs: it is told of its new identity there.
    let first = opened.frame_of(0xef).unwrap();
    let identity = with("identity", &|bytes| {
        let at = usize::try_from(first).unwrap() + 50;
        bytes[at] = !bytes[at];
    });
    for (pages, more) in [
        (&pages, &["--eager"][..]),
        (&pages, &[]),
        (&identity, &["--eager"]),
        (&identity, &[]),
        (&identity, &["--same-identity"]),
    ] {
        let mut restored = restore(pages, more);
        assert_eq!(restored.ends(), Some(1), "{:#?}", restored.said());
        let line = restored.says("cannot be re");
        assert!(
            line.contains("page 0x") && line.contains("at byte"),
            "{line}"
        );
    }
}

/// Where a guest's page faults may not be handled, all of it is read first, and the user is told
/// why.
#[test]
fn without_userfaultfd_memory_is_read_first() {
    if !guests_run() || !can_pretend() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, closed) = (dir.path().join("guest"), dir.path().join("closed"));
    let source = Host::run(WORK, "64M", 1);
    snapshot(&source, &request(&path));
    std::fs::write(&closed, "").unwrap();
    std::fs::set_permissions(&closed, std::os::unix::fs::PermissionsExt::from_mode(0o000)).unwrap();
    let restored = Host::start_where(
        &format!("mount --bind {} /dev/userfaultfd", closed.display()),
        "setpriv --bounding-set=-sys_ptrace,-dac_override,-dac_read_search",
        &["restore", path.to_str().unwrap(), "--serial", "stdio"],
    );
    let line = restored.says("all memory was read before the guest ran");
    assert!(line.contains("/dev/userfaultfd"), "{line}");
    assert!(restored.verdict().writes > 0);
}

/// A disk is not in the file, so it must be as it was.
#[test]
fn a_disk_that_was_changed_is_refused() {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.img");
    std::fs::File::create(&disk)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let (path, given) = (dir.path().join("guest"), disk.to_str().unwrap());
    let mut source = Host::run_with(WORK, "64M", 1, &["--disk", given]);
    snapshot(
        &source,
        &SnapshotRequest {
            then: Then::Stop,
            ..request(&path)
        },
    );
    assert_eq!(source.ends(), Some(0));
    let restored = restore(&path, &["--disk", given]);
    assert!(restored.verdict().writes > 0);

    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
    std::fs::OpenOptions::new()
        .write(true)
        .open(&disk)
        .unwrap()
        .set_modified(later)
        .unwrap();
    let mut refused = restore(&path, &["--disk", given]);
    assert_eq!(refused.ends(), Some(1));
    let line = refused.says("was changed");
    assert!(line.contains(given) && line.contains("--force"), "{line}");
    let mut none = restore(&path, &[]);
    assert_eq!(none.ends(), Some(1));
    none.says("1 disks, but 0");
    let forced = restore(&path, &["--disk", given, "--force"]);
    assert!(forced.verdict().writes > 0);
}
