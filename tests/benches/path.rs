//! What a byte costs on its way, stage by stage: `cargo bench -p ferry-tests --bench path`.
//!
//! Every stage is made by the functions that a migration makes it by, over a real guest's memory
//! (filled by the guest itself, mapped by KVM, standing still) and a real TCP connection; each in a
//! thread of its own, so that its processor time is its own. The whole migration stands below them.
//! `tests/bench/README.md` says how to read the table.
#![forbid(unsafe_code)]
#![allow(missing_docs)]

#[path = "path/coders.rs"]
mod coders;
#[path = "shared/guest.rs"]
mod guest;
#[path = "shared/measure.rs"]
mod measure;
#[path = "shared/median.rs"]
mod median;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use coders::coders;
use ferry_migration::options::{Compress, Options, Tracking};
use ferry_migration::page::{PageSet, Run};
use ferry_migration::report::Status;
use ferry_migration::wire::{FrameType, Header, encode_runs};
use ferry_tests::benchmark_host;
use ferry_vmm::machine::Machine;
use ferry_vmm::memory::{Backing, GuestRam, PAGE_SIZE, SplicePipe, Userfault, check_userfault};
use ferry_vmm::migrate::{Arrival, Handle, Receiver, Uri, migrate};
use guest::Guest;
use measure::{Cost, process_cpu, timed};
use median::median;
use std::hint::black_box;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

/// Pages of a batch, as a migration sends them.
const BATCH: u64 = 256;
const BATCH_WORDS: usize = 256 / 64;

#[derive(Debug, Parser)]
struct Args {
    /// The guest's memory in MiB.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(16..))]
    memory: u64,
    /// Passes of each stage; the median counts.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    passes: u32,
    /// What `cargo bench` adds, and `cargo test` does not.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if benchmark_host("the path", args.bench).is_none() {
        return Ok(());
    }
    let table = Table {
        passes: args.passes,
        memory: args.memory << 20,
    };
    println!(
        "{} MiB, {} passes       {:22} GB/s   CPU s/GiB",
        args.memory, args.passes, ""
    );
    let noise = table.guest("idle:fill=random")?;
    collect(&table, &noise.machine)?;
    read(&table, noise.machine.ram())?;
    send(&table, noise.machine.ram())?;
    receive(&table, noise.machine.ram())?;
    place(&table)?;
    coders(&table, "noise", noise.machine.ram())?;
    drop(noise);
    let half = table.guest("idle:fill=half")?;
    coders(&table, "2:1", half.machine.ram())?;
    drop(half);
    whole(&table)
}

/// Prints a line for each stage.
struct Table {
    passes: u32,
    memory: u64,
}

impl Table {
    /// A guest whose memory is full of something, standing still.
    fn guest(&self, work: &str) -> Result<Guest> {
        let guest = Guest::run(work, self.memory, Tracking::Log)?;
        guest.machine.pause()?.keep_paused();
        Ok(guest)
    }

    /// Measures a stage: `pass` does it and says for how many bytes, and what that took.
    fn stage(
        &self,
        stage: &str,
        what: &str,
        mut pass: impl FnMut() -> Result<(u64, Cost)>,
    ) -> Result<()> {
        let passes = (0..self.passes)
            .map(|_| pass())
            .collect::<Result<Vec<_>>>()?;
        self.line(stage, what, &passes);
        Ok(())
    }

    fn line(&self, stage: &str, what: &str, passes: &[(u64, Cost)]) {
        let of = |figure: fn(f64, Cost) -> f64| {
            let figures = passes
                .iter()
                .map(|(bytes, cost)| figure(*bytes as f64, *cost));
            median(figures.collect())
        };
        println!(
            "{stage:10} {what:38} {:8.2} {:11.4}",
            of(|bytes, cost| bytes / cost.wall / 1e9),
            of(|bytes, cost| cost.cpu / bytes * f64::from(1 << 30)),
        );
    }
}

/// All of a RAM in batches, as runs of pages.
fn batches(ram: &GuestRam) -> Vec<Run> {
    let mut runs = Vec::new();
    for region in ram.regions() {
        let mut at = region.first_gfn;
        while at < region.end_gfn() {
            let count = BATCH.min(region.end_gfn() - at);
            runs.push(Run::new(at, count));
            at += count;
        }
    }
    runs
}

/// The frame before the pages of a batch.
fn head(run: Run) -> Vec<u8> {
    let header = Header {
        gfn: run.first,
        count: 1,
        ..Header::bare(FrameType::Pages, 1)
    };
    let mut head = header.encode().to_vec();
    encode_runs(&[run], &mut head);
    head
}

