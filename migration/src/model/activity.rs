//! What the modelled guest does to its memory.
//!
//! Time here is *guest time*: the seconds that the guest has run. While it is paused or waits for a
//! page, it does not pass.

use crate::page::{Gfn, PageSet, RamLayout};
use crate::rng::Rng;

/// One access to a page.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Touch {
    /// Guest time in seconds.
    pub at: f64,
    /// The page.
    pub gfn: Gfn,
}

/// Which pages a guest touches, in the order of time.
pub trait Activity: Send {
    /// The next touch, without taking it; `None` when the guest never touches anything again.
    fn peek(&mut self) -> Option<Touch>;

    /// Takes the next touch.
    fn pop(&mut self);

    /// Takes all touches before `to` and marks their pages.
    fn advance(&mut self, to: f64, marks: &mut PageSet) {
        while let Some(touch) = self.peek().filter(|touch| touch.at < to) {
            marks.insert(touch.gfn);
            self.pop();
        }
    }

    /// A round of a migration begins, while these pages are pending. Guests do not know of it;
    /// papers do.
    fn round_begins(&mut self, pending: &PageSet) {
        let _ = pending;
    }
}

/// The page at an index into RAM, which may have holes.
fn page_at(layout: &RamLayout, mut index: u64) -> Gfn {
    for run in layout.runs() {
        if index < run.count {
            return run.first + index;
        }
        index -= run.count;
    }
    0
}

/// How a [`Writer`] chooses the next page of its working set.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Pattern {
    /// Any page, each as likely.
    Uniform,
    /// One after the other, around and around.
    Sequential,
    /// Every so many pages, around and around: each page once before any comes again.
    Stride {
        /// How far from one page to the next.
        step: u64,
    },
    /// A few pages often, most seldom: the page of rank *r* with a probability that falls as
    /// *r*^−`exponent`. Ranks are scattered over the working set.
    Zipf {
        /// Greater than 0; 1 is the classic.
        exponent: f64,
    },
}

/// A guest that touches pages at a steady rate.
#[derive(Clone, Debug)]
pub struct Writer {
    layout: RamLayout,
    pattern: Pattern,
    /// Index of the working set's first page, and how many it has.
    first: u64,
    pages: u64,
    rate: f64,
    taken: u64,
    rng: Rng,
    next: Option<Touch>,
}

impl Writer {
    /// A guest whose working set of `pages` pages lies in the middle of its RAM and which touches
    /// `rate` of them per second (not at all for 0).
    #[must_use]
    pub fn new(layout: &RamLayout, pattern: Pattern, pages: u64, rate: f64, seed: u64) -> Self {
        let pages = pages.clamp(1, layout.pages().max(1));
        let mut writer = Self {
            layout: layout.clone(),
            pattern,
            first: (layout.pages() - pages) / 2,
            pages,
            rate,
            taken: 0,
            rng: Rng::new(seed),
            next: None,
        };
        writer.pop();
        writer
    }

    fn choose(&mut self) -> u64 {
        match self.pattern {
            Pattern::Uniform => self.rng.below(self.pages),
            Pattern::Sequential => self.taken % self.pages,
            Pattern::Stride { step } => stride(self.taken % self.pages, step, self.pages),
            Pattern::Zipf { exponent } => {
                let rank = zipf(self.pages, exponent, self.rng.unit());
                // Multiplying by a number without a common divisor is a permutation.
                rank.wrapping_mul(scatter(self.pages)) % self.pages
            }
        }
    }
}

impl Activity for Writer {
    fn peek(&mut self) -> Option<Touch> {
        self.next
    }

    fn pop(&mut self) {
        if self.rate <= 0.0 || !self.rate.is_finite() {
            return;
        }
        let index = self.first + self.choose();
        self.next = Some(Touch {
            at: self.taken as f64 / self.rate,
            gfn: page_at(&self.layout, index),
        });
        self.taken += 1;
    }
}

/// A rank below `n` from a uniform `u`: the inverse of the distribution function, with the sum over
/// ranks replaced by its integral.
fn zipf(n: u64, exponent: f64, u: f64) -> u64 {
    let ranks = n as f64 + 1.0;
    let rank = if (exponent - 1.0).abs() < 1e-6 {
        ranks.powf(u)
    } else {
        let power = 1.0 - exponent;
        (u * (ranks.powf(power) - 1.0) + 1.0).powf(1.0 / power)
    };
    crate::numbers::pages_in(rank - 1.0).min(n - 1)
}

/// The page at a place in a walk of so many pages in steps: 0, step, 2·step …, 1, step + 1 …
fn stride(place: u64, step: u64, pages: u64) -> u64 {
    let step = step.clamp(1, pages);
    // Of the columns that the steps make, the first `longer` have one page more.
    let (rows, longer) = (pages / step, pages % step);
    let in_longer = longer * (rows + 1);
    if place < in_longer {
        place / (rows + 1) + place % (rows + 1) * step
    } else {
        let place = place - in_longer;
        longer + place / rows + place % rows * step
    }
}

/// A multiplier near the golden section of `n` that has no divisor in common with it.
fn scatter(n: u64) -> u64 {
    const fn gcd(mut a: u64, mut b: u64) -> u64 {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    }
    let mut step = crate::numbers::pages_in(n as f64 * 0.618_034).max(1);
    while gcd(step, n) != 1 {
        step += 1;
    }
    step
}

