//! Guest memory, as devices see it.

use vm_memory::{Address, GuestAddress, GuestMemory, Permissions};

use super::violation::Violation;

/// Guest memory as devices see it. Writes must be tracked by the memory's own bitmap where they are
/// to be migrated.
pub trait Memory: GuestMemory + Send + Sync + 'static {}

impl<M: GuestMemory + Send + Sync + 'static> Memory for M {}

/// Checks that bytes are RAM, without touching them: they may not have arrived yet.
pub(crate) fn check<M: GuestMemory>(
    memory: &M,
    what: &'static str,
    address: GuestAddress,
    len: u64,
) -> Result<(), Violation> {
    let fits =
        usize::try_from(len).is_ok_and(|n| memory.check_range(address, n, Permissions::ReadWrite));
    let wraps = address.checked_add(len).is_none();
    if fits && !wraps {
        Ok(())
    } else {
        Err(Violation::Outside {
            what,
            address: address.raw_value(),
            len,
        })
    }
}
