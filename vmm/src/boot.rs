//! Loading a kernel: what to write where in guest memory, and how the boot processor enters it.
//!
//! Loaders return data ([`BootImage`]) and touch neither guest memory nor a vCPU. Two boot
//! protocols are spoken, three kinds of files are understood:
//!
//! | file | protocol | entry |
//! |---|---|---|
//! | ELF with a Xen PHYS32_ENTRY note | PVH (Xen `hvm/start_info.h`) | 32-bit, `ebx` = start info |
//! | other x86-64 ELF (`vmlinux`) | Linux 64-bit (`Documentation/arch/x86/boot.rst`) | 64-bit, `rsi` = boot_params |
//! | bzImage with a 64-bit entry | Linux 64-bit | load address + 0x200 |
//!
//! The low megabyte, the same for all:
//!
//! ```text
//! 0x00500  GDT                 0x09000  page tables (identity, 4 GiB)
//! 0x06000  hvm_start_info      0x20000  command line
//! 0x07000  boot_params or      0x9fc00  end of usable low memory
//!          memory map, modules 0xe0000  ACPI tables
//!                              0xee000  VMClock
//!                              0xef000  VM generation id
//! ```
//!
//! A kernel file is untrusted input: every number in it is checked against the file's size and the
//! guest's memory before it is used, and nothing is allocated by it.

mod acpi;
mod bzimage;
mod elf;
mod error;
mod file;
mod generation;
mod linux;
mod memory_map;
mod mmio_device;
mod plan;
mod pvh;
mod tables;
mod vmclock;

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

pub use error::LoadError;
pub use generation::GenerationId;
pub(crate) use generation::{GENERATION_GSI, GENERATION_ID, GENERATION_MARK, GENERATION_PAGE};
pub use mmio_device::MmioDevice;
pub use tables::Gdt;
pub(crate) use vmclock::{
    DISRUPTION_MARKER, SEQ_COUNT, VM_GENERATION_COUNTER, VMCLOCK_GSI, VMCLOCK_PAGE,
    head as vmclock_head,
};

use crate::memory::RamLayout;
use crate::numa::Topology;
use file::Source;

/// Size of the command line's place in guest memory, in bytes with its NUL.
const CMDLINE_ROOM: u64 = 0x1_0000;
const START_INFO: u64 = 0x6000;
const BOOT_PARAMS: u64 = 0x7000;
const CMDLINE: u64 = 0x2_0000;
const BOOT_STACK: u64 = 0x8ff0;

/// What to boot.
#[derive(Debug, Clone, Default)]
pub struct Kernel {
    /// The kernel: an ELF file or a bzImage.
    pub path: PathBuf,
    /// An initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// What the ACPI tables describe: the part of the machine that a kernel cannot find by itself.
#[derive(Debug, Clone, Default)]
pub struct Platform {
    /// Number of vCPUs; their APIC ids are 0 and up.
    pub cpus: u32,
    /// The virtio devices.
    pub mmio: Vec<MmioDevice>,
    /// The guest's first generation id.
    pub generation: GenerationId,
    /// Its NUMA nodes, if it has some.
    pub numa: Option<Topology>,
}

/// How the boot processor enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Flat 32-bit protected mode, paging off.
    Protected32 {
        /// First instruction.
        eip: u32,
        /// EBX: for PVH, where `hvm_start_info` is.
        ebx: u32,
        /// Descriptor table of the segments.
        gdt: Gdt,
    },
    /// Long mode.
    Long64 {
        /// First instruction.
        rip: u64,
        /// RSI: for Linux, where `boot_params` is.
        rsi: u64,
        /// Stack pointer.
        rsp: u64,
        /// Page tables.
        cr3: u64,
        /// Descriptor table of the segments.
        gdt: Gdt,
    },
}

/// Bytes to be put into guest memory.
#[derive(Debug, Clone)]
pub struct MemoryWrite {
    /// Guest-physical address.
    pub address: u64,
    /// The bytes.
    pub data: WriteData,
}

/// Where the bytes of a [`MemoryWrite`] come from.
#[derive(Debug, Clone)]
pub enum WriteData {
    /// Made by the loader.
    Bytes(Vec<u8>),
    /// A part of a file, read straight into guest memory.
    File {
        /// The file, open.
        file: Arc<File>,
        /// Its name, for messages.
        path: PathBuf,
        /// First byte of the part.
        offset: u64,
        /// Length of the part in bytes.
        len: u64,
    },
}

impl MemoryWrite {
    /// Number of bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        match &self.data {
            WriteData::Bytes(b) => u64::try_from(b.len()).unwrap_or(u64::MAX),
            WriteData::File { len, .. } => *len,
        }
    }

    /// Whether there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A loaded kernel as data: to be applied to a fresh machine, whose memory is all zero.
#[derive(Debug, Clone)]
pub struct BootImage {
    /// How to enter it.
    pub entry: Entry,
    /// What to write first; the parts do not overlap and lie in RAM.
    pub writes: Vec<MemoryWrite>,
}

/// Reads what is needed of `kernel` and decides what goes where in a guest with this RAM and this
/// platform.
///
/// # Errors
/// [`LoadError`]: a sentence with the path of the file at fault.
pub fn load(kernel: &Kernel, ram: &RamLayout, platform: &Platform) -> Result<BootImage, LoadError> {
    let source = Source::open("kernel", &kernel.path)?;
    let initrd = kernel
        .initrd
        .as_deref()
        .map(|path| Source::open("initrd", path))
        .transpose()?;
    let mut head = [0; 4];
    source.read_at(0, &mut head)?;
    let load = Load {
        source: &source,
        initrd: initrd.as_ref(),
        cmdline: &kernel.cmdline,
        ram,
        platform,
    };
    if head == elf::MAGIC {
        let image = elf::parse(&source)?;
        match image.pvh_entry {
            Some(entry) => pvh::boot(&load, &image, entry),
            None => linux::boot_elf(&load, &image),
        }
    } else {
        let image = bzimage::parse(&source)?;
        linux::boot_bzimage(&load, &image)
    }
}

/// What is to be loaded, and where.
struct Load<'a> {
    source: &'a Source,
    initrd: Option<&'a Source>,
    cmdline: &'a str,
    ram: &'a RamLayout,
    platform: &'a Platform,
}

#[cfg(test)]
mod tests;