/// A guest that in every round dirties, evenly spread over its memory, as many different pages as a
/// share of what the link carries meanwhile.
///
/// It is not the STORD paper's, whose writes fall in the set that is being sent
/// ([`EvenInSet`](super::EvenInSet)). Writes within a round hit different pages, those of different
/// rounds are independent.
#[derive(Clone, Debug)]
pub struct EvenShare {
    layout: RamLayout,
    pages: u64,
    /// Pages per second.
    rate: f64,
    taken: u64,
    this_round: PageSet,
    written: u64,
    rng: Rng,
    next: Option<Touch>,
}

impl EvenShare {
    /// A guest that dirties `share` (0.9 is 90 %) of what a link of `pages_per_second` carries.
    #[must_use]
    pub fn new(layout: &RamLayout, share: f64, pages_per_second: f64, seed: u64) -> Self {
        let pages = layout.pages();
        let mut guest = Self {
            layout: layout.clone(),
            pages,
            rate: share * pages_per_second,
            taken: 0,
            this_round: PageSet::new(pages),
            written: 0,
            rng: Rng::new(seed),
            next: None,
        };
        guest.pop();
        guest
    }

    fn begin_round(&mut self) {
        self.this_round.clear();
        self.written = 0;
    }
}

impl Activity for EvenShare {
    fn peek(&mut self) -> Option<Touch> {
        self.next
    }

    fn pop(&mut self) {
        if self.rate <= 0.0 || !self.rate.is_finite() {
            return;
        }
        if self.written >= self.pages {
            // Everything is dirty: more writes change nothing.
            self.begin_round();
        }
        let mut index = self.rng.below(self.pages);
        while !self.this_round.insert(index) {
            index = self.rng.below(self.pages);
        }
        self.written += 1;
        self.next = Some(Touch {
            at: self.taken as f64 / self.rate,
            gfn: page_at(&self.layout, index),
        });
        self.taken += 1;
    }

    fn round_begins(&mut self, _: &PageSet) {
        self.begin_round();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Run;

    fn layout() -> RamLayout {
        RamLayout::new(vec![Run::new(0, 600), Run::new(1000, 400)]).unwrap()
    }

    fn touched(activity: &mut dyn Activity, to: f64) -> PageSet {
        let mut marks = PageSet::new(1400);
        activity.advance(to, &mut marks);
        marks
    }

    #[test]
    fn writers_stay_in_their_working_set_and_keep_their_rate() {
        for pattern in [
            Pattern::Uniform,
            Pattern::Sequential,
            Pattern::Zipf { exponent: 0.8 },
            Pattern::Zipf { exponent: 1.0 },
            Pattern::Zipf { exponent: 1.4 },
        ] {
            let mut writer = Writer::new(&layout(), pattern, 200, 1000.0, 1);
            let mut count = 0;
            while let Some(touch) = writer.peek().filter(|touch| touch.at < 2.0) {
                // Pages 400..600 of RAM: the middle.
                assert!((400..600).contains(&touch.gfn), "{pattern:?} {touch:?}");
                count += 1;
                writer.pop();
            }
            assert_eq!(count, 2000, "{pattern:?}");
        }
        // Around the hole.
        let writer = &mut Writer::new(&layout(), Pattern::Sequential, 1000, 1000.0, 1);
        assert_eq!(touched(writer, 1.0), layout().all());
        assert!(
            touched(
                &mut Writer::new(&layout(), Pattern::Uniform, 9, 0.0, 1),
                1e9
            )
            .is_empty()
        );
    }

    #[test]
    fn zipf_is_the_steeper_the_larger_the_exponent() {
        let distinct = |exponent| {
            let writer = &mut Writer::new(&layout(), Pattern::Zipf { exponent }, 1000, 2e3, 1);
            touched(writer, 1.0).len()
        };
        let (flat, classic, steep) = (distinct(0.2), distinct(1.0), distinct(1.6));
        assert!(
            flat > classic && classic > steep && steep > 1,
            "{flat} {classic} {steep}"
        );
    }

    #[test]
    fn the_papers_guest_never_hits_a_page_twice_in_a_round() {
        let guest = &mut EvenShare::new(&layout(), 0.9, 1000.0, 3);
        // One page was drawn ahead of the round.
        guest.begin_round();
        assert!((899..=900).contains(&touched(guest, 1.0).len()));
        guest.begin_round();
        let second = touched(guest, 1.5);
        assert!((449..=450).contains(&second.len()));
        // Spread evenly: half of them in the upper half.
        let upper = second.iter().filter(|&gfn| gfn >= 500).count();
        assert!((180..270).contains(&upper), "{upper}");
    }

    #[test]
    fn a_stride_visits_every_page_once() {
        for (pages, step) in [(1, 1), (10, 3), (100, 7), (100, 10), (5, 9)] {
            let mut seen = PageSet::new(pages);
            assert!((0..pages).all(|at| seen.insert(stride(at, step, pages))));
            assert_eq!(seen.len(), pages, "{pages} {step}");
        }
        assert_eq!([0, 1, 2, 3, 4].map(|at| stride(at, 3, 10)), [0, 3, 6, 9, 1]);
    }

    #[test]
    fn scattering_is_a_permutation() {
        for n in [1, 2, 3, 64, 1000, 1023] {
            let mut seen = PageSet::new(n);
            assert!((0..n).all(|rank| seen.insert(rank * scatter(n) % n)), "{n}");
        }
    }
}
