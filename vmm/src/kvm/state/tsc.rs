//! The guest's time stamp counter across a move, by Linux's
//! `Documentation/virt/kvm/devices/vcpu.rst`, section 4.1.
//!
//! ```text
//!  guest's TSC of vCPU i = S + offset[i]     S: the host's TSC, scaled to the guest's frequency
//! ```
//!
//! A saved TSC is that of the instant at which the VM's clock was read, S + offset[i], on all vCPUs.
//! At the destination the clock is set first, and says by how much it has gone on since: by the time
//! of the move, or by nothing where it stood still (a snapshot). The TSC goes on by the same time:
//!
//! ```text
//!  offset[i] = saved[i] + ticks(clock here - saved clock) - S here
//! ```
//!
//! So what passed is in either exactly once. S is what KVM_GET_CLOCK tells; where the TSC is
//! scaled, or KVM does not tell, it is measured by a reading of the first vCPU's TSC between two of
//! the clock. A KVM without offsets (KVM_VCPU_TSC_OFFSET, Linux 5.16) gets the value itself, and
//! guesses which vCPUs belong together. IA32_TSC_ADJUST counts what the guest wrote, and neither
//! way changes it. The deadline is a value of the guest's TSC and stays.
//!
//! A source without offsets, or of an older version, reads one TSC after the other, so saved TSCs
//! are apart although the vCPUs have one offset. Without what the guest wrote, counters less than a
//! second apart are one counter, which is KVM's own rule:
//!
//! ```text
//!  |(saved[i] - adjust[i]) - (saved[0] - adjust[0])| < 1 s:  saved[i] = saved[0] - adjust[0] + adjust[i]
//! ```

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Msrs, kvm_clock_data,
    kvm_device_attr, kvm_msr_entry,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::msrs::{IA32_TSC, IA32_TSC_ADJUST, IA32_TSC_DEADLINE};
use super::{RestoreError, SkippedMsr, VcpuState, VmState};
use crate::kvm::error::IoctlError;
use crate::kvm::vcpu::Vcpu;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kvm_device_attr);

/// So often S is measured; the quickest reading is the best one.
const READINGS: usize = 5;

/// An instant here, seen by a VM whose clock is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moment {
    /// How far the VM's clock has gone on since it was saved, in nanoseconds.
    since_ns: u64,
    /// What the offsets are added to; `None` where KVM has no offsets.
    scaled: Option<u64>,
}

impl Moment {
    /// What the TSC that was saved is by now.
    fn tsc(&self, saved: u64, khz: u32) -> u64 {
        saved.wrapping_add(ticks(self.since_ns, khz))
    }
}

/// Ticks of a TSC in so many nanoseconds. KVM's counter wraps, and so does this.
fn ticks(ns: u64, khz: u32) -> u64 {
    let ticks = u128::from(ns) * u128::from(khz) / 1_000_000;
    u64::try_from(ticks & u128::from(u64::MAX)).unwrap_or(0)
}

/// S at the instant of `clock`, by the first vCPU's TSC that was read between two readings of the
/// clock, `before` and `after`.
fn measured(clock: u64, (before, after): (u64, u64), tsc: u64, offset: u64, khz: u32) -> u64 {
    let read_at = before + after.saturating_sub(before) / 2;
    let since = ticks(read_at.saturating_sub(clock), khz);
    tsc.wrapping_sub(offset).wrapping_sub(since)
}

/// A vCPU's TSC, read between two readings of the VM's clock.
#[derive(Debug, Clone, Copy)]
struct Reading {
    between: (u64, u64),
    tsc: u64,
}

impl Reading {
    fn took(&self) -> u64 {
        let (before, after) = self.between;
        after.saturating_sub(before)
    }
}

/// A vCPU's TSC in a saved state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SavedTsc {
    value: u64,
    /// IA32_TSC_ADJUST: the part of it that the guest wrote.
    adjust: u64,
}

impl SavedTsc {
    fn of(state: &VcpuState) -> Option<Self> {
        Some(Self {
            value: state.tsc()?,
            adjust: state.msr(IA32_TSC_ADJUST).unwrap_or(0),
        })
    }

    /// The value at the instant at which the first vCPU's was read, if the two are one counter.
    fn at_reading_of(self, first: Self, khz: u32) -> u64 {
        let unadjusted = |tsc: Self| tsc.value.wrapping_sub(tsc.adjust);
        let apart = unadjusted(self).wrapping_sub(unadjusted(first));
        if apart.cast_signed().unsigned_abs() < ticks(1_000_000_000, khz) {
            self.value.wrapping_sub(apart)
        } else {
            self.value
        }
    }
}

