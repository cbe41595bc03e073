//! Where the destination stands, as its VMM sees it.

/// Where the destination stands; see the module's figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
// Exhaustive: a VMM decides by it what becomes of the guest, and must decide for every value.
pub enum State {
    /// Connected; no handshake yet.
    Waiting,
    /// The machine stands, memory arrives.
    Filling,
    /// The guest is complete and checked; the source owns it until its commit is read.
    Ready,
    /// The guest runs; the source may not know yet, or the guest's pages follow.
    Running,
    /// The source was told.
    Complete,
    /// Nothing was kept; the source owns the guest.
    Discarded,
    /// Ready, and the source is silent: the machine is kept and does not run.
    InDoubt,
    /// The guest runs, pages are missing, and the connection to the source is lost.
    Interrupted,
}

/// What happened in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
// Exhaustive: a VMM that did not know a step would leave the guest standing.
pub enum Step {
    /// More frames are expected.
    Continue,
    /// The guest runs from now on. The source is told so by the next step: the driver of the engine
    /// books the guest before it.
    Running,
    /// The guest runs and the source was told.
    Complete,
}
