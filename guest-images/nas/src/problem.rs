//! What can be run: kernel, class, the memory it takes, and what comes out.

use crate::bt::BlockTridiagonal;
use crate::flow::{self, Method};
use crate::sp::Pentadiagonal;
use crate::team::{Hooks, MAX_RANKS, Team};
use crate::{cg, ep, ft, is, mg};
use core::fmt;

/// A kernel of the NAS Parallel Benchmarks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernel {
    /// Embarrassingly parallel: pairs of Gaussian deviates. Processor-bound, writes almost no
    /// memory.
    Ep,
    /// Integer sort: ranks keys by counting. Scattered writes.
    Is,
    /// Conjugate gradient: an eigenvalue of a random sparse matrix. Scattered reads, writes a few
    /// vectors only.
    Cg,
    /// Multigrid: V-cycles on a 3-D Poisson problem. Sweeps over large arrays.
    Mg,
    /// Fourier transforms of a 3-D box, along each of its directions. Rewrites most of its memory
    /// in every iteration.
    Ft,
    /// Block-tridiagonal systems along the lines of a 3-D flow. Much computing between sweeps over
    /// large arrays.
    Bt,
    /// Scalar pentadiagonal systems along the lines of the same flow. Sweeps over large arrays.
    Sp,
}

impl Kernel {
    /// All kernels there are.
    pub const ALL: [Self; 7] = [
        Self::Ep,
        Self::Is,
        Self::Cg,
        Self::Mg,
        Self::Ft,
        Self::Bt,
        Self::Sp,
    ];

    /// The published short name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ep => "ep",
            Self::Is => "is",
            Self::Cg => "cg",
            Self::Mg => "mg",
            Self::Ft => "ft",
            Self::Bt => "bt",
            Self::Sp => "sp",
        }
    }

    /// The kernel of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kernel| kernel.name() == name)
    }
}

/// A published problem size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// Sample: a fraction of a second.
    S,
    /// Workstation.
    W,
    /// The smallest of the large ones.
    A,
    /// About four times A.
    B,
    /// About four times B.
    C,
}

impl Class {
    /// All classes there are, from small to large.
    pub const ALL: [Self; 5] = [Self::S, Self::W, Self::A, Self::B, Self::C];

    /// The published letter.
    pub fn name(self) -> &'static str {
        match self {
            Self::S => "S",
            Self::W => "W",
            Self::A => "A",
            Self::B => "B",
            Self::C => "C",
        }
    }

    /// The class of that letter.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|class| class.name() == name)
    }
}

/// A kernel at a problem size, written `mg.A`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// What to compute.
    pub kernel: Kernel,
    /// How much of it.
    pub class: Class,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.kernel.name(), self.class.name())
    }
}

/// What NPB prints of a problem besides its results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The problem's size: points along each direction of a grid, or one number, and ones.
    pub size: [u64; 3],
    /// Iterations of the timed part; 0 where it is done in one go.
    pub iterations: u32,
    /// What is counted as an operation.
    pub operation: &'static str,
}

impl Facts {
    /// What most kernels count.
    pub(crate) const FLOATING_POINT: &'static str = "floating point";

    /// Of a problem that is one number.
    pub(crate) const fn of(size: u64, iterations: u32, operation: &'static str) -> Self {
        Self {
            size: [size, 1, 1],
            iterations,
            operation,
        }
    }

    /// Of a grid that is computed in floating point.
    pub(crate) fn grid(edges: [usize; 3], iterations: u32) -> Self {
        Self {
            size: edges.map(|edge| edge as u64),
            iterations,
            operation: Self::FLOATING_POINT,
        }
    }
}

/// The memory a run takes, in elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Elements of [`Workspace::floats`].
    pub floats: usize,
    /// Elements of [`Workspace::words`].
    pub words: usize,
}

impl Needs {
    /// The sum, in bytes.
    pub fn bytes(self) -> u64 {
        self.floats as u64 * 8 + self.words as u64 * 4
    }
}

/// The memory a run works in.
#[derive(Debug)]
pub struct Workspace<'a> {
    /// At least [`Needs::floats`] elements.
    pub floats: &'a mut [f64],
    /// At least [`Needs::words`] elements.
    pub words: &'a mut [u32],
    /// Whether it still holds what the last run of the same problem left. If not, its old contents
    /// do not matter; if so, a kernel may keep what it would set up again as it is. `mg` does,
    /// whose set-up leaves memory alone for as long as it draws numbers: a guest that runs it over
    /// and over is hardly ever out of its timed part.
    pub kept: bool,
}

impl Problem {
    /// Its published size, and how NPB counts.
    pub fn facts(self) -> Facts {
        match self.kernel {
            Kernel::Ep => ep::facts(self.class),
            Kernel::Is => is::facts(self.class),
            Kernel::Cg => cg::facts(self.class),
            Kernel::Mg => mg::facts(self.class),
            Kernel::Ft => ft::facts(self.class),
            Kernel::Bt => flow::facts(BlockTridiagonal::new, self.class),
            Kernel::Sp => flow::facts(Pentadiagonal::new, self.class),
        }
    }

