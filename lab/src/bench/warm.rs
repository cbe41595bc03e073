//! Has 2 MiB pages at hand right before a migration, as a host has that is not a guest itself.
//!
//! Where the machine is a guest, its free memory goes back to its own host within seconds, and 2
//! MiB pages are what it then lacks most: filling 1 GiB takes 0.1 s or 3 s, and a table says more
//! of that than of the VMMs. So memory is taken and given back until taking it is fast, for every
//! VMM alike.

use ferry_vmm::memory::{Backing, GuestRam, MemoryOptions};
use std::time::{Duration, Instant};

/// Memory is at hand when a GiB of it is taken in less; a host that has to fetch it takes ten times
/// as long.
const FAST: Duration = Duration::from_millis(270);
/// So often it is tried.
const ROUNDS: u32 = 5;
/// Taken at most of the memory that is available, as one part in so many: the guests need the rest.
const PART: u64 = 3;

/// Whether 2 MiB pages for a guest of `bytes` bytes and for what moves it are at hand now.
pub fn warm(bytes: u64, available: u64) -> bool {
    let wanted = bytes.saturating_mul(3).min(available / PART) >> 21 << 21;
    if wanted < 1 << 21 {
        return false;
    }
    let options = MemoryOptions {
        backing: Backing::Transparent,
        prealloc: true,
    };
    let allowed = FAST.mul_f64(wanted as f64 / f64::from(1 << 30));
    (0..ROUNDS).any(|_| {
        let began = Instant::now();
        let ram = GuestRam::with_options(wanted, options);
        let took = began.elapsed();
        ram.is_ok_and(|ram| ram.backing() == Backing::Transparent) && took < allowed
    })
}

/// `MemAvailable` of this host in bytes.
pub fn available() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_memory_nothing_is_warm() {
        assert!(!warm(1 << 30, 0));
        assert!(!warm(0, 1 << 40));
        assert!(available() > 0);
    }
}
