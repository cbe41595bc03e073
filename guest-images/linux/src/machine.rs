//! The machine around init: file systems, modules, network, its end.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::options::{Network, network};
use crate::sys;

/// Mounts, loads the modules, brings up the loopback; returns what did not work, a sentence each.
pub fn set_up() -> Vec<String> {
    let mut failed = Vec::new();
    for (kind, target) in [
        (c"proc", c"/proc"),
        (c"sysfs", c"/sys"),
        (c"devtmpfs", c"/dev"),
        (c"devpts", c"/dev/pts"),
        (c"tmpfs", c"/tmp"),
        (c"tmpfs", c"/run"),
    ] {
        let path = target.to_string_lossy();
        let _ = fs::create_dir_all(&*path);
        if let Err(e) = sys::mount(kind, target) {
            failed.push(format!("{path} cannot be mounted ({e})"));
        }
    }
    for path in modules() {
        if let Err(e) = File::open(&path).and_then(|file| sys::load_module(&file)) {
            failed.push(format!(
                "the module {} cannot be loaded ({e})",
                path.display()
            ));
        }
    }
    let loopback = Network {
        name: "lo".to_owned(),
        address: [127, 0, 0, 1],
        prefix: 8,
        gateway: None,
    };
    failed.extend(configure(&loopback).err());
    failed
}

/// The modules to load, in order.
fn modules() -> Vec<PathBuf> {
    let entries = fs::read_dir("/modules").into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|e| e.path()).collect();
    paths.sort();
    paths
}

