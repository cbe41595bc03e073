use crate::kvm::IoctlError;

/// Why a saved state could not be put into KVM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// KVM refused a part of a vCPU's state.
    #[error(
        "the state of vCPU {vcpu} could not be restored: {source}; the hosts may differ in what their CPUs can do"
    )]
    Vcpu {
        /// Number of the vCPU.
        vcpu: u32,
        /// What was refused.
        source: IoctlError,
    },
    /// KVM refused a part of the VM's state.
    #[error("the state of the virtual machine could not be restored: {0}")]
    Vm(#[from] IoctlError),
    /// The vector state does not fit this host's.
    #[error(
        "vCPU {vcpu} uses vector registers that this host's KVM has no room for ({saved} bytes saved, {room} here): restore it on a host with the same vector extensions"
    )]
    Xsave {
        /// Number of the vCPU.
        vcpu: u32,
        /// Bytes saved.
        saved: usize,
        /// Bytes that this host's KVM takes.
        room: usize,
    },
    /// The state has an MSR that ferry does not carry.
    #[error(
        "the state of vCPU {vcpu} has the MSR {index:#x}, which ferry does not know as a guest's state: it was saved by a \
         newer ferry, or is damaged; restore it with the ferry that saved it"
    )]
    UnknownMsr {
        /// Number of the vCPU.
        vcpu: u32,
        /// The MSR.
        index: u32,
    },
    /// The state has a part that this KVM cannot take, and it matters.
    #[error(
        "the saved state has {0}, which this host's KVM cannot take: restore it on a newer kernel"
    )]
    Lacks(&'static str),
}
