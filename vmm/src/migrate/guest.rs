//! A machine at the source: the engine's [`SourceVm`].

use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ferry_devices::sync::lock;
use ferry_migration::page::{Gfn, PAGE_BYTES, PAGE_SIZE, PageSet, RamLayout, Run};
use ferry_migration::port::{
    BlockSource, Committed, CommittedVm, FreeMemory, FreedPages, NotStarted, PageSource, Paused,
    PausedVm, PortError, ShareMemory, SourceDisks, SourceVm, TakeBackError, Throttle,
};
use ferry_migration::wire::SessionId;

use super::disks::DiskCopy;
use super::{StreamLink, copied, engine_layout};
use crate::machine::{Machine, PausedMachine, version_for};
use crate::memory::{HUGE_PAGE_SIZE, ShareError};

/// The guest of a machine while it is migrated away.
pub(crate) struct MachineGuest<'a> {
    machine: &'a Arc<Machine>,
    /// The version that its state is written in, where that is not the destination's affair.
    version: Option<u32>,
}

impl<'a> MachineGuest<'a> {
    pub(crate) const fn new(machine: &'a Arc<Machine>) -> Self {
        Self {
            machine,
            version: None,
        }
    }

    /// Has the state written in this version.
    pub(crate) const fn with_state_version(self, version: u32) -> Self {
        Self {
            version: Some(version),
            ..self
        }
    }
}

/// A machine that stands still for the engine. Dropping it resumes the machine, if that ran before.
struct StoppedMachine<'a> {
    machine: &'a Arc<Machine>,
    paused: PausedMachine<'a>,
    /// As the guest's.
    version: Option<u32>,
    /// When the guest ran last.
    ran: Instant,
}

/// A machine whose guest was given to the destination. It stands still, and cannot be taken over
/// while this exists: COMMIT is on its way.
pub(crate) struct CommittedMachine<'a>(&'a Arc<Machine>);

impl<'a> CommittedMachine<'a> {
    /// The machine, if its guest was given away and no other question about it is under way: there
    /// is nothing to recover otherwise.
    pub(crate) fn of(machine: &'a Arc<Machine>) -> Option<Self> {
        machine.begin_asking().then(|| Self(machine))
    }
}

impl Drop for CommittedMachine<'_> {
    fn drop(&mut self) {
        self.0.end_asking();
    }
}

impl<'g> PausedVm<'g> for StoppedMachine<'g> {
    fn stopped_for(&self) -> Option<Duration> {
        Some(self.ran.elapsed())
    }

    fn save(&self, newest: Option<u32>) -> Result<Vec<u8>, PortError> {
        let version = self.version.map_or_else(|| version_for(newest), Ok)?;
        // A take-over here is refused if the destination ran the guest on its disks meanwhile.
        self.machine.note_disks();
        let mut bytes = vec![u8::from(self.paused.was_running())];
        bytes.extend(self.paused.save()?.to_bytes_as(version)?);
        Ok(bytes)
    }

    fn commit(self: Box<Self>, session: SessionId) -> Result<Committed<'g>, PortError> {
        // From here on the other side may take the disks and the memory. Where that fails the guest
        // stays: the guard is dropped and takes them again.
        self.machine.release_disks()?;
        self.machine.ram().give_up()?;
        self.machine.close_connections();
        tracing::info!(%session, "the guest is handed over");
        self.paused.commit();
        let committed = CommittedMachine::of(self.machine);
        Ok(Box::new(committed.ok_or("the guest was taken over")?))
    }

    fn keep(self: Box<Self>) {
        self.paused.keep_paused();
    }
}

impl CommittedVm for CommittedMachine<'_> {
    fn release(self: Box<Self>) {
        self.0.stop();
    }

    fn take_back(self: Box<Self>, word: NotStarted) -> Result<(), TakeBackError> {
        tracing::warn!(
            why = word.why(),
            "the destination did not start the guest: it is here again, as it was"
        );
        if !lock(self.0.freed()).is_empty() {
            let why = "the guest's memory was given back to this host while it ran there";
            return Err(TakeBackError::Lost(why.into()));
        }
        let taken = self.0.take_back(&word);
        taken.map_err(|error| TakeBackError::StandsStill(error.into()))
    }
}

