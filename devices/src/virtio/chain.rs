//! Descriptor chains, read from guest memory once and checked whole.
//!
//! `virtio-queue` iterates over a chain leniently: where a descriptor is wrong the chain just ends.
//! Here a wrong chain is an error that says what is wrong, and a chain can be read again by its
//! head: what a paused device puts back is taken up from there, on another host even.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};

use super::memory::{Memory, check};
use super::violation::Violation;

/// The most descriptors of an indirect table that are followed; Linux keeps to the size of its
/// queue.
const MAX_INDIRECT: u32 = 1024;
const DESCRIPTOR: u32 = 16;

/// Contiguous guest memory, checked to be RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: GuestAddress,
    /// Length in bytes.
    pub len: u32,
}

/// Guest memory in pieces: the readable or the writable part of a chain. At most 4 GiB.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Buffer {
    segments: Vec<Segment>,
}

impl Buffer {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.segments.iter().map(|s| u64::from(s.len)).sum()
    }

    /// Whether there is no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The pieces.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Takes the first `n` bytes off; all of them if there are fewer.
    #[must_use]
    pub fn take_front(&mut self, n: u64) -> Self {
        let tail = self.split_off(n);
        std::mem::replace(self, tail)
    }

    /// Takes the last `n` bytes off; all of them if there are fewer.
    #[must_use]
    pub fn take_back(&mut self, n: u64) -> Self {
        self.split_off(self.len().saturating_sub(n))
    }

    fn split_off(&mut self, mut at: u64) -> Self {
        let mut index = 0;
        while let Some(segment) = self.segments.get_mut(index) {
            let len = u64::from(segment.len);
            if at < len {
                let mut tail = self.segments.split_off(index);
                if let (Ok(keep), Some(first)) = (u32::try_from(at), tail.first_mut())
                    && keep > 0
                {
                    self.segments.push(Segment {
                        address: first.address,
                        len: keep,
                    });
                    first.address = first.address.unchecked_add(at);
                    first.len -= keep;
                }
                return Self { segments: tail };
            }
            at -= len;
            index += 1;
        }
        Self::default()
    }

    /// Copies from the start of this memory; returns how many bytes there were for `into`.
    ///
    /// # Errors
    /// [`Violation::Memory`].
    pub fn read<M: Memory>(&self, memory: &M, into: &mut [u8]) -> Result<usize, Violation> {
        let mut done = 0;
        for segment in &self.segments {
            let n = size(segment.len).min(into.len() - done);
            memory.read_slice(&mut into[done..done + n], segment.address)?;
            done += n;
        }
        Ok(done)
    }

    /// Copies to the start of this memory; returns how many bytes of `from` it had room for.
    ///
    /// # Errors
    /// [`Violation::Memory`].
    pub fn write<M: Memory>(&self, memory: &M, from: &[u8]) -> Result<usize, Violation> {
        let mut done = 0;
        for segment in &self.segments {
            let n = size(segment.len).min(from.len() - done);
            memory.write_slice(&from[done..done + n], segment.address)?;
            done += n;
        }
        Ok(done)
    }
}

fn size(len: u32) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

/// A request of the driver: what the device may read, and what it may write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Index of its first descriptor, by which it is given back.
    pub head: u16,
    /// For the device to read.
    pub readable: Buffer,
    /// For the device to write.
    pub writable: Buffer,
}

impl Chain {
    /// Reads the chain from descriptor `head` of the table of `size` at `table`.
    pub(super) fn walk<M: Memory>(
        memory: &M,
        table: GuestAddress,
        size: u16,
        head: u16,
    ) -> Result<Self, Violation> {
        let mut walk = Walk {
            chain: Self {
                head,
                readable: Buffer::default(),
                writable: Buffer::default(),
            },
            bytes: 0,
        };
        if let Some(indirect) = walk.table(memory, table, size, head, false)? {
            let (len, at) = (indirect.len(), indirect.addr());
            if len == 0 || !len.is_multiple_of(DESCRIPTOR) || len / DESCRIPTOR > MAX_INDIRECT {
                return Err(Violation::Indirect { head, len });
            }
            check(memory, "indirect table", at, len.into())?;
            let size = u16::try_from(len / DESCRIPTOR).unwrap_or(u16::MAX);
            walk.table(memory, at, size, 0, true)?;
        }
        Ok(walk.chain)
    }
}

struct Walk {
    chain: Chain,
    bytes: u32,
}

impl Walk {
    /// Follows a chain through one table; returns the descriptor of the indirect table that it ends
    /// in, if it does.
    fn table<M: Memory>(
        &mut self,
        memory: &M,
        table: GuestAddress,
        size: u16,
        first: u16,
        indirect: bool,
    ) -> Result<Option<Descriptor>, Violation> {
        let head = self.chain.head;
        let mut index = first;
        for _ in 0..size {
            if index >= size {
                return Err(Violation::Index { index, size });
            }
            // In RAM: tables are checked before they are walked.
            let at = table.unchecked_add(u64::from(index) * u64::from(DESCRIPTOR));
            let descriptor: Descriptor = memory.read_obj(at)?;
            if descriptor.refers_to_indirect_table() {
                if indirect {
                    return Err(Violation::Nested { head });
                }
                return Ok(Some(descriptor));
            }
            self.push(memory, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(None);
            }
            index = descriptor.next();
        }
        Err(Violation::Loop { head })
    }

    fn push<M: Memory>(&mut self, memory: &M, descriptor: &Descriptor) -> Result<(), Violation> {
        let head = self.chain.head;
        let (address, len) = (descriptor.addr(), descriptor.len());
        self.bytes = self
            .bytes
            .checked_add(len)
            .ok_or(Violation::Length { head })?;
        if len > 0 {
            check(memory, "buffer", address, len.into())?;
        }
        let part = if descriptor.is_write_only() {
            &mut self.chain.writable
        } else if self.chain.writable.segments.is_empty() {
            &mut self.chain.readable
        } else {
            return Err(Violation::Order { head });
        };
        part.segments.push(Segment { address, len });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffer(lens: &[u32]) -> Buffer {
        let segments = (0u64..)
            .zip(lens)
            .map(|(i, len)| Segment {
                address: GuestAddress(i * 0x1000),
                len: *len,
            })
            .collect();
        Buffer { segments }
    }

    #[test]
    fn buffers_split_at_every_byte() {
        let whole = buffer(&[3, 0, 5, 1]);
        let bytes = |b: &Buffer| -> Vec<u64> {
            b.segments
                .iter()
                .flat_map(|s| s.address.raw_value()..s.address.raw_value() + u64::from(s.len))
                .collect()
        };
        let all = bytes(&whole);
        for at in 0..12u64 {
            let mut rest = whole.clone();
            let front = rest.take_front(at);
            let cut = usize::try_from(at).unwrap().min(9);
            assert_eq!(bytes(&front), all[..cut], "{at}");
            assert_eq!(bytes(&rest), all[cut..], "{at}");
            let mut rest = whole.clone();
            let back = rest.take_back(at);
            assert_eq!(bytes(&back), all[9 - cut..], "{at}");
            assert_eq!(bytes(&rest), all[..9 - cut], "{at}");
        }
    }
}
