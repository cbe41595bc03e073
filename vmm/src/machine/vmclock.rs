//! What a guest is told of its clock: that it was disrupted, in its own memory.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{Machine, PausedMachine};
use crate::boot::{
    DISRUPTION_MARKER, SEQ_COUNT, VM_GENERATION_COUNTER, VMCLOCK_GSI, VMCLOCK_PAGE, vmclock_head,
};
use crate::kvm::IoctlError;

/// Why a guest was not told that its clock was disrupted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DisruptionError {
    /// Its memory.
    #[error("the guest's VMClock could not be changed in its memory: {0}")]
    Memory(#[from] GuestMemoryError),
    /// The guest cannot be interrupted.
    #[error("the guest could not be told that its clock was disrupted: {0}")]
    Notify(#[from] IoctlError),
}

/// What was disrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Disruption {
    /// The guest was moved: its counter may be another host's.
    Moved,
    /// Besides, the guest is a copy of one that was saved.
    Copied,
}

/// A guest's VMClock, as it stands in its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmClock {
    /// Odd while the others change.
    pub seq_count: u32,
    /// Another one after each disruption.
    pub disruption_marker: u64,
    /// Another one in each copy.
    pub vm_generation_counter: u64,
}

const fn at(offset: u64) -> GuestAddress {
    GuestAddress(VMCLOCK_PAGE + offset)
}

impl Machine {
    /// The guest's VMClock; `None` for one that was started without. Waits for that page of its
    /// memory.
    ///
    /// # Errors
    /// The page is no memory of the guest.
    pub fn vmclock(&self) -> Result<Option<VmClock>, GuestMemoryError> {
        let memory = self.ram().memory();
        let mut head = [0; 12];
        memory.read_slice(&mut head, at(0))?;
        if head != vmclock_head() {
            return Ok(None);
        }
        let long = |offset| -> Result<u64, GuestMemoryError> {
            let mut bytes = [0; 8];
            memory.read_slice(&mut bytes, at(offset))?;
            Ok(u64::from_le_bytes(bytes))
        };
        let mut seq_count = [0; 4];
        memory.read_slice(&mut seq_count, at(SEQ_COUNT))?;
        Ok(Some(VmClock {
            seq_count: u32::from_le_bytes(seq_count),
            disruption_marker: long(DISRUPTION_MARKER)?,
            vm_generation_counter: long(VM_GENERATION_COUNTER)?,
        }))
    }
}

impl PausedMachine<'_> {
    /// Tells the guest that its clock was disrupted, once it runs: what it has found out about its
    /// counter is void. Its memory and its state must be in place. Returns whether it was told: a
    /// guest that was started without a VMClock goes on without.
    ///
    /// # Errors
    /// [`DisruptionError`]; it must not be resumed then.
    pub fn disrupt_clock(&self, what: Disruption) -> Result<bool, DisruptionError> {
        let machine = self.machine();
        let Some(clock) = machine.vmclock()? else {
            return Ok(false);
        };
        let memory = machine.ram().memory();
        let marker = clock.disruption_marker.wrapping_add(1);
        memory.write_slice(&marker.to_le_bytes(), at(DISRUPTION_MARKER))?;
        if what == Disruption::Copied {
            let copy = clock.vm_generation_counter.wrapping_add(1);
            memory.write_slice(&copy.to_le_bytes(), at(VM_GENERATION_COUNTER))?;
        }
        // The guest stands still, and never sees it odd; it may have written anything there.
        let even = (clock.seq_count | 1).wrapping_add(1);
        memory.write_slice(&even.to_le_bytes(), at(SEQ_COUNT))?;
        machine.vm().raise_if_heard(VMCLOCK_GSI)?;
        Ok(true)
    }
}
