//! Disks that are slow or fail: a library that is loaded before ferry's own, and is told what to do
//! through a file that both map.

use crate::{Host, until};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

const SOURCE: &str = include_str!("disk_faults.c");

/// What the words of the file are; as in the C source.
const MODE: u64 = 0;
const CALLS: u64 = 1;
const HOLD_AT: u64 = 2;
const HELD: u64 = 3;
const SYNCS: u64 = 4;
const HOLD_SYNC_AT: u64 = 5;

/// How a disk behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Normal,
    Slow,
    Failing,
}

/// The disks of one process.
#[derive(Debug)]
pub(super) struct DiskFaults {
    path: PathBuf,
    words: File,
}

impl DiskFaults {
    /// For the files of this folder's file system.
    pub fn new(dir: &Path, name: &str) -> Self {
        let path = dir.join(name);
        let words = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        words.set_len(4096).unwrap();
        Self { path, words }
    }

    /// Starts a VMM with these disks.
    pub fn start(&self, args: &[&str]) -> Host {
        let wrapper = self.wrapper();
        let wrapper: Vec<&str> = wrapper.iter().map(String::as_str).collect();
        Host::start_by(&wrapper, args)
    }

    /// What starts a process with these disks.
    fn wrapper(&self) -> [String; 3] {
        [
            "env".into(),
            format!("LD_PRELOAD={}", library().display()),
            format!("FERRY_DISK_FAULTS={}", self.path.display()),
        ]
    }

    pub fn set(&self, mode: Mode) {
        self.write(MODE, mode as u64);
    }

    /// The read or write of this number, from 1, does not return until [`go_on`](Self::go_on).
    pub fn hold_at(&self, call: u64) {
        self.write(HOLD_AT, call);
    }

    /// As [`hold_at`](Self::hold_at), of flushes.
    pub fn hold_sync_at(&self, call: u64) {
        self.write(HOLD_SYNC_AT, call);
    }

    /// Reads and writes so far.
    pub fn calls(&self) -> u64 {
        self.read(CALLS)
    }

    /// Flushes so far.
    pub fn syncs(&self) -> u64 {
        self.read(SYNCS)
    }

    /// Waits until a call is held, or `over`; whether one is.
    pub fn holds(&self, over: impl Fn() -> bool) -> bool {
        until("a call is held, or it is over", || {
            self.read(HELD) != 0 || over()
        });
        self.read(HELD) != 0
    }

    /// What is held returns, and nothing is held any more.
    pub fn go_on(&self) {
        self.write(HOLD_AT, 0);
        self.write(HOLD_SYNC_AT, 0);
    }

    fn write(&self, word: u64, value: u64) {
        let bytes = value.to_ne_bytes();
        self.words.write_all_at(&bytes, word * 8).unwrap();
    }

    fn read(&self, word: u64) -> u64 {
        let mut bytes = [0; 8];
        self.words.read_exact_at(&mut bytes, word * 8).unwrap();
        u64::from_ne_bytes(bytes)
    }
}

/// The library, built once for this process by the compiler that Rust links with.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = LIBRARY.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let (source, path) = (dir.path().join("faults.c"), dir.path().join("faults.so"));
        std::fs::write(&source, SOURCE).unwrap();
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .args([&path, &source])
            .arg("-ldl")
            .status()
            .unwrap();
        assert!(built.success(), "disk_faults.c does not build");
        (dir, path)
    });
    path
}
