//! Linux's 64-bit boot protocol: `Documentation/arch/x86/boot.rst`, "64-bit Boot Protocol".

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

use super::error::LoadError;
use super::memory_map::memory_map;
use super::plan::Plan;
use super::{BOOT_PARAMS, BOOT_STACK, BootImage, Entry, Load, bzimage, elf, tables};

/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// COMMAND_LINE_SIZE of x86 Linux, less the NUL; a bzImage says its own.
const ELF_CMDLINE_MAX: u64 = 2047;
/// The 64-bit entry of a bzImage lies this far behind where it is loaded.
const ENTRY_64: u64 = 0x200;

pub(super) fn boot_elf(load: &Load<'_>, image: &elf::Image) -> Result<BootImage, LoadError> {
    let mut plan = Plan::new(load.source, load.ram)?;
    for s in &image.segments {
        plan.kernel_piece(s.address, s.offset, s.file_size, s.memory_size)?;
    }
    if !plan.is_kernel(image.entry) {
        return Err(load
            .source
            .not_a_kernel("its entry point is outside of what it loads"));
    }
    let header = setup_header {
        boot_flag: 0xaa55,
        header: 0x5372_6448,
        kernel_alignment: 0x20_0000,
        ..Default::default()
    };
    let limits = Limits {
        cmdline: ELF_CMDLINE_MAX,
        initrd: u64::MAX,
    };
    finish(plan, header, image.entry, load, &limits)
}

pub(super) fn boot_bzimage(
    load: &Load<'_>,
    image: &bzimage::Image,
) -> Result<BootImage, LoadError> {
    let mut plan = Plan::new(load.source, load.ram)?;
    plan.kernel_piece(image.address, image.offset, image.size, image.room)?;
    let mut header = image.header;
    // The piece fits below 4 GiB, so it is exact.
    header.code32_start = u32::try_from(image.address).unwrap_or(0);
    let initrd_max = match header.initrd_addr_max {
        0 => u64::MAX,
        max => u64::from(max) + 1,
    };
    let limits = Limits {
        cmdline: header.cmdline_size.into(),
        initrd: initrd_max,
    };
    finish(plan, header, image.address + ENTRY_64, load, &limits)
}

struct Limits {
    cmdline: u64,
    initrd: u64,
}

fn finish(
    mut plan: Plan<'_>,
    mut header: setup_header,
    rip: u64,
    load: &Load<'_>,
    limits: &Limits,
) -> Result<BootImage, LoadError> {
    let low32 = |n: u64| u32::try_from(n).unwrap_or(0);
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = low32(plan.cmdline(load.cmdline, limits.cmdline)?);
    if let Some(initrd) = load.initrd {
        let (address, size) = plan.initrd(initrd, limits.initrd)?;
        // Below 3 GiB, like all of it.
        header.ramdisk_image = low32(address);
        header.ramdisk_size = low32(size);
    }
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: plan.acpi(load.platform),
        ..Default::default()
    };
    let map = memory_map(load.ram);
    params.e820_entries = u8::try_from(map.len()).unwrap_or(0);
    for (i, range) in map.iter().enumerate() {
        params.e820_table[i] = boot_e820_entry {
            addr: range.address,
            size: range.size,
            r#type: range.kind,
        };
    }
    plan.bytes(BOOT_PARAMS, params.as_slice().to_vec());
    plan.bytes(tables::PAGE_TABLES, tables::identity_map());
    let gdt = plan.gdt(true);
    let entry = Entry::Long64 {
        rip,
        rsi: BOOT_PARAMS,
        rsp: BOOT_STACK,
        cr3: tables::PAGE_TABLES,
        gdt,
    };
    Ok(BootImage {
        entry,
        writes: plan.writes,
    })
}
