//! What a guest keeps outside its memory, where that is to move with it: its disks, as *disks* of
//! blocks.

use super::PortError;

/// Bytes in a block: what is tracked, sent and compared as one. A disk's last block may be shorter.
pub const BLOCK_BYTES: u64 = 64 << 10;

/// How many blocks a disk of so many bytes has.
#[must_use]
pub const fn blocks_in(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES)
}

/// A disk at the source. The guest goes on writing to it while it is copied.
///
/// A write counts as written when it is done, and before the guest is told that it is: what was
/// read too early or half is then found written later, and read again. While the guest is paused
/// nothing is written, and every write that was done is counted.
pub trait BlockSource: Send + Sync {
    /// Its size in bytes; it does not change.
    fn bytes(&self) -> u64;
    /// From now on blocks that are written are remembered.
    ///
    /// # Errors
    /// When they cannot be.
    fn start(&self) -> Result<(), PortError>;
    /// Remembers nothing any more.
    fn stop(&self);
    /// The blocks written since the last time, as words: bit `i` of word `j` is block `64 j + i`.
    /// They count as not written afterwards: the caller answers for them.
    ///
    /// # Errors
    /// When it was not started.
    fn take_written(&self) -> Result<Vec<u64>, PortError>;
    /// How many bytes from `offset` on, at most `len`, are known to be zero without reading them; 0
    /// where that is not known.
    fn hole(&self, offset: u64, len: u64) -> u64 {
        let _ = (offset, len);
        0
    }
    /// Copies bytes out.
    ///
    /// # Errors
    /// When they cannot be read.
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), PortError>;
}

/// A disk at the destination, being filled. Nothing is believed of what it held before.
pub trait BlockSink: Send + Sync {
    /// Writes bytes.
    ///
    /// # Errors
    /// When they cannot be written.
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), PortError>;
    /// Makes bytes zero.
    ///
    /// # Errors
    /// When that cannot be.
    fn zero(&self, offset: u64, len: u64) -> Result<(), PortError>;
    /// As [`BlockSource::hole`].
    fn hole(&self, offset: u64, len: u64) -> u64 {
        let _ = (offset, len);
        0
    }
    /// Copies bytes out, to compare them.
    ///
    /// # Errors
    /// When they cannot be read.
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), PortError>;
    /// Returns when all that was written outlasts a crash.
    ///
    /// # Errors
    /// When it does not.
    fn flush(&self) -> Result<(), PortError>;
}
