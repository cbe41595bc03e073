//! The state of a machine as bytes.
//!
//! ```text
//! "FRYSTATE"  version u32  vCPUs u32  length of the rest u32  CRC32C of the rest u32
//! version 4: CBOR maps with names, one for VM and devices, one for each vCPU   (v4)
//! version 3: the same as postcard, by position                                 (v3)
//! ```
//!
//! Little-endian. This build reads both and writes version 4, or 3 for a reader that has no word
//! for 4. The number of vCPUs is in the header and each is decoded by itself, so that a sender
//! cannot make the receiver allocate more than a machine of that size has.
//!
//! Within a version fields are added, never moved or reused. A reader skips a field that it does
//! not know, unless the map's `requires` names it: that is what a writer puts there when the guest
//! would not be the same without. A field that a writer may not have has a default.

#[cfg(test)]
mod recorded;
mod v3;
mod v4;

use ferry_devices::acpi_pm::AcpiPmState;
use ferry_devices::i8042::I8042State;
use ferry_devices::serial::SerialState;
use ferry_devices::virtio::VirtioState;
use serde::{Deserialize, Serialize};

use crate::kvm::{MAX_CPUS, VcpuState, VmState};

const MAGIC: [u8; 8] = *b"FRYSTATE";
/// The version that is written.
pub const STATE_VERSION: u32 = 4;
/// The oldest version that is read, and written where it is asked for.
pub const OLDEST_STATE_VERSION: u32 = STATE_VERSION - 1;
const HEADER: usize = 24;
/// The most bytes that VM and devices are believed to have: 64 KiB of input for the serial port,
/// as much for a console, and the queues of 13 devices are a fifth of it.
const VM_BYTES: usize = 1 << 20;
/// The most bytes that a vCPU is believed to have: 64 KiB of vector registers, 512 MSRs of at most
/// 15 bytes, 3 KiB of the rest.
const VCPU_BYTES: usize = 80 << 10;

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
    Encode(String),
    /// Something else.
    #[error("these bytes are not the state of a ferry machine")]
    NotAState,
    /// Another version.
    #[error(
        "the machine's state has version {found}, but this ferry reads versions {OLDEST_STATE_VERSION} to {STATE_VERSION}: \
         go by way of a ferry that reads both"
    )]
    Version {
        /// The version found.
        found: u32,
    },
    /// Not a version of this build.
    #[error(
        "the machine's state is wanted in version {wanted}, but this ferry writes versions {OLDEST_STATE_VERSION} to \
         {STATE_VERSION}: upgrade the older side"
    )]
    Unwritable {
        /// The version that was asked for, or the newest that the reader reads.
        wanted: u32,
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
    /// A part cannot be read.
    #[error(
        "the machine's state is damaged, or of a newer ferry: its {part} cannot be read: {why}"
    )]
    Part {
        /// Which.
        part: String,
        /// Why.
        why: String,
    },
    /// A newer writer says that it must be understood.
    #[error(
        "the guest cannot be what it was without {names} of its {part}, which this ferry (state version {STATE_VERSION}) does not \
         know: use a newer ferry here"
    )]
    Requires {
        /// Of which part.
        part: String,
        /// The names that are not known.
        names: String,
    },
}

