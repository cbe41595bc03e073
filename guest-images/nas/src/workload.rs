//! What a guest can be told to run, as it is written on its command line:
//!
//! - `mg.A`: a kernel at a class,
//! - `dirty:wss=16M,rate=5000,pattern=uniform,fill=random,seconds=0,seed=1`: the writer, see
//!   [`Dirty`],
//! - `idle:fill=random,seconds=0,seed=1`: memory filled once, then nothing but watching the clock.
//!
//! The same parser runs in the guest and on the host, so what the host accepts the guest
//! understands.

use crate::dirty::{Dirty, Fill, PAGE_BYTES, Pattern};
use crate::problem::{Class, Kernel, Problem};
use core::fmt;

/// What each processor of a bare guest but the first takes of its memory, for its stacks.
pub const BYTES_PER_CPU: usize = 128 * 1024;

/// What a bare guest keeps for itself below the memory it works in: image and tables.
const RESERVED_BYTES: u64 = 4 << 20;

/// The guest maps its memory in pages of this size.
const LARGE_PAGE_BYTES: u64 = 2 << 20;

/// A guest's task.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Workload {
    /// A NAS-style kernel.
    Nas(Problem),
    /// The self-checking writer; with a working set of zero, an idle guest.
    Dirty(Dirty),
}

/// What is wrong with a workload's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecError<'a> {
    /// Neither `KERNEL.CLASS` nor `dirty:…` nor `idle:…`.
    Form(&'a str),
    /// No such kernel.
    Kernel(&'a str),
    /// No such class.
    Class(&'a str),
    /// An option without `=`, or one that does not exist.
    Option(&'a str),
    /// An option's value that cannot be read or is out of range.
    Value {
        /// The option.
        key: &'a str,
        /// What was given.
        value: &'a str,
        /// What would do.
        expected: &'static str,
    },
}

impl fmt::Display for SpecError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Form(text) => {
                write!(
                    f,
                    "`{text}` is no workload; write KERNEL.CLASS such as mg.A, dirty:… or idle:…"
                )
            }
            Self::Kernel(name) => {
                write!(f, "`{name}` is no known kernel; choose one of")?;
                Kernel::ALL
                    .iter()
                    .try_for_each(|kernel| write!(f, " {}", kernel.name()))
            }
            Self::Class(name) => {
                write!(f, "`{name}` is no known class; choose one of")?;
                Class::ALL
                    .iter()
                    .try_for_each(|class| write!(f, " {}", class.name()))
            }
            Self::Option(text) => {
                write!(
                    f,
                    "`{text}` is no option of this workload; dirty takes wss, rate, pattern, exponent, fill, part, seconds, seed and idle takes fill, seconds, seed, each as name=value"
                )
            }
            Self::Value {
                key,
                value,
                expected,
            } => write!(f, "`{key}={value}` does not do; write {expected}"),
        }
    }
}

impl core::error::Error for SpecError<'_> {}

impl fmt::Display for Workload {
    /// Writes the text that [`Workload::parse`] reads back as the same workload.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nas(problem) => problem.fmt(f),
            Self::Dirty(dirty) if dirty.working_set_pages == 0 => {
                write!(
                    f,
                    "idle:fill={},seconds={},seed={}",
                    dirty.fill.name(),
                    dirty.seconds,
                    dirty.seed
                )
            }
            Self::Dirty(dirty) => {
                write!(
                    f,
                    "dirty:wss={}K,rate={},pattern={}",
                    dirty.working_set_pages * PAGE_BYTES / 1024,
                    dirty.rate,
                    dirty.pattern.name()
                )?;
                if let Pattern::Zipf { exponent } = dirty.pattern {
                    write!(f, ",exponent={exponent}")?;
                }
                write!(f, ",fill={}", dirty.fill.name())?;
                if dirty.part != Dirty::default().part {
                    write!(f, ",part={}", dirty.part)?;
                }
                write!(f, ",seconds={},seed={}", dirty.seconds, dirty.seed)
            }
        }
    }
}

