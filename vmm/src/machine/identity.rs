//! Which copy of a guest this is: its VM generation id, in its own memory.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{Machine, PausedMachine};
use crate::boot::{GENERATION_GSI, GENERATION_ID, GENERATION_MARK, GENERATION_PAGE, GenerationId};
use crate::kvm::IoctlError;

/// Why a guest did not get another identity.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// No random numbers.
    #[error("the host's kernel has no random numbers for the guest's generation id: {0}")]
    Random(#[source] std::io::Error),
    /// Its memory.
    #[error("the guest's generation id could not be changed in its memory: {0}")]
    Memory(#[from] GuestMemoryError),
    /// The guest cannot be told.
    #[error("the guest could not be told of its new generation id: {0}")]
    Notify(#[from] IoctlError),
}

impl Machine {
    /// The guest's generation id; `None` for one that was started without. Waits for that page of
    /// its memory.
    ///
    /// # Errors
    /// The page is no memory of the guest.
    pub fn generation(&self) -> Result<Option<GenerationId>, GuestMemoryError> {
        let memory = self.ram().memory();
        let (mut mark, mut id) = ([0; 16], [0; 16]);
        memory.read_slice(&mut mark, GuestAddress(GENERATION_PAGE))?;
        memory.read_slice(&mut id, GuestAddress(GENERATION_ID))?;
        Ok((mark == GENERATION_MARK).then(|| id.into()))
    }
}

impl PausedMachine<'_> {
    /// Makes the guest another one than all copies of it: it gets a new generation id, and is told
    /// so when it runs. Its memory and its state must be in place. Returns the id; `None` for a
    /// guest that was started without, which goes on without.
    ///
    /// # Errors
    /// [`IdentityError`]; it must not be resumed then.
    pub fn renew_identity(&self) -> Result<Option<GenerationId>, IdentityError> {
        let machine = self.machine();
        if machine.generation()?.is_none() {
            return Ok(None);
        }
        let id = GenerationId::random().map_err(IdentityError::Random)?;
        let memory = machine.ram().memory();
        memory.write_slice(&id.bytes(), GuestAddress(GENERATION_ID))?;
        // A guest whose driver is not there yet reads the id when it is.
        machine.vm().raise_if_heard(GENERATION_GSI)?;
        Ok(Some(id))
    }
}