/// The version that a state is written in for a reader of versions up to `newest`; `None` is one
/// that did not say, which no reader of version 4 leaves out.
///
/// # Errors
/// [`StateError::Unwritable`].
pub fn version_for(newest: Option<u32>) -> Result<u32, StateError> {
    match newest.unwrap_or(3) {
        wanted if wanted < OLDEST_STATE_VERSION => Err(StateError::Unwritable { wanted }),
        newest => Ok(newest.min(STATE_VERSION)),
    }
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
        self.to_bytes_as(STATE_VERSION)
    }

    /// The state in one of the versions that this build writes.
    ///
    /// # Errors
    /// [`StateError::Encode`], [`StateError::Unwritable`].
    pub fn to_bytes_as(&self, version: u32) -> Result<Vec<u8>, StateError> {
        let header = vec![0; HEADER];
        let mut bytes = match version {
            3 => v3::encode(self, header)?,
            STATE_VERSION => v4::encode(self, header)?,
            wanted => return Err(StateError::Unwritable { wanted }),
        };
        let (header, body) = bytes.split_at_mut(HEADER);
        let too_long = StateError::Absurd("more than fits into it");
        let cpus = u32::try_from(self.vcpus.len()).map_err(|_| too_long.clone())?;
        let len = u32::try_from(body.len()).map_err(|_| too_long)?;
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&version.to_le_bytes());
        header[12..16].copy_from_slice(&cpus.to_le_bytes());
        header[16..20].copy_from_slice(&len.to_le_bytes());
        header[20..24].copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
        Ok(bytes)
    }

    /// Reads a state of this version or the one before. Bytes of any origin are safe: they give a
    /// state that KVM still has to accept, or an error.
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
        let version = word(8);
        if !(OLDEST_STATE_VERSION..=STATE_VERSION).contains(&version) {
            return Err(StateError::Version { found: version });
        }
        let cpus = word(12);
        if cpus == 0 || cpus > MAX_CPUS {
            return Err(StateError::Absurd("an impossible number of vCPUs"));
        }
        let said = usize::try_from(word(16)).unwrap_or(usize::MAX);
        let count = usize::try_from(cpus).unwrap_or(usize::MAX);
        let most = count.saturating_mul(VCPU_BYTES).saturating_add(VM_BYTES);
        if said != body.len() || body.len() > most {
            return Err(StateError::Length {
                found: body.len(),
                said,
            });
        }
        if crc32c::crc32c(body) != word(20) {
            return Err(StateError::Checksum);
        }
        let state = match version {
            3 => v3::decode(cpus, body)?,
            _ => v4::decode(cpus, body)?,
        };
        if state.devices.serial.input.len() > ferry_devices::serial::INPUT_LIMIT {
            return Err(StateError::Absurd("more serial input than a port can hold"));
        }
        Ok(state)
    }
}

/// The name of a vCPU's part in messages.
fn vcpu_name(id: u32) -> String {
    format!("vCPU {id}")
}

/// A vCPU's state, checked.
fn checked(vcpu: VcpuState) -> Result<VcpuState, StateError> {
    vcpu.check().map_err(StateError::Absurd)?;
    Ok(vcpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header with a right checksum over `body`.
    pub(super) fn framed(version: u32, cpus: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        for word in [
            version,
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
        let read = |bytes: &[u8]| MachineState::from_bytes(bytes).unwrap_err();
        assert_eq!(read(b""), StateError::NotAState);
        assert_eq!(read(&[0; 100]), StateError::NotAState);
        for version in [3, 4] {
            let mut short = framed(version, 1, &[1, 2, 3]);
            short.pop();
            assert!(matches!(read(&short), StateError::Length { .. }));
            let mut flipped = framed(version, 1, &[1, 2, 3]);
            flipped[25] ^= 1;
            assert_eq!(read(&flipped), StateError::Checksum);
            for cpus in [0, 255, u32::MAX] {
                let error = read(&framed(version, cpus, &[0; 64]));
                assert!(matches!(error, StateError::Absurd(_)), "{error}");
            }
            // More than one vCPU can have.
            let long = framed(version, 1, &vec![0; VM_BYTES + VCPU_BYTES + 1]);
            assert!(matches!(read(&long), StateError::Length { .. }));
            // Bodies with a right checksum: all one byte, so counts and lengths of every size.
            for byte in 0..=255 {
                for len in [1, 20, 300, 5000] {
                    let body = vec![byte; len];
                    assert!(MachineState::from_bytes(&framed(version, 2, &body)).is_err());
                }
            }
        }
    }

    #[test]
    fn other_versions_are_refused_with_both_numbers() {
        for found in [0, 2, 5, u32::MAX] {
            let error = MachineState::from_bytes(&framed(found, 1, b"")).unwrap_err();
            assert_eq!(error, StateError::Version { found });
            let text = error.to_string();
            assert!(text.contains(&format!("version {found},")), "{text}");
            assert!(text.contains("versions 3 to 4"), "{text}");
        }
    }

    #[test]
    fn a_state_is_written_for_its_reader() {
        assert_eq!(version_for(None), Ok(3));
        assert_eq!(version_for(Some(3)), Ok(3));
        assert_eq!(version_for(Some(4)), Ok(4));
        // A newer reader reads ours.
        assert_eq!(version_for(Some(9)), Ok(4));
        let error = version_for(Some(2)).unwrap_err();
        assert_eq!(error, StateError::Unwritable { wanted: 2 });
        assert!(error.to_string().contains("version 2,"), "{error}");
    }
}
