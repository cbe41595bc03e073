//! What a guest does: HTTP, the work it was given, a disk, and commands on its consoles.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ferry_nas::line::Line;

use crate::machine::{power_off, reset, size_line, terminal, time_line, uptime_ms};
use crate::options::Options;
use crate::{http, identity, nodes, work};

/// The virtio console, where there is one.
const CONSOLE: &str = "/dev/hvc0";

/// This program, which is the first process.
const SELF: &str = "/init";

const HELP: &str = "commands: status, flags (of the processor), identity, vmclock, terminal, nodes, meminfo, time MARK, run WORK (such as run mg.S), disk PATH, vsock PORT (of the host), vsock-serve PORT, memory KEEP FREE (fills as many MiB, and frees the latter), q (ends the work, then the guest), poweroff, reboot";

/// Works until the guest is told to end.
pub fn serve(options: &Options) {
    for token in &options.odd {
        println!("init: `{token}` on the command line is not understood");
    }
    start_line(options);
    println!("{}", status());
    std::thread::spawn(http::serve);
    power_button();
    let working = Arc::new(Mutex::new(None));
    if let Some(path) = &options.disk {
        begin(&["disk", path]);
    }
    if let Some(path) = &options.rng {
        begin(&["rng", path]);
    }
    match &options.run {
        Some(run) => {
            let repeat = options.repeat.clone().unwrap_or_else(|| "1".to_owned());
            let cpus = options
                .cpus
                .clone()
                .unwrap_or_else(|| processors().to_string());
            let child = begin(&["work", run, &cpus, &repeat]);
            *working.lock().unwrap_or_else(PoisonError::into_inner) = child;
            let working = Arc::clone(&working);
            std::thread::spawn(move || end_after(&working));
        }
        None => println!("{}\n{HELP}", Line::Ready { t_ms: uptime_ms() }),
    }
    fast_console(&working);
    let input = std::io::stdin().lock();
    console(&working, input, &mut std::io::stdout());
    // Without a console the guest lives until its work ends or its machine does.
    loop {
        std::thread::park();
    }
}

/// Watches the input devices for the power button: with no acpid or systemd, the first process does
/// it.
fn power_button() {
    // `struct input_event` of `linux/input.h`: a time of 16 bytes, type, code, value.
    const EVENT: usize = 24;
    const KEY_POWER_PRESSED: [u8; 8] = [1, 0, 116, 0, 1, 0, 0, 0];
    let devices = fs::read_dir("/dev/input").into_iter().flatten().flatten();
    for path in devices
        .map(|e| e.path())
        .filter(|p| p.to_string_lossy().contains("/event"))
    {
        std::thread::spawn(move || {
            let Ok(mut device) = fs::File::open(path) else {
                return;
            };
            let mut event = [0; EVENT];
            while device.read_exact(&mut event).is_ok() {
                if event[EVENT - 8..] == KEY_POWER_PRESSED {
                    println!("ferry-linux: the power button was pressed");
                    power_off();
                }
            }
        });
    }
}

/// Starts a part of init in a process of its own.
fn begin(arguments: &[&str]) -> Option<Child> {
    match Command::new(SELF)
        .args(arguments)
        .stdin(Stdio::piped())
        .spawn()
    {
        Ok(child) => Some(child),
        Err(e) => {
            println!("init: {arguments:?} cannot be started ({e})");
            None
        }
    }
}

