//! Threads in the sandbox: one that does its work, and ones that try what they may not.
//!
//! A sandbox is entered once, by a process with one thread, so each case is a process: this binary
//! starts itself, without libtest and its threads.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_vmm::sandbox::{Files, Mode, VIOLATION, enter, support};
use ferry_vmm::thread::{Kind, spawn};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, socket_with,
};
use rustix::process::Resource;
use std::fs::File;
use std::net::TcpStream;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Which case the process is for.
const CASE: &str = "FERRY_SANDBOX_CASE";

/// What a shell shows as the status [`VIOLATION`].
const SIGSYS: i32 = VIOLATION as i32 - 128;

type Case = (&'static str, Kind, fn());

/// What a thread of the kind must not do, by the name of the system call.
const ATTACKS: [(&str, Case); 12] = [
    ("socket", ("vcpu-socket", Kind::Vcpu, connect)),
    ("openat", ("vcpu-create", Kind::Vcpu, create)),
    ("socket", ("device-socket", Kind::Device, connect)),
    ("openat", ("device-create", Kind::Device, create)),
    ("execve", ("device-execve", Kind::Device, become_a_program)),
    ("socket", ("vsock-inet", Kind::Sockets, connect_elsewhere)),
    ("openat", ("vsock-create", Kind::Sockets, create)),
    ("bind", ("vsock-bind", Kind::Sockets, listen)),
    ("execve", ("migr-execve", Kind::Migration, become_a_program)),
    ("prlimit64", ("migr-limit", Kind::Migration, set_a_limit)),
    ("listen", ("api-listen", Kind::Api, listen)),
    ("execve", ("vmm-execve", Kind::Vmm, become_a_program)),
];

/// What makes a thread or a process. The C library blocks all signals meanwhile, so that the kernel
/// ends the process by SIGSYS, and nothing can tell.
const SILENT: [Case; 4] = [
    ("vcpu-thread", Kind::Vcpu, start_a_thread),
    ("vsock-thread", Kind::Sockets, start_a_thread),
    ("migr-program", Kind::Migration, start_a_program),
    ("vmm-program", Kind::Vmm, start_a_program),
];

const WORK: [Case; 6] = [
    ("vcpu", Kind::Vcpu, work),
    ("device", Kind::Device, work),
    ("vsock", Kind::Sockets, talk),
    ("migration", Kind::Migration, work),
    ("api", Kind::Api, work),
    ("vmm", Kind::Vmm, work),
];

fn connect() {
    let _ = UnixStream::connect("/nowhere");
}

fn connect_elsewhere() {
    let _ = TcpStream::connect("127.0.0.1:9");
}

/// As a vsock device does with programs of the host: it connects, accepts, sends, ends.
fn talk() {
    let (kind, flags) = (SocketType::STREAM, SocketFlags::NONBLOCK);
    let socket = socket_with(AddressFamily::UNIX, kind, flags, None).unwrap();
    let nowhere = SocketAddrUnix::new("/nowhere").unwrap();
    assert!(rustix::net::connect(&socket, &nowhere).is_err());
    assert!(rustix::net::accept_with(&socket, flags).is_err());
    assert!(rustix::net::send(&socket, b"x", SendFlags::NOSIGNAL).is_err());
    assert!(rustix::net::recv(&socket, &mut [0; 8], RecvFlags::PEEK).is_err());
    let _ = UnixStream::from(socket).shutdown(std::net::Shutdown::Write);
    work();
}

fn create() {
    let _ = File::create("/nowhere/new");
}

fn set_a_limit() {
    // A migration may ask for it.
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let _ = rustix::process::setrlimit(Resource::Nofile, limit);
}

fn start_a_thread() {
    let _ = std::thread::Builder::new().spawn(|| ());
}

fn start_a_program() {
    let _ = Command::new("/bin/true").status();
}

fn become_a_program() {
    let _ = Command::new("/bin/true").exec();
}

fn listen() {
    let path = std::env::temp_dir().join(format!("ferry-sandbox-{}", std::process::id()));
    let listener = UnixListener::bind(&path);
    std::fs::remove_file(&path).unwrap();
    listener.unwrap();
}

/// What every thread does, and the paths of libraries that are seldom taken.
fn work() {
    std::thread::sleep(Duration::from_millis(1));
    // Makes the heap of this thread grow and shrink: malloc looks at the host's settings then.
    for _ in 0..2 {
        let many: Vec<Vec<u8>> = (0..300).map(|_| vec![1; 100 << 10]).collect();
        assert!(many.iter().all(|bytes| bytes[0] == 1));
    }
    panic!("this thread has worked");
}

fn child(case: &str) -> ExitCode {
    let attacks = ATTACKS.iter().map(|(_, case)| case);
    let mut all = attacks.chain(&WORK).chain(&SILENT);
    let (name, kind, body) = *all.find(|(n, _, _)| *n == case).unwrap();
    // To make a socket is allowed, and to listen on it is not.
    let mut files = Files::default();
    files.socket(&std::env::temp_dir().join("any"));
    assert!(enter(Mode::On, files).is_ok());
    let (tell, told) = mpsc::channel();
    let body = move || {
        body();
        Ok(())
    };
    let thread = spawn(kind, name, body, move |why| tell.send(why).unwrap()).unwrap();
    thread.join().unwrap();
    // The work's panic is told as any is; an attack has nothing to tell.
    match told.recv() {
        Ok(why) if why.contains("has worked") => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn run(case: &str) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .env(CASE, case)
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn main() -> ExitCode {
    if let Ok(case) = std::env::var(CASE) {
        return child(&case);
    }
    if !support().seccomp {
        println!("NOT RUN: this kernel has no seccomp filters");
        return ExitCode::SUCCESS;
    }
    for (name, _, _) in WORK {
        let out = run(name);
        assert_eq!(out.status.code(), Some(0), "{name}: {out:?}");
        println!("test {name} works ... ok");
    }
    for (call, (name, kind, _)) in ATTACKS {
        let out = run(name);
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(VIOLATION.into()), "{name}: {out:?}");
        let sentence = format!("a {kind} thread ({name}) tried the system call {call}, ");
        assert!(stderr.contains(&sentence), "{name}: {stderr}");
        println!("test {name} ends the process ... ok");
    }
    for (name, _, _) in SILENT {
        let out = run(name);
        assert_eq!(out.status.signal(), Some(SIGSYS), "{name}: {out:?}");
        println!("test {name} is killed ... ok");
    }
    ExitCode::SUCCESS
}