/// Reading the dirty log and clearing it, with every page dirty.
fn collect(table: &Table, machine: &Machine) -> Result<()> {
    let log = machine.dirty_log();
    let end = machine.ram().regions().iter().map(|r| r.end_gfn()).max();
    let mut pages = PageSet::new(end.context("a guest without memory")?);
    let mut clears = Vec::new();
    table.stage("collect", "the dirty log, of all memory", || {
        pages.clear();
        log.start()?;
        let (collected, cost) =
            timed(|| log.collect(|first, words| pages.insert_words(first, words)));
        collected?;
        let (cleared, clear) = timed(|| {
            batches(machine.ram()).iter().try_for_each(|run| {
                let words = [u64::MAX; BATCH_WORDS];
                log.clear(
                    run.first,
                    &words[..usize::try_from(run.count / 64).unwrap_or(0)],
                )
            })
        });
        cleared?;
        log.stop()?;
        clears.push((pages.len() * PAGE_SIZE, clear));
        Ok((machine.ram().size(), cost))
    })?;
    table.line("", "clearing batches of 256 pages", &clears);
    Ok(())
}

/// Looking at pages: whether there are any, whether they are zero; and copying them.
fn read(table: &Table, ram: &GuestRam) -> Result<()> {
    let zero = GuestRam::new(ram.size(), Backing::Small)?;
    for run in batches(&zero) {
        zero.populate(run.first, run.count);
    }
    let absent = GuestRam::new(ram.size(), Backing::Small)?;
    for (ram, what) in [(&absent, "never written"), (ram, "full"), (&zero, "zero")] {
        let runs = batches(ram);
        table.stage(
            "read",
            &format!("is it there? pages that are {what}"),
            || {
                let ((), cost) = timed(|| {
                    for run in &runs {
                        black_box(ram.unpopulated(run.first, run.count));
                    }
                });
                Ok((ram.size(), cost))
            },
        )?;
    }
    for (ram, what) in [(ram, "full"), (&zero, "zero")] {
        let runs = batches(ram);
        table.stage(
            "read",
            &format!("is it zero? pages that are {what}"),
            || {
                let (zeros, cost) = timed(|| {
                    let gfns = runs.iter().flat_map(|run| run.first..run.end());
                    gfns.filter(|gfn| ram.page_is_zero(*gfn).unwrap_or(false))
                        .count()
                });
                black_box(zeros);
                Ok((ram.size(), cost))
            },
        )?;
    }
    let runs = batches(ram);
    let mut page = [0; ferry_migration::page::PAGE_SIZE];
    table.stage("read", "a copy of each page", || {
        let (copied, cost) = timed(|| {
            runs.iter()
                .flat_map(|run| run.first..run.end())
                .try_for_each(|gfn| ram.copy_page(gfn, black_box(&mut page)))
        });
        copied?;
        Ok((ram.size(), cost))
    })
}

/// Two ends of a TCP connection on this host.
fn connection() -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let out = TcpStream::connect(listener.local_addr()?)?;
    let (into, _) = listener.accept()?;
    out.set_nodelay(true)?;
    Ok((out, into))
}

/// From guest memory into a socket, whose other end throws it away.
fn send(table: &Table, ram: &GuestRam) -> Result<()> {
    table.stage("send", "batches, to loopback TCP", || {
        let (out, mut into) = connection()?;
        let sink = std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 20];
            while into.read(&mut buffer).is_ok_and(|n| n > 0) {}
        });
        let runs = batches(ram);
        let (sent, cost) = timed(|| feed(ram, &out, &runs, true));
        sent?;
        drop(out);
        let _ = sink.join();
        Ok((ram.size(), cost))
    })
}

fn feed(ram: &GuestRam, out: &TcpStream, runs: &[Run], framed: bool) -> Result<()> {
    for run in runs {
        let head = if framed { head(*run) } else { Vec::new() };
        ram.write_pages(out.as_fd(), &head, &[*run], |_| Ok(()))?;
    }
    Ok(())
}

