//! What a case is, and which there are.

use ferry_migration::rng::Rng;
use std::fmt;
use std::time::Duration;

/// A way to move a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// Memory goes first.
    PreCopy,
    /// Memory follows.
    PostCopy,
    /// Both processes map the same memory.
    HandOver,
    /// Memory and disk go first.
    CopyDisk,
    /// Through a file.
    Snapshot,
}

/// A step of the list in which a guest changes its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// The guest runs; the first memory, blocks or bytes of a file are on their way.
    FirstPass,
    /// The guest runs; what it has written goes again.
    Draining,
    /// The guest stands still.
    Stopped,
    /// Its state is sent.
    State,
    /// The destination says that it has all.
    Ready,
    /// The source gives the guest away.
    Commit,
    /// The destination says that the guest runs.
    Running,
    /// The guest runs and its pages follow.
    Following,
    /// The last word, of either side.
    Complete,
}

/// What breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// SIGKILL.
    KillSource,
    /// SIGKILL.
    KillDestination,
    /// SIGKILL.
    KillBoth,
    /// SIGSTOP, and SIGCONT after a while.
    StopSource,
    /// SIGSTOP, and SIGCONT after a while.
    StopDestination,
    /// Every connection breaks.
    Cut,
    /// Nothing passes for a while.
    Stalled,
    /// Bytes pass one by one.
    Trickled,
    /// Reads, writes and flushes take long.
    DiskSlow,
    /// Reads, writes and flushes fail.
    DiskFailing,
}

impl Method {
    /// All there are.
    pub const ALL: [Self; 5] = [
        Self::PreCopy,
        Self::PostCopy,
        Self::HandOver,
        Self::CopyDisk,
        Self::Snapshot,
    ];

    /// Its steps.
    #[must_use]
    pub fn steps(self) -> Vec<Step> {
        use Step::{
            Commit, Complete, Draining, FirstPass, Following, Ready, Running, State, Stopped,
        };
        let common = [FirstPass, Draining, Stopped, State, Ready, Commit, Running];
        let own: &[Step] = match self {
            Self::PreCopy | Self::CopyDisk => &[Complete],
            Self::PostCopy => &[Following, Complete],
            Self::HandOver => {
                // No memory is sent, so nothing drains.
                return vec![FirstPass, Stopped, State, Ready, Commit, Running, Complete];
            }
            Self::Snapshot => {
                return vec![FirstPass, Draining, Stopped, State, Complete, Following];
            }
        };
        common.iter().chain(own).copied().collect()
    }

    /// What can break at that step.
    #[must_use]
    pub fn faults(self, step: Step) -> &'static [Fault] {
        use Fault::{
            Cut, DiskFailing, DiskSlow, KillBoth, KillDestination, KillSource, Stalled,
            StopDestination, StopSource, Trickled,
        };
        match (self, step) {
            (Self::Snapshot, Step::Following) => {
                &[KillDestination, StopDestination, DiskSlow, DiskFailing]
            }
            (Self::Snapshot, Step::Complete) => &[KillSource],
            // There is no destination and no network.
            (Self::Snapshot, _) => &[KillSource, StopSource, DiskSlow, DiskFailing],
            _ => &[
                KillSource,
                KillDestination,
                KillBoth,
                StopSource,
                StopDestination,
                Cut,
                Stalled,
                Trickled,
                DiskSlow,
                DiskFailing,
            ],
        }
    }
}

/// One migration, and how it is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// How the guest moves.
    pub method: Method,
    /// When the fault comes.
    pub step: Step,
    /// The fault.
    pub fault: Fault,
    /// Everything else: how long, in which part of the frame, which disk, what comes after it.
    pub detail: u64,
}

impl Case {
    /// The case of a seed.
    #[must_use]
    pub fn from_seed(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let method = pick(&mut rng, &Method::ALL);
        let step = pick(&mut rng, &method.steps());
        let fault = pick(&mut rng, method.faults(step));
        Self {
            method,
            step,
            fault,
            detail: rng.next() % 10_000,
        }
    }

    /// Every way, step and fault together, in a fixed order; the detail is the place in it.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let mut cases = Vec::new();
        for method in Method::ALL {
            for step in method.steps() {
                for &fault in method.faults(step) {
                    cases.push(Self {
                        method,
                        step,
                        fault,
                        detail: cases.len() as u64,
                    });
                }
            }
        }
        cases
    }

    /// A part of them, with each step of each way, each fault of each way, and each fault at each
    /// step.
    #[must_use]
    pub fn selection() -> Vec<Self> {
        let mut left = Self::all();
        let (mut steps, mut faults, mut both) = (Vec::new(), Vec::new(), Vec::new());
        let mut chosen = Vec::new();
        loop {
            let gain = |case: &Self| {
                let step = !steps.contains(&(case.method, case.step));
                let fault = !faults.contains(&(case.method, case.fault));
                let pair = !both.contains(&(case.step, case.fault));
                u32::from(step) + u32::from(fault) + u32::from(pair)
            };
            let best = (0..left.len()).rev().max_by_key(|&at| gain(&left[at]));
            let Some(best) = best.filter(|&at| gain(&left[at]) > 0) else {
                chosen.sort_by_key(|case: &Self| case.detail);
                return chosen;
            };
            let case = left.remove(best);
            steps.push((case.method, case.step));
            faults.push((case.method, case.fault));
            both.push((case.step, case.fault));
            chosen.push(case);
        }
    }

    /// How long a fault lasts that ends by itself. In few cases longer than the timeout of a
    /// commit.
    pub(super) fn lasts(&self) -> Duration {
        let mut rng = Rng::new(self.detail ^ 0x5eed);
        if self.detail >= 1000 && rng.below(15) == 0 {
            return Duration::from_millis(10_500 + rng.below(2_000));
        }
        Duration::from_millis(20 + rng.below(1_200))
    }

    /// Random numbers for the detail.
    pub(super) fn rng(&self) -> Rng {
        Rng::new(self.detail)
    }
}

fn pick<T: Copy>(rng: &mut Rng, of: &[T]) -> T {
    of[usize::try_from(rng.below(of.len() as u64)).unwrap()]
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            method,
            step,
            fault,
            detail,
        } = self;
        write!(f, "{method:?}/{step:?}/{fault:?}/{detail}")
    }
}

impl std::str::FromStr for Case {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, detail) = text.rsplit_once('/').ok_or("WAY/STEP/FAULT/DETAIL")?;
        let detail = detail.parse().map_err(|e| format!("{detail}: {e}"))?;
        let known = Self::all()
            .into_iter()
            .find(|case| case.to_string().starts_with(&format!("{name}/")));
        let case = known.ok_or_else(|| format!("there is no case {name}"))?;
        Ok(Self { detail, ..case })
    }
}
