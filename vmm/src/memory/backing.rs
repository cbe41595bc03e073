//! What guest memory is made of: 2 MiB pages wherever the host can give them.
//!
//! | asked | file | pages |
//! |---|---|---|
//! | `auto`, `thp` | a private tmpfs with `huge=always`, else a memfd | transparent 2 MiB, 4 KiB where the host has none left |
//! | `4k` | a memfd | 4 KiB |
//! | `hugetlb` | a memfd of the host's pool | 2 MiB, reserved |
//!
//! All of them are files, so that the memory can be handed to another process, can be punched, and
//! can be received page by page. Anonymous memory is none of that.

use std::fmt;
use std::fs::File;
use std::str::FromStr;

use super::{HUGE_PAGE_SIZE, RamError, huge_mount, memfd};

/// Decides about 2 MiB pages in memfds, and may forbid them in every tmpfs.
const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// What guest memory is to be made of: `--memory-backing`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backing {
    /// The best that the host has. A guest that arrives from a hugetlb pool gets the pool's pages,
    /// if there are enough.
    #[default]
    Auto,
    /// Transparent 2 MiB pages.
    Transparent,
    /// 4 KiB pages.
    Small,
    /// The host's pool of 2 MiB pages.
    Hugetlb,
}

impl Backing {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Auto, Self::Transparent, Self::Small, Self::Hugetlb];

    /// The name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Transparent => "thp",
            Self::Small => "4k",
            Self::Hugetlb => "hugetlb",
        }
    }
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Backing {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|backing| backing.name() == text)
            .ok_or_else(|| format!("'{text}' is not one of auto, thp, 4k, hugetlb"))
    }
}

/// How guest memory is made on this host.
///
/// Built by functional update, `MemoryOptions { …, ..MemoryOptions::default() }`:
/// a new field has a default and breaks no caller. `#[non_exhaustive]` would forbid just that.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryOptions {
    /// What it is made of.
    pub backing: Backing,
    /// Whether all of it is taken from the host before the guest runs.
    pub prealloc: bool,
}

impl MemoryOptions {
    /// Mounts the private tmpfs now, if it will be wanted: for a process that soon may not, or has
    /// few threads yet.
    pub fn prepare(&self) {
        if matches!(self.backing, Backing::Auto | Backing::Transparent) {
            // A refusal is told when the memory is made.
            let _ = huge_mount::prepare();
        }
    }
}

/// What guest memory is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pages {
    pub(super) kind: PageKind,
    /// Why it is not what it could be, in a sentence.
    pub(super) note: Option<String>,
}

impl Pages {
    pub(super) const fn new(kind: PageKind) -> Self {
        Self { kind, note: None }
    }
}

/// The pages of a memory file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PageKind {
    /// 4 KiB each.
    Small,
    /// Of 2 MiB where the kernel finds such, which a punch splits.
    Transparent,
    /// Of the host's pool.
    Hugetlb,
}

impl PageKind {
    /// What `ferry status` says.
    pub(super) const fn backing(self) -> Backing {
        match self {
            Self::Small => Backing::Small,
            Self::Transparent => Backing::Transparent,
            Self::Hugetlb => Backing::Hugetlb,
        }
    }
}

/// How much of the guest's memory is there, and how much of that in pages of 2 MiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Resident {
    /// Bytes that this process has mapped.
    pub bytes: u64,
    /// Of those, in pages of 2 MiB.
    pub huge_bytes: u64,
}

impl Resident {
    /// Sums what `/proc/self/smaps` says of the mappings inside `ranges` (start and end addresses).
    pub(super) fn of(smaps: &str, ranges: &[(u64, u64)]) -> Self {
        let mut found = Self::default();
        let mut ours = false;
        for line in smaps.lines() {
            if let Some(range) = mapping(line) {
                ours = ranges.iter().any(|r| range.0 >= r.0 && range.1 <= r.1);
            } else if ours && let Some((name, value)) = line.split_once(':') {
                let kib: u64 = value
                    .trim()
                    .strip_suffix(" kB")
                    .and_then(|n| n.parse().ok())
                    .unwrap_or(0);
                match name {
                    "Rss" => found.bytes += kib << 10,
                    "ShmemPmdMapped" => found.huge_bytes += kib << 10,
                    // The pool's pages are not in Rss.
                    "Shared_Hugetlb" | "Private_Hugetlb" => {
                        found.bytes += kib << 10;
                        found.huge_bytes += kib << 10;
                    }
                    _ => {}
                }
            }
        }
        found
    }
}

