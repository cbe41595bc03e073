use std::io;

use ferry_devices::Trigger;
use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE};
use vmm_sys_util::eventfd::EventFd;

use super::error::{IoctlError, Named};
use super::vm::Vm;

/// The mask bit of an IOAPIC's redirection entry.
const MASKED: u64 = 1 << 16;
/// The 8259's first vector is set by its driver; below are the processor's exceptions.
const FIRST_VECTOR: u8 = 32;
/// The master's input that the second 8259 is at.
const CASCADE: u32 = 2;

/// An interrupt line of the in-kernel controller, raised through an irqfd: an edge for each
/// trigger.
///
/// The kernel injects from a work queue, so an edge may still be on its way when the triggering
/// vCPU stops; devices raise what is pending again when they are restored.
#[derive(Debug)]
pub struct IrqLine(pub(super) EventFd);

impl IrqLine {
    /// Another handle on the same line.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }
}

impl Trigger for IrqLine {
    fn trigger(&self) -> io::Result<()> {
        match self.0.write(1) {
            // The counter is full: edges are pending already, and one more would merge with them.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}

impl Vm {
    /// Raises an edge on a line of the second 8259 (8 to 15), and of the IOAPIC, where a driver has
    /// unmasked it. A guest that never asked for this interrupt may have no handler. It has got to
    /// the local APIC when this returns. Whether it was raised.
    ///
    /// # Errors
    /// The kernel's.
    pub fn raise_if_heard(&self, gsi: u32) -> Result<bool, IoctlError> {
        if !self.hears(gsi)? {
            return Ok(false);
        }
        for level in [true, false] {
            self.fd().set_irq_line(gsi, level).named("KVM_IRQ_LINE")?;
        }
        Ok(true)
    }

    fn hears(&self, gsi: u32) -> Result<bool, IoctlError> {
        let pic = |id| {
            let chip = self.irqchip(id)?;
            // SAFETY: KVM fills in the member that the id asks for, and both of its values are
            // plain bytes.
            Ok(unsafe { chip.chip.pic })
        };
        let io_apic = self.irqchip(KVM_IRQCHIP_IOAPIC)?;
        let line = usize::try_from(gsi).unwrap_or(usize::MAX);
        // SAFETY: as above; an entry is a number of 64 bits by either of its members.
        let entry = unsafe { io_apic.chip.ioapic.redirtbl.get(line).map(|e| e.bits) };
        if entry.is_some_and(|bits| bits & MASKED == 0) {
            return Ok(true);
        }
        let (master, slave) = (pic(KVM_IRQCHIP_PIC_MASTER)?, pic(KVM_IRQCHIP_PIC_SLAVE)?);
        let open = |mask: u8, input: u32| u32::from(mask) & 1 << input == 0;
        Ok(slave.irq_base >= FIRST_VECTOR && open(master.imr, CASCADE) && open(slave.imr, gsi % 8))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use kvm_bindings::kvm_irqchip;

    use super::*;
    use crate::kvm::Host;
    use crate::memory::{Backing, GuestRam};

    const LINE: u32 = 15;
    const VECTOR: u8 = 0x51;

    /// Whether the local APIC has an interrupt of the vector, not yet delivered.
    fn requested(vcpu: &crate::kvm::Vcpu) -> bool {
        let lapic = vcpu.fd().get_lapic().unwrap();
        // The requests begin at 0x200, 32 of them every 16 bytes.
        let at = 0x200 + usize::from(VECTOR / 32) * 0x10 + usize::from(VECTOR % 32 / 8);
        lapic.regs[at].to_le_bytes()[0] & 1 << (VECTOR % 8) != 0
    }

    #[test]
    fn only_a_line_that_a_driver_has_unmasked_is_raised() {
        let Ok(host) = Host::open() else {
            eprintln!("NOT RUN: only_a_line_that_a_driver_has_unmasked_is_raised: no KVM");
            return;
        };
        let ram = Arc::new(GuestRam::new(1 << 20, Backing::Small).unwrap());
        let vm = Arc::new(Vm::new(&host, ram).unwrap());
        let cpuid = host.guest_cpuid().unwrap();
        let vcpu = vm.create_vcpu(0, 1, &cpuid).unwrap();
        // After reset the 8259s mask nothing, and would give the vectors of exceptions.
        assert!(!vm.raise_if_heard(LINE).unwrap());

        // Enabled by its spurious vector register.
        let mut lapic = vcpu.fd().get_lapic().unwrap();
        lapic.regs[0xf0] = -1;
        lapic.regs[0xf1] = 1;
        vcpu.fd().set_lapic(&lapic).unwrap();
        let set_io_apic = |masked: bool| {
            let mut chip = vm.irqchip(KVM_IRQCHIP_IOAPIC).unwrap();
            // SAFETY: KVM filled in the member that the id asks for.
            let mut io_apic = unsafe { chip.chip.ioapic };
            io_apic.redirtbl[15].bits = u64::from(VECTOR) | if masked { MASKED } else { 0 };
            chip.chip.ioapic = io_apic;
            vm.fd().set_irqchip(&chip).unwrap();
        };
        for (masked, raised) in [(true, false), (false, true)] {
            set_io_apic(masked);
            assert_eq!(vm.raise_if_heard(LINE).unwrap(), raised);
            assert_eq!(requested(&vcpu), raised);
        }
        set_io_apic(true);

        // A kernel without the IOAPIC: (first vector, the master's mask, the other's).
        let set = |id, base: u8, mask: u8| {
            let mut chip: kvm_irqchip = vm.irqchip(id).unwrap();
            // SAFETY: KVM filled in the member that the id asks for.
            let mut pic = unsafe { chip.chip.pic };
            (pic.irq_base, pic.imr) = (base, mask);
            chip.chip.pic = pic;
            vm.fd().set_irqchip(&chip).unwrap();
        };
        for (base, master, slave, heard) in [
            (0x28, 0, 0, true),
            (0x28, 0xff, 0, false),
            (0x28, 0xfb, 0x7f, true),
            (0x28, 0xfb, 0x80, false),
            (0x08, 0, 0, false),
        ] {
            set(KVM_IRQCHIP_PIC_MASTER, base, master);
            set(KVM_IRQCHIP_PIC_SLAVE, base, slave);
            assert_eq!(
                vm.hears(LINE).unwrap(),
                heard,
                "{base:#x} {master:#x} {slave:#x}"
            );
        }
    }
}
