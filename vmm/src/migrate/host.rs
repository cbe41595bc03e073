//! A destination: the engine's [`Host`] and [`PageSink`] over a machine that is built for the guest.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_migration::codec::marks::Marks;
use ferry_migration::options::Tracking;
use ferry_migration::page::{Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use ferry_migration::port::{BlockSink, Host, PageFault, PageSink, PortError};
use ferry_migration::wire::MAX_RUNS;

use super::disks::ArrivingDisks;
use super::{StreamLink, engine_layout, lock, page_runs};
use crate::machine::{Backends, DeviceDescription, Machine, MachineDescription, MachineState};
use crate::memory::{
    GuestRam, PageRun, SharedRam, Userfault, UserfaultError, Waited, check_available,
    check_userfault,
};

/// Makes the serial console's output for an arriving machine.
pub type SerialFactory = Arc<dyn Fn() -> io::Result<Box<dyn Write + Send>> + Send + Sync>;

/// Guest memory being filled.
pub struct RamSink {
    ram: Arc<GuestRam>,
    /// Pages that were written: decoded ones are placed in another way while nothing lies there.
    filled: Marks,
    faults: Mutex<Faults>,
}

/// How pages of a running guest come into place.
#[derive(Debug)]
enum Faults {
    /// No page of a running guest has been missing.
    NotBegun,
    Served(Arc<Userfault>),
    /// Nobody waits for a page any more.
    Over,
}

impl RamSink {
    /// Shorter runs are not worth two more system calls.
    const LONG: u64 = 16;

    /// Where to place pages of a running guest; `None` when nobody waits for any: one that comes late, because the guest has
    /// ended while it was on its way, has no place any more.
    fn faults(&self) -> Result<Option<Arc<Userfault>>, PortError> {
        match &*lock(&self.faults) {
            Faults::NotBegun => Err("no page of this guest is missing".into()),
            Faults::Served(faults) => Ok(Some(Arc::clone(faults))),
            Faults::Over => Ok(None),
        }
    }

    /// Nobody waits for a page any more: all are in place, or the guest is at its end.
    pub(crate) fn end_faults(&self) {
        let before = std::mem::replace(&mut *lock(&self.faults), Faults::Over);
        // Who waits in there holds it too, and drops it when the wait ends.
        if let Faults::Served(faults) = before
            && let Err(error) = faults.interrupt()
        {
            tracing::warn!(%error, "the threads that serve page faults end later");
        }
    }

    fn read_direct(&self, link: &StreamLink, runs: &[PageRun]) -> io::Result<()> {
        if runs.is_empty() {
            return Ok(());
        }
        let (fd, mut patience) = link.parts();
        self.ram
            .read_pages(fd, runs, |progress| patience.tick(progress))
    }

    /// Whether a run is long, and nothing was written to any of its pages. What was, is remembered: to ask the memory file
    /// would mean waiting for another lane that writes to it.
    fn is_fresh(&self, (first, count): PageRun) -> bool {
        count >= Self::LONG
            && !self.ram.hugepages()
            && !(first..first + count).any(|gfn| self.filled.contains(gfn))
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
        runs.iter().for_each(|run| self.filled.set_run(*run, true));
        Ok(())
    }

    fn write(&self, run: Run, bytes: &[u8]) -> Result<(), PortError> {
        // Exact but for zero pages, which are as good as fresh either way.
        let fresh = !self.filled.contains(run.first);
        self.filled.set_run(run, true);
        Ok(self.ram.write_decoded(run.first, bytes, fresh)?)
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

    fn place(&self, run: Run, bytes: &[u8]) -> Result<(), PortError> {
        if let Some(faults) = self.faults()? {
            faults.place(run.first, run.count, bytes)?;
        }
        Ok(())
    }

    fn place_zero(&self, run: Run) -> Result<(), PortError> {
        if let Some(faults) = self.faults()? {
            faults.place_zero(run.first, run.count)?;
        }
        Ok(())
    }

    fn next_fault(&self, timeout: Duration) -> Result<Option<PageFault>, PortError> {
        // Ended while this thread was on its way here: it looks again before long.
        let Ok(Some(faults)) = self.faults() else {
            std::thread::sleep(timeout);
            return Ok(None);
        };
        match faults.wait(timeout)? {
            Waited::Fault(fault) => Ok(Some(PageFault {
                gfn: fault.gfn,
                waiter: fault.thread.unwrap_or(0),
            })),
            Waited::TimedOut | Waited::Interrupted => Ok(None),
        }
    }
}

/// Builds and starts the machine of an arriving guest.
pub struct MachineHost {
    serial: SerialFactory,
    backends: Backends,
    dirty: Tracking,
    /// Those that are copied here.
    disks: ArrivingDisks,
    machine: Option<Arc<Machine>>,
    sink: Option<Arc<RamSink>>,
    /// That came, while the taps are asked for.
    memory: Option<SharedRam>,
    run_after: bool,
    started: bool,
}

impl MachineHost {
    pub(crate) fn new(serial: SerialFactory, backends: Backends, dirty: Tracking) -> Self {
        Self {
            serial,
            backends,
            dirty,
            disks: ArrivingDisks::default(),
            machine: None,
            sink: None,
            memory: None,
            run_after: true,
            started: false,
        }
    }

    /// Its memory.
    pub(super) const fn sink(&self) -> Option<&Arc<RamSink>> {
        self.sink.as_ref()
    }

    /// The machine, once it is built.
    pub(crate) const fn machine(&self) -> Option<&Arc<Machine>> {
        self.machine.as_ref()
    }
}

impl MachineHost {
    /// Builds the machine, over new memory or over what the source has shared.
    fn build(
        &mut self,
        layout: &RamLayout,
        machine: &[u8],
        shared: Option<(SharedRam, Vec<OwnedFd>)>,
    ) -> Result<Arc<RamSink>, PortError> {
        let description: MachineDescription = serde_json::from_slice(machine)
            .map_err(|e| format!("the machine's description cannot be understood: {e}"))?;
        description.check_host()?;
        let serial = (self.serial)()
            .map_err(|e| format!("the serial console cannot be opened here: {e}"))?;
        let mut builder = Machine::builder()
            .from_description(&description)
            .serial(serial)
            .devices(self.backends.clone())
            .dirty(self.dirty)
            .opened_disks(self.disks.disks());
        if let Some((memory, taps)) = shared {
            builder = builder.shared_memory(memory).shared_taps(taps);
        }
        let machine = builder.build()?;
        if engine_layout(machine.ram())? != *layout {
            return Err(
                "the source's memory layout is not that of its machine's description".into(),
            );
        }
        let sink = Arc::new(RamSink {
            ram: Arc::clone(machine.ram()),
            filled: Marks::new(layout.end()),
            faults: Mutex::new(Faults::NotBegun),
        });
        self.machine = Some(Arc::new(machine));
        self.sink = Some(Arc::clone(&sink));
        Ok(sink)
    }
}

impl Host<StreamLink> for MachineHost {
    type Sink = RamSink;

    fn take_stores(&mut self, bytes: &[u64]) -> Result<Vec<Arc<dyn BlockSink>>, PortError> {
        self.disks.make(&self.backends.disks, bytes)?;
        Ok(self.disks.sinks())
    }

    fn prepare(&mut self, layout: &RamLayout, machine: &[u8]) -> Result<Arc<RamSink>, PortError> {
        self.build(layout, machine, None)
    }

    fn wants_files(&mut self, link: &mut StreamLink) -> Result<bool, PortError> {
        let Some(beside) = link.beside() else {
            return Ok(false);
        };
        self.memory = beside.take()?;
        if self.memory.is_some() {
            beside.expect_files();
        }
        Ok(self.memory.is_some())
    }

    fn adopt(
        &mut self,
        link: &mut StreamLink,
        layout: &RamLayout,
        machine: &[u8],
    ) -> Result<Option<Arc<RamSink>>, PortError> {
        let Some(beside) = link.beside() else {
            return Ok(None);
        };
        let (memory, taps) = match self.memory.take() {
            Some(memory) => (Some(memory), beside.take_files()?),
            None => (beside.take()?, Vec::new()),
        };
        let Some(memory) = memory else {
            return Ok(None);
        };
        // Page tables are left to be made as the guest touches its pages. Made here for all of them they cost three times
        // as much for each (3.7 µs against 1.3 µs measured) while the guest needs the processors, and it gained nothing.
        self.build(layout, machine, Some((memory, taps))).map(Some)
    }

    fn check_post_copy(&self) -> Result<(), PortError> {
        check_userfault()?;
        Ok(())
    }

    fn drop_stale(&mut self, pages: &PageSet) -> Result<(), PortError> {
        let sink = self.sink.as_ref().ok_or("there is no machine")?;
        if sink.ram.hugepages() {
            return Err(UserfaultError::Hugepages.into());
        }
        for run in pages.runs() {
            sink.ram.drop_pages(run.first, run.count)?;
        }
        Ok(())
    }

    fn begin_post_copy(&mut self, missing: &PageSet) -> Result<(), PortError> {
        let sink = self.sink.as_ref().ok_or("there is no machine")?;
        // Pre-copy finds a shortage while the source still has the guest; here it would come too late.
        check_available(missing.len() * PAGE_SIZE as u64)?;
        // A page that the guest gives back would fault again, and the source would be asked for it in vain.
        if let Some(machine) = &self.machine {
            machine.keep_free_pages(true);
        }
        let faults = Userfault::register(Arc::clone(&sink.ram))?;
        *lock(&sink.faults) = Faults::Served(Arc::new(faults));
        Ok(())
    }

    fn end_post_copy(&mut self) {
        if let Some(sink) = &self.sink {
            sink.end_faults();
        }
        if let Some(machine) = &self.machine {
            machine.keep_free_pages(false);
        }
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
        self.disks.arrived()?;
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
            // A machine ends only when none of its vCPUs waits for a page.
            self.end_post_copy();
            self.sink = None;
            self.machine = None;
            self.disks.remove();
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
    let is_net = |device: &DeviceDescription| matches!(device, DeviceDescription::Net { .. });
    if !machine.description().devices.iter().any(is_net) {
        return;
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_comes_after_the_end_is_not_an_error() {
        let ram = Arc::new(GuestRam::new(1 << 20, false).unwrap());
        let sink = RamSink {
            ram,
            filled: Marks::new(256),
            faults: Mutex::new(Faults::NotBegun),
        };
        let bytes = [1; PAGE_SIZE];
        let run = Run::new(3, 1);
        assert!(sink.place(run, &bytes).is_err());
        assert!(sink.place_zero(run).is_err());
        sink.end_faults();
        sink.place(run, &bytes).unwrap();
        sink.place_zero(run).unwrap();
        assert!(sink.next_fault(Duration::ZERO).unwrap().is_none());
    }
}
