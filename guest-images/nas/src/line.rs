//! What a guest prints: one line per event, `ferry-guest: WORD key=value …`, for people and
//! programs alike.
//!
//! [`Line`] writes such a line with [`core::fmt::Display`] and reads one with [`Line::parse`], so
//! the guest that prints and the host that reads cannot drift apart. Unknown keys are skipped:
//! lines may grow.

use crate::dirty::{Corruption, Verdict};
use core::fmt;

/// What every line begins with.
pub const PREFIX: &str = "ferry-guest:";

/// The longest times that a processor of the guest did not run, merged over all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gaps {
    /// The longest since the previous line of this kind, in microseconds.
    pub last_us: u64,
    /// The longest since `ready`, in microseconds.
    pub max_us: u64,
    /// When that one ended, in milliseconds since the start.
    pub max_at_ms: u64,
}

/// How far the guest's work has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// The writer: pages written, and mismatches found.
    Writes {
        /// Since `ready`.
        writes: u64,
        /// Since the start.
        corrupt: u64,
    },
    /// A kernel.
    Steps {
        /// The run, from 1.
        run: u64,
        /// Finished steps of the run.
        done: u32,
        /// All steps of the run's timed part; 0 while it is set up.
        total: u32,
    },
}

/// A kernel's result.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KernelResult<'a> {
    /// Kernel and class, such as `mg.A`.
    pub kernel: &'a str,
    /// The run, from 1.
    pub run: u64,
    /// Whether it agrees with the published reference.
    pub verified: bool,
    /// The first value that is verified.
    pub value: f64,
    /// Its reference.
    pub reference: f64,
    /// The largest relative deviation of all values that are verified.
    pub error: f64,
    /// Millions of operations a second, as NPB counts them.
    pub mops: f64,
    /// Time of the part that NPB times.
    pub seconds: f64,
    /// Gaps until now.
    pub gaps: Gaps,
}

/// A line of a guest's output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Line<'a> {
    /// The guest knows what to do.
    Start {
        /// The workload.
        run: &'a str,
        /// Processors.
        cpus: u64,
        /// Memory it has, in MiB.
        memory_mib: u64,
        /// The rate of its clock.
        tsc_khz: u64,
    },
    /// The set-up is over; the steady state begins.
    Ready {
        /// Milliseconds since the start.
        t_ms: u64,
    },
    /// Once a second, or as often as the guest was told.
    Stat {
        /// Milliseconds since the start.
        t_ms: u64,
        /// The work's progress.
        work: Work,
        /// The gaps.
        gaps: Gaps,
    },
    /// A page is not what was written.
    Corrupt(Corruption),
    /// A kernel's run is over.
    Result(KernelResult<'a>),
    /// The writer is done.
    Verdict {
        /// What it found.
        verdict: Verdict,
        /// Gaps until now.
        gaps: Gaps,
    },
    /// The guest cannot do what it was told; the sentence says why.
    Error(&'a str),
    /// A processor exception that nothing handles.
    Fault {
        /// The vector.
        vector: u64,
        /// Where.
        rip: u64,
        /// The error code.
        code: u64,
        /// The address of a page fault.
        address: u64,
    },
    /// The last line: the guest shuts down.
    End,
}

fn yes(flag: bool) -> &'static str {
    if flag { "yes" } else { "no" }
}

impl fmt::Display for Gaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            last_us,
            max_us,
            max_at_ms,
        } = self;
        write!(
            f,
            "gap_us={last_us} gap_max_us={max_us} gap_max_at_ms={max_at_ms}"
        )
    }
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX} ")?;
        match self {
            Self::Start {
                run,
                cpus,
                memory_mib,
                tsc_khz,
            } => {
                write!(
                    f,
                    "start run={run} cpus={cpus} memory_mib={memory_mib} tsc_khz={tsc_khz}"
                )
            }
            Self::Ready { t_ms } => write!(f, "ready t_ms={t_ms}"),
            Self::Stat {
                t_ms,
                work: Work::Writes { writes, corrupt },
                gaps,
            } => {
                write!(
                    f,
                    "stat t_ms={t_ms} writes={writes} corrupt={corrupt} {gaps}"
                )
            }
            Self::Stat {
                t_ms,
                work: Work::Steps { run, done, total },
                gaps,
            } => {
                write!(
                    f,
                    "stat t_ms={t_ms} nas_run={run} step={done}/{total} {gaps}"
                )
            }
            Self::Corrupt(Corruption {
                page,
                generation,
                word,
                expected,
                found,
            }) => write!(
                f,
                "dirty: CORRUPT page={page} generation={generation} word={word} expected={expected:#x} found={found:#x}"
            ),
            Self::Result(r) => write!(
                f,
                "result kernel={} nas_run={} verified={} value={:.13e} reference={:.13e} error={:.1e} mops={:.2} seconds={:.3} {}",
                r.kernel,
                r.run,
                yes(r.verified),
                r.value,
                r.reference,
                r.error,
                r.mops,
                r.seconds,
                r.gaps
            ),
            Self::Verdict {
                verdict:
                    Verdict {
                        pages,
                        writes,
                        corrupt,
                        verified,
                    },
                gaps,
            } => write!(
                f,
                "verdict pages={pages} writes={writes} corrupt={corrupt} verified={} {gaps}",
                yes(*verified)
            ),
            Self::Error(text) => write!(f, "error {text}"),
            Self::Fault {
                vector,
                rip,
                code,
                address,
            } => {
                write!(
                    f,
                    "fault vector={vector} rip={rip:#x} code={code:#x} address={address:#x}"
                )
            }
            Self::End => f.write_str("end"),
        }
    }
}

