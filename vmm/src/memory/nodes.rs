//! Which of the host's NUMA nodes the guest's memory comes from (mbind(2)).
//!
//! A policy for a mapping of a file in a tmpfs is kept with the file, and holds for every page that
//! the file gets: by a touch, a write(2), a splice(2), userfaultfd, and in every process that maps
//! it. So it is set before the first page comes, through a mapping that is made for that: the
//! guest's own stays in one piece, which UFFDIO_COPY needs. With the memory the policy is handed
//! over. Files of the pool of huge pages keep none: there it is set for the guest's mapping.

use std::io;
use std::ptr::NonNull;

use vm_memory::FileOffset;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};

use super::{GuestRam, PAGE_SIZE, PageKind, RamError};

/// Where a part of the memory is to come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeMemory {
    /// Where it begins in the RAM, in bytes, without the hole.
    pub first: u64,
    /// How much it is, in bytes.
    pub bytes: u64,
    /// The host's node.
    pub node: u32,
    /// Only from there. Otherwise from elsewhere where that node has none left. A pool's pages are
    /// never strict: where a node has none the guest would be killed.
    pub strict: bool,
}

/// Nodes that a policy can name: what kernels are built for at most (`MAX_NUMNODES`).
const MAX_NODES: usize = 1024;
const BITS: usize = u64::BITS as usize;

impl GuestRam {
    /// Has parts of the memory come from the host's nodes: pages that have come stay where they
    /// are.
    ///
    /// # Errors
    /// [`RamError::Node`] where a part must not come from elsewhere.
    pub(crate) fn bind(&mut self, parts: &[NodeMemory]) -> Result<(), RamError> {
        let pool = self.pages.kind == PageKind::Hugetlb;
        // Its file has the policy already.
        if self.adopted && !pool {
            return Ok(());
        }
        for part in parts {
            let bound = match pool {
                true => self.bind_mapped(part),
                false => self.bind_file(part),
            };
            match bound {
                Ok(()) => {}
                Err(source) if part.strict => {
                    let node = part.node;
                    return Err(RamError::Node { node, source });
                }
                Err(error) => self.add_note(&format!(
                    "the guest's memory cannot be kept on NUMA node {} ({error}), and comes from anywhere",
                    part.node
                )),
            }
        }
        Ok(())
    }

    fn bind_file(&self, part: &NodeMemory) -> io::Result<()> {
        let size = usize::try_from(part.bytes).map_err(io::Error::other)?;
        let mapping: MmapRegion = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_NONE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(self.file.clone(), part.first))
            .build()
            .map_err(io::Error::other)?;
        let base = NonNull::new(mapping.as_ptr()).ok_or(io::ErrorKind::InvalidInput)?;
        mbind(base, size, part.node, part.strict)
    }

    fn bind_mapped(&self, part: &NodeMemory) -> io::Result<()> {
        for (address, bytes) in self.layout.pieces(part.first, part.bytes) {
            let base = self.host_address(address / PAGE_SIZE, bytes / PAGE_SIZE);
            let size = usize::try_from(bytes).map_err(io::Error::other)?;
            mbind(base.map_err(io::Error::other)?, size, part.node, false)?;
        }
        Ok(())
    }

    /// Adds a sentence to what is known of the memory.
    pub(crate) fn add_note(&mut self, note: &str) {
        match &mut self.pages.note {
            Some(before) => {
                before.push_str("; ");
                before.push_str(note);
            }
            none => *none = Some(note.to_owned()),
        }
    }
}

