//! Puts a boot protocol's entry state into the boot processor.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment};

use super::error::{IoctlError, Named};
use super::vcpu::Vcpu;
use crate::boot::{Entry, Gdt};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set; interrupts are off.
const RFLAGS: u64 = 2;

/// Segment types (Intel SDM vol. 3A, 3.4.5.1 and 3.5).
const CODE_EXEC_READ_ACCESSED: u8 = 0xb;
const DATA_READ_WRITE_ACCESSED: u8 = 0x3;
const TSS_BUSY: u8 = 0xb;

impl Vcpu {
    /// Makes the vCPU start at `entry` when it next runs.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_entry(&self, entry: &Entry) -> Result<(), IoctlError> {
        let mut sregs = self.fd().get_sregs().named("KVM_GET_SREGS")?;
        let mut regs = kvm_regs {
            rflags: RFLAGS,
            ..Default::default()
        };
        let (long, gdt) = match *entry {
            Entry::Protected32 { eip, ebx, gdt } => {
                regs.rip = eip.into();
                regs.rbx = ebx.into();
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr3 = 0;
                sregs.cr4 = 0;
                sregs.efer = 0;
                (false, gdt)
            }
            Entry::Long64 {
                rip,
                rsi,
                rsp,
                cr3,
                gdt,
            } => {
                regs.rip = rip;
                regs.rsi = rsi;
                regs.rsp = rsp;
                sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
                sregs.cr3 = cr3;
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME | EFER_LMA;
                (true, gdt)
            }
        };
        sregs.cs = segment(Gdt::CODE, CODE_EXEC_READ_ACCESSED, long);
        let data = segment(Gdt::DATA, DATA_READ_WRITE_ACCESSED, false);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        // A task register that VM entry accepts; both protocols leave its use to the guest.
        sregs.tr = kvm_segment {
            limit: 0x67,
            selector: Gdt::TSS,
            type_: TSS_BUSY,
            present: 1,
            ..Default::default()
        };
        sregs.gdt = kvm_dtable {
            base: gdt.base,
            limit: gdt.limit,
            ..Default::default()
        };
        // No IDT: an exception before the guest has its own is a triple fault, as it should be.
        sregs.idt = kvm_dtable {
            base: 0,
            limit: 0,
            ..Default::default()
        };
        self.fd().set_sregs(&sregs).named("KVM_SET_SREGS")?;
        self.fd().set_regs(&regs).named("KVM_SET_REGS")
    }
}

/// A flat 4 GiB segment; `long` makes it 64-bit code.
fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        l: long.into(),
        db: (!long).into(),
        ..Default::default()
    }
}
