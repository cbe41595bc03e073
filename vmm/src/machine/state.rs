//! The state of a machine as bytes.
//!
//! ```text
//! "FRYSTATE"  version u32  vCPUs u32  length of the rest u32  CRC32C of the rest u32
//! devices and VM (postcard)   vCPU 0 (postcard)   vCPU 1 …
//! ```
//!
//! Little-endian. The number of vCPUs is in the header and each is decoded by itself, so that a
//! sender cannot make the receiver allocate more than a machine of that size has.

use ferry_devices::acpi_pm::AcpiPmState;
use ferry_devices::i8042::I8042State;
use ferry_devices::serial::SerialState;
use ferry_devices::virtio::VirtioState;
use serde::{Deserialize, Serialize};

use crate::kvm::{MAX_CPUS, VcpuState, VmState};

const MAGIC: [u8; 8] = *b"FRYSTATE";
const VERSION: u32 = 3;
const HEADER: usize = 24;
/// The largest state that is believed: 254 vCPUs of 70 KiB are 17 MiB.
const MAX_BYTES: usize = 32 << 20;

/// State of the devices outside of the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicesState {
    /// COM1.
    pub serial: SerialState,
    /// The keyboard controller.
    pub i8042: I8042State,
    /// The power button and the switch.
    pub acpi_pm: AcpiPmState,
    /// The virtio devices, in the order of their places.
    pub virtio: Vec<VirtioState>,
}

/// Everything of a machine but its memory and its description.
#[derive(Debug, Clone)]
pub struct MachineState {
    pub(super) devices: DevicesState,
    pub(super) vm: VmState,
    pub(super) vcpus: Vec<VcpuState>,
}

/// Why bytes are not a state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The state could not be written.
    #[error("the machine's state could not be encoded: {0}")]
    Encode(postcard::Error),
    /// Something else.
    #[error("these bytes are not the state of a ferry machine")]
    NotAState,
    /// Another version.
    #[error(
        "the machine's state has version {found}, but this ferry reads version {VERSION}: use the same version of ferry on both sides"
    )]
    Version {
        /// The version found.
        found: u32,
    },
    /// Cut short or too long.
    #[error(
        "the machine's state has {found} bytes where its header says {said}: it was cut short or mixed up"
    )]
    Length {
        /// Bytes there are.
        found: usize,
        /// Bytes the header says.
        said: usize,
    },
    /// Bits have changed.
    #[error("the machine's state is damaged: its checksum is wrong")]
    Checksum,
    /// It cannot be true.
    #[error("the machine's state is damaged: it has {0}")]
    Absurd(&'static str),
}

impl MachineState {
    /// Number of vCPUs.
    #[must_use]
    pub fn cpus(&self) -> usize {
        self.vcpus.len()
    }

    /// The vCPUs' states.
    #[must_use]
    pub fn vcpus(&self) -> &[VcpuState] {
        &self.vcpus
    }

    /// For a guest that was away: its clock goes on from where it stood when the state was saved.
    /// Otherwise it counts the time since, where KVM can tell it on both hosts
    /// (`KVM_CLOCK_REALTIME`), as it does for the pause of a migration.
    pub fn stop_clock(&mut self) {
        self.vm.stop_clock();
    }

    /// The state as bytes that [`from_bytes`](Self::from_bytes) takes.
    ///
    /// # Errors
    /// [`StateError::Encode`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, StateError> {
        let mut bytes = vec![0; HEADER];
        bytes =
            postcard::to_extend(&(&self.devices, &self.vm), bytes).map_err(StateError::Encode)?;
        for vcpu in &self.vcpus {
            bytes = postcard::to_extend(vcpu, bytes).map_err(StateError::Encode)?;
        }
        let (header, body) = bytes.split_at_mut(HEADER);
        let too_long = StateError::Absurd("more than fits into it");
        let cpus = u32::try_from(self.vcpus.len()).map_err(|_| too_long.clone())?;
        let len = u32::try_from(body.len()).map_err(|_| too_long)?;
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&cpus.to_le_bytes());
        header[16..20].copy_from_slice(&len.to_le_bytes());
        header[20..24].copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
        Ok(bytes)
    }

    /// Reads a state. Bytes of any origin are safe: they give a state that KVM still has to accept,
    /// or an error.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let (header, body) = bytes
            .split_at_checked(HEADER)
            .ok_or(StateError::NotAState)?;
        if header[..8] != MAGIC {
            return Err(StateError::NotAState);
        }
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        if word(8) != VERSION {
            return Err(StateError::Version { found: word(8) });
        }
        let said = usize::try_from(word(16)).unwrap_or(usize::MAX);
        if said != body.len() || body.len() > MAX_BYTES {
            return Err(StateError::Length {
                found: body.len(),
                said,
            });
        }
        let cpus = word(12);
        if cpus == 0 || cpus > MAX_CPUS {
            return Err(StateError::Absurd("an impossible number of vCPUs"));
        }
        if crc32c::crc32c(body) != word(20) {
            return Err(StateError::Checksum);
        }
        let ((devices, vm), mut rest) = take::<(DevicesState, VmState)>(body)?;
        if devices.serial.input.len() > ferry_devices::serial::INPUT_LIMIT {
            return Err(StateError::Absurd("more serial input than a port can hold"));
        }
        let mut vcpus = Vec::new();
        for _ in 0..cpus {
            let (vcpu, after) = take::<VcpuState>(rest)?;
            vcpu.check().map_err(StateError::Absurd)?;
            vcpus.push(vcpu);
            rest = after;
        }
        if !rest.is_empty() {
            return Err(StateError::Absurd("bytes after its end"));
        }
        Ok(Self { devices, vm, vcpus })
    }
}

fn take<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<(T, &'a [u8]), StateError> {
    postcard::take_from_bytes(bytes)
        .map_err(|_| StateError::Absurd("a part that cannot be decoded"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header with a right checksum over `body`.
    fn framed(cpus: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        for word in [
            VERSION,
            cpus,
            u32::try_from(body.len()).unwrap(),
            crc32c::crc32c(body),
        ] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(body);
        bytes
    }

    #[test]
    fn hostile_bytes_give_an_error() {
        assert_eq!(
            MachineState::from_bytes(b"").unwrap_err(),
            StateError::NotAState
        );
        assert_eq!(
            MachineState::from_bytes(&[0; 100]).unwrap_err(),
            StateError::NotAState
        );
        let mut old = framed(1, b"");
        old[8] = 9;
        assert_eq!(
            MachineState::from_bytes(&old).unwrap_err(),
            StateError::Version { found: 9 }
        );
        let mut short = framed(1, &[1, 2, 3]);
        short.pop();
        assert!(matches!(
            MachineState::from_bytes(&short),
            Err(StateError::Length { .. })
        ));
        let mut flipped = framed(1, &[1, 2, 3]);
        flipped[25] ^= 1;
        assert_eq!(
            MachineState::from_bytes(&flipped).unwrap_err(),
            StateError::Checksum
        );
        for cpus in [0, 255, u32::MAX] {
            let error = MachineState::from_bytes(&framed(cpus, &[0; 64])).unwrap_err();
            assert!(matches!(error, StateError::Absurd(_)));
        }
        // Bodies with a right checksum: all one byte, so counts and lengths of every size.
        for byte in 0..=255 {
            for len in [1, 20, 300, 5000] {
                assert!(MachineState::from_bytes(&framed(2, &vec![byte; len])).is_err());
            }
        }
    }
}