/// From a socket into guest memory that is new, or that was written before; as whole batches, or as
/// single pages with others between them.
fn receive(table: &Table, from: &GuestRam) -> Result<()> {
    let to = GuestRam::new(from.size(), Backing::Small)?;
    let pipe = SplicePipe::new()?;
    let runs = batches(&to);
    let ways: [(&str, bool, bool, bool); 5] = [
        ("into new memory, by splice", true, true, false),
        ("into new memory, by recvmsg", true, false, false),
        ("single new pages, by splice", true, true, true),
        ("single new pages, by recvmsg", true, false, true),
        ("into memory that is there", false, false, false),
    ];
    for (what, new, splice, single) in ways {
        let placed: Vec<Vec<Run>> = runs.iter().map(|run| pieces(*run, single)).collect();
        table.stage("receive", what, || {
            for run in runs.iter().filter(|_| new) {
                to.drop_pages(run.first, run.count)?;
            }
            let (out, into) = connection()?;
            let (received, cost) = std::thread::scope(|scope| {
                scope.spawn(|| feed(from, &out, &runs, false));
                timed(|| {
                    placed.iter().try_for_each(|runs| {
                        if splice {
                            to.splice_pages(into.as_fd(), &pipe, runs, |_| Ok(()))
                        } else {
                            to.read_pages(into.as_fd(), runs, |_| Ok(()))
                        }
                    })
                })
            });
            received?;
            Ok((to.size(), cost))
        })?;
    }
    Ok(())
}

/// A batch as memory takes it: whole, or page by page, no two of them beside each other.
fn pieces(run: Run, single: bool) -> Vec<Run> {
    if !single {
        return vec![run];
    }
    let every_other = |from| (from..run.end()).step_by(2);
    let pages = every_other(run.first).chain(every_other(run.first + 1));
    pages.map(|gfn| Run::new(gfn, 1)).collect()
}

/// Pages that were decoded or fetched, into guest memory.
fn place(table: &Table) -> Result<()> {
    let ram = Arc::new(GuestRam::new(table.memory, Backing::Small)?);
    let runs = batches(&ram);
    let bytes = vec![0x5a; usize::try_from(BATCH * PAGE_SIZE)?];
    let of = |run: &Run| &bytes[..usize::try_from(run.bytes()).unwrap_or(0)];
    let drop_all = || {
        runs.iter()
            .try_for_each(|run| ram.drop_pages(run.first, run.count))
    };
    for (what, new) in [
        ("write, into new memory", true),
        ("write, over what is there", false),
    ] {
        table.stage("place", what, || {
            if new {
                drop_all()?;
            }
            let (written, cost) = timed(|| {
                runs.iter()
                    .try_for_each(|run| ram.write_decoded(run.first, of(run), new))
            });
            written?;
            Ok((ram.size(), cost))
        })?;
    }
    table.stage("place", "zero pages, over what is there", || {
        let (zeroed, cost) = timed(|| {
            runs.iter()
                .try_for_each(|run| ram.discard(run.first, run.count))
        });
        zeroed?;
        for run in &runs {
            ram.populate(run.first, run.count);
        }
        Ok((ram.size(), cost))
    })?;
    if let Err(error) = check_userfault() {
        println!("NOT RUN: UFFDIO_COPY: {error}");
        return Ok(());
    }
    let faults = Userfault::register(Arc::clone(&ram))?;
    for (what, size) in [
        ("UFFDIO_COPY, a page at a time", 1),
        ("UFFDIO_COPY, batches", BATCH),
    ] {
        table.stage("place", what, || {
            drop_all()?;
            let (placed, cost) = timed(|| {
                for run in &runs {
                    for first in (run.first..run.end()).step_by(usize::try_from(size)?) {
                        let count = size.min(run.end() - first);
                        let bytes = &bytes[..usize::try_from(count * PAGE_SIZE)?];
                        faults.place(first, count, bytes)?;
                    }
                }
                Ok::<(), anyhow::Error>(())
            });
            placed?;
            Ok((ram.size(), cost))
        })?;
    }
    Ok(())
}

/// A migration from end to end: both sides are in this process, so that its processor time is
/// theirs together.
fn whole(table: &Table) -> Result<()> {
    for compress in [Compress::None, Compress::Auto, Compress::Zstd] {
        let name = serde_json::to_string(&compress)?;
        let what = format!("noise, --compress {}", name.trim_matches('"'));
        table.stage("migration", &what, || {
            let guest = table.guest("idle:fill=random")?;
            let console = Arc::new(|| Ok(Box::new(std::io::sink()) as _));
            let receiver = Receiver::bind(&"tcp:127.0.0.1:0".parse::<Uri>()?, console)?;
            let options = Options {
                compress,
                ..Options::default()
            };
            let cpu = process_cpu();
            let report = migrate(
                &guest.machine,
                receiver.local_uri(),
                &options,
                &Handle::new(),
                &mut |_| {},
            );
            let cost = Cost {
                cpu: process_cpu() - cpu,
                wall: report.total_ms / 1e3,
            };
            ensure!(report.status == Status::Completed, "{report:?}");
            match receiver.wait(Duration::from_secs(10)) {
                Some(Arrival::Arrived { machine, .. }) => machine.stop(),
                other => bail!("the guest did not arrive: {other:?}"),
            }
            Ok((table.memory, cost))
        })?;
    }
    Ok(())
}
