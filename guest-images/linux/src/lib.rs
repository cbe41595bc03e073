//! The first process of a Linux that ferry starts: of a guest (`ferry run --linux`), or of a nested
//! host, which QEMU emulates where this machine's KVM cannot run Linux guests.
//!
//! It mounts what programs expect, loads the modules that lie in `/modules` in the order of their
//! names, brings up the network, and then does what the kernel's command line says:
//!
//! | token | meaning |
//! |---|---|
//! | `ferry.role=host` | an [`agent`] that runs commands for its starter; `guest` if left out |
//! | `ferry.agent=ADDRESS:PORT,TOKEN` | where the agent reports to, and the word that proves it |
//! | `ferry.net=NAME=ADDRESS/PREFIX[,GATEWAY]` | an address for a network interface; may be given several times |
//! | `ferry.run=WORK` | what a guest runs: a kernel such as `mg.S`, or the writer (`dirty:…`), in a process of its own |
//! | `ferry.repeat=N` | runs of a kernel; 1 if left out, 0 for until told to stop |
//! | `ferry.cpus=N` | threads of the work; as many as there are processors if left out |
//! | `ferry.disk=/dev/vda` | a disk that the guest writes all over, again and again, and verifies |
//! | `ferry.rng=/dev/hwrng` | random numbers that the guest reads all the time, none of which may come twice |
//!
//! A guest also answers HTTP on port 80 (a counter and an echo) and takes commands on its console,
//! and on its virtio console (`/dev/hvc0`) where it has one.
//!
//! The crate is compiled with rustc alone and linked statically, so it has no dependency but the
//! kernels; the system calls that std does not offer are in `sys`.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

pub mod agent;
pub mod client;
pub mod frames;
pub mod tsc;

mod content;
mod disk;
mod guest;
mod http;
mod identity;
mod machine;
mod memory;
mod nodes;
mod options;
mod rng;
mod sys;
mod vsock;
mod work;

use options::Options;

/// The first thing that init prints.
pub const START: &str = "ferry-linux: init";

/// Everything: `/init` when it is process 1, else one of its parts by name.
pub fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if std::process::id() == 1 {
        init();
        return;
    }
    let done = match words.as_slice() {
        ["work", spec, threads, repeat] => work::run(spec, threads, repeat),
        ["disk", path] => disk::run(path),
        ["memory", keep, free] => memory::run(keep, free),
        ["rng", path] => rng::run(path),
        ["get", address, path] => http::get(address, path),
        ["client", address] => client::run(address),
        ["vsock", port] => vsock::client(port),
        ["vsock-serve", port] => vsock::serve(port),
        ["unix-serve", path] => vsock::unix_serve(path),
        ["unix-ask", path, port, line] => vsock::unix_client(path, port, line, false),
        ["unix-hold", path, port, line] => vsock::unix_client(path, port, line, true),
        ["clock"] => machine::clock(None),
        ["clock", by] => machine::clock(Some(by)),
        ["cat", path] => machine::cat(path),
        ["write", path] => machine::write(path),
        ["truncate", path, bytes] => machine::truncate(path, bytes),
        ["tasks"] => machine::tasks(),
        ["resize", path, columns, rows] => machine::resize(path, columns, rows),
        ["tap", name] => machine::tap(name),
        ["bridge", network, ports @ ..] => machine::bridge(network, ports),
        _ => Err(
            "init is the first process; its parts are work, disk, memory, rng, get, client, vsock, vsock-serve, unix-serve, unix-ask, unix-hold, clock, cat, write, truncate, tasks, resize, tap and bridge"
                .to_owned(),
        ),
    };
    if let Err(sentence) = done {
        eprintln!("init: {sentence}");
        std::process::exit(1);
    }
}

/// Process 1 must not end: the kernel would panic. So it says what went wrong, and goes on with
/// what works.
fn init() {
    // The start mark for measuring a boot: before anything is loaded.
    println!("{START}");
    for sentence in machine::set_up() {
        println!("init: {sentence}");
    }
    let options = Options::of_this_kernel();
    for wish in &options.networks {
        if let Err(sentence) = machine::configure(wish) {
            println!("init: {sentence}");
        }
    }
    if options.host {
        agent::serve(options.agent.as_deref());
    } else {
        guest::serve(&options);
    }
    machine::power_off();
}
