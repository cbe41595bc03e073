//! What a guest's driver can do wrong.

use vm_memory::GuestMemoryError;

/// A rule of virtio that a guest broke.
#[derive(Debug, thiserror::Error)]
pub enum Violation {
    /// A ring or a table outside of RAM.
    #[error("its {what} of {len} bytes at {address:#x} is not all in RAM")]
    Outside {
        /// What it is.
        what: &'static str,
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        len: u64,
    },
    /// An index past the end of its table.
    #[error("descriptor {index} is named, but its table has {size}")]
    Index {
        /// The index.
        index: u16,
        /// Number of descriptors there are.
        size: u16,
    },
    /// A chain that goes round, or on for too long.
    #[error("the chain from descriptor {head} has more descriptors than its table: it goes round")]
    Loop {
        /// The chain's first descriptor.
        head: u16,
    },
    /// A table that cannot be.
    #[error("the indirect table of the chain from descriptor {head} has {len} bytes")]
    Indirect {
        /// The chain's first descriptor.
        head: u16,
        /// Bytes of the table.
        len: u32,
    },
    /// A table within a table.
    #[error("the chain from descriptor {head} has an indirect table in an indirect table")]
    Nested {
        /// The chain's first descriptor.
        head: u16,
    },
    /// Something to read after something to write.
    #[error("the chain from descriptor {head} has a readable buffer after a writable one")]
    Order {
        /// The chain's first descriptor.
        head: u16,
    },
    /// More than 2³² bytes.
    #[error("the chain from descriptor {head} is longer than 4 GiB")]
    Length {
        /// The chain's first descriptor.
        head: u16,
    },
    /// More buffers than there are descriptors.
    #[error("more buffers are available at once than the queue of {size} can hold")]
    RunAway {
        /// Size of the queue.
        size: u16,
    },
    /// A chain that a device cannot use.
    #[error("the chain from descriptor {head} has {what}")]
    Shape {
        /// The chain's first descriptor.
        head: u16,
        /// What is wrong.
        what: &'static str,
    },
    /// A queue that cannot work.
    #[error("queue {index} was made ready with {what}")]
    Setup {
        /// The queue.
        index: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// Memory that was checked refuses an access.
    #[error("guest memory could not be accessed: {0}")]
    Memory(#[from] GuestMemoryError),
    /// The rings.
    #[error("a ring could not be used: {0}")]
    Ring(#[from] virtio_queue::Error),
}