impl PageSource<StreamLink> for MachineGuest<'_> {
    fn transmit(&self, link: &mut StreamLink, head: &[u8], runs: &[Run]) -> io::Result<()> {
        let ram = self.machine.ram();
        if link.is_coded_here() {
            return copied::send(ram, link, head, runs);
        }
        let pages: u64 = runs.iter().map(|run| run.count).sum();
        let bytes = head.len() as u64 + pages * PAGE_BYTES;
        link.send_directly(bytes, |fd, mut wait| {
            ram.write_pages(fd, head, runs, |progress| wait.tick(progress))
        })
    }

    fn copy_page(&self, gfn: Gfn, into: &mut [u8; PAGE_SIZE]) -> Result<(), PortError> {
        Ok(self.machine.ram().copy_page(gfn, into)?)
    }

    fn is_zero(&self, gfn: Gfn) -> bool {
        self.machine.ram().page_is_zero(gfn).unwrap_or(false)
    }

    fn unpopulated(&self, run: Run) -> Option<Run> {
        self.machine.ram().unpopulated(run.first, run.count)
    }
}

impl SourceVm<StreamLink> for MachineGuest<'_> {
    fn layout(&self) -> RamLayout {
        // The machine's own layout is sorted and disjoint, which is all that is asked.
        engine_layout(self.machine.ram())
            .unwrap_or_else(|error| unreachable!("a machine's RAM layout: {error}"))
    }

    fn description(&self) -> Result<Vec<u8>, PortError> {
        Ok(serde_json::to_vec(&self.machine.description_to_send())?)
    }

    fn check_reader(&self, newest: Option<u32>) -> Result<(), PortError> {
        version_for(newest)?;
        Ok(())
    }

    /// What the state of a machine came to when it was measured: about 6 KiB for the VM and its
    /// devices, 8 KiB for each vCPU, and less than 256 bytes for each virtio device.
    fn state_bytes(&self) -> u64 {
        let description = self.machine.description();
        let virtio = u64::try_from(description.devices.len()).unwrap_or(0) << 8;
        (6 << 10) + virtio + u64::from(description.cpus) * (8 << 10)
    }

    fn start_tracking(&self) -> Result<(), PortError> {
        Ok(self.machine.dirty_log().start()?)
    }

    fn stop_tracking(&self) {
        if let Err(error) = self.machine.dirty_log().stop() {
            tracing::warn!(%error, "the guest may be slower than before");
        }
    }

    fn collect_dirty(&self, into: &mut PageSet) -> Result<(), PortError> {
        Ok(self
            .machine
            .dirty_log()
            .collect(|first, words| into.insert_words(first, words))?)
    }

    /// KVM clears by 64-page words and a bitmap: runs that share a word, or lie in neighbouring
    /// ones, go together.
    fn clear_dirty(&self, runs: &[Run], words: &mut Vec<u64>) -> Result<(), PortError> {
        /// A stretch of untouched words longer than this is worth a call of its own.
        const GAP: u64 = 64;
        let log = self.machine.dirty_log();
        words.clear();
        let (mut start, mut region_end) = (0, 0);
        for run in runs {
            let first_word = run.first / 64 * 64;
            let reach = start + words.len() as u64 * 64;
            if !words.is_empty() && (run.first >= region_end || first_word > reach + GAP * 64) {
                log.clear(start, words)?;
                words.clear();
            }
            if words.is_empty() {
                start = first_word;
                let regions = self.machine.ram().regions();
                let region = regions.iter().find(|r| run.first < r.first_gfn + r.pages);
                region_end = region.map_or(u64::MAX, |r| r.first_gfn + r.pages);
            }
            let needed = (run.end() - start).div_ceil(64);
            words.resize(words.len().max(usize::try_from(needed)?), 0);
            for gfn in run.first..run.end() {
                words[usize::try_from((gfn - start) / 64)?] |= 1 << (gfn % 64);
            }
        }
        if !words.is_empty() {
            log.clear(start, words)?;
        }
        Ok(())
    }

    fn pause(&self) -> Result<Paused<'_>, PortError> {
        let asked = Instant::now();
        let paused = self.machine.pause()?;
        let last = if paused.was_running() {
            self.machine.last_paused_at()
        } else {
            None
        };
        Ok(Box::new(StoppedMachine {
            machine: self.machine,
            paused,
            version: self.version,
            // Each vCPU stops when its kick arrives; the first may have stopped when they were
            // sent.
            ran: last.map_or(asked, |last| last.min(asked)),
        }))
    }

    fn disks(&self) -> Option<&dyn SourceDisks> {
        (!self.machine.disks().is_empty()).then_some(self)
    }

    fn sharing(&self) -> Option<&dyn ShareMemory<StreamLink>> {
        Some(self)
    }

    fn throttle(&self) -> Option<&dyn Throttle> {
        Some(self)
    }

    fn freeing(&self) -> Option<&dyn FreeMemory> {
        Some(self)
    }

    fn fault_channels(&self) -> u16 {
        u16::try_from(self.machine.description().cpus).unwrap_or(u16::MAX)
    }

    fn processors(&self) -> u16 {
        let here = std::thread::available_parallelism();
        here.map_or(1, |n| u16::try_from(n.get()).unwrap_or(u16::MAX))
    }
}

