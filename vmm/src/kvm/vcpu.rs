//! A vCPU: one KVM_RUN at a time, its exits as data.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use ferry_devices::bus::Bus;
use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_MMIO, KVM_EXIT_SET_TPR, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT,
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, KVMIO,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use super::error::{IoctlError, Named};
use super::kick::Kicker;
use super::run_page::RunPage;
use super::vm::{Vm, VmError};

ioctl_io_nr!(KVM_RUN, KVMIO, 0x80);

/// Why KVM_RUN came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmExit {
    /// An access to a device, done; or nothing to do. Run again.
    Handled,
    /// A kick (or another signal). No access of the guest is pending: see [`Vcpu::run`].
    Interrupted,
    /// The guest asked to be powered off.
    Shutdown,
    /// The guest triple-faulted.
    TripleFault,
    /// The guest asked for a reset.
    Reset,
    /// KVM cannot go on; a sentence.
    Failure(String),
}

/// A virtual CPU.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    page: Arc<RunPage>,
    kicker: Kicker,
    id: u32,
    /// Frequency of the TSC before a guest's was set, in kHz: the host's.
    host_tsc_khz: Option<u32>,
    /// The number of its dirty ring, where there are rings.
    ring: Option<usize>,
    pub(super) msrs: super::state::MsrList,
    // Last, so that it is dropped last: the guest's memory must outlive the vCPU.
    vm: Arc<Vm>,
}

impl Vcpu {
    pub(super) fn new(
        vm: Arc<Vm>,
        fd: VcpuFd,
        run_size: usize,
        id: u32,
        ring: Option<usize>,
    ) -> Result<Self, VmError> {
        let page = RunPage::map(fd.as_raw_fd(), run_size).map_err(|source| VmError::Io {
            what: "mapping a vCPU's run page",
            source,
        })?;
        let page = Arc::new(page);
        let kicker = Kicker::new(page.clone());
        let mut vcpu = Self {
            fd,
            page,
            kicker,
            id,
            host_tsc_khz: None,
            ring,
            msrs: super::state::MsrList::default(),
            vm,
        };
        vcpu.host_tsc_khz = vcpu.tsc_khz();
        Ok(vcpu)
    }

    /// The vCPU's number, which is its APIC id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// What stops it from another thread.
    #[must_use]
    pub fn kicker(&self) -> Kicker {
        self.kicker.clone()
    }

    /// The VM it belongs to.
    #[must_use]
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Frequency of the guest's TSC in kHz, where the host tells.
    #[must_use]
    pub fn tsc_khz(&self) -> Option<u32> {
        if !self.vm.capabilities().get_tsc_khz {
            return None;
        }
        self.fd.get_tsc_khz().ok().filter(|khz| *khz != 0)
    }

    /// What a guest's TSC runs at here unless it is scaled, in kHz.
    pub(super) const fn host_tsc_khz(&self) -> Option<u32> {
        self.host_tsc_khz
    }

