//! A destination: the engine's [`Host`] and [`PageSink`] over a machine that is built for the guest.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use ferry_migration::page::{Gfn, PAGE_SIZE, RamLayout, Run};
use ferry_migration::port::{Host, PageSink, PortError};
use ferry_migration::wire::MAX_RUNS;

use super::{StreamLink, engine_layout, page_runs};
use crate::machine::{Backends, Machine, MachineDescription, MachineState};
use crate::memory::{GuestRam, PageRun};

/// Makes the serial console's output for an arriving machine.
pub type SerialFactory = Arc<dyn Fn() -> io::Result<Box<dyn Write + Send>> + Send + Sync>;

/// Guest memory being filled.
pub struct RamSink {
    ram: Arc<GuestRam>,
}

impl RamSink {
    /// Shorter runs are not worth two more system calls.
    const LONG: u64 = 16;

    fn read_direct(&self, link: &StreamLink, runs: &[PageRun]) -> io::Result<()> {
        if runs.is_empty() {
            return Ok(());
        }
        let (fd, mut patience) = link.parts();
        self.ram
            .read_pages(fd, runs, |progress| patience.tick(progress))
    }

    fn is_fresh(&self, (first, count): PageRun) -> bool {
        count >= Self::LONG
            && !self.ram.hugepages()
            && self.ram.unpopulated(first, count) == Some((first, count))
    }
}

impl PageSink<StreamLink> for RamSink {
    fn receive(&self, link: &mut StreamLink, runs: &[Run]) -> io::Result<()> {
        let mut buffer = [(0, 0); MAX_RUNS as usize];
        let mut rest = page_runs(runs, &mut buffer)?;
        // Long runs of memory that holds nothing yet have a shorter way; all else is read straight
        // into place, as many runs at once as lie together.
        while !rest.is_empty() {
            let direct = rest.iter().take_while(|run| !self.is_fresh(**run)).count();
            let (now, later) = rest.split_at(direct);
            self.read_direct(link, now)?;
            rest = later;
            if let Some((&run, later)) = rest.split_first() {
                match link.splice_pipe() {
                    Some((fd, mut patience, pipe)) => {
                        self.ram
                            .splice_pages(fd, pipe, run, |progress| patience.tick(progress))?;
                    }
                    None => self.read_direct(link, &[run])?,
                }
                rest = later;
            }
        }
        Ok(())
    }

    fn zero(&self, run: Run) -> Result<(), PortError> {
        // Where nothing was written nothing is to be done: new memory is zero.
        let mut at = run.first;
        while at < run.end() {
            match self.ram.unpopulated(at, run.end() - at) {
                Some((first, count)) => {
                    if first > at {
                        self.ram.discard(at, first - at)?;
                    }
                    at = first + count;
                }
                None => {
                    self.ram.discard(at, run.end() - at)?;
                    at = run.end();
                }
            }
        }
        Ok(())
    }

    fn copy_page(&self, gfn: Gfn, into: &mut [u8; PAGE_SIZE]) -> Result<(), PortError> {
        if self.ram.unpopulated(gfn, 1).is_some() {
            // Comparing memory must not make the host find memory for empty pages.
            into.fill(0);
            return Ok(());
        }
        Ok(self.ram.copy_page(gfn, into)?)
    }
}

/// Builds and starts the machine of an arriving guest.
pub struct MachineHost {
    serial: SerialFactory,
    backends: Backends,
    machine: Option<Arc<Machine>>,
    run_after: bool,
    started: bool,
}

impl MachineHost {
    pub(super) fn new(serial: SerialFactory, backends: Backends) -> Self {
        Self {
            serial,
            backends,
            machine: None,
            run_after: true,
            started: false,
        }
    }

    /// The machine, once it is built.
    pub(super) const fn machine(&self) -> Option<&Arc<Machine>> {
        self.machine.as_ref()
    }
}

impl Host<StreamLink> for MachineHost {
    type Sink = RamSink;

    fn prepare(&mut self, layout: &RamLayout, machine: &[u8]) -> Result<Arc<RamSink>, PortError> {
        let description: MachineDescription = serde_json::from_slice(machine)
            .map_err(|e| format!("the machine's description cannot be understood: {e}"))?;
        description.check_host()?;
        let serial = (self.serial)()
            .map_err(|e| format!("the serial console cannot be opened here: {e}"))?;
        let machine = Machine::builder()
            .from_description(&description)
            .serial(serial)
            .devices(self.backends.clone())
            .build()?;
        if engine_layout(machine.ram())? != *layout {
            return Err(
                "the source's memory layout is not that of its machine's description".into(),
            );
        }
        let ram = Arc::clone(machine.ram());
        self.machine = Some(Arc::new(machine));
        Ok(Arc::new(RamSink { ram }))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), PortError> {
        let machine = self.machine.as_ref().ok_or("there is no machine")?;
        let (&running, state) = state.split_first().ok_or("the state is empty")?;
        let state = MachineState::from_bytes(state)?;
        let paused = machine.pause()?;
        let restored = paused.restore(&state);
        paused.keep_paused();
        for skipped in restored?.skipped_msrs {
            tracing::info!(?skipped, "an MSR of the source cannot be set here");
        }
        self.run_after = running != 0;
        Ok(())
    }

    fn run(&mut self) -> Result<Duration, PortError> {
        let machine = self.machine.as_ref().ok_or("there is no machine")?;
        self.started = true;
        if !self.run_after {
            return Ok(Duration::ZERO);
        }
        machine.resume()?;
        let first = machine.wait_first_entry(Duration::from_secs(5));
        announce(machine);
        Ok(first.map_or(Duration::ZERO, |at| at.elapsed()))
    }

    fn discard(&mut self) {
        if !self.started {
            self.machine = None;
        }
    }
}

/// Tells the network, more than once, where the guest is now: the first frame may be lost while a bridge still learns.
fn announce(machine: &Arc<Machine>) {
    const PAUSES: [Duration; 3] = [
        Duration::from_millis(50),
        Duration::from_millis(150),
        Duration::from_millis(250),
    ];
    machine.announce();
    let machine = Arc::downgrade(machine);
    let again = move || {
        for pause in PAUSES {
            std::thread::sleep(pause);
            let Some(machine) = machine.upgrade() else {
                return;
            };
            machine.announce();
        }
    };
    let thread = std::thread::Builder::new().name("ferry-announce".into());
    if let Err(error) = thread.spawn(again) {
        tracing::warn!(%error, "the network is told only once where the guest is");
    }
}