fn mbind(base: NonNull<u8>, size: usize, node: u32, strict: bool) -> io::Result<()> {
    let node = usize::try_from(node).map_err(io::Error::other)?;
    let mut mask = [0_u64; MAX_NODES / BITS];
    let word = mask
        .get_mut(node / BITS)
        .ok_or(io::ErrorKind::InvalidInput)?;
    *word |= 1 << (node % BITS);
    let mode = match strict {
        true => libc::MPOL_BIND,
        false => libc::MPOL_PREFERRED,
    };
    // The kernel takes one bit less than it is told.
    let (bits, flags) = (MAX_NODES + 1, 0_usize);
    // SAFETY: the caller has mapped `size` bytes at `base`. The call reads `MAX_NODES` bits of the
    // mask, which has as many, and changes neither the mapping nor a byte of what is in it: without
    // flags it says where pages come from later.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            base.as_ptr(),
            size,
            mode,
            mask.as_ptr(),
            bits,
            flags,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, MemoryOptions};
    use std::os::unix::fs::FileExt;

    /// The policy of a new mapping of all of a memory's file, and of its second half.
    fn policies(ram: &GuestRam) -> [String; 2] {
        let half = ram.size() / 2;
        [0, half].map(|offset| {
            let size = usize::try_from(ram.size() - offset).unwrap();
            let mapping: MmapRegion = MmapRegionBuilder::new(size)
                .with_mmap_prot(libc::PROT_READ)
                .with_mmap_flags(libc::MAP_SHARED)
                .with_file_offset(FileOffset::from_arc(ram.file().clone(), offset))
                .build()
                .unwrap();
            let address = format!("{:x} ", mapping.as_ptr() as usize);
            let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap();
            let line = maps.lines().find_map(|l| l.strip_prefix(&address));
            line.unwrap().split(' ').next().unwrap().to_owned()
        })
    }

    fn halves(bytes: u64, strict: [bool; 2]) -> [NodeMemory; 2] {
        [0, 1].map(|at| NodeMemory {
            first: bytes / 2 * at,
            bytes: bytes / 2,
            node: 0,
            strict: strict[usize::try_from(at).unwrap()],
        })
    }

    /// Whether the kernel knows nodes.
    fn nodes() -> bool {
        let found = std::path::Path::new("/proc/self/numa_maps").exists();
        if !found {
            eprintln!("NOT RUN: policies of memory (a kernel without NUMA)");
        }
        found
    }

    #[test]
    fn the_file_has_the_policy_and_the_mapping_stays_whole() {
        if !nodes() {
            return;
        }
        for backing in [Backing::Small, Backing::Auto] {
            for prealloc in [false, true] {
                let options = MemoryOptions { backing, prealloc };
                let bytes = 16 << 20;
                let ram = GuestRam::on_nodes(bytes, false, options, &halves(bytes, [true, false]));
                let ram = ram.unwrap();
                // The kernel prints a preference for the nodes 0.
                assert_eq!(policies(&ram), ["bind:0", "prefer:0"]);
                let start = ram.host_address(0, 1).unwrap().addr().get();
                let whole = format!("{start:x}-{:x} ", start + (16 << 20));
                let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
                assert!(maps.contains(&whole), "{whole} {maps}");
                ram.file().write_all_at(&[7; 4096], 8 << 20).unwrap();
                // In another process, too: it is the file's.
                drop(policies(&ram));
                let shared = ram.share().unwrap();
                let there = GuestRam::adopt(bytes, false, shared).unwrap();
                assert_eq!(policies(&there), ["bind:0", "prefer:0"]);
            }
        }
    }

    #[test]
    fn a_node_that_is_not_there_is_an_error_or_a_note() {
        if !nodes() {
            return;
        }
        let on = |node, strict| {
            let part = NodeMemory {
                first: 0,
                bytes: 2 << 20,
                node,
                strict,
            };
            GuestRam::on_nodes(2 << 20, false, MemoryOptions::default(), &[part])
        };
        for node in [1000, 5000] {
            let error = on(node, true).unwrap_err().to_string();
            assert!(error.contains(&format!("NUMA node {node}")), "{error}");
            let ram = on(node, false).unwrap();
            assert!(
                ram.note().unwrap().contains("comes from anywhere"),
                "{ram:?}"
            );
        }
    }
}
