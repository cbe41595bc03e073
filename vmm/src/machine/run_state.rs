//! What a machine does, and why it does not do what it is asked for.

use super::control::TIMEOUT;

const COMMITTED: &str =
    "its guest was handed over to the destination of a migration, and may run there";

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// The guest shut down: it switched the machine off or asked KVM for it.
    Shutdown,
    /// A fault could not be delivered, nor the double fault that followed: a crash, or a guest's
    /// last way to ask for a reset.
    TripleFault,
    /// The guest asked for a reset.
    Reset,
    /// [`Machine::stop`](super::Machine::stop), or the machine was dropped.
    Stopped,
    /// KVM could not go on; a sentence that says where and why.
    Failure(String),
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shutdown => f.write_str("the guest shut down"),
            Self::TripleFault => f.write_str("the guest triple-faulted"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::Stopped => f.write_str("the machine was stopped"),
            Self::Failure(why) => f.write_str(why),
        }
    }
}

/// What a machine is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunState {
    /// No guest code runs.
    Paused,
    /// The vCPUs run.
    Running,
    /// No guest code runs: the guest belongs to the destination of a migration. Neither
    /// [`Machine::resume`](super::Machine::resume) nor a pause changes that.
    Committed,
    /// No guest code will run again.
    Ended(Exit),
}

/// Why a machine could not be paused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PauseError {
    /// It has ended.
    #[error("the machine cannot be paused since it has ended: {0}")]
    Ended(Exit),
    /// Its guest is another's.
    #[error("the machine cannot be paused: {COMMITTED}")]
    Committed,
    /// A vCPU did not stop.
    #[error(
        "{0} of the machine's vCPUs did not stop within {TIMEOUT:?}: a device blocks, or a page of the guest's memory has not arrived; the machine runs on"
    )]
    Stuck(usize),
    /// A device did not come to rest.
    #[error("{0}; the machine runs on")]
    Device(#[from] ferry_devices::virtio::PauseError),
}

/// Why a machine could not be resumed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResumeError {
    /// It has ended.
    #[error("the machine cannot be resumed since it has ended: {0}")]
    Ended(Exit),
    /// Its guest is another's.
    #[error("the machine cannot be resumed: {COMMITTED}")]
    Committed,
    /// Its guest is its own.
    #[error("there is no guest to take back: the machine was not handed over to a destination")]
    NotCommitted,
    /// COMMIT is on its way.
    #[error(
        "the guest cannot be taken over: the destination is being asked about it; wait for the answer"
    )]
    Asked,
    /// Its disk is not its own; a sentence.
    #[error("the machine cannot be resumed: {0}")]
    Disk(String),
    /// Its memory is not its own; a sentence.
    #[error("the machine cannot be resumed: {0}")]
    Memory(String),
}

/// Why a machine's guest was not changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChangeError {
    /// It has ended.
    #[error("the guest cannot be changed since it has ended: {0}")]
    Ended(Exit),
    /// Its guest is another's.
    #[error("the guest cannot be changed here: {COMMITTED}")]
    Committed,
    /// A guard holds it paused, whose holder may have read its state already.
    #[error(
        "the guest cannot be changed while its state is read, which has taken {TIMEOUT:?} so far; try again later"
    )]
    Busy,
}
