//! A process in the sandbox that tries files: `confined FOLDER OTHER` may use FOLDER. It makes
//! both, and prints a line for each attempt: `done` or `refused`, and what was tried.
#![allow(clippy::unwrap_used)]

use ferry_vmm::sandbox::{Files, Mode, enter};
use ferry_vmm::thread::{Kind, spawn};
use rustix::fs::{CWD, Mode as Bits, OFlags, openat};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

fn main() {
    let mut folders = std::env::args_os().skip(1).map(PathBuf::from);
    let (folder, other) = (folders.next().unwrap(), folders.next().unwrap());
    for folder in [&folder, &other] {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("file"), "secret").unwrap();
    }
    let open = File::open(other.join("file")).unwrap();
    let mut files = Files::of_a_vmm();
    files.nameable(&folder);
    enter(Mode::On, files).unwrap();
    let tries = move || {
        attempts("folder", &folder);
        attempts("other", &other);
        tell("read", "open", io::read_to_string(&open).map(drop));
        tell("read", "status", File::open("/proc/self/status").map(drop));
        tell("list", "/", fs::read_dir("/").map(drop));
        Ok(())
    };
    let failed = |why: String| println!("{why}");
    let thread = spawn(Kind::Api, "tries", tries, failed).unwrap();
    thread.join().unwrap();
}

fn attempts(name: &str, folder: &Path) {
    let file = folder.join("file");
    tell("read", name, fs::read(&file).map(drop));
    tell(
        "write",
        name,
        File::options().append(true).open(&file).map(drop),
    );
    tell("make", name, File::create_new(folder.join("new")).map(drop));
    let nameless = OFlags::TMPFILE | OFlags::RDWR;
    let made = openat(CWD, folder, nameless, Bits::RUSR).map(drop);
    tell("tmpfile", name, made.map_err(io::Error::from));
    tell("remove", name, fs::remove_file(&file));
}

fn tell(what: &str, name: &str, done: io::Result<()>) {
    match done {
        Ok(()) => println!("done {what} {name}"),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => println!("refused {what} {name}"),
        Err(e) => println!("{what} {name}: {e}"),
    }
}