impl Vcpu {
    /// S at the instant of the clock in a saved state, by this first vCPU, for
    /// [`note_tsc`](Self::note_tsc). Where there is none, TSCs stay as they were read, within the
    /// same pause.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn scaled_tsc_at(&self, vm: &VmState) -> Result<Option<u64>, IoctlError> {
        match &vm.clock {
            Some(clock) => self.scaled_tsc(clock),
            None => Ok(None),
        }
    }

    /// Notes the TSC in a saved state as of the instant at which S was `scaled`.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn note_tsc(&self, state: &mut VcpuState, scaled: u64) -> Result<(), IoctlError> {
        if let Some(offset) = self.tsc_offset()? {
            state.set_tsc(scaled.wrapping_add(offset));
        }
        Ok(())
    }

    /// Now, by this first vCPU of a VM whose clock has just been restored from `saved`.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn moment(&self, saved: &VmState) -> Result<Moment, IoctlError> {
        let (now, saved) = match (self.vm().clock()?, &saved.clock) {
            (Some(now), Some(saved)) => (now, saved),
            _ => {
                return Ok(Moment {
                    since_ns: 0,
                    scaled: None,
                });
            }
        };
        Ok(Moment {
            since_ns: now.clock.saturating_sub(saved.clock),
            scaled: self.scaled_tsc(&now)?,
        })
    }

    /// Has the guest's TSC go on from a saved state, and arms its deadline: that is compared with
    /// the TSC at once. `first` is the first vCPU's saved state. The vCPU's other state must be in,
    /// the local APIC's mode above all. Returns what this KVM would not take.
    ///
    /// # Errors
    /// [`RestoreError`]; the vCPU must then not run.
    pub(crate) fn restore_tsc(
        &self,
        state: &VcpuState,
        first: &VcpuState,
        moment: &Moment,
    ) -> Result<Vec<SkippedMsr>, RestoreError> {
        let vcpu = self.id();
        let error = |source| RestoreError::Vcpu { vcpu, source };
        let khz = state.tsc_khz.or_else(|| self.tsc_khz()).unwrap_or(0);
        let saved = SavedTsc::of(state);
        let first = SavedTsc::of(first).or(saved);
        let saved = saved.zip(first);
        let saved = saved.map(|(own, first)| own.at_reading_of(first, khz));
        let tsc = saved.map(|saved| moment.tsc(saved, khz));
        let mut left = tsc.map(|tsc| (IA32_TSC, tsc));
        if let (Some(tsc), Some(scaled)) = (tsc, moment.scaled) {
            let offset = tsc.wrapping_sub(scaled);
            self.set_tsc_offset(offset).map_err(error)?;
            left = None;
        }
        let deadline = state.msr(IA32_TSC_DEADLINE);
        let deadline = deadline.map(|deadline| (IA32_TSC_DEADLINE, deadline));
        let written = left.into_iter().chain(deadline);
        self.write_msrs(written).map_err(error)
    }

    /// S at the instant of a reading of the clock; `None` where KVM has no offsets.
    fn scaled_tsc(&self, clock: &kvm_clock_data) -> Result<Option<u64>, IoctlError> {
        let (Some(offset), Some(khz)) = (self.tsc_offset()?, self.tsc_khz()) else {
            return Ok(None);
        };
        if clock.flags & KVM_CLOCK_HOST_TSC != 0 && self.host_tsc_khz() == Some(khz) {
            return Ok(Some(clock.host_tsc));
        }
        let mut best: Option<Reading> = None;
        for _ in 0..READINGS {
            let Some(reading) = self.read_tsc()? else {
                return Ok(None);
            };
            if best.is_none_or(|best| reading.took() < best.took()) {
                best = Some(reading);
            }
        }
        Ok(best.map(|best| measured(clock.clock, best.between, best.tsc, offset, khz)))
    }

    fn read_tsc(&self) -> Result<Option<Reading>, IoctlError> {
        let Some(before) = self.vm().clock()? else {
            return Ok(None);
        };
        let tsc = self.read_msrs(&[IA32_TSC])?;
        let (Some((_, tsc)), Some(after)) = (tsc.first(), self.vm().clock()?) else {
            return Ok(None);
        };
        Ok(Some(Reading {
            between: (before.clock, after.clock),
            tsc: *tsc,
        }))
    }

    fn tsc_offset(&self) -> Result<Option<u64>, IoctlError> {
        offset(self.fd())
    }

    fn set_tsc_offset(&self, value: u64) -> Result<(), IoctlError> {
        set_offset(self.fd(), value)
    }
}

/// Whether an offset changes what the guest reads: a software KVM takes one and lets the guest read
/// the host's own counter. Of a vCPU that no guest uses.
pub(in crate::kvm) fn offsets_work(vcpu: &VcpuFd) -> bool {
    /// An hour or so.
    const FAR: u64 = 1 << 43;
    let tsc = || {
        let entry = kvm_msr_entry {
            index: IA32_TSC,
            ..Default::default()
        };
        let mut msrs = Msrs::from_entries(&[entry]).ok()?;
        let read = vcpu.get_msrs(&mut msrs).ok()?;
        (read == 1).then(|| msrs.as_slice()[0].data)
    };
    let moved = || {
        let (before, value) = (tsc()?, offset(vcpu).ok()??);
        set_offset(vcpu, value.wrapping_add(FAR)).ok()?;
        let after = tsc()?;
        set_offset(vcpu, value).ok()?;
        Some(after.wrapping_sub(before) >= FAR)
    };
    moved().unwrap_or(false)
}

/// KVM_VCPU_TSC_OFFSET, where there is one.
fn offset(vcpu: &VcpuFd) -> Result<Option<u64>, IoctlError> {
    let mut offset = 0u64;
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: KVM reads the attribute, and not what its address points to.
    if unsafe { ioctl_with_ref(vcpu, KVM_HAS_DEVICE_ATTR(), &attribute) } < 0 {
        return Ok(None);
    }
    // SAFETY: KVM writes a u64 to the attribute's address, which is that of one that lives through
    // the call.
    if unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) } < 0 {
        return Err(IoctlError::last(
            "KVM_GET_DEVICE_ATTR (KVM_VCPU_TSC_OFFSET)",
        ));
    }
    Ok(Some(offset))
}

fn set_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), IoctlError> {
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: KVM reads a u64 from the attribute's address, which is that of one that lives through
    // the call.
    if unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) } < 0 {
        return Err(IoctlError::last(
            "KVM_SET_DEVICE_ATTR (KVM_VCPU_TSC_OFFSET)",
        ));
    }
    Ok(())
}

fn tsc_attribute(offset: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: u64::try_from(offset.expose_provenance()).unwrap_or(0),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests;