    /// The memory that a team of `ranks` needs for it.
    pub fn needs(self, ranks: usize) -> Needs {
        let ranks = ranks.clamp(1, MAX_RANKS);
        match self.kernel {
            Kernel::Ep => Needs::default(),
            Kernel::Is => is::needs(self.class, ranks),
            Kernel::Cg => cg::needs(self.class),
            Kernel::Mg => mg::needs(self.class),
            Kernel::Ft => ft::needs(self.class, ranks),
            Kernel::Bt => flow::needs(BlockTridiagonal::new, self.class, ranks),
            Kernel::Sp => flow::needs(Pentadiagonal::new, self.class, ranks),
        }
    }
}

/// A computed value beside its published reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Check {
    /// What it is.
    pub name: &'static str,
    /// What came out.
    pub value: f64,
    /// What NPB publishes.
    pub reference: f64,
}

impl Check {
    /// The published epsilon of verification, of all kernels that do not have a smaller one.
    pub const EPSILON: f64 = 1e-8;

    /// The relative deviation from the reference.
    pub fn error(&self) -> f64 {
        let error = (self.value - self.reference) / self.reference;
        if error < 0.0 { -error } else { error }
    }
}

/// The checks of a run against the published epsilon of its kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Verification {
    epsilon: f64,
    check: Check,
    passed: bool,
    error: f64,
}

impl Verification {
    /// The first check is the one to show.
    pub(crate) fn new(epsilon: f64, check: Check) -> Self {
        let none = Self {
            epsilon,
            check,
            passed: true,
            error: 0.0,
        };
        none.and_error(check.error())
    }

    #[cfg(test)]
    pub(crate) fn passed(&self) -> bool {
        self.passed
    }

    /// Another check.
    pub(crate) fn and(self, check: Check) -> Self {
        self.and_error(check.error())
    }

    /// Another relative deviation. Not a number does not pass, and stays to be seen.
    pub(crate) fn and_error(mut self, error: f64) -> Self {
        self.passed &= error <= self.epsilon;
        if error > self.error || error.is_nan() {
            self.error = error;
        }
        self
    }
}

/// What a run gave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// What was run.
    pub problem: Problem,
    /// Whether every check passed.
    pub verified: bool,
    /// The first check, the one to show.
    pub check: Check,
    /// The largest relative deviation of all checks.
    pub error: f64,
    /// Time of the part that NPB times, in seconds.
    pub seconds: f64,
    /// Millions of operations a second, counted as NPB counts them.
    pub mops: f64,
}

impl Outcome {
    /// An outcome of `operations` operations in `nanos` nanoseconds.
    pub(crate) fn new(
        problem: Problem,
        verification: Verification,
        operations: f64,
        nanos: u64,
    ) -> Self {
        let seconds = nanos as f64 * 1e-9;
        Self {
            problem,
            verified: verification.passed,
            check: verification.check,
            error: verification.error,
            seconds,
            mops: if nanos == 0 {
                0.0
            } else {
                operations * 1e-6 / seconds
            },
        }
    }
}

/// Why a run did not begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunError {
    /// There is not enough memory.
    Memory {
        /// What was to be run.
        problem: Problem,
        /// What it needs, in bytes.
        needs: u64,
        /// What there is, in bytes, where that is known.
        given: Option<u64>,
    },
}

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Memory {
            problem,
            needs,
            given,
        } = self;
        const MIB: u64 = 1 << 20;
        write!(f, "{problem} needs {} MiB of memory, ", needs.div_ceil(MIB))?;
        match given {
            Some(given) => write!(f, "and there are {}", given / MIB)?,
            None => f.write_str("more than this process may have")?,
        }
        f.write_str("; give it more or choose a smaller class")
    }
}

impl core::error::Error for RunError {}

/// Runs `problem` once on `team`.
///
/// # Errors
/// [`RunError::Memory`] if the workspace is smaller than [`Problem::needs`] says.
pub fn run(
    problem: Problem,
    workspace: Workspace<'_>,
    team: &impl Team,
    hooks: &impl Hooks,
) -> Result<Outcome, RunError> {
    let needs = problem.needs(team.size());
    let given = Needs {
        floats: workspace.floats.len(),
        words: workspace.words.len(),
    };
    let short = RunError::Memory {
        problem,
        needs: needs.bytes(),
        given: Some(given.bytes()),
    };
    let Some(floats) = workspace.floats.get_mut(..needs.floats) else {
        return Err(short);
    };
    let Some(words) = workspace.words.get_mut(..needs.words) else {
        return Err(short);
    };
    Ok(match problem.kernel {
        Kernel::Ep => ep::run(problem, team, hooks),
        Kernel::Is => is::run(problem, words, team, hooks),
        Kernel::Cg => cg::run(problem, floats, words, team, hooks),
        Kernel::Mg => mg::run(problem, floats, workspace.kept, team, hooks),
        Kernel::Ft => ft::run(problem, floats, team, hooks),
        Kernel::Bt => flow::run(BlockTridiagonal::new, problem, floats, team, hooks),
        Kernel::Sp => flow::run(Pentadiagonal::new, problem, floats, team, hooks),
    })
}
