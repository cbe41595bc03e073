//! Filters for seccomp(2), made once and applied by each thread to itself.

use ferry_devices::thread::Kind;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use super::calls::{Calls, allowed, refused};

/// The filters of one kind of thread.
#[derive(Debug)]
struct Filters {
    /// Applied first: the other one does not let further ones be added.
    refused: BpfProgram,
    allowed: BpfProgram,
}

/// The filters of all kinds.
#[derive(Debug)]
pub(super) struct All(Vec<Filters>);

impl All {
    /// # Errors
    /// A defect in the lists; a sentence.
    pub(super) fn new() -> Result<Self, String> {
        let made = Kind::ALL.into_iter().map(Filters::of).collect();
        let made: Result<Vec<_>, _> = made;
        made.map(Self)
            .map_err(|e| format!("the sandbox's filters are wrong: {e}"))
    }

    /// Applies them to the calling thread.
    ///
    /// # Errors
    /// The kernel refuses; a sentence.
    pub(super) fn apply(&self, kind: Kind) -> Result<(), String> {
        let Filters { refused, allowed } = &self.0[index(kind)];
        for filter in [refused, allowed] {
            seccompiler::apply_filter(filter)
                .map_err(|e| format!("the sandbox of a {kind} thread cannot be entered ({e})"))?;
        }
        Ok(())
    }
}

impl Filters {
    fn of(kind: Kind) -> Result<Self, seccompiler::BackendError> {
        let compile = |calls: Calls, others, these| {
            SeccompFilter::new(calls, others, these, TargetArch::x86_64)?.try_into()
        };
        let (allow, trap) = (SeccompAction::Allow, SeccompAction::Trap);
        let unknown = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
        let mut strict: BpfProgram = compile(allowed(kind)?, trap, allow.clone())?;
        for instruction in &mut strict {
            // The kernel hands the low half of the result to the handler of the signal.
            if instruction.code == RETURN && instruction.k == libc::SECCOMP_RET_TRAP {
                instruction.k |= u32::from(number(kind));
            }
        }
        Ok(Self {
            refused: compile(refused(kind)?, allow, unknown)?,
            allowed: strict,
        })
    }
}

/// `BPF_RET | BPF_K`
const RETURN: u16 = 0x06;

fn index(kind: Kind) -> usize {
    let found = Kind::ALL.iter().position(|k| *k == kind);
    // A kind of the future is the VMM's until it has its own filter.
    found.unwrap_or(Kind::ALL.len() - 1)
}

/// The kind as a number that is not zero, for the kernel to hand back.
fn number(kind: Kind) -> u16 {
    u16::try_from(index(kind) + 1).unwrap_or(u16::MAX)
}

/// The kind that [`number`] stands for.
pub(super) fn kind_of(number: usize) -> Option<Kind> {
    Kind::ALL.get(number.checked_sub(1)?).copied()
}
