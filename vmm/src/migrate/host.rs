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
use crate::numa::PlacementError;

/// Makes the serial console's output for an arriving machine.
pub type SerialFactory = Arc<dyn Fn() -> io::Result<Box<dyn Write + Send>> + Send + Sync>;

/// Builds and starts the machine of an arriving guest.
pub struct MachineHost {
    serial: SerialFactory,
    backends: Backends,
    dirty: Tracking,
    /// Those that are copied here.
    disks: IncomingDisks,
    phase: Phase,
    /// The guest's clock goes on from where it stood when the state was saved.
    stopped_clock: bool,
    /// The guest is a copy, and is told so.
    new_identity: bool,
    /// How large a guest may be.
    gate: Gate,
    /// Who the guest is for; `None` where that cannot change its mind.
    owner: Option<Arc<dyn Owner>>,
}

/// What there is of the guest here.
///
/// ```text
///  Empty ──▶ Offered ──▶ Built ──state──▶ Restored ──commit──▶ Started
///    │                     ▲    │             │
///    └─────────────────────┘    └── discard ──┴──▶ Empty
/// ```
enum Phase {
    /// Nothing.
    Empty,
    /// Its memory came, and the taps are asked for.
    Offered(SharedRam),
    /// Its machine, whose memory arrives.
    Built(Built),
    /// Its machine with its state.
    Restored(Built, Then),
    /// The guest belongs here: its machine is not discarded any more.
    Started(Built, Then),
}

/// What the state says of a guest that is started here.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    /// It ran at the source.
    Run,
    /// It was paused.
    Stand,
}

/// A machine and its memory.
struct Built {
    sink: Arc<RamSink>,
    machine: Arc<Machine>,
}

fn no_machine() -> PortError {
    "there is no machine".into()
}

impl MachineHost {
    pub(crate) fn new(serial: SerialFactory, backends: Backends, dirty: Tracking) -> Self {
        Self {
            serial,
            backends,
            dirty,
            disks: IncomingDisks::default(),
            phase: Phase::Empty,
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
        match self.built() {
            Some(built) if !force => built.machine.check_disks(),
            _ => Ok(()),
        }
    }

    /// Its memory.
    pub(super) fn sink(&self) -> Option<&Arc<RamSink>> {
        self.built().map(|built| &built.sink)
    }

    /// The machine, once it is built.
    pub(crate) fn machine(&self) -> Option<&Arc<Machine>> {
        self.built().map(|built| &built.machine)
    }

    const fn built(&self) -> Option<&Built> {
        match &self.phase {
            Phase::Empty | Phase::Offered(_) => None,
            Phase::Built(built) | Phase::Restored(built, _) | Phase::Started(built, _) => {
                Some(built)
            }
        }
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
        self.phase = Phase::Built(Built {
            machine: Arc::new(machine),
            sink: Arc::clone(&sink),
        });
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
        let machine = self.machine().ok_or_else(no_machine)?;
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
        machine.note_disks();
        let then = if running == 0 { Then::Stand } else { Then::Run };
        self.phase = match std::mem::replace(&mut self.phase, Phase::Empty) {
            Phase::Built(built) => Phase::Restored(built, then),
            other => other,
        };
        Ok(())
    }

    fn claim(&mut self) -> Result<(), PortError> {
        match &self.owner {
            Some(owner) => Ok(owner.claim()?),
            None => Ok(()),
        }
    }

    fn run(&mut self) -> Result<Option<Duration>, PortError> {
        // Once more where it could not be started before.
        let (built, then) = match std::mem::replace(&mut self.phase, Phase::Empty) {
            Phase::Restored(built, then) | Phase::Started(built, then) => (built, then),
            other => {
                self.phase = other;
                return Err("there is no machine with its state".into());
            }
        };
        let machine = Arc::clone(&built.machine);
        self.phase = Phase::Started(built, then);
        self.disks.arrived()?;
        if then == Then::Stand {
            return Ok(Some(Duration::ZERO));
        }
        machine.resume()?;
        let first = machine.wait_first_entry(Duration::from_secs(5));
        Ok(Some(first.map_or(Duration::ZERO, |at| at.elapsed())))
    }

    fn discard(&mut self) {
        if matches!(self.phase, Phase::Started(..)) {
            return;
        }
        // A machine ends only when none of its vCPUs waits for a page.
        self.end();
        self.phase = Phase::Empty;
        self.disks.remove();
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
        let Some(memory) = fd_passing.take()? else {
            return Ok(false);
        };
        fd_passing.expect_files();
        self.phase = Phase::Offered(memory);
        Ok(true)
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
        let (memory, taps) = match std::mem::replace(&mut self.phase, Phase::Empty) {
            Phase::Offered(memory) => (Some(memory), fd_passing.take_files()?),
            _ => (fd_passing.take()?, Vec::new()),
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
            Err(error) if is_to_be_copied(&error) => {
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
        self.sink().ok_or_else(no_machine)?.drop_stale(pages)
    }

    fn begin(&mut self, missing: &PageSet) -> Result<(), PortError> {
        let Built { machine, sink } = self.built().ok_or_else(no_machine)?;
        // Pre-copy finds a shortage while the source still has the guest; here it would come too
        // late.
        check_available(missing.len() * PAGE_SIZE as u64)?;
        // A page that the guest gives back would fault again, and the source would be asked for it
        // in vain.
        machine.keep_free_pages(true);
        sink.begin_faults(missing)
    }

    fn end(&mut self) {
        if let Some(Built { machine, sink }) = self.built() {
            sink.end_faults();
            machine.keep_free_pages(false);
        }
    }
}

/// Whether shared memory is not taken because its source could cut it, or because it is not where
/// it should be.
fn is_to_be_copied(error: &PortError) -> bool {
    matches!(
        error.downcast_ref(),
        Some(
            BuildError::Shared(ShareError::Unsealed)
                | BuildError::Placement(PlacementError::Stays { .. })
        )
    )
}

#[cfg(test)]
mod tests;
