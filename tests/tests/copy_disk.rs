//! `--copy-disk`: a guest's disks move to a host that does not reach them, or the guest stays and
//! nothing of either side's files is lost.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_devices::block::Disk;
use ferry_migration::options::{Compress, Options, PolicyKind};
use ferry_migration::report::{Report, Status};
use ferry_tests::{Host, State, guests_run, is_locked};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

const WORK: &str = "dirty:wss=8M,rate=2000";
const SIZE: u64 = (3 << 20) + 512;

/// A directory with a disk that has data, zeros and holes.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = File::create(dir.path().join("disk.img")).unwrap();
        disk.set_len(SIZE).unwrap();
        let mut word = 1u64;
        for at in (0..SIZE).step_by(100_000).take(12) {
            let bytes: Vec<u8> = (0..50_000u64)
                .map(|n| {
                    word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(n);
                    word.to_be_bytes()[0]
                })
                .collect();
            disk.write_all_at(&bytes, at).unwrap();
        }
        disk.write_all_at(&[0; 70_000], 1 << 21).unwrap();
        disk.write_all_at(b"the end", SIZE - 7).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn source(&self) -> Host {
        Host::run_with(WORK, "64M", 1, &["--disk", &self.text("disk.img")])
    }

    fn destination(&self, name: &str) -> Host {
        Host::receive_with(&["--disk", &self.text(name)])
    }
}

fn options() -> Options {
    Options {
        copy_disk: true,
        verify: true,
        ..Host::options()
    }
}

#[test]
fn a_disk_arrives_whole_and_sparse() {
    if !guests_run() {
        return;
    }
    let cases = [
        (PolicyKind::Precopy, Compress::Auto, 3),
        (PolicyKind::Postcopy, Compress::Zstd, 1),
    ];
    for (policy, compress, channels) in cases {
        let place = Place::new();
        let mut source = place.source();
        // The second time over what the copy's place held before.
        if policy == PolicyKind::Postcopy {
            std::fs::write(
                place.path("copy.img"),
                vec![7; usize::try_from(SIZE).unwrap()],
            )
            .unwrap();
        }
        let destination = place.destination("copy.img");
        let options = Options {
            policy,
            compress,
            channels: Some(channels),
            ..options()
        };
        let report = source.migrate_well(destination.uri(), &options);
        let disk = report.disk.unwrap();
        eprintln!("{}: {disk:?}", policy.name());
        assert_eq!((disk.disks, disk.total), (1, SIZE));
        // The guest does not write: each block crosses once.
        assert_eq!((disk.resent, disk.in_pause), (0, 0));
        assert_eq!(disk.sent + disk.zero, SIZE.next_multiple_of(64 << 10));
        assert!(disk.zero >= 1 << 20 && disk.sent >= 600_000, "{disk:?}");
        assert!(disk.bytes_wire < disk.sent + (64 << 10), "{disk:?}");
        assert_eq!(report.verified, Some(true));
        assert_eq!(source.ends(), Some(0));
        destination.proves_running();
        assert!(is_locked(&place.path("copy.img")));
        assert!(!is_locked(&place.path("disk.img")));
        assert!(destination.verdict().writes > 0);
        let [sent, here] = ["disk.img", "copy.img"].map(|n| std::fs::read(place.path(n)).unwrap());
        assert!(sent == here, "{}: the copy differs", policy.name());
        let blocks = |name| std::fs::metadata(place.path(name)).unwrap().blocks() * 512;
        assert!(
            blocks("copy.img") <= SIZE - (1 << 20),
            "the copy has no holes"
        );
    }
}

/// The guest stays, with its disk; what ferry made for it is gone, and what was there before is as
/// it was.
fn stays(source: &mut Host, place: &Place, to: &str, args: &[&str], sentence: &str) -> Report {
    let before = std::fs::read(place.path("disk.img")).unwrap();
    let destination = Host::receive_with(args);
    let report = source.migrate(destination.uri(), &options());
    assert_eq!(report.status, Status::Failed, "{to}: {report:#?}");
    let error = report.error.clone().unwrap();
    assert!(error.contains(sentence), "{to}: {error}");
    assert_eq!(source.state(), State::Running);
    // What it made is gone when it says so.
    destination.says("keeps its guest");
    assert!(is_locked(&place.path("disk.img")));
    assert!(std::fs::read(place.path("disk.img")).unwrap() == before);
    report
}

