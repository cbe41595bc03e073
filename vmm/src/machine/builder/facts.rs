//! A guest's CPU, and this host's: whether they fit.

use super::BuildError;
use crate::kvm::{Host, Vcpu};
use crate::machine::cpu::CpuModel;
use crate::machine::description::MachineDescription;
use crate::machine::fit::{self, HostCpu};

/// What the guest's CPU is here.
pub(super) fn host_cpu(host: &Host, vendor: String, vcpus: &[Vcpu]) -> HostCpu {
    HostCpu {
        vendor,
        tsc_khz: vcpus.first().and_then(Vcpu::tsc_khz),
        scales: host.capabilities().tsc_control,
        arch_capabilities: vcpus.first().and_then(Vcpu::arch_capabilities),
    }
}

/// Whether the guest can run on this host's CPU, which an operator may insist on.
fn check_fit(
    description: &MachineDescription,
    here: &HostCpu,
    insist: bool,
) -> Result<(), BuildError> {
    match fit::check(description, here) {
        Err(misfit) if insist => {
            tracing::warn!(%misfit, "the guest runs here all the same");
            Ok(())
        }
        other => Ok(other?),
    }
}

/// What a guest that is new here or arrives has of its host's CPU.
pub(super) fn cpu_facts(
    description: Option<&MachineDescription>,
    model: &CpuModel,
    here: &HostCpu,
    vcpus: &[Vcpu],
    insist: bool,
) -> Result<(Option<u32>, Option<u64>), BuildError> {
    match description {
        Some(d) => {
            check_fit(d, here, insist)?;
            Ok((d.tsc_khz, d.arch_capabilities))
        }
        None => Ok((here.tsc_khz, model.tell(vcpus, here.arch_capabilities)?)),
    }
}