impl Workload {
    /// Reads a workload's text.
    ///
    /// # Errors
    /// A [`SpecError`] that names the part that does not do.
    pub fn parse(text: &str) -> Result<Self, SpecError<'_>> {
        if let Some(options) = text
            .strip_prefix("dirty:")
            .or_else(|| (text == "dirty").then_some(""))
        {
            return parse_options(options, Dirty::default(), true).map(Self::Dirty);
        }
        if let Some(options) = text
            .strip_prefix("idle:")
            .or_else(|| (text == "idle").then_some(""))
        {
            let idle = Dirty {
                working_set_pages: 0,
                rate: 0,
                ..Dirty::default()
            };
            return parse_options(options, idle, false).map(Self::Dirty);
        }
        let (kernel, class) = text.split_once('.').ok_or(SpecError::Form(text))?;
        Ok(Self::Nas(Problem {
            kernel: Kernel::parse(kernel).ok_or(SpecError::Kernel(kernel))?,
            class: Class::parse(class).ok_or(SpecError::Class(class))?,
        }))
    }

    /// The memory that a bare guest with `cpus` processors must have to run this, in bytes: whole
    /// large pages.
    pub fn memory_needed(&self, cpus: usize) -> u64 {
        let stacks = cpus.saturating_sub(1) as u64 * BYTES_PER_CPU as u64;
        // Memory beyond 4 GiB begins behind a hole, whose edges may cost a page more.
        RESERVED_BYTES
            + (self.arena_needed(cpus) + stacks).next_multiple_of(LARGE_PAGE_BYTES)
            + LARGE_PAGE_BYTES
    }

    /// The memory the workload works in, in bytes, on `ranks` processors. The writer takes all that
    /// it is given; this is the least.
    pub fn arena_needed(&self, ranks: usize) -> u64 {
        match self {
            Self::Nas(problem) => problem.needs(ranks).bytes(),
            // A page and its four-byte generation, and room to align the pages.
            Self::Dirty(dirty) => dirty.working_set_pages * (PAGE_BYTES + 4) + PAGE_BYTES,
        }
    }
}

fn parse_options(text: &str, mut dirty: Dirty, writes: bool) -> Result<Dirty, SpecError<'_>> {
    let mut exponent = None;
    for option in text.split(',').filter(|option| !option.is_empty()) {
        let (key, value) = option.split_once('=').ok_or(SpecError::Option(option))?;
        let bad = |expected| SpecError::Value {
            key,
            value,
            expected,
        };
        match key {
            "wss" if writes => {
                let bytes = size(value).filter(|&bytes| (PAGE_BYTES..=1 << 40).contains(&bytes));
                let bytes = bytes.ok_or(bad(
                    "a size from 4K to 1024G with K, M or G behind the number",
                ))?;
                dirty.working_set_pages = bytes / PAGE_BYTES;
            }
            "rate" if writes => {
                let rate = value.parse().ok().filter(|&rate| rate <= 1_000_000_000);
                dirty.rate = rate.ok_or(bad(
                    "pages per second up to 1000000000, 0 for as fast as it can",
                ))?;
            }
            "pattern" if writes => {
                dirty.pattern = Pattern::parse(value).ok_or(bad("sequential, uniform or zipf"))?;
            }
            "exponent" if writes => {
                let number = value
                    .parse::<f64>()
                    .ok()
                    .filter(|x| (0.01..=10.0).contains(x));
                exponent = Some((option, number.ok_or(bad("a number from 0.01 to 10"))?));
            }
            "fill" => {
                dirty.fill = Fill::parse(value).ok_or(bad("random, zero-rich, half or none"))?
            }
            "part" if writes => {
                let part = size(value).and_then(|bytes| usize::try_from(bytes).ok());
                let fits = |part: &usize| part.is_multiple_of(8) && (16..=4096).contains(part);
                dirty.part = part.filter(fits).ok_or(bad(
                    "the bytes of a page that a write changes: a multiple of 8 from 16 to 4096",
                ))?;
            }
            "seconds" => {
                let seconds = value
                    .parse()
                    .ok()
                    .filter(|&seconds| seconds <= 1_000_000_000);
                dirty.seconds = seconds.ok_or(bad(
                    "whole seconds up to 1000000000, 0 for until told to stop",
                ))?;
            }
            "seed" => {
                dirty.seed = value
                    .parse()
                    .map_err(|_| bad("a whole number below 2^64"))?
            }
            _ => return Err(SpecError::Option(option)),
        }
    }
    match (&mut dirty.pattern, exponent) {
        (Pattern::Zipf { exponent }, Some((_, given))) => *exponent = given,
        (_, Some((option, _))) => return Err(SpecError::Option(option)),
        (_, None) => {}
    }
    Ok(dirty)
}