/// Gives an interface its address. Drivers find their devices by themselves, so it is waited for,
/// for some seconds.
pub fn configure(network: &Network) -> Result<(), String> {
    let mut tries = 100;
    loop {
        match sys::configure(network) {
            Ok(()) => return Ok(()),
            Err(e) if e.raw_os_error() == Some(19) && tries > 0 => tries -= 1,
            Err(e) => {
                return Err(format!(
                    "the network interface {} cannot be configured ({e})",
                    network.name
                ));
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Powers the machine off. If even that fails, all that is left is to wait.
pub fn power_off() -> ! {
    end(false)
}

/// Resets the machine.
pub fn reset() -> ! {
    end(true)
}

fn end(reset: bool) -> ! {
    let error = sys::end(reset);
    println!("init: the machine cannot be ended ({error})");
    loop {
        std::thread::park();
    }
}

/// Milliseconds since the kernel's start.
pub fn uptime_ms() -> u64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = text.split(' ').next().and_then(|t| t.parse::<f64>().ok());
    Duration::try_from_secs_f64(seconds.unwrap_or(0.0))
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// CLOCK_REALTIME.
fn time() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

/// Both clocks of this machine, on one line that ends in `mark`.
pub fn time_line(mark: &str) -> String {
    let time_ms = time().as_millis();
    format!(
        "ferry-linux: time_ms={time_ms} uptime_ms={} {mark}",
        uptime_ms()
    )
}

/// `init clock [MS]`: moves the clock by so many milliseconds, and tells it, in milliseconds.
pub fn clock(by: Option<&str>) -> Result<(), String> {
    if let Some(by) = by {
        let by: i64 = by
            .parse()
            .map_err(|_| format!("`{by}` is not a number of milliseconds"))?;
        let distance = Duration::from_millis(by.unsigned_abs());
        let moved = match by < 0 {
            true => time().saturating_sub(distance),
            false => time() + distance,
        };
        sys::set_clock(moved).map_err(|e| format!("the clock cannot be set ({e})"))?;
    }
    println!("{}", time().as_millis());
    Ok(())
}

/// `init cat PATH`.
pub fn cat(path: &str) -> Result<(), String> {
    let copied =
        File::open(path).and_then(|mut file| io::copy(&mut file, &mut io::stdout().lock()));
    copied
        .map(drop)
        .map_err(|e| format!("{path} cannot be read ({e})"))
}

/// `init write PATH`: what comes on stdin.
pub fn write(path: &str) -> Result<(), String> {
    let copied =
        File::create(path).and_then(|mut file| io::copy(&mut io::stdin().lock(), &mut file));
    copied
        .map(drop)
        .map_err(|e| format!("{path} cannot be written ({e})"))
}

/// `O_NOCTTY` of `fcntl.h`.
const NO_CONTROLLING_TERMINAL: i32 = 0o400;

/// A terminal by its path, which becomes no process's controlling terminal.
pub fn terminal(path: &str) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true);
    options.custom_flags(NO_CONTROLLING_TERMINAL).open(path)
}

/// `init resize PATH COLUMNS ROWS`: makes a terminal so large.
pub fn resize(path: &str, columns: &str, rows: &str) -> Result<(), String> {
    let number = |text: &str| {
        let number = text.parse::<u16>();
        number.map_err(|_| format!("`{text}` is no number of characters"))
    };
    let (columns, rows) = (number(columns)?, number(rows)?);
    terminal(path)
        .and_then(|terminal| sys::set_terminal_size(&terminal, columns, rows))
        .map_err(|e| format!("{path} cannot be resized ({e})"))
}

/// How large the terminal at `path` is, on one line.
pub fn size_line(path: &str) -> String {
    match terminal(path).and_then(|terminal| sys::terminal_size(&terminal)) {
        Ok(size) => format!(
            "ferry-linux: terminal columns={} rows={}",
            size.columns, size.rows
        ),
        Err(e) => format!("ferry-linux: terminal {path} has no size ({e})"),
    }
}

/// `init tasks`: what every thread of every program is doing, by the kernel's own account, for
/// the analysis of a hang.
pub fn tasks() -> Result<(), String> {
    for process in numbered("/proc")? {
        // Threads of the kernel have no command line.
        let command = fs::read_to_string(format!("/proc/{process}/cmdline")).unwrap_or_default();
        if command.is_empty() {
            continue;
        }
        println!("process {process}: {}", command.replace('\0', " "));
        // One that has ended meanwhile is doing nothing.
        for thread in numbered(&format!("/proc/{process}/task")).unwrap_or_default() {
            let read = |what: &str| {
                let text = fs::read_to_string(format!("/proc/{process}/task/{thread}/{what}"));
                text.unwrap_or_default()
            };
            let stack: Vec<String> = read("stack")
                .lines()
                .filter_map(|l| Some(l.split_once("] ")?.1.to_owned()))
                .collect();
            let status = read("status");
            let cpus = status
                .lines()
                .find_map(|l| l.strip_prefix("Cpus_allowed_list:"));
            println!(
                "  {thread} {}: on {}; system call {}; {}",
                read("comm").trim(),
                cpus.unwrap_or_default().trim(),
                read("syscall").trim(),
                stack.join(" < ")
            );
        }
    }
    const LAST: usize = 20;
    let log = kernel_log();
    for record in &log[log.len().saturating_sub(LAST)..] {
        println!("kernel: {record}");
    }
    Ok(())
}

/// What the kernel said, as far as it remembers.
pub fn kernel_log() -> Vec<String> {
    /// A reader does not wait for more.
    const O_NONBLOCK: i32 = 0o4000;
    let log = File::options()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open("/dev/kmsg");
    let Ok(mut log) = log else { return Vec::new() };
    let mut records = Vec::new();
    // A read gives one record: numbers, a semicolon, a line, and perhaps more lines of properties.
    let mut record = [0; 8192];
    while let Ok(length @ 1..) = log.read(&mut record) {
        let text = String::from_utf8_lossy(&record[..length]).into_owned();
        let line = text.lines().next().and_then(|l| l.split_once(';'));
        records.extend(line.map(|(_, said)| said.to_owned()));
    }
    records
}

/// The entries of a directory whose names are numbers, in order.
fn numbered(path: &str) -> Result<Vec<u32>, String> {
    let entries = fs::read_dir(path).map_err(|e| format!("{path} cannot be read ({e})"))?;
    let mut numbers: Vec<u32> = entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// `init truncate PATH BYTES`: an empty disk image.
pub fn truncate(path: &str, bytes: &str) -> Result<(), String> {
    let length = bytes
        .parse()
        .map_err(|_| format!("`{bytes}` is not a number"))?;
    let made = File::create(path).and_then(|file| file.set_len(length));
    made.map_err(|e| format!("{path} cannot be made ({e})"))
}

/// `init tap NAME[=ADDRESS/PREFIX]`: a tap device for a guest's network card; without an address
/// for a bridge.
pub fn tap(text: &str) -> Result<(), String> {
    let network = match text.contains('=') {
        true => Some(network(text).ok_or_else(|| format!("`{text}` is not NAME=ADDRESS/PREFIX"))?),
        false => None,
    };
    let name = network.as_ref().map_or(text, |n| &n.name);
    sys::make_tap(name).map_err(|e| format!("the tap device {name} cannot be made ({e})"))?;
    network.as_ref().map_or(Ok(()), configure)
}

/// `init bridge NAME=ADDRESS/PREFIX PORT…`: a bridge with an address, to which interfaces are
/// joined; theirs are taken away.
pub fn bridge(text: &str, ports: &[&str]) -> Result<(), String> {
    let network = network(text).ok_or_else(|| format!("`{text}` is not NAME=ADDRESS/PREFIX"))?;
    let name = &network.name;
    sys::make_bridge(name).map_err(|e| format!("the bridge {name} cannot be made ({e})"))?;
    for port in ports {
        let index = fs::read_to_string(format!("/sys/class/net/{port}/ifindex"));
        let index = index
            .ok()
            .and_then(|text| text.trim().parse::<u32>().ok())
            .ok_or_else(|| format!("there is no network interface {port} to join to {name}"))?;
        sys::join_bridge(name, port, index)
            .map_err(|e| format!("{port} cannot be joined to the bridge {name} ({e})"))?;
    }
    configure(&network)
}
