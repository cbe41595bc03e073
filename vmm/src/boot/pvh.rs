//! The PVH protocol: Xen's `public/arch-x86/hvm/start_info.h` and `docs/misc/pvh.pandoc`.

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use super::elf::Image;
use super::error::LoadError;
use super::memory_map::memory_map;
use super::plan::Plan;
use super::{BOOT_PARAMS, BootImage, Entry, Load, START_INFO};

/// What Linux keeps of a command line; the protocol itself has no limit.
const CMDLINE_MAX: u64 = 2047;
const MODULES: u64 = BOOT_PARAMS + 0x800;

pub(super) fn boot(load: &Load<'_>, image: &Image, entry: u32) -> Result<BootImage, LoadError> {
    let mut plan = Plan::new(load.source, load.ram)?;
    for s in &image.segments {
        plan.kernel_piece(s.address, s.offset, s.file_size, s.memory_size)?;
    }
    if !plan.is_kernel(entry.into()) {
        return Err(load
            .source
            .not_a_kernel("its PVH entry point is outside of what it loads"));
    }
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        cmdline_paddr: plan.cmdline(load.cmdline, CMDLINE_MAX)?,
        memmap_paddr: BOOT_PARAMS,
        rsdp_paddr: plan.acpi(load.platform),
        ..Default::default()
    };
    let mut map = Vec::new();
    for range in memory_map(load.ram) {
        let entry = hvm_memmap_table_entry {
            addr: range.address,
            size: range.size,
            type_: range.kind,
            reserved: 0,
        };
        map.extend_from_slice(entry.as_slice());
        info.memmap_entries += 1;
    }
    plan.bytes(BOOT_PARAMS, map);
    if let Some(initrd) = load.initrd {
        let (paddr, size) = plan.initrd(initrd, u64::MAX)?;
        let module = hvm_modlist_entry {
            paddr,
            size,
            ..Default::default()
        };
        plan.bytes(MODULES, module.as_slice().to_vec());
        info.modlist_paddr = MODULES;
        info.nr_modules = 1;
    }
    plan.bytes(START_INFO, info.as_slice().to_vec());
    let gdt = plan.gdt(false);
    let ebx = u32::try_from(START_INFO).unwrap_or(0);
    Ok(BootImage {
        entry: Entry::Protected32 {
            eip: entry,
            ebx,
            gdt,
        },
        writes: plan.writes,
    })
}