fn size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_the_documentation_shows() {
        let Ok(Workload::Nas(problem)) = Workload::parse("mg.A") else {
            panic!()
        };
        assert_eq!((problem.kernel, problem.class), (Kernel::Mg, Class::A));
        assert_eq!(
            Workload::parse("dirty"),
            Ok(Workload::Dirty(Dirty::default()))
        );
        let text =
            "dirty:wss=16M,rate=5000,pattern=zipf,exponent=1.2,fill=half,part=64,seconds=3,seed=9";
        let Ok(Workload::Dirty(dirty)) = Workload::parse(text) else {
            panic!()
        };
        assert_eq!(dirty.working_set_pages, 4096);
        assert_eq!(dirty.pattern, Pattern::Zipf { exponent: 1.2 });
        assert_eq!(dirty.part, 64);
        let Ok(Workload::Dirty(idle)) = Workload::parse("idle:fill=none") else {
            panic!()
        };
        assert_eq!((idle.working_set_pages, idle.fill), (0, Fill::None));
    }

    #[test]
    fn errors_name_the_bad_part() {
        for (text, part) in [
            ("mg", "`mg`"),
            ("lu.A", "`lu`"),
            ("mg.a", "`a`"),
            ("dirty:wss=16Q", "`wss=16Q`"),
            ("dirty:wss=1", "`wss=1`"),
            ("dirty:part=12", "`part=12`"),
            ("dirty:part=8K", "`part=8K`"),
            ("idle:part=64", "`part=64`"),
            ("dirty:colour=red", "`colour=red`"),
            ("dirty:exponent=2", "`exponent=2`"),
            ("dirty:wss=99999999999G", "`wss=99999999999G`"),
            ("idle:wss=1M", "`wss=1M`"),
            ("idle:seconds=x", "`seconds=x`"),
        ] {
            let error = Workload::parse(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    fn dirty() -> impl Strategy<Value = Dirty> {
        let pattern = prop_oneof![
            Just(Pattern::Sequential),
            Just(Pattern::Uniform),
            (1u32..1000).prop_map(|x| Pattern::Zipf {
                exponent: f64::from(x) / 100.0
            }),
        ];
        let fill = prop_oneof![
            Just(Fill::Random),
            Just(Fill::ZeroRich),
            Just(Fill::Half),
            Just(Fill::None)
        ];
        (
            1u64..1 << 28,
            0u64..1_000_000_000,
            pattern,
            fill,
            (2usize..=512).prop_map(|words| words * 8),
            0u64..1_000_000,
            any::<u64>(),
        )
            .prop_map(
                |(working_set_pages, rate, pattern, fill, part, seconds, seed)| Dirty {
                    working_set_pages,
                    rate,
                    pattern,
                    fill,
                    part,
                    seconds,
                    seed,
                },
            )
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(dirty in dirty()) {
            let text = Workload::Dirty(dirty).to_string();
            prop_assert_eq!(Workload::parse(&text), Ok(Workload::Dirty(dirty)));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,60}", tail in "[a-z0-9=,.KMG:-]{0,40}") {
            for text in [text, format!("dirty:{tail}"), format!("idle:{tail}"), tail] {
                if let Ok(workload) = Workload::parse(&text) {
                    let again = workload.to_string();
                    prop_assert_eq!(Workload::parse(&again), Ok(workload));
                }
            }
        }
    }
}
