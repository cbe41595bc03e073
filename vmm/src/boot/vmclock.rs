//! VMClock: a page by which a guest sees that its clock was disrupted (Linux
//! `include/uapi/linux/vmclock-abi.h`, `drivers/ptp/ptp_vmclock.c`).
//!
//! ```text
//! 0xee000  magic, size, version, counter, kind of time: constant
//! 0xee00c  seq_count               odd while the fields behind it change
//! 0xee010  disruption_marker       changes with every move and every restore
//! 0xee018  flags
//! 0xee068  vm_generation_counter   changes with every copy
//! ```
//!
//! Programs of the guest map the page, by `/dev/vmclock0`. It tells that time has to be asked for
//! again, and not what time it is: that would go stale as the host's own clock is corrected.
//!
//! The page is memory of the guest, as that of the [generation id](super::GenerationId) is, and
//! goes wherever the guest goes. An older ferry carries it and changes nothing in it.

/// The page: below 1 MiB, behind the ACPI tables.
pub(crate) const VMCLOCK_PAGE: u64 = 0xe_e000;
/// Its size in bytes. A whole page, or programs cannot map it.
pub(super) const VMCLOCK_BYTES: u32 = 0x1000;
/// The interrupt line by which the guest is told of a disruption: ISA's that a PC leaves to its
/// first disk controller, an edge.
pub(crate) const VMCLOCK_GSI: u32 = 14;

/// Where the fields are in the page.
pub(crate) const SEQ_COUNT: u64 = 0x0c;
pub(crate) const DISRUPTION_MARKER: u64 = 0x10;
const FLAGS: usize = 0x18;
pub(crate) const VM_GENERATION_COUNTER: u64 = 0x68;
const FIELDS_END: usize = 0x70;

const MAGIC: [u8; 4] = *b"VCLK";
const VERSION: u16 = 1;
/// No counter of the processor is related to a time.
const COUNTER_INVALID: u8 = 0xff;
const TIME_UTC: u8 = 0;
/// `vm_generation_counter` is there.
const HAS_GENERATION_COUNTER: u64 = 1 << 8;
/// The device notifies of each new `seq_count`.
const NOTIFIES: u64 = 1 << 9;

/// How the page begins, which no update changes.
pub(crate) fn head() -> [u8; 12] {
    let mut head = [0; 12];
    head[..4].copy_from_slice(&MAGIC);
    head[4..8].copy_from_slice(&VMCLOCK_BYTES.to_le_bytes());
    head[8..10].copy_from_slice(&VERSION.to_le_bytes());
    head[10] = COUNTER_INVALID;
    head[11] = TIME_UTC;
    head
}

/// The beginning of the page in a new guest's memory; the rest is zero.
pub(super) fn page() -> Vec<u8> {
    let mut page = vec![0; FIELDS_END];
    page[..12].copy_from_slice(&head());
    let flags = HAS_GENERATION_COUNTER | NOTIFIES;
    page[FLAGS..FLAGS + 8].copy_from_slice(&flags.to_le_bytes());
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the offsets of the header's C structure, counted by hand.
    #[test]
    fn a_new_page_is_what_the_driver_checks() {
        let page = page();
        assert_eq!(page[..4], 0x4b4c_4356u32.to_le_bytes());
        assert_eq!(page[4..8], 4096u32.to_le_bytes());
        assert_eq!(page[8..12], [1, 0, 0xff, 0]);
        assert_eq!(page[12..24], [0; 12]);
        assert_eq!(page[24..32], 0x300u64.to_le_bytes());
        assert_eq!(page[32..], [0; 80]);
        // 40 bytes to the first pair of counter and time, nine words from there on.
        assert_eq!(VM_GENERATION_COUNTER, 40 + 8 * 8);
    }
}
