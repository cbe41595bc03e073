//! Where RAM lies in the guest-physical address space.

use super::{HUGE_PAGE_SIZE, PAGE_SIZE, RamError, RangeError};

/// End of RAM below the hole for APICs and MMIO: 3 GiB.
pub const LOW_RAM_END: u64 = 0xC000_0000;
/// Start of RAM above the hole: 4 GiB.
pub const HIGH_RAM_START: u64 = 1 << 32;
/// The most memory a guest can have: 4 TiB, half of what one KVM memory slot can hold.
pub const MAX_RAM: u64 = 4 << 40;

/// A stretch of RAM without a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    /// Number of its first page (guest-physical address / 4096).
    pub first_gfn: u64,
    /// Its size in pages.
    pub pages: u64,
    /// Where it starts in the memory file, in bytes.
    pub file_offset: u64,
}

impl RamRegion {
    /// Guest-physical address of its first byte.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.first_gfn * PAGE_SIZE
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// Number of the page after its last.
    #[must_use]
    pub fn end_gfn(&self) -> u64 {
        self.first_gfn + self.pages
    }

    /// Where one of its pages lies in the memory file, in bytes.
    #[must_use]
    pub const fn offset_of(&self, page: u64) -> u64 {
        self.file_offset + page * PAGE_SIZE
    }

    /// Words of 64 pages that a bitmap of the region has.
    #[must_use]
    pub fn words(&self) -> usize {
        // At most 4 TiB / 4 KiB / 64 = 2^24.
        usize::try_from(self.pages.div_ceil(64)).unwrap_or(usize::MAX)
    }
}

/// The regions of a guest's RAM; a function of its size alone, so that both ends of a migration
/// agree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamLayout {
    size: u64,
    regions: Vec<RamRegion>,
}

impl RamLayout {
    /// The layout of `bytes` of RAM.
    ///
    /// # Errors
    /// [`RamError`] when the size is 0, no multiple of the page size (2 MiB with `hugepages`) or
    /// absurd.
    pub fn new(bytes: u64, hugepages: bool) -> Result<Self, RamError> {
        if bytes == 0 {
            return Err(RamError::Zero);
        }
        if bytes > MAX_RAM {
            return Err(RamError::TooBig { bytes });
        }
        let page = if hugepages { HUGE_PAGE_SIZE } else { PAGE_SIZE };
        if !bytes.is_multiple_of(page) {
            return Err(RamError::not_page_multiple(bytes, hugepages));
        }
        let low = bytes.min(LOW_RAM_END);
        let mut regions = vec![RamRegion {
            first_gfn: 0,
            pages: low / PAGE_SIZE,
            file_offset: 0,
        }];
        if bytes > low {
            regions.push(RamRegion {
                first_gfn: HIGH_RAM_START / PAGE_SIZE,
                pages: (bytes - low) / PAGE_SIZE,
                file_offset: low,
            });
        }
        Ok(Self {
            size: bytes,
            regions,
        })
    }

    /// RAM size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The regions in order of address.
    #[must_use]
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// End of the RAM below the hole, in bytes.
    #[must_use]
    pub fn low_end(&self) -> u64 {
        self.size.min(LOW_RAM_END)
    }

    /// Where `bytes` bytes of RAM from `first` on lie, which counts without the hole: address and
    /// length of each piece.
    pub fn pieces(&self, first: u64, bytes: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let last = first.saturating_add(bytes);
        self.regions.iter().filter_map(move |region| {
            let from = first.max(region.file_offset);
            let to = last.min(region.file_offset + region.bytes());
            (from < to).then(|| (region.address() + from - region.file_offset, to - from))
        })
    }

    /// Whether the bytes `address..address + len` are all RAM of one region.
    #[must_use]
    pub fn contains(&self, address: u64, len: u64) -> bool {
        let Some(end) = address.checked_add(len) else {
            return false;
        };
        self.regions
            .iter()
            .any(|r| address >= r.address() && end <= r.address() + r.bytes())
    }

    /// Index of the region that holds all these pages, and the first page's number in it.
    pub(crate) fn find(&self, first_gfn: u64, count: u64) -> Result<(usize, u64), RangeError> {
        let error = RangeError::new(first_gfn, count);
        let end = first_gfn.checked_add(count).ok_or(error)?;
        self.regions
            .iter()
            .position(|r| first_gfn >= r.first_gfn && end <= r.end_gfn())
            .map(|i| (i, first_gfn - self.regions[i].first_gfn))
            .ok_or(error)
    }

    /// Index of the region and of the word in its bitmap for `words` words from `first_gfn`; the
    /// last word may reach past the region's last page, as bitmaps do.
    pub(crate) fn find_words(
        &self,
        first_gfn: u64,
        words: usize,
    ) -> Result<(usize, usize), RangeError> {
        let count = u64::try_from(words).unwrap_or(u64::MAX).saturating_mul(64);
        let error = RangeError::new(first_gfn, count);
        let (region, page) = self.find(first_gfn, 0)?;
        let word = usize::try_from(page / 64).map_err(|_| error)?;
        let fits = word
            .checked_add(words)
            .is_some_and(|end| end <= self.regions[region].words());
        if page.is_multiple_of(64) && fits {
            Ok((region, word))
        } else {
            Err(error)
        }
    }
}
