//! What a guest knows of being a copy: its VM generation id, and whether it was told of a new one.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use crate::machine::kernel_log;

/// Where ferry has the id, as the table in `/sys/firmware/acpi/tables/DSDT` says too.
const ADDRESS: u64 = 0xe_f010;
/// What Linux's driver says when it has mixed a new id into its random numbers
/// (`drivers/char/random.c`).
const RESEEDED: &str = "crng reseeded due to virtual machine fork";
/// By what name `drivers/acpi/evged.c` has the interrupt that tells of it.
const INTERRUPT: &str = "ACPI:Ged";

/// The id, how often the guest was interrupted for a new one, and how often that changed its random
/// numbers, on one line.
pub fn line() -> String {
    let id = id().unwrap_or_else(|why| format!("({why})"));
    let told = interrupts(&fs::read_to_string("/proc/interrupts").unwrap_or_default());
    let log = kernel_log();
    let reseeded = log.iter().filter(|said| said.contains(RESEEDED)).count();
    format!("ferry-linux: generation={id} told={told} reseeded={reseeded} end-of-identity")
}

/// The memory is reserved, so even a kernel with CONFIG_STRICT_DEVMEM shows it.
fn id() -> Result<String, String> {
    let mut bytes = [0; 16];
    File::open("/dev/mem")
        .and_then(|memory| memory.read_exact_at(&mut bytes, ADDRESS))
        .map_err(|e| format!("/dev/mem cannot be read: {e}"))?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// The interrupts of that name, on all processors.
fn interrupts(text: &str) -> u64 {
    let line = text
        .lines()
        .find(|line| line.split_ascii_whitespace().any(|word| word == INTERRUPT));
    let words = line.unwrap_or_default().split_ascii_whitespace().skip(1);
    words.map_while(|word| word.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    #[test]
    fn interrupts_of_all_processors_are_counted() {
        let text = "           CPU0       CPU1\n   4:          9          0   IO-APIC   4-edge      ttyS0\n  \
                    15:          1          2   IO-APIC  15-edge      ACPI:Ged\n";
        assert_eq!(super::interrupts(text), 3);
        assert_eq!(super::interrupts(""), 0);
    }
}
