//! The FPU and vector registers: KVM_GET_XSAVE2 where there is one, KVM_GET_XSAVE's 4 KiB
//! elsewhere.

use kvm_bindings::{Xsave, kvm_xsave};

use super::RestoreError;
use crate::kvm::error::{IoctlError, Named};
use crate::kvm::vcpu::Vcpu;

/// Size of the area of KVM_GET_XSAVE, in bytes: the least there is.
pub(super) const LEGACY: usize = 4096;
/// The largest area that is believed, in bytes; with AMX's tiles it is 11,008 today.
pub const MAX_XSAVE: usize = 64 * 1024;

impl Vcpu {
    /// Bytes of the area that this KVM reads and writes.
    fn xsave_size(&self) -> usize {
        self.vm()
            .capabilities()
            .xsave2_size
            .max(LEGACY)
            .next_multiple_of(4)
    }

    pub(super) fn save_xsave(&self) -> Result<Vec<u8>, IoctlError> {
        if self.vm().capabilities().xsave2_size == 0 {
            let area = self.fd().get_xsave().named("KVM_GET_XSAVE")?;
            return Ok(to_bytes(&area.region, &[]));
        }
        let mut area = Xsave::new((self.xsave_size() - LEGACY) / 4)
            .map_err(|_| IoctlError::errno("an XSAVE area", libc::ENOMEM))?;
        // SAFETY: the area has the size that KVM_CHECK_EXTENSION(KVM_CAP_XSAVE2) told, which is how
        // much KVM writes. ferry asks for no dynamic XSAVE feature that would let it grow later.
        unsafe { self.fd().get_xsave2(&mut area) }.named("KVM_GET_XSAVE2")?;
        Ok(to_bytes(
            &area.as_fam_struct_ref().xsave.region,
            area.as_slice(),
        ))
    }

    pub(super) fn restore_xsave(&self, saved: &[u8]) -> Result<(), RestoreError> {
        let vcpu = self.id();
        let error = |source| RestoreError::Vcpu { vcpu, source };
        let room = self.xsave_size();
        // A host with more extensions has a larger area, and the surplus is in its initial state,
        // all zeroes. A host with fewer can only take it if nothing is in the surplus.
        if saved.len() > room && saved[room..].iter().any(|b| *b != 0) {
            return Err(RestoreError::Xsave {
                vcpu,
                saved: saved.len(),
                room,
            });
        }
        let mut words = saved
            .chunks_exact(4)
            .map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]]));
        let mut area = Xsave::new((room - LEGACY) / 4)
            .map_err(|_| error(IoctlError::errno("an XSAVE area", libc::ENOMEM)))?;
        let mut region = kvm_xsave::default().region;
        region
            .iter_mut()
            .zip(&mut words)
            .for_each(|(to, from)| *to = from);
        area.as_mut_slice()
            .iter_mut()
            .zip(&mut words)
            .for_each(|(to, from)| *to = from);
        // SAFETY: only `region` is written, the length of the flexible array stays as it is.
        unsafe { area.as_mut_fam_struct().xsave.region = region };
        // SAFETY: KVM reads as much as KVM_CAP_XSAVE2 told, 4 KiB where there is none, and the area
        // has at least that. It checks the header of what it reads itself.
        unsafe { self.fd().set_xsave2(&area) }
            .named("KVM_SET_XSAVE")
            .map_err(error)
    }
}

fn to_bytes(region: &[u32], extra: &[u32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity((region.len() + extra.len()) * 4);
    for word in region.iter().chain(extra) {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes
}
