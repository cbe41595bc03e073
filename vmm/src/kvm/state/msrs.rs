//! Model-specific registers.
//!
//! KVM tells which it keeps (KVM_GET_MSR_INDEX_LIST), but the list is of the host, not of the
//! guest's CPU: some of it cannot be read for this guest, and more of it reads but cannot be
//! written. Of the list those are carried that ferry [knows](super::known). Both KVM_GET_MSRS and
//! KVM_SET_MSRS stop at the first they do not like and return how far they came, so the rest is
//! tried after skipping that one, which is remembered.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};

use super::known::{self, Kind};
use crate::kvm::error::{IoctlError, Named};
use crate::kvm::vcpu::Vcpu;

/// The most MSRs a saved vCPU may have; KVM's list has about a hundred.
pub const MAX_MSRS: usize = 512;

pub(super) const IA32_TSC: u32 = 0x10;
pub(super) const IA32_TSC_ADJUST: u32 = 0x3b;
pub(super) const IA32_TSC_DEADLINE: u32 = 0x6e0;
pub(in crate::kvm) const IA32_ARCH_CAPABILITIES: u32 = 0x10a;

/// The MSRs that this vCPU lets itself be read; found out once, so that saving, which happens in
/// the guest's pause, is one ioctl for each 256 of them.
#[derive(Debug, Default)]
pub struct MsrList(Vec<u32>);

/// An MSR whose saved value KVM would not take, and which has another value now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SkippedMsr {
    /// Number of the vCPU.
    pub vcpu: u32,
    /// Index of the MSR.
    pub index: u32,
    /// The value that was saved.
    pub saved: u64,
    /// The value it has instead, if it can be read at all.
    pub present: Option<u64>,
}

impl SkippedMsr {
    /// Its name, or that of the group of registers that it is of.
    #[must_use]
    pub fn name(&self) -> &'static str {
        known::name(self.index).unwrap_or("unknown")
    }
}

/// The first MSR of a saved state that ferry does not know.
pub(super) fn first_unknown(saved: &[(u32, u64)]) -> Option<u32> {
    let mut indices = saved.iter().map(|(index, _)| *index);
    indices.find(|index| known::kind(*index).is_none())
}

impl Vcpu {
    /// Finds out which MSRs of `candidates` ferry carries and KVM lets be read.
    pub(in crate::kvm) fn probe_msrs(&mut self, candidates: &[u32]) -> Result<(), IoctlError> {
        let carried = |index: &u32| {
            let kind = known::kind(*index);
            if kind.is_none() {
                tracing::debug!(
                    index = format!("{index:#x}"),
                    "KVM keeps an MSR that ferry does not know"
                );
            }
            matches!(kind, Some(Kind::State | Kind::Description))
        };
        let carried: Vec<u32> = candidates.iter().copied().filter(carried).collect();
        let readable = self.read_msrs(&carried)?;
        self.msrs = MsrList(readable.into_iter().map(|(index, _)| index).collect());
        Ok(())
    }

    /// IA32_ARCH_CAPABILITIES as the guest reads it; `None` where this KVM has no such register.
    #[must_use]
    pub fn arch_capabilities(&self) -> Option<u64> {
        let values = self.read_msrs(&[IA32_ARCH_CAPABILITIES]).ok()?;
        values.first().map(|(_, value)| *value)
    }

