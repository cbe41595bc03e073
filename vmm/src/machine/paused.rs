//! A machine whose vCPUs stand still.

use ferry_devices::serial::SerialError;
use ferry_devices::sync::lock;

use super::state::{DevicesState, MachineState};
use super::{Machine, ResumeError};
use crate::kvm::{IoctlError, RestoreError, SkippedMsr, VcpuState};

/// Why a machine could not be saved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// KVM refused to tell a part of the state.
    #[error("the machine's state could not be read: {0}")]
    Ioctl(#[from] IoctlError),
}

/// Why a machine could not take over a state.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreMachineError {
    /// Another machine's state.
    #[error(
        "the state is of a machine with {saved} vCPUs, but this one has {here}: build it from the other's description"
    )]
    Cpus {
        /// vCPUs in the state.
        saved: usize,
        /// vCPUs of the machine.
        here: usize,
    },
    /// KVM refused a part of it.
    #[error(transparent)]
    Kvm(#[from] RestoreError),
    /// The serial port refused its part.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// The machines have different devices.
    #[error(
        "the state is of a machine with {saved} virtio devices, but this one has {here}: build it from the other's description"
    )]
    Devices {
        /// Devices in the state.
        saved: usize,
        /// Devices of the machine.
        here: usize,
    },
    /// A virtio device refused its part.
    #[error(transparent)]
    Virtio(#[from] ferry_devices::virtio::RestoreError),
    /// The serial port's interrupt line could not be duplicated.
    #[error("the serial port's interrupt could not be connected: {0}")]
    Interrupt(#[source] std::io::Error),
}

/// What is worth knowing about a restore that succeeded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Restored {
    /// MSRs whose saved value this host would not take. Their names are in the CPU's manual; most
    /// are read-only descriptions of the host that guests do not look at twice.
    pub skipped_msrs: Vec<SkippedMsr>,
}

/// A paused machine. While it exists, only its holder can resume the machine.
///
/// Dropping it resumes the machine if it ran before it was paused.
#[derive(Debug)]
#[must_use = "dropping the guard resumes the machine"]
pub struct PausedMachine<'a> {
    machine: &'a Machine,
    was_running: bool,
    released: bool,
}

impl<'a> PausedMachine<'a> {
    pub(super) fn new(machine: &'a Machine, was_running: bool) -> Self {
        Self {
            machine,
            was_running,
            released: false,
        }
    }

    /// The machine.
    #[must_use]
    pub fn machine(&self) -> &'a Machine {
        self.machine
    }

    /// Whether it ran before it was paused.
    #[must_use]
    pub fn was_running(&self) -> bool {
        self.was_running
    }

    /// Reads the state of everything but the memory.
    ///
    /// From the sources of interrupts to their sinks: timers in the kernel go on while the vCPUs
    /// stand still, so an interrupt may pass from one part to the next between two reads. In this
    /// order it is then in both, and the guest sees one too many; in the other order it would be in
    /// neither.
    ///
    /// # Errors
    /// [`SaveError`]; the machine is unharmed.
    pub fn save(&self) -> Result<MachineState, SaveError> {
        let devices = DevicesState {
            serial: lock(&self.machine.devices.serial).save(),
            i8042: lock(&self.machine.devices.i8042).save(),
            acpi_pm: lock(&self.machine.devices.acpi_pm).save(),
            virtio: self.machine.virtio.save(),
        };
        let vm = self.machine.vm.save()?;
        let vcpus = self.machine.vcpus.iter().map(|vcpu| lock(vcpu).save());
        let mut vcpus: Vec<VcpuState> = vcpus.collect::<Result<_, _>>()?;
        let first = self.machine.vcpus.first();
        let scaled = first.map(|first| lock(first).scaled_tsc_at(&vm));
        if let Some(scaled) = scaled.transpose()?.flatten() {
            for (vcpu, state) in self.machine.vcpus.iter().zip(&mut vcpus) {
                lock(vcpu).note_tsc(state, scaled)?;
            }
        }
        Ok(MachineState { devices, vm, vcpus })
    }

    /// Takes over a state that was saved from a machine with the same description. Memory is not
    /// part of it, and may come before or after.
    ///
    /// From the sinks of interrupts to their sources: see the module [`kvm::state`](crate::kvm).
    ///
    /// # Errors
    /// [`RestoreMachineError`]; the machine's state is then a mixture, and it must not be resumed.
    pub fn restore(&self, state: &MachineState) -> Result<Restored, RestoreMachineError> {
        let vcpus = &self.machine.vcpus;
        if state.vcpus.len() != vcpus.len() {
            return Err(RestoreMachineError::Cpus {
                saved: state.vcpus.len(),
                here: vcpus.len(),
            });
        }
        let virtio = (state.devices.virtio.len(), self.machine.virtio.len());
        if virtio.0 != virtio.1 {
            return Err(RestoreMachineError::Devices {
                saved: virtio.0,
                here: virtio.1,
            });
        }
        let mut restored = Restored::default();
        for (vcpu, state) in vcpus.iter().zip(&state.vcpus) {
            restored.skipped_msrs.extend(lock(vcpu).restore(state)?);
        }
        self.machine.vm.restore(&state.vm)?;
        if let (Some(vcpu), Some(first)) = (vcpus.first(), state.vcpus.first()) {
            let moment = lock(vcpu).moment(&state.vm).map_err(RestoreError::Vm)?;
            for (vcpu, state) in vcpus.iter().zip(&state.vcpus) {
                let skipped = lock(vcpu).restore_tsc(state, first, &moment)?;
                restored.skipped_msrs.extend(skipped);
            }
        }
        let devices = &self.machine.devices;
        lock(&devices.i8042).restore(&state.devices.i8042);
        lock(&devices.acpi_pm)
            .restore(&state.devices.acpi_pm)
            .map_err(RestoreMachineError::Interrupt)?;
        let line = devices
            .serial_irq
            .try_clone()
            .map_err(RestoreMachineError::Interrupt)?;
        lock(&devices.serial).restore(&state.devices.serial, Box::new(line))?;
        self.machine.virtio.restore(&state.devices.virtio)?;
        self.machine.virtio.announce_when_resumed();
        Ok(restored)
    }

    /// The guest belongs to another machine from now on: neither a resume nor a pause of this one
    /// will be granted, until [`Machine::take_back`] or [`Machine::take_over`].
    pub fn commit(mut self) {
        self.released = true;
        self.machine.control.commit(self.was_running);
    }

    /// Gives the guard up and leaves the machine paused.
    pub fn keep_paused(mut self) {
        self.released = true;
        // Only a resume can fail.
        let _ = self.machine.control.release(false);
    }

    /// Resumes the machine, whether it ran before or not.
    ///
    /// # Errors
    /// [`ResumeError::Ended`].
    pub fn resume(mut self) -> Result<(), ResumeError> {
        self.released = true;
        self.machine.control.release(true)
    }
}

impl Drop for PausedMachine<'_> {
    fn drop(&mut self) {
        if !self.released {
            match self.machine.control.release(self.was_running) {
                // A machine that was stopped meanwhile has nothing to resume.
                Ok(()) | Err(ResumeError::Ended(_)) => {}
                Err(error) => {
                    tracing::error!(%error, "the guest stays paused");
                }
            }
        }
    }
}
