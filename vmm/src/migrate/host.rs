//! A destination: the engine's [`DestinationVm`] and [`PageSink`] over a machine that is built for
//! the guest.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use ferry_migration::options::Tracking;
use ferry_migration::page::{PAGE_SIZE, PageSet, RamLayout};
use ferry_migration::port::{
    AdoptMemory, BlockSink, DestinationDisks, DestinationVm, PortError, PostCopyVm,
};

use super::arrival::Owner;
use super::disks::IncomingDisks;
use super::gate::Gate;
use super::sink::RamSink;
use super::{StreamLink, engine_layout};
use crate::machine::{
    Backends, BuildError, Disruption, Machine, MachineDescription, MachineState, PausedMachine,
    STATE_VERSION,
};
use crate::memory::{
    Backing, ShareError, SharedRam, UserfaultError, check_available, check_userfault,
};

/// Makes the serial console's output for an arriving machine.
pub type SerialFactory = Arc<dyn Fn() -> io::Result<Box<dyn Write + Send>> + Send + Sync>;

/// Builds and starts the machine of an arriving guest.
pub struct MachineHost {
    serial: SerialFactory,
    backends: Backends,
    dirty: Tracking,
    /// Those that are copied here.
    disks: IncomingDisks,
    machine: Option<Arc<Machine>>,
    sink: Option<Arc<RamSink>>,
    /// That came, while the taps are asked for.
    memory: Option<SharedRam>,
    run_after: bool,
    started: bool,
    /// The guest's clock goes on from where it stood when the state was saved.
    stopped_clock: bool,
    /// The guest is a copy, and is told so.
    new_identity: bool,
    /// How large a guest may be.
    gate: Gate,
    /// Who the guest is for; `None` where that cannot change its mind.
    owner: Option<Arc<dyn Owner>>,
}

impl MachineHost {
    pub(crate) fn new(serial: SerialFactory, backends: Backends, dirty: Tracking) -> Self {
        Self {
            serial,
            backends,
            dirty,
            disks: IncomingDisks::default(),
            machine: None,
            sink: None,
            memory: None,
            run_after: true,
            started: false,
            stopped_clock: false,
            new_identity: false,
            gate: Gate::default(),
            owner: None,
        }
    }

    /// Asks this owner before it takes the guest.
    pub(super) fn owned_by(mut self, owner: Arc<dyn Owner>) -> Self {
        self.owner = Some(owner);
        self
    }

    /// Restores the guest as it was, however long that is ago: its clock does not count the time
    /// since.
    pub(crate) fn with_stopped_clock(mut self) -> Self {
        self.stopped_clock = true;
        self
    }

    /// Makes the guest another one than all copies of it.
    pub(crate) const fn with_new_identity(mut self, new: bool) -> Self {
        self.new_identity = new;
        self
    }

    /// Takes only a guest that this gate lets in.
    pub(super) fn behind(mut self, gate: Gate) -> Self {
        self.gate = gate;
        self
    }

    /// Before a take-over: whether the disks are still those of the guest's state.
    pub(super) fn check_disks(&self, force: bool) -> Result<(), String> {
        match &self.machine {
            Some(machine) if !force => machine.check_disks(),
            _ => Ok(()),
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
        let description = MachineDescription::from_json(machine)?;
        self.gate.check(&description)?;
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
        let sink = Arc::new(RamSink::new(Arc::clone(machine.ram()), layout));
        self.machine = Some(Arc::new(machine));
        self.sink = Some(Arc::clone(&sink));
        Ok(sink)
    }

    /// Tells the guest what it cannot see: that it was moved, or copied.
    fn tell(&self, paused: &PausedMachine<'_>) -> Result<(), PortError> {
        let what = if self.new_identity {
            paused.renew_identity()?;
            Disruption::Copied
        } else {
            Disruption::Moved
        };
        paused.disrupt_clock(what)?;
        Ok(())
    }
}

impl DestinationVm<StreamLink> for MachineHost {
    type Sink = RamSink;

    fn prepare(&mut self, layout: &RamLayout, machine: &[u8]) -> Result<Arc<RamSink>, PortError> {
        self.build(layout, machine, None)
    }

    fn state_version(&self) -> Option<u32> {
        Some(STATE_VERSION)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), PortError> {
        if let Some(owner) = &self.owner {
            owner.wants()?;
        }
        let machine = self.machine.as_ref().ok_or("there is no machine")?;
        let (&running, state) = state.split_first().ok_or("the state is empty")?;
        let mut state = MachineState::from_bytes(state)?;
        if self.stopped_clock {
            state.stop_clock();
        }
        let paused = machine.pause()?;
        let restored = paused.restore(&state);
        let told = match &restored {
            Ok(_) => self.tell(&paused),
            Err(_) => Ok(()),
        };
        paused.keep_paused();
        told?;
        for skipped in restored?.skipped_msrs {
            tracing::info!(
                name = skipped.name(),
                ?skipped,
                "an MSR of the source cannot be set here"
            );
        }
        self.run_after = running != 0;
        machine.note_disks();
        Ok(())
    }

