//! The destination of the simulated world: what it is given, and when its guest starts.

use super::{STALE, World, index};
use crate::page::{Gfn, PageSet};

impl World {
    /// Whether the guest, at the destination, has to wait for this page.
    pub(super) fn faults_on(&mut self, gfn: Gfn) -> bool {
        let faults =
            self.destination_runs && self.missing.as_ref().is_some_and(|set| set.contains(gfn));
        if faults {
            self.blocked = Some(gfn);
            self.faults_heard.push_back(gfn);
            self.faults_taken += 1;
        }
        faults
    }

    /// What is here of these pages is stale and must not be read.
    pub fn drop_stale(&mut self, pages: &PageSet) {
        for gfn in pages.iter() {
            self.destination_memory[index(gfn)] = STALE;
        }
    }

    /// These pages are to follow the guest.
    pub fn begin_post_copy(&mut self, missing: &PageSet) {
        for gfn in missing.iter() {
            if self.destination_memory[index(gfn)] != STALE {
                self.violations
                    .push(format!("page {gfn} is missing and was not dropped"));
            }
        }
        self.missing = Some(missing.clone());
    }

    /// A page that has followed the guest.
    pub fn place(&mut self, gfn: Gfn, version: u64) {
        let expected = self.missing.as_mut().is_some_and(|set| set.remove(gfn));
        if !expected {
            self.violations.push(format!("page {gfn} was placed twice"));
            return;
        }
        let sent = self.paused_memory[index(gfn)];
        if sent != version {
            self.violations.push(format!(
                "lost write: page {gfn} followed as {version}, should be {sent}"
            ));
        }
        self.destination_memory[index(gfn)] = version;
        if self.blocked == Some(gfn) {
            self.blocked = None;
            self.write(gfn);
        }
    }

    /// The destination's claim on shared memory, as the kernel would decide it.
    pub fn claim(&mut self) -> Result<(), crate::port::PortError> {
        if self.ran_since_shared {
            return Err("the guest has run in this memory since".into());
        }
        if !(self.committed || self.source_dead) {
            return Err("the source has the guest's memory".into());
        }
        self.destination_memory = self.source_memory.clone();
        self.ran_since_shared = true;
        Ok(())
    }

    /// What the destination has of a page.
    pub fn at_destination(&self, gfn: Gfn) -> u64 {
        let memory = if self.shared {
            &self.source_memory
        } else {
            &self.destination_memory
        };
        memory[index(gfn)]
    }

    /// The destination puts a page in place.
    pub fn fill(&mut self, gfn: Gfn, version: u64) {
        if self.complete {
            let wrong = format!("page {gfn} was written into a complete guest");
            self.violations.push(wrong);
        } else if self.shared {
            let wrong = format!("page {gfn} was written into memory that the source's guest has");
            self.violations.push(wrong);
        } else {
            self.destination_memory[index(gfn)] = version;
        }
    }

    pub fn destination_starts(&mut self) {
        if self.source_runs {
            self.violations
                .push("two owners: the destination started while the source runs".into());
        }
        let layout = self.layout.clone();
        let mut here = layout.all();
        if let Some(missing) = &self.missing {
            here.subtract(missing);
        }
        for gfn in here.iter() {
            let (sent, here) = (
                self.paused_memory[index(gfn)],
                self.destination_memory[index(gfn)],
            );
            if sent != here {
                self.violations.push(format!(
                    "lost write: page {gfn} is {here}, should be {sent}"
                ));
            }
        }
        self.violations.extend(self.disks.wrong());
        self.starts += 1;
        if self.starts > 1 {
            self.violations
                .push("the destination started the guest again".into());
        }
        if self.cancelled && !self.source_dead {
            self.violations
                .push("a guest started whose migration was cancelled".into());
        }
        // An operator who takes over from a source that went on and died goes back in time.
        if self.disks.is_unflushed() && !self.source_dead {
            let wrong = "the guest started on a disk that the source had not flushed";
            self.violations.push(wrong.into());
        }
        self.destination_runs = true;
    }
}
