//! Moves the guest of a VMM of one's own: the ports of `ferry-migration` over a `Vec<u8>` that a thread writes to, from one
//! "host" to another over TCP.
//!
//! ```text
//! cargo run -p ferry-migration --example own_vmm
//! ```
//!
//! The guest is a counter: its n-th step writes n to the start of one page. So what every page must hold follows from how far
//! the guest came, and a write that was lost would show.
#![forbid(unsafe_code)]

use ferry_migration::destination::{self, Destination, greet};
use ferry_migration::options::{OnTimeout, Options};
use ferry_migration::page::{Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use ferry_migration::port::{
    Clock, DestinationVm, Link, PageSink, PageSource, PortError, SourceVm,
};
use ferry_migration::report::{Report, Status};
use ferry_migration::source::{self, CancelSwitch, Setup};
use ferry_migration::wire::SessionId;
use std::error::Error;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The guest's memory in pages: 16 MiB.
const PAGES: u64 = 4096;
/// How far apart successive writes are; it and the number of pages have no common divisor.
const STRIDE: u64 = 1237;
/// How long the other side may take for anything, on a machine that has much else to do.
const TIMEOUT: Duration = Duration::from_secs(60);

type Page = [u8; PAGE_SIZE];

/// The whole VMM: memory, the one register of its guest, and the dirty log.
#[derive(Default)]
struct Machine {
    ram: Vec<u8>,
    steps: u64,
    runs: bool,
    ended: bool,
    log: Option<PageSet>,
}

/// Shared by the guest's thread and the migration's.
#[derive(Clone, Default)]
struct Vm(Arc<Mutex<Machine>>);

fn index(gfn: Gfn) -> usize {
    usize::try_from(gfn).unwrap_or(usize::MAX)
}

impl Machine {
    fn page(&mut self, gfn: Gfn) -> Result<&mut Page, PortError> {
        let pages = self.ram.as_chunks_mut::<PAGE_SIZE>().0;
        let page = pages.get_mut(index(gfn));
        page.ok_or_else(|| format!("page {gfn} is not RAM").into())
    }

    /// What the guest does: a write, seen by the dirty log.
    fn step(&mut self) -> Result<(), PortError> {
        self.steps += 1;
        let (gfn, number) = (self.steps * STRIDE % PAGES, self.steps);
        self.page(gfn)?[..8].copy_from_slice(&number.to_le_bytes());
        if let Some(log) = &mut self.log {
            log.insert(gfn);
        }
        Ok(())
    }

    /// Pages that do not hold the last write that went to them.
    fn corrupt(&mut self) -> Result<usize, PortError> {
        let mut expected = vec![0; index(PAGES)];
        for number in 1..=self.steps {
            expected[index(number * STRIDE % PAGES)] = number;
        }
        let pages = self.ram.as_chunks::<PAGE_SIZE>().0;
        let wrong = pages.iter().zip(&expected);
        Ok(wrong
            .filter(|(page, number)| page[..8] != number.to_le_bytes())
            .count())
    }
}

impl Vm {
    fn with_memory() -> Self {
        let vm = Self::default();
        vm.lock().ram = vec![0; index(PAGES) * PAGE_SIZE];
        vm
    }

    fn lock(&self) -> MutexGuard<'_, Machine> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest's processor, until the machine ends.
    fn processor(&self) -> Result<(), PortError> {
        loop {
            let mut machine = self.lock();
            if machine.ended {
                return Ok(());
            }
            for _ in 0..if machine.runs { 20 } else { 0 } {
                machine.step()?;
            }
            drop(machine);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A stream of bytes.
struct Tcp {
    stream: TcpStream,
    timeout: Option<Duration>,
}

impl Tcp {
    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let timeout = None;
        Ok(Self { stream, timeout })
    }
}

/// A wait that was too long is `WouldBlock` for a socket and `TimedOut` for the engines.
fn late(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::WouldBlock => ErrorKind::TimedOut.into(),
        _ => error,
    }
}

impl Link for Tcp {
    fn send(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
        // Head and body leave in one write as far as the socket takes them.
        let sent = self
            .stream
            .write_vectored(&[IoSlice::new(head), IoSlice::new(body)])
            .map_err(late)?;
        let rest_of_head = &head[sent.min(head.len())..];
        self.stream.write_all(rest_of_head).map_err(late)?;
        let rest = &body[sent.saturating_sub(head.len())..];
        self.stream.write_all(rest).map_err(late)
    }

    fn recv(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.stream.set_read_timeout(self.timeout)?;
        self.stream.read_exact(buf).map_err(late)
    }

    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
        // A socket takes zero for "for ever".
        let timeout = timeout.max(Duration::from_micros(1));
        self.stream.set_read_timeout(Some(timeout))?;
        match self.stream.peek(&mut [0]) {
            Ok(_) => Ok(true),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout;
        // Reads set their own; a socket that cannot be told will fail at the next write.
        let _ = self.stream.set_write_timeout(timeout);
    }
}

struct Wall(Instant);

impl Clock for Wall {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}

impl PageSource<Tcp> for Vm {
    fn transmit(&self, link: &mut Tcp, head: &[u8], runs: &[Run]) -> io::Result<()> {
        // A VMM with mapped memory would hand the kernel the pages themselves.
        let mut body = Vec::new();
        for gfn in runs.iter().flat_map(|run| run.first..run.end()) {
            body.extend_from_slice(self.lock().page(gfn).map_err(io::Error::other)?);
        }
        link.send(head, &body)
    }

    fn copy_page(&self, gfn: Gfn, into: &mut Page) -> Result<(), PortError> {
        *into = *self.lock().page(gfn)?;
        Ok(())
    }

    fn is_zero(&self, gfn: Gfn) -> bool {
        let mut machine = self.lock();
        machine
            .page(gfn)
            .is_ok_and(|page| page.iter().all(|byte| *byte == 0))
    }
}

impl SourceVm<Tcp> for Vm {
    fn layout(&self) -> RamLayout {
        // One run from page 0 is a layout.
        RamLayout::new(vec![Run::new(0, PAGES)]).unwrap_or_else(|_| unreachable!())
    }

    fn description(&self) -> Result<Vec<u8>, PortError> {
        Ok(b"a counter".to_vec())
    }

    fn state_bytes(&self) -> u64 {
        8
    }

    fn start_tracking(&self) -> Result<(), PortError> {
        self.lock().log = Some(self.layout().all());
        Ok(())
    }

    fn stop_tracking(&self) {
        self.lock().log = None;
    }

    fn collect_dirty(&self, into: &mut PageSet) -> Result<(), PortError> {
        if let Some(log) = &self.lock().log {
            into.union_with(log);
        }
        Ok(())
    }

    fn clear_dirty(&self, runs: &[Run], _: &mut Vec<u64>) -> Result<(), PortError> {
        if let Some(log) = &mut self.lock().log {
            runs.iter().for_each(|run| log.remove_run(*run));
        }
        Ok(())
    }

    fn pause(&self) -> Result<Duration, PortError> {
        // Whoever holds the lock runs: from here on the guest does not.
        self.lock().runs = false;
        Ok(Duration::ZERO)
    }

    fn save(&self) -> Result<Vec<u8>, PortError> {
        Ok(self.lock().steps.to_le_bytes().to_vec())
    }

    fn resume(&self) {
        self.lock().runs = true;
    }

    fn commit(&self, _: SessionId) -> Result<(), PortError> {
        // A VMM writes down here that it will never run this guest again by itself.
        Ok(())
    }

    fn release(&self) {
        self.lock().ended = true;
    }
}

/// The other host.
struct Elsewhere(Vm);

impl PageSink<Tcp> for Vm {
    fn receive(&self, link: &mut Tcp, runs: &[Run]) -> io::Result<()> {
        for gfn in runs.iter().flat_map(|run| run.first..run.end()) {
            let mut page = [0; PAGE_SIZE];
            link.recv(&mut page)?;
            *self.lock().page(gfn).map_err(io::Error::other)? = page;
        }
        Ok(())
    }

    fn write(&self, run: Run, bytes: &[u8]) -> Result<(), PortError> {
        for (gfn, page) in (run.first..run.end()).zip(bytes.as_chunks().0) {
            *self.lock().page(gfn)? = *page;
        }
        Ok(())
    }

    fn zero(&self, run: Run) -> Result<(), PortError> {
        for gfn in run.first..run.end() {
            self.lock().page(gfn)?.fill(0);
        }
        Ok(())
    }

    fn copy_page(&self, gfn: Gfn, into: &mut Page) -> Result<(), PortError> {
        PageSource::copy_page(self, gfn, into)
    }
}

impl DestinationVm<Tcp> for Elsewhere {
    type Sink = Vm;

    fn prepare(&mut self, layout: &RamLayout, machine: &[u8]) -> Result<Arc<Vm>, PortError> {
        if layout.end() != PAGES || machine != b"a counter" {
            return Err("this host runs counters of 16 MiB only".into());
        }
        self.0 = Vm::with_memory();
        Ok(Arc::new(self.0.clone()))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), PortError> {
        let state = state.try_into().map_err(|_| "the state is no number")?;
        self.0.lock().steps = u64::from_le_bytes(state);
        Ok(())
    }

    fn run(&mut self) -> Result<Duration, PortError> {
        self.0.lock().runs = true;
        let vm = self.0.clone();
        std::thread::spawn(move || vm.processor());
        Ok(Duration::ZERO)
    }

    fn discard(&mut self) {
        self.0 = Vm::default();
    }
}

/// Waits for a guest and lets it run.
fn receive(listener: &TcpListener) -> Result<Vm, PortError> {
    let timeouts = destination::Timeouts {
        handshake: TIMEOUT,
        transfer: TIMEOUT,
        commit: TIMEOUT,
    };
    let link = Tcp::new(listener.accept()?.0)?;
    let (channel, preamble) = greet(link, timeouts.handshake)?;
    let clock = Arc::new(Wall(Instant::now()));
    let host = Elsewhere(Vm::default());
    let mut migration = Destination::new(channel, &preamble, host, timeouts, clock);
    migration.run()?;
    Ok(migration.into_host().0)
}

/// Sends one away.
fn send(vm: &Vm, to: SocketAddr) -> Report {
    let options = Options {
        // What still changes after ten seconds is sent in the pause.
        timeout: Duration::from_secs(10),
        on_timeout: OnTimeout::Stop,
        downtime: Duration::from_millis(20),
        verify: true,
        ..Options::default()
    };
    let half = || RandomState::new().hash_one(0).to_le_bytes();
    let mut session = [0; 16];
    session[..8].copy_from_slice(&half());
    session[8..].copy_from_slice(&half());
    let setup = Setup {
        connect: &mut |_, _| Tcp::new(TcpStream::connect(to)?),
        clock: &Wall(Instant::now()),
        options: &options,
        session: SessionId(session),
        cancel: &CancelSwitch::default(),
        events: &mut |_| {},
        timeouts: source::Timeouts {
            handshake: TIMEOUT,
            transfer: TIMEOUT,
            ready: TIMEOUT,
            commit: TIMEOUT,
        },
        threads: true,
    };
    source::migrate(vm, setup)
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let vm = Vm::with_memory();
    vm.lock().runs = true;
    let processor = vm.clone();
    let processor = std::thread::spawn(move || processor.processor());

    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let there = std::thread::spawn(move || receive(&listener));
    let report = send(&vm, address);
    if report.status != Status::Completed {
        return Err(report.error.unwrap_or_else(|| "it failed".into()).into());
    }
    let died = |_| "a thread died";
    let arrived = there.join().map_err(died)??;
    processor.join().map_err(died)??;

    // The guest goes on where it was.
    let (left, deadline) = (vm.lock().steps, Instant::now() + TIMEOUT);
    while arrived.lock().steps <= left && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut machine = arrived.lock();
    (machine.runs, machine.ended) = (false, true);
    println!(
        "moved after {left} writes in {:.1} ms, {} rounds, {:.2} ms of downtime; memory compared: {:?}",
        report.total_ms,
        report.rounds.len(),
        report.downtime_ms,
        report.verified
    );
    let (steps, corrupt) = (machine.steps, machine.corrupt()?);
    println!("it went on to {steps} writes; {corrupt} pages are not what was written last");
    if steps <= left || corrupt > 0 || report.verified != Some(true) {
        return Err("the guest did not arrive as it was".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_guest_arrives_as_it_was() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        super::main()
    }
}
