//! Descriptor and page tables that a kernel is entered with.

/// Where the descriptor table is.
pub(super) const GDT: u64 = 0x500;
/// Where the page tables are: PML4, PDPT, four page directories.
pub(super) const PAGE_TABLES: u64 = 0x9000;
pub(super) const PAGE_TABLES_END: u64 = PAGE_TABLES + 6 * 0x1000;

/// A global descriptor table in guest memory, with descriptors at [`CODE`](Self::CODE),
/// [`DATA`](Self::DATA) and [`TSS`](Self::TSS).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gdt {
    /// Guest-physical (and linear) address.
    pub base: u64,
    /// Its size in bytes less one.
    pub limit: u16,
}

impl Gdt {
    /// Selector of the code segment (Linux: `__BOOT_CS`).
    pub const CODE: u16 = 0x10;
    /// Selector of the data segment (Linux: `__BOOT_DS`).
    pub const DATA: u16 = 0x18;
    /// Selector of the task state segment.
    pub const TSS: u16 = 0x20;
}

/// Flat segments for 64-bit (`long`) or 32-bit code.
pub(super) fn gdt(long: bool) -> (Gdt, Vec<u8>) {
    let code: u64 = if long {
        0x00af_9b00_0000_ffff
    } else {
        0x00cf_9b00_0000_ffff
    };
    let entries = [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067, 0];
    let bytes: Vec<u8> = entries.iter().flat_map(|e: &u64| e.to_le_bytes()).collect();
    let limit = u16::try_from(bytes.len() - 1).unwrap_or(u16::MAX);
    (Gdt { base: GDT, limit }, bytes)
}

/// The first 4 GiB mapped onto themselves by 2 MiB pages, to be put at [`PAGE_TABLES`].
pub(super) fn identity_map() -> Vec<u8> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 0x80;
    let mut entries = vec![0u64; 6 * 512];
    entries[0] = (PAGE_TABLES + 0x1000) | PRESENT_WRITABLE;
    for (i, entry) in (0u64..4).zip(&mut entries[512..]) {
        *entry = (PAGE_TABLES + 0x2000 + i * 0x1000) | PRESENT_WRITABLE;
    }
    for (i, entry) in (0u64..).zip(&mut entries[1024..]) {
        *entry = (i << 21) | PRESENT_WRITABLE | LARGE;
    }
    entries.iter().flat_map(|e| e.to_le_bytes()).collect()
}
