//! The arena: all usable memory above 4 MiB as one stretch of addresses, whatever holes the machine
//! has.
//!
//! The tables are written from ring 3 and hooked in when they are complete, so that a KVM that
//! watches the guest's tables sees one write instead of thousands.

use crate::start_info::Region;

/// Where the arena begins: the second entry of the top table, 512 GiB.
const WINDOW: usize = 1 << 39;
const LARGE_BYTES: usize = 1 << 21;
const LARGE: u64 = LARGE_BYTES as u64;
/// The tables lie at 2 MiB, behind the image; the arena's memory begins behind them.
const TABLES_AT: usize = 2 << 20;
const TABLES: u64 = TABLES_AT as u64;
const FIRST: u64 = 4 << 20;
const LINK: u64 = 0x27;
const LEAF: u64 = 0xe7;
const MAX_LEAVES: usize = 510 * 512;

unsafe extern "C" {
    static mut pml4: [u64; 512];
}

/// An entry of a table in the identity-mapped memory behind the image.
fn table(number: usize, entry: usize) -> *mut u64 {
    core::ptr::with_exposed_provenance_mut(TABLES_AT + number * 4096 + entry * 8)
}

/// Maps the arena. `None` if the machine has no memory for it. Must be called once.
pub fn map(regions: &[Region]) -> Option<&'static mut [u8]> {
    // The tables need their two megabytes to be memory.
    regions
        .iter()
        .find(|region| region.start <= TABLES && region.end >= FIRST)?;
    let mut leaves = 0;
    for region in regions {
        let mut at = region.start.max(FIRST).next_multiple_of(LARGE);
        while at + LARGE <= region.end && leaves < MAX_LEAVES {
            // SAFETY: the table memory is usable memory that nothing else uses (checked above);
            // tables 1 to 510 of 4 KiB end below 4 MiB.
            unsafe { table(1 + leaves / 512, leaves % 512).write_volatile(at | LEAF) };
            leaves += 1;
            at += LARGE;
        }
    }
    if leaves == 0 {
        return None;
    }
    let tables = leaves.div_ceil(512);
    for entry in leaves..tables * 512 {
        // SAFETY: as above.
        unsafe { table(1 + entry / 512, entry % 512).write_volatile(0) };
    }
    for entry in 0..512 {
        let link = if entry < tables {
            table(1 + entry, 0).addr() as u64 | LINK
        } else {
            0
        };
        // SAFETY: as above, table 0.
        unsafe { table(0, entry).write_volatile(link) };
    }
    // SAFETY: the second entry was not present, so no stale translation can exist; the tables below
    // it are complete.
    unsafe {
        (&raw mut pml4)
            .cast::<u64>()
            .add(1)
            .write_volatile(TABLES | LINK)
    };
    let bytes = leaves * LARGE_BYTES;
    // SAFETY: `bytes` bytes from the window on are now mapped to usable memory, each page once,
    // above the image and the tables; no other reference to it exists, as this function is called
    // once.
    Some(unsafe {
        core::slice::from_raw_parts_mut(core::ptr::with_exposed_provenance_mut(WINDOW), bytes)
    })
}

/// A type for which any bytes are a value.
///
/// # Safety
/// As it says; and it has no padding.
pub unsafe trait Plain {}
// SAFETY: numbers and arrays of them.
unsafe impl Plain for f64 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for ferry_nas::dirty::Page {}

/// Takes `count` elements off the front of `arena`; `None` if it is too short.
pub fn take<T: Plain>(arena: &mut &'static mut [u8], count: usize) -> Option<&'static mut [T]> {
    let all = core::mem::take(arena);
    // Pages begin at page boundaries, so that a page here is a page of the machine.
    let align = if size_of::<T>() == 4096 {
        4096
    } else {
        align_of::<T>()
    };
    let padding = all.as_ptr().align_offset(align);
    let bytes = count.checked_mul(size_of::<T>())?;
    let (_, rest) = all.split_at_mut_checked(padding)?;
    let (mine, rest) = rest.split_at_mut_checked(bytes)?;
    *arena = rest;
    // SAFETY: the bytes are aligned, exclusively ours, as many as `count` elements take, and valid
    // as `T`.
    Some(unsafe { core::slice::from_raw_parts_mut(mine.as_mut_ptr().cast(), count) })
}