#[test]
fn what_cannot_be_a_copy_is_refused_and_the_guest_runs_on() {
    if !guests_run() {
        return;
    }
    let place = Place::new();
    let mut source = place.source();
    let disk = |name: &str| ["--disk".to_owned(), place.text(name)];
    let small = vec![5; 512];
    std::fs::write(place.path("small.img"), &small).unwrap();
    std::os::unix::fs::symlink(place.path("disk.img"), place.path("link.img")).unwrap();
    let used = Disk::missing_pages(&place.path("used.img"), false, SIZE).unwrap();
    used.0.copy_in(0, b"another's").unwrap();
    let read_only = ["--disk".to_owned(), format!("{},ro", place.text("ro.img"))];
    for (what, args, sentence) in [
        ("no disk", vec![], "1 disks, but 0"),
        ("too small", disk("small.img").to_vec(), "512 bytes"),
        // The source's own disk, by whichever name.
        (
            "itself",
            disk("disk.img").to_vec(),
            "a copy would overwrite it",
        ),
        (
            "a link to itself",
            disk("link.img").to_vec(),
            "a copy would overwrite it",
        ),
        ("another's", disk("used.img").to_vec(), "in use"),
        ("a directory", disk("").to_vec(), "cannot be opened"),
        (
            "no directory",
            disk("no/such.img").to_vec(),
            "directory must exist",
        ),
        ("read-only", read_only.to_vec(), "read-only"),
    ] {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let report = stays(&mut source, &place, what, &args, sentence);
        // Refused before anything was sent.
        assert_eq!(report.disk.map_or(0, |d| d.sent), 0, "{report:#?}");
    }
    assert!(!place.path("ro.img").exists());
    assert_eq!(std::fs::read(place.path("small.img")).unwrap(), small);
    let mut bytes = [0; 9];
    used.0.copy_out(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"another's");
    // And then it moves.
    let destination = place.destination("copy.img");
    source.migrate_well(destination.uri(), &options());
    destination.proves_running();
    assert!(destination.verdict().writes > 0);
}

#[test]
fn a_disk_that_cannot_be_read_to_its_end_keeps_the_guest_here() {
    if !guests_run() {
        return;
    }
    let place = Place::new();
    let mut source = place.source();
    let file = File::options()
        .write(true)
        .open(place.path("disk.img"))
        .unwrap();
    file.set_len(1 << 20).unwrap();
    stays(
        &mut source,
        &place,
        "a cut disk",
        &["--disk", &place.text("copy.img")],
        "it was truncated",
    );
    assert!(!place.path("copy.img").exists());
    assert!(source.verdict().writes > 0);
}

/// The destination has read COMMIT and cannot start the guest: it is asked until it can.
#[test]
fn a_disk_that_is_locked_where_the_guest_goes_is_waited_for() {
    if !guests_run() {
        return;
    }
    let place = Place::new();
    std::fs::copy(place.path("disk.img"), place.path("other.img")).unwrap();
    let mut source = place.source();
    let other = place.text("other.img");
    let destination = Host::receive_with(&["--disk", &other, "--force"]);
    let locked = Disk::open(&place.path("other.img"), false).unwrap();
    locked.lock().unwrap();
    let report = source.migrate(destination.uri(), &Host::options());
    assert_eq!(report.status, Status::InDoubt, "{report:#?}");
    let error = report.error.unwrap();
    assert!(error.contains("could not be started"), "{error}");
    assert_eq!(source.state(), State::InDoubt);
    locked.unlock().unwrap();
    destination.reaches(State::Running);
    assert_eq!(source.ends(), Some(0), "{:#?}", source.said());
    destination.proves_running();
}
