//! Embeds ferry's VMM: two machines in one process, and a guest that moves from one to the other
//! while it computes.
//!
//! ```text
//! cargo run -p ferry-vmm --example embed
//! ```
#![forbid(unsafe_code)]

use ferry_guest_images::{BARE, Line, STOP, Workload};
use ferry_migration::options::{OnTimeout, Options};
use ferry_migration::report::{Event, Status};
use ferry_vmm::boot::Kernel;
use ferry_vmm::doctor;
use ferry_vmm::machine::Machine;
use ferry_vmm::migrate::{Arrival, Handle, Receiver, migrate};
use std::error::Error;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What the guest prints, wherever it runs.
#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut text = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Console {
    /// Waits for a line.
    fn wait(&self, what: &str, wanted: impl Fn(&Line<'_>) -> bool) -> Result<String, String> {
        let deadline = Instant::now() + Duration::from_secs(90);
        while Instant::now() < deadline {
            let text = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let text = String::from_utf8_lossy(&text).into_owned();
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            let mut lines = whole.lines();
            if let Some(line) = lines.find(|line| Line::parse(line).is_some_and(|l| wanted(&l))) {
                return Ok(line.to_owned());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err(format!("the guest did not tell {what}"))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    if !doctor::examine().ready {
        println!("NOT RUN: no guest can run on this host; `ferry doctor` says why");
        return Ok(());
    }
    let (here, there) = (Console::default(), Console::default());

    // A machine, built paused, with a kernel: the built-in guest, which writes to its memory and
    // checks it.
    let work = Workload::parse("dirty:wss=8M,rate=5000")?;
    let source = Machine::builder()
        .memory(64 << 20)
        .cpus(1)
        .name("a guest that moves")
        .serial(Box::new(here.clone()))
        .build()?;
    let mut image = tempfile::NamedTempFile::new()?;
    image.write_all(BARE)?;
    source.load(&Kernel {
        path: image.path().to_owned(),
        initrd: None,
        cmdline: work.command_line(1, source.tsc_khz().map(u64::from)),
    })?;
    source.resume()?;
    here.wait("that it is ready", |line| {
        matches!(line, Line::Ready { .. })
    })?;

    // The other side builds its machine from what the source says.
    let console = there.clone();
    let receiver = Receiver::bind(
        &"tcp:127.0.0.1:0".parse()?,
        Arc::new(move || Ok(Box::new(console.clone()) as _)),
    )?;
    let source = Arc::new(source);
    let options = Options {
        timeout: Duration::from_secs(15),
        on_timeout: OnTimeout::Stop,
        verify: true,
        ..Options::default()
    };
    let mut events = |event: Event| {
        if let Event::Round(round) = event {
            println!(
                "round {}: {} pages in {:.1} ms",
                round.n, round.pages, round.ms
            );
        }
    };
    let to = receiver.local_uri();
    let report = migrate(&source, to, &options, &Handle::new(), &mut events);
    if report.status != Status::Completed {
        return Err(report.error.unwrap_or_else(|| "it failed".into()).into());
    }
    let Some(Arrival::Arrived { machine, .. }) = receiver.wait(Duration::from_secs(30)) else {
        return Err("the guest has not arrived".into());
    };
    drop(source);
    println!(
        "moved in {:.1} ms with {:.2} ms of downtime; memory compared: {:?}",
        report.total_ms, report.downtime_ms, report.verified
    );

    // It goes on there, and says itself that nothing was lost.
    there.wait("its progress", |line| matches!(line, Line::Stat { .. }))?;
    while machine.serial_input(&[STOP]) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let verdict = there.wait("its verdict", |line| matches!(line, Line::Verdict { .. }))?;
    println!("{verdict}\nthe machine has ended: {:?}", machine.wait());
    match Line::parse(&verdict) {
        Some(Line::Verdict { verdict, .. }) if verdict.verified && verdict.corrupt == 0 => Ok(()),
        _ => Err("the guest's memory is not what it wrote".into()),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_guest_arrives_as_it_was() -> Result<(), Box<dyn std::error::Error>> {
        super::main()
    }
}