    /// Has the guest read `value` as IA32_ARCH_CAPABILITIES.
    ///
    /// # Errors
    /// KVM does not take it.
    pub fn set_arch_capabilities(&self, value: u64) -> Result<(), IoctlError> {
        let entry = kvm_msr_entry {
            index: IA32_ARCH_CAPABILITIES,
            data: value,
            ..Default::default()
        };
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| too_many())?;
        match self.fd().set_msrs(&msrs).named("KVM_SET_MSRS")? {
            0 => Err(IoctlError::errno(
                "KVM_SET_MSRS (IA32_ARCH_CAPABILITIES)",
                libc::EINVAL,
            )),
            _ => Ok(()),
        }
    }

    pub(super) fn save_msrs(&self) -> Result<Vec<(u32, u64)>, IoctlError> {
        self.read_msrs(&self.msrs.0)
    }

    /// Reads those that can be read, in the order given.
    pub(super) fn read_msrs(&self, indices: &[u32]) -> Result<Vec<(u32, u64)>, IoctlError> {
        let mut values = Vec::with_capacity(indices.len());
        let mut rest = indices;
        while !rest.is_empty() {
            let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
            let mut msrs = request(batch)?;
            let n = self
                .fd()
                .get_msrs(&mut msrs)
                .named("KVM_GET_MSRS")?
                .min(batch.len());
            values.extend(msrs.as_slice()[..n].iter().map(|e| (e.index, e.data)));
            // The one that stopped it is skipped.
            let done = if n < batch.len() { n + 1 } else { n };
            rest = &rest[done..];
        }
        Ok(values)
    }

    /// Writes the MSRs but the time stamp counter and its deadline, which
    /// [`restore_tsc`](Self::restore_tsc) does. Returns what could not be written and matters.
    ///
    /// The wall clock is left out. It is a request rather than a state: a guest writes the register
    /// each time that it wants to know. And nothing may be written into guest memory here, which
    /// may still belong to the guest at its source.
    pub(super) fn restore_msrs(&self, saved: &[(u32, u64)]) -> Result<Vec<SkippedMsr>, IoctlError> {
        let written = |index| {
            !matches!(index, IA32_TSC | IA32_TSC_DEADLINE)
                && matches!(known::kind(index), Some(Kind::State | Kind::Description))
        };
        let states = saved.iter().copied().filter(|(i, _)| written(*i));
        self.write_msrs(states)
    }

    /// Writes those, in this order. Returns what could not be written and is not so anyway.
    pub(super) fn write_msrs(
        &self,
        values: impl Iterator<Item = (u32, u64)>,
    ) -> Result<Vec<SkippedMsr>, IoctlError> {
        let entry = |(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let entries: Vec<kvm_msr_entry> = values.map(entry).collect();
        let mut refused = Vec::new();
        let mut rest = entries.as_slice();
        while !rest.is_empty() {
            let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
            let msrs = Msrs::from_entries(batch).map_err(|_| too_many())?;
            let n = self
                .fd()
                .set_msrs(&msrs)
                .named("KVM_SET_MSRS")?
                .min(batch.len());
            let mut done = n;
            if n < batch.len() {
                refused.push(batch[n]);
                done += 1;
            }
            rest = &rest[done..];
        }
        self.differing(&refused)
    }

    /// Read-only MSRs are in KVM's list too; those that hold the saved value anyway are not missed.
    fn differing(&self, refused: &[kvm_msr_entry]) -> Result<Vec<SkippedMsr>, IoctlError> {
        let indices: Vec<u32> = refused.iter().map(|e| e.index).collect();
        let present = self.read_msrs(&indices)?;
        Ok(refused
            .iter()
            .map(|wanted| SkippedMsr {
                vcpu: self.id(),
                index: wanted.index,
                saved: wanted.data,
                present: present
                    .iter()
                    .find(|(i, _)| *i == wanted.index)
                    .map(|(_, v)| *v),
            })
            .filter(|s| s.present != Some(s.saved))
            .collect())
    }
}

fn request(indices: &[u32]) -> Result<Msrs, IoctlError> {
    let entries: Vec<kvm_msr_entry> = indices
        .iter()
        .map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries).map_err(|_| too_many())
}

fn too_many() -> IoctlError {
    IoctlError::errno("a list of MSRs", libc::E2BIG)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_msr_that_is_not_known_is_found_by_name() {
        assert_eq!(first_unknown(&[(IA32_TSC, 1), (0x6, 2), (0x7, 3)]), Some(6));
        assert_eq!(first_unknown(&[(IA32_TSC, 1), (0x4b56_4d00, 2)]), None);
    }
}
