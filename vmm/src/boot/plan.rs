//! Gathers the writes of a boot and keeps them apart.

use super::error::LoadError;
use super::file::Source;
use super::memory_map::{HIGH_START, LOW_END};
use super::tables::{self, Gdt};
use super::{BOOT_PARAMS, CMDLINE, CMDLINE_ROOM, MemoryWrite, START_INFO, WriteData};
use super::{GENERATION_PAGE, Platform, VMCLOCK_PAGE, acpi, vmclock};
use crate::memory::{PAGE_SIZE, RamLayout};

/// What the loader itself puts below 1 MiB, for any protocol.
const OWN: [(u64, u64, &str); 5] = [
    (tables::GDT, tables::GDT + 0x100, "the descriptor table"),
    (START_INFO, START_INFO + PAGE_SIZE, "the start information"),
    (BOOT_PARAMS, tables::PAGE_TABLES, "the boot parameters"),
    (
        tables::PAGE_TABLES,
        tables::PAGE_TABLES_END,
        "the first page tables",
    ),
    (CMDLINE, CMDLINE + CMDLINE_ROOM, "the command line"),
];

pub(super) struct Plan<'a> {
    kernel: &'a Source,
    ram: &'a RamLayout,
    pub(super) writes: Vec<MemoryWrite>,
    /// Start and end of each piece of the kernel in memory.
    taken: Vec<(u64, u64)>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(kernel: &'a Source, ram: &'a RamLayout) -> Result<Self, LoadError> {
        let plan = Self {
            kernel,
            ram,
            writes: Vec::new(),
            taken: Vec::new(),
        };
        if ram.low_end() <= HIGH_START {
            return Err(plan.too_big(HIGH_START + PAGE_SIZE));
        }
        Ok(plan)
    }

    /// Loads a piece of the kernel that needs `memory` bytes from `address` on.
    pub(super) fn kernel_piece(
        &mut self,
        address: u64,
        offset: u64,
        size: u64,
        memory: u64,
    ) -> Result<(), LoadError> {
        let overlap = |by| LoadError::Overlap {
            path: self.kernel.path.clone(),
            address,
            by,
        };
        let end = address
            .checked_add(memory)
            .ok_or_else(|| self.too_big(u64::MAX))?;
        if end > self.ram.low_end() {
            return Err(self.too_big(end));
        }
        if address < HIGH_START && end > LOW_END {
            return Err(overlap("the BIOS area"));
        }
        let hits = |start: u64, stop: u64| address < stop && start < end;
        if let Some((_, _, by)) = OWN.iter().find(|(start, stop, _)| hits(*start, *stop)) {
            return Err(overlap(by));
        }
        if self.taken.iter().any(|(start, stop)| hits(*start, *stop)) {
            return Err(overlap("another part of itself"));
        }
        self.taken.push((address, end));
        if size > 0 {
            self.writes.push(self.kernel.write(address, offset, size)?);
        }
        Ok(())
    }

    /// Whether `address` is in a piece of the kernel.
    pub(super) fn is_kernel(&self, address: u64) -> bool {
        self.taken
            .iter()
            .any(|(start, end)| (*start..*end).contains(&address))
    }

    /// Puts the initrd as high as it may be, below `limit` and above the kernel. Returns its
    /// address and size.
    pub(super) fn initrd(&mut self, initrd: &Source, limit: u64) -> Result<(u64, u64), LoadError> {
        let top = self.ram.low_end().min(limit) / PAGE_SIZE * PAGE_SIZE;
        let kernel_end = self
            .taken
            .iter()
            .map(|(_, end)| *end)
            .max()
            .unwrap_or(0)
            .max(HIGH_START);
        let room = top.saturating_sub(kernel_end.next_multiple_of(PAGE_SIZE));
        if initrd.len > room {
            return Err(LoadError::InitrdTooBig {
                path: initrd.path.clone(),
                size: initrd.len,
                room,
            });
        }
        let address = (top - initrd.len) / PAGE_SIZE * PAGE_SIZE;
        self.writes.push(initrd.write(address, 0, initrd.len)?);
        Ok((address, initrd.len))
    }

    /// Puts the command line, NUL-terminated. `max` is what the kernel takes, without the NUL.
    pub(super) fn cmdline(&mut self, cmdline: &str, max: u64) -> Result<u64, LoadError> {
        let path = || self.kernel.path.clone();
        let max = usize::try_from(max.min(CMDLINE_ROOM - 1)).unwrap_or(0);
        if cmdline.len() > max {
            return Err(LoadError::CmdlineTooLong {
                path: path(),
                len: cmdline.len(),
                max,
            });
        }
        if cmdline.contains('\0') {
            return Err(LoadError::CmdlineNul { path: path() });
        }
        let mut bytes = cmdline.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(CMDLINE, bytes);
        Ok(CMDLINE)
    }

    pub(super) fn bytes(&mut self, address: u64, bytes: Vec<u8>) {
        self.writes.push(MemoryWrite {
            address,
            data: WriteData::Bytes(bytes),
        });
    }

    /// Puts the ACPI tables and what they point to; returns where their root is.
    pub(super) fn acpi(&mut self, platform: &Platform) -> u64 {
        self.bytes(acpi::TABLES, acpi::tables(platform, self.ram));
        self.bytes(VMCLOCK_PAGE, vmclock::page());
        self.bytes(GENERATION_PAGE, platform.generation.page());
        acpi::TABLES
    }

    pub(super) fn gdt(&mut self, long: bool) -> Gdt {
        let (gdt, bytes) = tables::gdt(long);
        self.bytes(gdt.base, bytes);
        gdt
    }

    fn too_big(&self, need: u64) -> LoadError {
        LoadError::TooBig {
            path: self.kernel.path.clone(),
            need,
            have: self.ram.low_end(),
        }
    }
}