/// The `key=value` words of a line.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a str);

impl<'a> Fields<'a> {
    fn text(self, key: &str) -> Option<&'a str> {
        self.0
            .split_ascii_whitespace()
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    fn number(self, key: &str) -> Option<u64> {
        let text = self.text(key)?;
        match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => text.parse().ok(),
        }
    }

    fn float(self, key: &str) -> Option<f64> {
        self.text(key)?.parse().ok()
    }

    fn flag(self, key: &str) -> Option<bool> {
        match self.text(key)? {
            "yes" => Some(true),
            "no" => Some(false),
            _ => None,
        }
    }

    fn gaps(self) -> Option<Gaps> {
        Some(Gaps {
            last_us: self.number("gap_us")?,
            max_us: self.number("gap_max_us")?,
            max_at_ms: self.number("gap_max_at_ms")?,
        })
    }

    fn work(self) -> Option<Work> {
        if let Some(writes) = self.number("writes") {
            return Some(Work::Writes {
                writes,
                corrupt: self.number("corrupt")?,
            });
        }
        let (done, total) = self.text("step")?.split_once('/')?;
        Some(Work::Steps {
            run: self.number("nas_run")?,
            done: done.parse().ok()?,
            total: total.parse().ok()?,
        })
    }
}

impl<'a> Line<'a> {
    /// Reads a line; `None` if it is not one of a guest's or is cut short. White space around it
    /// does not matter.
    pub fn parse(text: &'a str) -> Option<Self> {
        let text = text.trim().strip_prefix(PREFIX)?.trim_start();
        let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
        let fields = Fields(rest);
        Some(match word {
            "start" => Self::Start {
                run: fields.text("run")?,
                cpus: fields.number("cpus")?,
                memory_mib: fields.number("memory_mib")?,
                tsc_khz: fields.number("tsc_khz")?,
            },
            "ready" => Self::Ready {
                t_ms: fields.number("t_ms")?,
            },
            "stat" => Self::Stat {
                t_ms: fields.number("t_ms")?,
                work: fields.work()?,
                gaps: fields.gaps()?,
            },
            "dirty:" => Self::Corrupt(Corruption {
                page: fields.number("page")?,
                generation: u32::try_from(fields.number("generation")?).ok()?,
                word: fields.number("word")?,
                expected: fields.number("expected")?,
                found: fields.number("found")?,
            }),
            "result" => Self::Result(KernelResult {
                kernel: fields.text("kernel")?,
                run: fields.number("nas_run")?,
                verified: fields.flag("verified")?,
                value: fields.float("value")?,
                reference: fields.float("reference")?,
                error: fields.float("error")?,
                mops: fields.float("mops")?,
                seconds: fields.float("seconds")?,
                gaps: fields.gaps()?,
            }),
            "verdict" => Self::Verdict {
                verdict: Verdict {
                    pages: fields.number("pages")?,
                    writes: fields.number("writes")?,
                    corrupt: fields.number("corrupt")?,
                    verified: fields.flag("verified")?,
                },
                gaps: fields.gaps()?,
            },
            "error" => Self::Error(rest),
            "fault" => Self::Fault {
                vector: fields.number("vector")?,
                rip: fields.number("rip")?,
                code: fields.number("code")?,
                address: fields.number("address")?,
            },
            "end" => Self::End,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn samples() -> Vec<Line<'static>> {
        let gaps = Gaps {
            last_us: 12,
            max_us: 34,
            max_at_ms: 56,
        };
        vec![
            Line::Start {
                run: "mg.A",
                cpus: 2,
                memory_mib: 512,
                tsc_khz: 2_400_000,
            },
            Line::Ready { t_ms: 17 },
            Line::Stat {
                t_ms: 1017,
                work: Work::Writes {
                    writes: 5000,
                    corrupt: 0,
                },
                gaps,
            },
            Line::Stat {
                t_ms: 1017,
                work: Work::Steps {
                    run: 3,
                    done: 2,
                    total: 4,
                },
                gaps,
            },
            Line::Corrupt(Corruption {
                page: 7,
                generation: 3,
                word: 511,
                expected: 0xabc,
                found: 0,
            }),
            Line::Result(KernelResult {
                kernel: "ep.S",
                run: 1,
                verified: true,
                value: 1.5e-5,
                reference: 1.25e-5,
                error: 2e-10,
                mops: 1234.5,
                seconds: 0.125,
                gaps,
            }),
            Line::Verdict {
                verdict: Verdict {
                    pages: 9,
                    writes: 8,
                    corrupt: 1,
                    verified: false,
                },
                gaps,
            },
            Line::Error("mg.C needs 3500 MiB of memory and the guest has 512; give it more"),
            Line::Fault {
                vector: 14,
                rip: 0x10_0000,
                code: 2,
                address: 0xffff_ffff_ffff_f000,
            },
            Line::End,
        ]
    }

    #[test]
    fn every_line_is_read_as_it_was_written() {
        for line in samples() {
            let text = line.to_string();
            assert_eq!(Line::parse(&format!("  {text}\r\n")), Some(line), "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics_and_cut_lines_are_safe(text in "\\PC{0,80}", sample in 0usize..10, cut in 0usize..200) {
            let _ = Line::parse(&text);
            let _ = Line::parse(&format!("{PREFIX} {text}"));
            let line = samples()[sample].to_string();
            let _ = Line::parse(line.get(..cut).unwrap_or(""));
        }
    }
}
