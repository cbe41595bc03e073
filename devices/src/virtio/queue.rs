//! A virtqueue: `virtio-queue`'s rings, with chains that are checked, counted and can be put back.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use super::chain::Chain;
use super::memory::{Memory, check};
use super::state::{QueueState, RestoreError};
use super::violation::Violation;

/// Bytes before the entries of the available and of the used ring: flags and index.
const AVAILABLE_HEADER: u64 = 4;
const USED_HEADER: u64 = 4;
/// Bytes of an entry of the used ring.
const USED_ENTRY: u64 = 8;

/// The three areas of a queue.
#[derive(Debug, Clone, Copy)]
pub(super) enum Area {
    Descriptors,
    Available,
    Used,
}

/// A split virtqueue (§2.7).
#[derive(Debug)]
pub struct VirtQueue {
    ring: Queue,
    /// Heads that were taken from the available ring, and then put back by the device.
    returned: VecDeque<u16>,
    /// Chains that the device has and the driver has not got back.
    outstanding: u16,
    /// Chains that may be taken before others get their turn.
    budget: u16,
    /// The budget ended before the queue did.
    more: bool,
    /// Chains given back since the driver was last told.
    added: u16,
    /// What the driver set up wrongly.
    wrong: Option<&'static str>,
}

impl VirtQueue {
    pub(super) fn new(max_size: u16) -> Result<Self, virtio_queue::Error> {
        Ok(Self {
            ring: Queue::new(max_size)?,
            returned: VecDeque::new(),
            outstanding: 0,
            budget: 0,
            more: false,
            added: 0,
            wrong: None,
        })
    }

