//! Whether a page that a running guest may be writing to holds only zeros.

use super::{GuestRam, PAGE_SIZE_USIZE, RangeError};

impl GuestRam {
    /// Whether a page holds only zeros, as seen now. Reads no further than the first group of bytes
    /// that are not.
    ///
    /// # Errors
    /// [`RangeError`] when it is not RAM.
    pub fn page_is_zero(&self, gfn: u64) -> Result<bool, RangeError> {
        /// Vectors tested at once: two cache lines.
        const STEP: usize = 8;
        /// Pages between the one that is looked at and the one that is fetched.
        const AHEAD: usize = 8;
        const VECTOR: usize = size_of::<Vector>();
        let page = self.host_address(gfn, 1)?;
        // What holds something is known by its first bytes: waiting for them is nearly all that it
        // costs, so those of a page that is looked at soon are fetched meanwhile.
        fetch(page.as_ptr().wrapping_add(AHEAD * PAGE_SIZE_USIZE));
        let vectors = page.cast::<Vector>();
        for group in 0..PAGE_SIZE_USIZE / VECTOR / STEP {
            let mut or = ZERO;
            for vector in 0..STEP {
                // SAFETY: the index stays below PAGE_SIZE / VECTOR, so the vector lies within the
                // page, which `host_address` has checked to be mapped; page starts are aligned.
                // Volatile, since the guest may write at the same time: any value is then as good
                // as another (the page is in the dirty log again).
                or = unite(or, unsafe {
                    vectors.add(group * STEP + vector).read_volatile()
                });
            }
            if !is_zero(or) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

#[cfg(target_arch = "x86_64")]
use sse2::{Vector, ZERO, fetch, is_zero, unite};

/// Vectors of the zero check: every x86-64 has SSE2. The compiler may not join volatile reads of
/// words into such.
#[cfg(target_arch = "x86_64")]
mod sse2 {
    use std::arch::x86_64::{
        __m128i, _MM_HINT_T0, _mm_cmpeq_epi8, _mm_movemask_epi8, _mm_or_si128, _mm_prefetch,
    };

    pub type Vector = __m128i;
    // SAFETY: a vector of integers may have any bits.
    pub const ZERO: Vector = unsafe { std::mem::zeroed() };

    pub fn unite(a: Vector, b: Vector) -> Vector {
        // SAFETY: needs SSE2, which x86-64 has by definition.
        unsafe { _mm_or_si128(a, b) }
    }

    pub fn is_zero(v: Vector) -> bool {
        // SAFETY: as above. All sixteen bytes are equal to zero.
        unsafe { _mm_movemask_epi8(_mm_cmpeq_epi8(v, ZERO)) == 0xffff }
    }

    /// Has the processor fetch the two cache lines that begin there. Nothing happens where no
    /// memory is mapped.
    pub fn fetch(at: *const u8) {
        // SAFETY: needs SSE, which x86-64 has by definition. A prefetch is a hint: it reads nothing
        // that the program sees, and never faults (Intel SDM volume 2, PREFETCHh).
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(at.cast());
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(64).cast());
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
use portable::{Vector, ZERO, fetch, is_zero, unite};

#[cfg(not(target_arch = "x86_64"))]
mod portable {
    pub type Vector = u64;
    pub const ZERO: Vector = 0;

    pub const fn unite(a: Vector, b: Vector) -> Vector {
        a | b
    }

    pub const fn is_zero(v: Vector) -> bool {
        v == 0
    }

    pub const fn fetch(_: *const u8) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn one_byte_anywhere_is_not_zero() {
        let ram = GuestRam::new(4 << 20, Backing::Small).unwrap();
        for at in 0..4096 {
            for value in [1_u8, 0x80, 0xff] {
                ram.memory()
                    .write_slice(&[value], GuestAddress(4096 + at))
                    .unwrap();
                assert!(!ram.page_is_zero(1).unwrap(), "byte {at} is {value}");
            }
            ram.memory()
                .write_slice(&[0], GuestAddress(4096 + at))
                .unwrap();
            assert!(ram.page_is_zero(1).unwrap(), "byte {at}");
        }
        assert!(ram.page_is_zero(0).unwrap() && ram.page_is_zero(2).unwrap());
    }
}