/// When the guest's work is over, so is the guest, as with the bare one.
fn end_after(working: &Mutex<Option<Child>>) {
    loop {
        let mut working = working.lock().unwrap_or_else(PoisonError::into_inner);
        let over = working
            .as_mut()
            .is_none_or(|child| child.try_wait().is_ok_and(|s| s.is_some()));
        drop(working);
        if over {
            println!("{}", Line::End);
            power_off();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Takes commands at the virtio console as well, where there is one.
fn fast_console(working: &Arc<Mutex<Option<Child>>>) {
    let Ok(input) = terminal(CONSOLE) else {
        return;
    };
    let working = Arc::clone(working);
    std::thread::spawn(move || {
        let Ok(mut output) = input.try_clone() else {
            return;
        };
        // What the host does not take is lost to it, and not to the guest.
        let _ = writeln!(output, "ferry-linux: {CONSOLE} is ready");
        console(&working, BufReader::new(input), &mut output);
    });
}

/// Reads commands, a line each, until the console ends. What commands start prints on the first
/// console.
fn console(working: &Mutex<Option<Child>>, input: impl BufRead, output: &mut impl Write) {
    for line in input.lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let mut say = |sentence: &str| drop(writeln!(output, "{sentence}"));
        match words.as_slice() {
            [] => {}
            ["status"] => say(&status()),
            ["flags"] => say(&format!("ferry-linux: flags= {} end-of-flags", flags())),
            ["meminfo"] => say(&meminfo()),
            ["time", mark] => say(&time_line(mark)),
            ["identity"] => say(&identity::line()),
            ["nodes"] => say(&nodes::line()),
            ["vmclock"] => say(&identity::vmclock_line()),
            ["terminal"] => say(&size_line(CONSOLE)),
            ["poweroff"] => power_off(),
            ["reboot"] => reset(),
            ["q"] => {
                let mut working = working.lock().unwrap_or_else(PoisonError::into_inner);
                match working.as_mut().and_then(|child| child.stdin.as_mut()) {
                    // If it does not take it, it is ending already.
                    Some(input) => {
                        drop(input.write_all(&[work::STOP]).and_then(|()| input.flush()))
                    }
                    None => power_off(),
                }
            }
            ["run", spec] => drop(begin(&["work", spec, &processors().to_string(), "1"])),
            ["disk", path] => drop(begin(&["disk", path])),
            ["vsock", port] => drop(begin(&["vsock", port])),
            ["vsock-serve", port] => drop(begin(&["vsock-serve", port])),
            ["memory", keep, free] => drop(begin(&["memory", keep, free])),
            _ => say(HELP),
        }
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// The features of the first processor, as the kernel names them.
fn flags() -> String {
    let text = read("/proc/cpuinfo");
    let line = text.lines().find_map(|line| line.strip_prefix("flags"));
    let names = line.and_then(|line| line.split_once(':'));
    names.map_or_else(String::new, |(_, names)| names.trim().to_owned())
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

fn start_line(options: &Options) {
    let memory = read("/proc/meminfo");
    let kib = memory.lines().find_map(|l| {
        l.strip_prefix("MemTotal:")?
            .trim()
            .split(' ')
            .next()?
            .parse::<u64>()
            .ok()
    });
    let cpu = read("/proc/cpuinfo");
    let mhz = cpu.lines().find_map(|l| {
        l.strip_prefix("cpu MHz")?
            .split(':')
            .nth(1)?
            .trim()
            .parse::<f64>()
            .ok()
    });
    let khz = Duration::try_from_secs_f64(mhz.unwrap_or(0.0))
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(0));
    println!(
        "{}",
        Line::Start {
            run: options.run.as_deref().unwrap_or("linux"),
            cpus: u64::try_from(processors()).unwrap_or(0),
            memory_mib: kib.unwrap_or(0) >> 10,
            tsc_khz: khz,
        }
    );
}

/// What the kernel says of its memory, on one line, in KiB.
fn meminfo() -> String {
    let text = read("/proc/meminfo");
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|line| line.trim().split(' ').next());
        number.unwrap_or("0").to_owned()
    };
    format!(
        "ferry-linux: meminfo total={} free={} available={}",
        value("MemTotal:"),
        value("MemFree:"),
        value("MemAvailable:")
    )
}

/// What the guest found, on one line.
fn status() -> String {
    let names = |path: &str| {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names.join(",")
    };
    format!(
        "ferry-linux: kernel={} clocksource={} cpus={} t_ms={} blocks={} networks={} virtio={}",
        read("/proc/sys/kernel/osrelease"),
        read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        processors(),
        uptime_ms(),
        names("/sys/block"),
        names("/sys/class/net"),
        names("/sys/bus/virtio/devices"),
    )
}