    /// Whether the driver has set it up.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.ring.ready()
    }

    /// The next request. `None` when there is none: the driver will then notify of the next; or
    /// when it is time to let others work: then the device is called again soon.
    ///
    /// # Errors
    /// [`Violation`].
    pub fn pop<M: Memory>(&mut self, memory: &M) -> Result<Option<Chain>, Violation> {
        if !self.ready() {
            return Ok(None);
        }
        if self.budget == 0 {
            self.more = true;
            return Ok(None);
        }
        let Some(head) = self.pop_head(memory)? else {
            return Ok(None);
        };
        let size = self.ring.size();
        if self.outstanding >= size {
            return Err(Violation::RunAway { size });
        }
        let table = GuestAddress(self.ring.desc_table());
        let chain = Chain::walk(memory, table, size, head)?;
        self.budget -= 1;
        self.outstanding += 1;
        Ok(Some(chain))
    }

    fn pop_head<M: Memory>(&mut self, memory: &M) -> Result<Option<u16>, Violation> {
        if let Some(head) = self.returned.pop_front() {
            return Ok(Some(head));
        }
        // More than one turn means that the driver added one before it saw that it shall notify.
        // One that plays with its index could keep us here, so after some turns it has to wait for
        // the next call.
        for _ in 0..8 {
            self.ring.disable_notification(memory)?;
            let size = self.ring.size();
            match self.ring.iter(memory) {
                Ok(mut heads) => {
                    if let Some(chain) = heads.next() {
                        return Ok(Some(chain.head_index()));
                    }
                }
                Err(virtio_queue::Error::InvalidAvailRingIndex) => {
                    return Err(Violation::RunAway { size });
                }
                Err(error) => return Err(error.into()),
            }
            if !self.ring.enable_notification(memory)? {
                return Ok(None);
            }
        }
        self.more = true;
        Ok(None)
    }

    /// Puts a chain that nothing was done with back: it is the next to be taken, here or on another
    /// host.
    pub fn put_back(&mut self, head: u16) {
        self.outstanding = self.outstanding.saturating_sub(1);
        self.returned.push_front(head);
    }

    /// Gives a chain back to the driver; `written` bytes of its writable part were written.
    ///
    /// # Errors
    /// [`Violation`] when the driver has made the head up.
    pub fn complete<M: Memory>(
        &mut self,
        memory: &M,
        head: u16,
        written: u32,
    ) -> Result<(), Violation> {
        self.complete_together(memory, &[(head, written)])
    }

    /// Gives chains back so that the driver sees all of them or none: a network packet in several
    /// buffers must come whole (§5.1.6.4.1). Each is its head and the bytes written.
    ///
    /// # Errors
    /// As [`complete`](Self::complete).
    pub fn complete_together<M: Memory>(
        &mut self,
        memory: &M,
        chains: &[(u16, u32)],
    ) -> Result<(), Violation> {
        let Some(((last, written), others)) = chains.split_last() else {
            return Ok(());
        };
        let size = self.ring.size();
        let mut at = self.ring.next_used();
        for (head, written) in others {
            // As `add_used` does, but for the index.
            let entry = USED_HEADER + USED_ENTRY * u64::from(at % size);
            let address = GuestAddress(self.ring.used_ring()).unchecked_add(entry);
            let entry = u64::from(*head) | u64::from(*written) << 32;
            memory.write_slice(&entry.to_le_bytes(), address)?;
            at = at.wrapping_add(1);
        }
        self.ring.set_next_used(at);
        self.ring.add_used(memory, *last, *written)?;
        let n = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        self.outstanding = self.outstanding.saturating_sub(n);
        self.added = self.added.saturating_add(n);
        Ok(())
    }

    /// Says that there is more to do, and that others may go first.
    pub fn again(&mut self) {
        self.more = true;
    }

    /// Allows one queue's worth of chains to be taken, and to find that there are no more.
    pub(super) fn refill(&mut self) {
        self.budget = self.ring.size() + 1;
        self.more = false;
    }

    pub(super) fn more(&self) -> bool {
        self.more
    }

    /// Whether the driver is to be told of used buffers (§2.7.7).
    pub(super) fn notify<M: Memory>(&mut self, memory: &M) -> Result<bool, Violation> {
        let added = std::mem::take(&mut self.added);
        if added == 0 {
            return Ok(false);
        }
        // The used index must be out before the driver's wish is read, or both sides may miss the
        // other's.
        fence(Ordering::SeqCst);
        let available = GuestAddress(self.ring.avail_ring());
        if !self.ring.event_idx_enabled() {
            let flags: u16 = memory.load(available, Ordering::Relaxed)?;
            return Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        let at = available.unchecked_add(AVAILABLE_HEADER + 2 * u64::from(self.ring.size()));
        let event = u16::from_le(memory.load(at, Ordering::Relaxed)?);
        // Among those just added is the one that the driver waits for. Counted from the newest.
        let since = self.ring.next_used().wrapping_sub(event).wrapping_sub(1);
        Ok(since < added)
    }

    pub(super) fn reset(&mut self) {
        self.ring.reset();
        self.returned.clear();
        self.outstanding = 0;
        self.more = false;
        self.added = 0;
        self.wrong = None;
    }

    /// Checks what the driver has set up; nothing is read from memory.
    pub(super) fn check<M: Memory>(&self, index: usize, memory: &M) -> Result<(), Violation> {
        if let Some(what) = self.wrong {
            return Err(Violation::Setup { index, what });
        }
        let n = u64::from(self.ring.size());
        let (table, available) = (self.ring.desc_table(), self.ring.avail_ring());
        check(memory, "descriptor table", GuestAddress(table), n * 16)?;
        check(memory, "available ring", GuestAddress(available), 6 + n * 2)?;
        let used = GuestAddress(self.ring.used_ring());
        check(memory, "used ring", used, 6 + n * 8)
    }

    /// `QueueNumMax`.
    pub(super) fn max_size(&self) -> u16 {
        self.ring.max_size()
    }

    /// `QueueNum`.
    pub(super) fn set_size(&mut self, size: u32) {
        let size = u16::try_from(size).unwrap_or(0);
        if self.ring.try_set_size(size).is_err() {
            self.wrong = Some("a size that is no power of two, or too large");
        }
    }

    pub(super) fn set_ready(&mut self, ready: bool) {
        self.ring.set_ready(ready);
    }

    pub(super) fn set_event_idx(&mut self, on: bool) {
        self.ring.set_event_idx(on);
    }

    /// One half of the address of one of the areas.
    pub(super) fn set_address(&mut self, area: Area, high: bool, value: u32) {
        let ring = &mut self.ring;
        let old = match area {
            Area::Descriptors => ring.desc_table(),
            Area::Available => ring.avail_ring(),
            Area::Used => ring.used_ring(),
        };
        let value = u64::from(value);
        let address = GuestAddress(if high {
            old & 0xffff_ffff | value << 32
        } else {
            old & !0xffff_ffff | value
        });
        let result = match area {
            Area::Descriptors => ring.try_set_desc_table_address(address),
            Area::Available => ring.try_set_avail_ring_address(address),
            Area::Used => ring.try_set_used_ring_address(address),
        };
        if result.is_err() {
            self.wrong = Some("a ring at an odd address");
        }
    }

    pub(super) fn save(&self) -> QueueState {
        QueueState {
            size: self.ring.size(),
            ready: self.ring.ready(),
            descriptors: self.ring.desc_table(),
            available: self.ring.avail_ring(),
            used: self.ring.used_ring(),
            next_available: self.ring.next_avail(),
            next_used: self.ring.next_used(),
            returned: self.returned.iter().copied().collect(),
        }
    }

    pub(super) fn restore(
        &mut self,
        index: usize,
        state: &QueueState,
        event_idx: bool,
    ) -> Result<(), RestoreError> {
        let max_size = self.ring.max_size();
        let absurd = |what| RestoreError::Queue { index, what };
        let mut ring = Queue::new(max_size).map_err(|_| absurd("an impossible size"))?;
        ring.try_set_size(state.size)
            .map_err(|_| absurd("an impossible size"))?;
        ring.try_set_desc_table_address(GuestAddress(state.descriptors))
            .and_then(|()| ring.try_set_avail_ring_address(GuestAddress(state.available)))
            .and_then(|()| ring.try_set_used_ring_address(GuestAddress(state.used)))
            .map_err(|_| absurd("rings at odd addresses"))?;
        let heads = &state.returned;
        if heads.len() > usize::from(state.size) || heads.iter().any(|h| *h >= state.size) {
            return Err(absurd("requests that the queue cannot hold"));
        }
        ring.set_next_avail(state.next_available);
        ring.set_next_used(state.next_used);
        ring.set_event_idx(event_idx);
        ring.set_ready(state.ready);
        self.reset();
        self.ring = ring;
        self.returned = heads.iter().copied().collect();
        Ok(())
    }
}
