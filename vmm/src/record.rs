//! Watching which pages a machine's guest dirties.

use std::sync::Arc;

use ferry_migration::page::{PageSet, RamLayout, Run};
use ferry_migration::trace::Header;

use crate::kvm::DirtyLogError;
use crate::machine::Machine;
use crate::memory::GuestRam;
use crate::migrate::engine_layout;

/// A guest whose dirty pages are being watched. Dropping it ends that.
pub trait Recording: Send {
    /// What is recorded, all but the interval.
    fn header(&self) -> Header;

    /// Puts the pages that were dirtied since the last call (the first time: since the recording
    /// began) into the set.
    ///
    /// # Errors
    /// A sentence; the recording is over.
    fn sample(&mut self, into: &mut PageSet) -> Result<(), String>;
}

/// A machine whose dirty log is on to be recorded.
#[derive(Debug)]
pub struct MachineRecording {
    machine: Arc<Machine>,
    layout: RamLayout,
    workload: Option<String>,
    empty_pages: u64,
}

/// Why a machine cannot be recorded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The dirty log.
    #[error(transparent)]
    DirtyLog(#[from] DirtyLogError),
    /// The machine's memory is laid out in a way that cannot be traced.
    #[error("the guest's memory cannot be traced: {0}")]
    Layout(#[from] ferry_migration::page::LayoutError),
}

impl MachineRecording {
    /// Turns the dirty log on and clears it: from now on it holds what the guest (and its devices)
    /// write.
    ///
    /// # Errors
    /// [`RecordError`]; the log is then off.
    pub fn begin(machine: Arc<Machine>, workload: Option<String>) -> Result<Self, RecordError> {
        let layout = engine_layout(machine.ram())?;
        let empty_pages = about_empty(machine.ram());
        machine.dirty_log().start()?;
        let recording = Self {
            empty_pages,
            machine,
            layout,
            workload,
        };
        // Every page counts as dirty at first.
        recording.take(&mut PageSet::new(recording.layout.end()))?;
        Ok(recording)
    }

    /// Collects the log and clears what was collected. What is dirtied in between is cleared with
    /// it when it was dirty already (and was found), and found the next time when not.
    fn take(&self, into: &mut PageSet) -> Result<(), DirtyLogError> {
        let log = self.machine.dirty_log();
        log.collect(|first, words| into.insert_words(first, words))?;
        for region in self.machine.ram().regions() {
            let first = usize::try_from(region.first_gfn / 64).unwrap_or(usize::MAX);
            let words = into.words().get(first..first + region.words());
            log.clear(region.first_gfn, words.unwrap_or_default())?;
        }
        Ok(())
    }
}

/// About how many pages hold nothing but zeros. Those that were never touched are counted; of the
/// others every so many is looked at.
fn about_empty(ram: &GuestRam) -> u64 {
    const EVERY: u64 = 16;
    let mut empty = 0;
    for region in ram.regions() {
        let end = region.first_gfn + region.pages;
        let mut at = region.first_gfn;
        while at < end {
            let untouched = ram.unpopulated(at, end - at).unwrap_or(Run::new(end, 0));
            empty += untouched.count;
            let mut sampled = at.next_multiple_of(EVERY);
            while sampled < untouched.first {
                if ram.page_is_zero(sampled).unwrap_or(false) {
                    empty += EVERY.min(untouched.first - sampled);
                }
                sampled += EVERY;
            }
            at = untouched.end();
        }
    }
    empty
}

impl Recording for MachineRecording {
    fn header(&self) -> Header {
        let description = self.machine.description();
        Header {
            layout: self.layout.clone(),
            memory_bytes: description.memory,
            cpus: description.cpus,
            name: Some(description.name.clone()),
            workload: self.workload.clone(),
            empty_pages: Some(self.empty_pages),
            interval_us: 0,
        }
    }

    fn sample(&mut self, into: &mut PageSet) -> Result<(), String> {
        self.take(into).map_err(|e| e.to_string())
    }
}

impl Drop for MachineRecording {
    fn drop(&mut self) {
        if let Err(error) = self.machine.dirty_log().stop() {
            tracing::warn!(%error, "the guest may be slower than before");
        }
    }
}
