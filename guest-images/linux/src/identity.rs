//! What a guest knows of being a copy or of having moved: its VM generation id and its VMClock, and
//! whether it was told of a change.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use crate::machine::kernel_log;

/// Where ferry has the id, as the table in `/sys/firmware/acpi/tables/DSDT` says too.
const ADDRESS: u64 = 0xe_f010;
/// What Linux's driver says when it has mixed a new id into its random numbers
/// (`drivers/char/random.c`).
const RESEEDED: &str = "crng reseeded due to virtual machine fork";
/// By what name `drivers/acpi/evged.c` has the interrupts that tell of a change.
const INTERRUPT: &str = "ACPI:Ged";
/// The line of the generation id's.
const GENERATION_LINE: &str = "15-edge";
/// That of VMClock's.
const VMCLOCK_LINE: &str = "14-edge";
/// Where ferry has the VMClock.
const VMCLOCK: u64 = 0xe_e000;
/// The driver's, where the kernel has one.
const VMCLOCK_DEVICE: &str = "/dev/vmclock0";
/// Bytes of the fields.
const VMCLOCK_FIELDS: usize = 0x70;

/// The id, how often the guest was interrupted for a new one, and how often that changed its random
/// numbers, on one line.
pub fn line() -> String {
    let id = id().unwrap_or_else(|why| format!("({why})"));
    let told = interrupts(&all_interrupts(), GENERATION_LINE);
    let log = kernel_log();
    let reseeded = log.iter().filter(|said| said.contains(RESEEDED)).count();
    format!("ferry-linux: generation={id} told={told} reseeded={reseeded} end-of-identity")
}

/// The VMClock, how often the guest was interrupted for it, and whether a driver shows the same to
/// programs, on one line.
pub fn vmclock_line() -> String {
    let told = interrupts(&all_interrupts(), VMCLOCK_LINE);
    let mut fields = [0; VMCLOCK_FIELDS];
    let text = match memory(VMCLOCK, &mut fields) {
        Ok(()) => vmclock(&fields),
        Err(why) => format!("({why})"),
    };
    let mut shown = [0; VMCLOCK_FIELDS];
    let device = File::open(VMCLOCK_DEVICE);
    let driver = match device.and_then(|file| file.read_exact_at(&mut shown, 0)) {
        Ok(()) if shown == fields => "same",
        Ok(()) => "other",
        Err(_) => "none",
    };
    format!("ferry-linux: vmclock {text} told={told} driver={driver} end-of-vmclock")
}

fn vmclock(fields: &[u8; VMCLOCK_FIELDS]) -> String {
    let number = |at: usize, len: usize| {
        let bytes = fields[at..at + len].iter().rev();
        bytes.fold(0, |value, byte| value << 8 | u64::from(*byte))
    };
    let (sequence, marker, copies) = (number(12, 4), number(16, 8), number(104, 8));
    format!("sequence={sequence} marker={marker} copies={copies}")
}

fn id() -> Result<String, String> {
    let mut bytes = [0; 16];
    memory(ADDRESS, &mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// The memory is reserved, so even a kernel with CONFIG_STRICT_DEVMEM shows it.
fn memory(address: u64, into: &mut [u8]) -> Result<(), String> {
    File::open("/dev/mem")
        .and_then(|memory| memory.read_exact_at(into, address))
        .map_err(|e| format!("/dev/mem cannot be read: {e}"))
}

fn all_interrupts() -> String {
    fs::read_to_string("/proc/interrupts").unwrap_or_default()
}

/// The interrupts of that name on this line, on all processors.
fn interrupts(text: &str, line: &str) -> u64 {
    let has = |text: &str, word: &str| text.split_ascii_whitespace().any(|w| w == word);
    let line = text
        .lines()
        .find(|text| has(text, INTERRUPT) && has(text, line));
    let words = line.unwrap_or_default().split_ascii_whitespace().skip(1);
    words.map_while(|word| word.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    #[test]
    fn interrupts_of_all_processors_are_counted() {
        let text = "           CPU0       CPU1\n   4:          9          0   IO-APIC   4-edge      ttyS0\n  \
                    14:          3          4   IO-APIC  14-edge      ACPI:Ged\n  \
                    15:          1          2   IO-APIC  15-edge      ACPI:Ged\n";
        assert_eq!(super::interrupts(text, super::GENERATION_LINE), 3);
        assert_eq!(super::interrupts(text, super::VMCLOCK_LINE), 7);
        assert_eq!(super::interrupts("", super::VMCLOCK_LINE), 0);
    }

    #[test]
    fn a_vmclock_is_told_in_numbers() {
        let mut fields = [0; super::VMCLOCK_FIELDS];
        (fields[12], fields[17], fields[104]) = (2, 1, 7);
        let text = super::vmclock(&fields);
        assert_eq!(text, "sequence=2 marker=256 copies=7");
    }
}