    fn claim(&mut self) -> Result<(), PortError> {
        match &self.owner {
            Some(owner) => Ok(owner.claim()?),
            None => Ok(()),
        }
    }

    fn run(&mut self) -> Result<Option<Duration>, PortError> {
        let machine = self.machine.as_ref().ok_or("there is no machine")?;
        self.started = true;
        self.disks.arrived()?;
        if !self.run_after {
            return Ok(Some(Duration::ZERO));
        }
        machine.resume()?;
        let first = machine.wait_first_entry(Duration::from_secs(5));
        Ok(Some(first.map_or(Duration::ZERO, |at| at.elapsed())))
    }

    fn discard(&mut self) {
        if !self.started {
            // A machine ends only when none of its vCPUs waits for a page.
            self.end();
            self.sink = None;
            self.machine = None;
            self.disks.remove();
        }
    }

    fn disks(&mut self) -> Option<&mut dyn DestinationDisks> {
        Some(self)
    }

    fn sharing(&mut self) -> Option<&mut dyn AdoptMemory<StreamLink, RamSink>> {
        Some(self)
    }

    fn post_copy(&mut self) -> Option<&mut dyn PostCopyVm> {
        Some(self)
    }
}

impl DestinationDisks for MachineHost {
    fn take_disks(&mut self, bytes: &[u64]) -> Result<Vec<Arc<dyn BlockSink>>, PortError> {
        self.disks.make(&self.backends.disks, bytes)?;
        Ok(self.disks.sinks())
    }
}

impl AdoptMemory<StreamLink, RamSink> for MachineHost {
    fn wants_files(&mut self, link: &mut StreamLink) -> Result<bool, PortError> {
        let Some(fd_passing) = link.fd_passing() else {
            return Ok(false);
        };
        self.memory = fd_passing.take()?;
        if self.memory.is_some() {
            fd_passing.expect_files();
        }
        Ok(self.memory.is_some())
    }

    fn adopt(
        &mut self,
        link: &mut StreamLink,
        layout: &RamLayout,
        machine: &[u8],
    ) -> Result<Option<Arc<RamSink>>, PortError> {
        let Some(fd_passing) = link.fd_passing() else {
            return Ok(None);
        };
        let (memory, taps) = match self.memory.take() {
            Some(memory) => (Some(memory), fd_passing.take_files()?),
            None => (fd_passing.take()?, Vec::new()),
        };
        let Some(memory) = memory else {
            return Ok(None);
        };
        // Page tables are left to be made as the guest touches its pages. Made here for all of them
        // they cost three times as much for each (3.7 µs against 1.3 µs measured) while the guest
        // needs the processors, and it gained nothing.
        match self.build(layout, machine, Some((memory, taps))) {
            Ok(sink) => Ok(Some(sink)),
            // The source takes this for an answer, unless it was told not to copy.
            Err(error) if is_unsealed(&error) => {
                tracing::info!(%error, "the guest's memory is copied");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

impl PostCopyVm for MachineHost {
    fn check(&self) -> Result<(), PortError> {
        if self.backends.memory.backing == Backing::Hugetlb {
            return Err(UserfaultError::Hugepages.into());
        }
        check_userfault()?;
        Ok(())
    }

    fn drop_stale(&mut self, pages: &PageSet) -> Result<(), PortError> {
        let sink = self.sink.as_ref().ok_or("there is no machine")?;
        sink.drop_stale(pages)
    }

    fn begin(&mut self, missing: &PageSet) -> Result<(), PortError> {
        let sink = self.sink.as_ref().ok_or("there is no machine")?;
        // Pre-copy finds a shortage while the source still has the guest; here it would come too
        // late.
        check_available(missing.len() * PAGE_SIZE as u64)?;
        // A page that the guest gives back would fault again, and the source would be asked for it
        // in vain.
        if let Some(machine) = &self.machine {
            machine.keep_free_pages(true);
        }
        sink.begin_faults(missing)
    }

    fn end(&mut self) {
        if let Some(sink) = &self.sink {
            sink.end_faults();
        }
        if let Some(machine) = &self.machine {
            machine.keep_free_pages(false);
        }
    }
}

/// Whether shared memory is not taken because its source could cut it.
fn is_unsealed(error: &PortError) -> bool {
    matches!(
        error.downcast_ref(),
        Some(BuildError::Shared(ShareError::Unsealed))
    )
}

#[cfg(test)]
mod tests;
