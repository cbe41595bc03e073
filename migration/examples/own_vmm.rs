//! A VMM of one's own, made migratable: the guest is a counter in 16 MiB of memory, the two hosts
//! are two ends of a TCP connection. The part between the two rules is all that migration needs.
//!
//! ```text
//! cargo run -p ferry-migration --example own_vmm
//! ```
#![forbid(unsafe_code)]

use ferry_migration::destination::Timeouts;
use ferry_migration::net::{self, Listener, StreamLink};
use ferry_migration::options::{OnTimeout, Options};
use ferry_migration::page::{Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use ferry_migration::port::{Pausable, PortError, SimpleVm};
use ferry_migration::report::Status;
use ferry_migration::wire::SessionId;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The guest's memory in pages: 16 MiB.
const PAGES: u64 = 4096;
/// Pages between two writes of the guest: no divisor of their number, so that all are written.
const STRIDE: u64 = 1237;

type Page = [u8; PAGE_SIZE];

/// The VMM: memory, the one register of its guest, the dirty log, and whether the guest runs.
struct Vm(Mutex<Machine>);

struct Machine {
    ram: Vec<Page>,
    steps: u64,
    log: Option<PageSet>,
    runs: bool,
    ended: bool,
}

impl Machine {
    fn new() -> Self {
        Self {
            ram: vec![[0; PAGE_SIZE]; index(PAGES)],
            steps: 0,
            log: None,
            runs: false,
            ended: false,
        }
    }
}

impl Vm {
    fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Machine::new())))
    }

    fn lock(&self) -> MutexGuard<'_, Machine> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn index(gfn: Gfn) -> usize {
    usize::try_from(gfn).unwrap_or(usize::MAX)
}

// ───────────────────────────── what the engines need of this VMM ─────────────────────────────

impl Pausable for Vm {
    fn stop(&self) -> Result<(), PortError> {
        self.lock().runs = false;
        Ok(())
    }
    fn resume(&self) -> Result<(), PortError> {
        self.lock().runs = true;
        Ok(())
    }
    fn save(&self, _newest: Option<u32>) -> Result<Vec<u8>, PortError> {
        Ok(self.lock().steps.to_le_bytes().to_vec())
    }
    fn give_away(&self, _: SessionId) -> Result<(), PortError> {
        Ok(()) // A VMM writes down here that it will never run this guest again by itself.
    }
    fn release(&self) {
        self.lock().ended = true;
    }
}

impl SimpleVm for Vm {
    fn layout(&self) -> RamLayout {
        RamLayout::new(vec![Run::new(0, PAGES)]).unwrap_or_else(|_| unreachable!())
    }
    fn description(&self) -> Result<Vec<u8>, PortError> {
        Ok(b"a counter".to_vec())
    }
    fn read_page(&self, gfn: Gfn, into: &mut Page) -> Result<(), PortError> {
        *into = *self.lock().ram.get(index(gfn)).ok_or("no such page")?;
        Ok(())
    }
    fn write_page(&self, gfn: Gfn, page: &Page) -> Result<(), PortError> {
        *self.lock().ram.get_mut(index(gfn)).ok_or("no such page")? = *page;
        Ok(())
    }
    fn start_tracking(&self) -> Result<(), PortError> {
        self.lock().log = Some(self.layout().all());
        Ok(())
    }
    fn stop_tracking(&self) {
        self.lock().log = None;
    }
    fn collect_dirty(&self, into: &mut PageSet) -> Result<(), PortError> {
        self.lock().log.iter().for_each(|log| into.union_with(log));
        Ok(())
    }
    fn clear_dirty(&self, runs: &[Run]) -> Result<(), PortError> {
        let mut vm = self.lock();
        let log = vm.log.as_mut().ok_or("nothing is logged")?;
        runs.iter().for_each(|run| log.remove_run(*run));
        Ok(())
    }
    fn restore(&self, state: &[u8]) -> Result<(), PortError> {
        self.lock().steps = u64::from_le_bytes(state.try_into()?);
        Ok(())
    }
    fn discard(&self) {
        *self.lock() = Machine::new();
    }
}

// ───────────────────────────────────── the two hosts ─────────────────────────────────────

/// The guest's processor: its n-th step writes n to the start of a page.
fn processor(vm: &Vm) {
    while !vm.lock().ended {
        let mut machine = vm.lock();
        for _ in 0..if machine.runs { 20 } else { 0 } {
            machine.steps += 1;
            let (gfn, number) = (machine.steps * STRIDE % PAGES, machine.steps);
            machine.ram[index(gfn)][..8].copy_from_slice(&number.to_le_bytes());
            machine.log.iter_mut().for_each(|log| {
                log.insert(gfn);
            });
        }
        drop(machine);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Pages that do not hold the last write that went to them.
fn corrupt(machine: &Machine) -> usize {
    let mut expected = vec![0; index(PAGES)];
    (1..=machine.steps).for_each(|n| expected[index(n * STRIDE % PAGES)] = n);
    let pages = machine.ram.iter().zip(expected);
    pages
        .filter(|(page, number)| page[..8] != number.to_le_bytes())
        .count()
}

fn main() -> Result<(), PortError> {
    let (here, there) = (Vm::new(), Vm::new());
    here.lock().runs = true;
    let listener = Listener::tcp("127.0.0.1:0")?;
    let address = listener.address().ok_or("a TCP listener has an address")?;
    let options = Options {
        on_timeout: OnTimeout::Stop,
        verify: true,
        ..Options::default()
    };

    let report = std::thread::scope(|scope| {
        scope.spawn(|| processor(&here));
        scope.spawn(|| processor(&there));
        let accept = |timeout| listener.accept(timeout);
        let vm = Arc::clone(&there);
        let receiver = scope.spawn(move || net::receive(accept, vm, Timeouts::default()));
        let report = net::migrate(&here, || StreamLink::connect_tcp(address), &options);
        let received = receiver.join().map_err(|_| "the receiver panicked");
        // The guest goes on where it was.
        let (left, deadline) = (here.lock().steps, Instant::now() + Duration::from_secs(60));
        while there.lock().steps <= left && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        (here.lock().ended, there.lock().ended) = (true, true);
        received??;
        Ok::<_, PortError>(report)
    })?;

    if report.status != Status::Completed {
        return Err(report.error.unwrap_or_else(|| "it failed".into()).into());
    }
    let (left, machine) = (here.lock().steps, there.lock());
    println!(
        "moved after {left} writes in {:.1} ms, {} rounds, {:.2} ms of downtime; memory compared: {:?}",
        report.total_ms,
        report.rounds.len(),
        report.downtime_ms,
        report.verified
    );
    let (steps, corrupt) = (machine.steps, corrupt(&machine));
    println!("it went on to {steps} writes; {corrupt} pages are not what was written last");
    if steps <= left || corrupt > 0 || report.verified != Some(true) {
        return Err("the guest did not arrive as it was".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_guest_arrives_as_it_was() -> Result<(), ferry_migration::port::PortError> {
        super::main()
    }
}