impl FreeMemory for MachineGuest<'_> {
    fn piece(&self) -> u64 {
        // Of small pages so many that a call is worth it.
        const SMALL: u64 = 16;
        if self.machine.ram().fills_huge() {
            HUGE_PAGE_SIZE / PAGE_BYTES
        } else {
            SMALL
        }
    }

    fn free(&self, pages: Run) -> Result<(), PortError> {
        Ok(self.machine.ram().discard(pages.first, pages.count)?)
    }

    fn freed(&self) -> &Mutex<FreedPages> {
        self.machine.freed()
    }
}

impl Throttle for MachineGuest<'_> {
    fn vcpus(&self) -> usize {
        usize::try_from(self.machine.description().cpus).unwrap_or(usize::MAX)
    }

    fn dirtied(&self) -> Option<Vec<u64>> {
        self.machine.dirty_log().dirtied_by_vcpu()
    }

    fn slow(&self, shares: &[f64]) -> Result<(), PortError> {
        Ok(self.machine.slow_vcpus(shares)?)
    }

    fn rested(&self) -> Vec<Duration> {
        self.machine.vcpus_rested()
    }
}

impl SourceDisks for MachineGuest<'_> {
    fn flush(&self) -> Result<(), PortError> {
        for disk in self.machine.disks().iter().filter(|disk| !disk.read_only()) {
            disk.sync().map_err(|error| {
                let path = disk.path().display();
                format!("the disk {path} cannot be flushed: {error}")
            })?;
        }
        Ok(())
    }

    fn to_copy(&self) -> Vec<Arc<dyn BlockSource>> {
        let disk = |disk: &Arc<_>| Arc::new(DiskCopy(Arc::clone(disk))) as _;
        self.machine.disks().iter().map(disk).collect()
    }
}

impl ShareMemory<StreamLink> for MachineGuest<'_> {
    fn share_memory(&self, link: &mut StreamLink) -> Result<bool, PortError> {
        let Some(fd_passing) = link.fd_passing() else {
            return Ok(false);
        };
        match self.machine.ram().share() {
            Ok(shared) => fd_passing.put(shared),
            // It lies in the private tmpfs of another process, which is in no rule of this one's
            // sandbox, and there are no spares.
            Err(ShareError::Reopen(error)) if error.kind() == ErrorKind::PermissionDenied => {
                tracing::warn!(%error, "the guest's memory is copied: it cannot be handed on once more");
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        }
        Ok(true)
    }

    fn has_files(&self) -> bool {
        self.machine.has_taps()
    }

    fn share_files(&self, link: &mut StreamLink) -> Result<(), PortError> {
        let fd_passing = link.fd_passing().ok_or("the link carries no files")?;
        fd_passing.put_files(self.machine.share_taps()?);
        Ok(())
    }
}