/// The addresses of a mapping, if the line is the first of one.
fn mapping(line: &str) -> Option<(u64, u64)> {
    let (start, rest) = line.split_once('-')?;
    let (end, _) = rest.split_once(' ')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    Some((hex(start)?, hex(end)?))
}

/// A memory file of 2 MiB pages, or of 4 KiB pages with a note why.
pub(super) fn transparent_file(bytes: u64) -> Result<(File, Pages), RamError> {
    let enabled = std::fs::read_to_string(SHMEM_ENABLED).unwrap_or_default();
    // A memfd can be sealed, and any version of ferry takes it over.
    if memfd_is_huge(&enabled) {
        let file = memfd::create(bytes, false)?;
        return Ok((file, Pages::new(PageKind::Transparent)));
    }
    let why = match huge_mount::file(bytes) {
        _ if enabled.contains("[deny]") => format!("{SHMEM_ENABLED} is `deny`"),
        Ok(file) => return Ok((file, Pages::new(PageKind::Transparent))),
        Err(error) => format!(
            "a tmpfs with 2 MiB pages cannot be mounted ({error}); allow this user CAP_SYS_ADMIN or user namespaces, or write \
             `advise` to {SHMEM_ENABLED}"
        ),
    };
    let pages = Pages {
        kind: PageKind::Small,
        note: Some(format!("guest memory has 4 KiB pages, since {why}")),
    };
    Ok((memfd::create(bytes, false)?, pages))
}

/// Whether a memory file that another process made may have 2 MiB pages: it lies in a private
/// tmpfs, or memfds have them.
pub(super) fn adopted_kind(sealed: bool) -> PageKind {
    let enabled = || std::fs::read_to_string(SHMEM_ENABLED).unwrap_or_default();
    match !sealed || memfd_is_huge(&enabled()) {
        true => PageKind::Transparent,
        false => PageKind::Small,
    }
}

/// Whether memfds get 2 MiB pages on this host: by themselves, or on advice.
fn memfd_is_huge(shmem_enabled: &str) -> bool {
    ["[always]", "[within_size]", "[advise]", "[force]"]
        .iter()
        .any(|word| shmem_enabled.contains(word))
}

/// Whether memory of so many bytes can have a 2 MiB page at all.
pub(super) const fn has_room(bytes: u64) -> bool {
    bytes >= HUGE_PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for backing in Backing::ALL {
            assert_eq!(backing.name().parse(), Ok(backing));
        }
        assert!("2m".parse::<Backing>().unwrap_err().contains("'2m'"));
    }

    #[test]
    fn smaps_are_summed_over_our_mappings_only() {
        let smaps = "1000-3000 rw-s 0 00:01 5 /x\nRss: 8 kB\nShmemPmdMapped:   4 kB\nVmFlags: rd\n\
                     3000-4000 rw-s 0 00:01 5 /x\nRss: 4 kB\nPrivate_Hugetlb: 2048 kB\n\
                     9000-a000 rw-p 0 00:00 0 [heap]\nRss: 100 kB\nShmemPmdMapped: 100 kB\n";
        let found = Resident::of(smaps, &[(0x1000, 0x4000)]);
        let expected = Resident {
            bytes: (12 + 2048) << 10,
            huge_bytes: (4 + 2048) << 10,
        };
        assert_eq!(found, expected);
        assert_eq!(Resident::of("nonsense", &[(0, 9)]), Resident::default());
    }

    #[test]
    fn shmem_enabled_is_read() {
        assert!(memfd_is_huge(
            "always within_size [advise] never deny force"
        ));
        assert!(!memfd_is_huge(
            "always within_size advise [never] deny force"
        ));
        assert!(!memfd_is_huge(""));
    }
}