    /// Runs guest code until KVM comes back once, and lets the buses answer if it was for a device.
    ///
    /// An access to a device is only complete in KVM when KVM_RUN is entered again: for `in` and
    /// loads that is when the data reaches the guest's register and RIP moves on. So after
    /// [`VmExit::Handled`] the state of the vCPU is not its architectural state yet.
    /// [`VmExit::Interrupted`] tells that it is: KVM completes what is pending before it looks at
    /// `immediate_exit` or at signals. Hence the way to stop is to kick and to go on calling `run`
    /// until it says so, and no access is lost or done twice.
    pub fn run(&mut self, pio: &Bus, mmio: &Bus) -> VmExit {
        // SAFETY: KVM_RUN takes no argument; the descriptor is our vCPU's, and `vm` (so its RAM) is
        // alive. Guest code writes to guest RAM only, to which Rust holds no references.
        let r = unsafe { ioctl(&self.fd, KVM_RUN()) };
        if r < 0 {
            return self.run_error(&io::Error::last_os_error());
        }
        // SAFETY: the page is mapped, and the kernel wrote the field before KVM_RUN returned.
        let reason = unsafe { (*self.page.get()).exit_reason };
        match reason {
            KVM_EXIT_IO => self.port_io(pio),
            KVM_EXIT_MMIO => self.mmio(mmio),
            KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN | KVM_EXIT_SET_TPR => VmExit::Handled,
            KVM_EXIT_DIRTY_RING_FULL => self.dirty_ring_full(),
            KVM_EXIT_SHUTDOWN => VmExit::TripleFault,
            KVM_EXIT_SYSTEM_EVENT => self.system_event(),
            KVM_EXIT_INTERNAL_ERROR => self.internal_error(),
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: this member of the union is the one that the exit reason names.
                let fail = unsafe { (*self.page.get()).__bindgen_anon_1.fail_entry };
                self.failure(&format!(
                    "the processor refused to enter the guest (hardware reason {:#x} on CPU {})",
                    fail.hardware_entry_failure_reason, fail.cpu
                ))
            }
            // The in-kernel APIC handles HLT; user space sees it only if there is none.
            KVM_EXIT_HLT => self.failure("KVM handed a HLT to user space although it has the APIC"),
            other => self.failure(&format!(
                "KVM stopped with an exit that ferry does not know ({other})"
            )),
        }
    }

    fn run_error(&self, error: &io::Error) -> VmExit {
        match error.raw_os_error() {
            Some(libc::EINTR) => VmExit::Interrupted,
            // A vCPU that waited for INIT or SIPI and got it: enter again.
            Some(libc::EAGAIN) => VmExit::Handled,
            Some(libc::EFAULT | libc::EHWPOISON) => {
                // SAFETY: the page is mapped; the union's member is only read when the reason names
                // it.
                let place = unsafe {
                    let run = self.page.get();
                    ((*run).exit_reason == KVM_EXIT_MEMORY_FAULT)
                        .then(|| (*run).__bindgen_anon_1.memory_fault.gpa)
                };
                let place =
                    place.map_or(String::new(), |gpa| format!(" at guest address {gpa:#x}"));
                self.failure(&format!(
                    "the host could not provide guest memory{place} ({error})"
                ))
            }
            _ => self.failure(&format!("KVM_RUN failed: {error}")),
        }
    }

    fn port_io(&self, bus: &Bus) -> VmExit {
        // SAFETY: this member of the union is the one that the exit reason names.
        let io = unsafe { (*self.page.get()).__bindgen_anon_1.io };
        let size = usize::from(io.size);
        let data = usize::try_from(io.count)
            .ok()
            .and_then(|count| count.checked_mul(size))
            .and_then(|len| self.page.data(io.data_offset, len));
        let Some(data) = data.filter(|_| size > 0) else {
            return self.failure("KVM described a port access that lies outside its own page");
        };
        // SAFETY: the bytes are inside the mapping. Until the next KVM_RUN, which takes
        // `&mut self`, the kernel leaves them alone and no other thread has a pointer to them.
        let data = unsafe { &mut *data };
        // INS and OUTS come in a batch: that many accesses to the same port.
        for access in data.chunks_exact_mut(size) {
            if u32::from(io.direction) == KVM_EXIT_IO_IN {
                bus.read(io.port.into(), access);
            } else {
                bus.write(io.port.into(), access);
            }
        }
        VmExit::Handled
    }

    fn mmio(&self, bus: &Bus) -> VmExit {
        // SAFETY: this member of the union is the one that the exit reason names; a copy is taken.
        let mut mmio = unsafe { (*self.page.get()).__bindgen_anon_1.mmio };
        let len = usize::try_from(mmio.len).unwrap_or(usize::MAX);
        let Some(data) = mmio.data.get_mut(..len) else {
            return self.failure("KVM described a memory access of more than 8 bytes");
        };
        if mmio.is_write != 0 {
            bus.write(mmio.phys_addr, data);
        } else {
            bus.read(mmio.phys_addr, data);
            // SAFETY: the same member as above; only this thread touches it between two KVM_RUNs.
            unsafe { (*self.page.get()).__bindgen_anon_1.mmio.data = mmio.data };
        }
        VmExit::Handled
    }

    /// Nothing of the guest's is pending in this exit: KVM leaves before it enters the guest.
    fn dirty_ring_full(&self) -> VmExit {
        let Some((rings, ring)) = self.vm.dirty_rings().zip(self.ring) else {
            return self.failure("KVM reported a full dirty ring where there is none");
        };
        match rings.make_room(&self.vm, ring) {
            Ok(()) => VmExit::Handled,
            Err(error) => self.failure(&format!(
                "its dirty ring is full and could not be emptied ({error})"
            )),
        }
    }

    fn system_event(&self) -> VmExit {
        // SAFETY: this member of the union is the one that the exit reason names.
        let kind = unsafe { (*self.page.get()).__bindgen_anon_1.system_event.type_ };
        match kind {
            KVM_SYSTEM_EVENT_SHUTDOWN => VmExit::Shutdown,
            KVM_SYSTEM_EVENT_RESET => VmExit::Reset,
            other => self.failure(&format!(
                "the guest reported a crash (system event {other})"
            )),
        }
    }

    fn internal_error(&self) -> VmExit {
        // SAFETY: this member of the union is the one that the exit reason names.
        let error = unsafe { (*self.page.get()).__bindgen_anon_1.internal };
        if error.suberror == KVM_INTERNAL_ERROR_EMULATION {
            // SAFETY: for this suberror the union holds an emulation_failure, whose fields past
            // `ndata` are valid where `flags` says so.
            let failed = unsafe { (*self.page.get()).__bindgen_anon_1.emulation_failure };
            let mut bytes = String::new();
            if failed.ndata >= 3
                && failed.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES)
                    != 0
            {
                // SAFETY: the flag says that this member is filled in.
                let insn = unsafe { failed.__bindgen_anon_1.__bindgen_anon_1 };
                let n = usize::from(insn.insn_size).min(insn.insn_bytes.len());
                for b in &insn.insn_bytes[..n] {
                    bytes += &format!(" {b:02x}");
                }
            }
            let bytes = if bytes.is_empty() {
                " unknown".to_owned()
            } else {
                bytes
            };
            return self.failure(&format!(
                "KVM could not emulate an instruction (bytes:{bytes})"
            ));
        }
        let n = usize::try_from(error.ndata)
            .unwrap_or(0)
            .min(error.data.len());
        self.failure(&format!(
            "KVM met an internal error (suberror {}, data {:#x?})",
            error.suberror,
            &error.data[..n]
        ))
    }

    /// A sentence that says which vCPU it was and where it stood.
    fn failure(&self, what: &str) -> VmExit {
        let place = match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(regs), Ok(sregs)) => format!(
                "rip {:#x}, cs {:#x}, cr0 {:#x}, cr3 {:#x}",
                regs.rip, sregs.cs.selector, sregs.cr0, sregs.cr3
            ),
            _ => "registers unknown".to_owned(),
        };
        VmExit::Failure(format!("vCPU {}: {what}; {place}", self.id))
    }

    /// Tells the guest's clock that it was paused, so that its watchdogs do not count the gap
    /// (KVM_KVMCLOCK_CTRL). A guest without kvmclock has nothing to be told.
    pub fn clock_was_paused(&self) {
        if self.vm.capabilities().kvmclock_ctrl {
            let _ = self.fd.kvmclock_ctrl();
        }
    }

    pub(super) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// The general registers as they are; the vCPU must be stopped to be meaningful.
    ///
    /// # Errors
    /// The kernel's.
    pub fn regs(&self) -> Result<kvm_bindings::kvm_regs, IoctlError> {
        self.fd.get_regs().named("KVM_GET_REGS")
    }
}
