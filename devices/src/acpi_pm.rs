//! The fixed ACPI hardware that a machine needs to be switched off: the PM1a event and control
//! registers of the ACPI specification 6.5, 4.8.3.
//!
//! | offset | register | bits kept |
//! |---|---|---|
//! | 0 | PM1_STS, cleared by writing ones | 8: the power button was pressed |
//! | 2 | PM1_EN | 8: an interrupt for it |
//! | 4 | PM1_CNT | 0: SCI_EN, always 1; 10–12: SLP_TYP; 13: SLP_EN, which enters that state |
//!
//! There is no PM timer, and no way to switch ACPI off: the SMI command port does not exist.

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::trigger::Trigger;

/// First port.
pub const ACPI_PM_BASE: u64 = 0x600;
/// Number of ports.
pub const ACPI_PM_LEN: u64 = 6;
/// Bytes of the event block: status and enable.
pub const ACPI_PM_EVENT_LEN: u8 = 4;
/// Bytes of the control block, which follows it.
pub const ACPI_PM_CONTROL_LEN: u8 = 2;
/// The interrupt line of ACPI (the SCI), an edge for each event.
pub const ACPI_PM_IRQ: u32 = 9;
/// The value of SLP_TYP that stands for S5, off; the DSDT's `\_S5` says so.
pub const SLEEP_TYPE_OFF: u8 = 5;

const POWER_BUTTON: u16 = 1 << 8;
const SCI_ENABLED: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE: u16 = 7 << 10;

/// What has to travel of the registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiPmState {
    /// PM1_STS.
    pub status: u16,
    /// PM1_EN.
    pub enable: u16,
    /// PM1_CNT without SLP_EN, which is always 0 when read.
    pub control: u16,
}

/// The registers, with their interrupt and the power supply's switch.
pub struct AcpiPm {
    state: AcpiPmState,
    sci: Box<dyn Trigger>,
    power_off: Box<dyn Trigger>,
}

impl AcpiPm {
    /// The registers after reset. `sci` is poked for each event, `power_off` when the guest
    /// switches the machine off.
    #[must_use]
    pub fn new(sci: Box<dyn Trigger>, power_off: Box<dyn Trigger>) -> Self {
        Self {
            state: AcpiPmState::default(),
            sci,
            power_off,
        }
    }

    /// Presses the power button. The guest decides what that does.
    ///
    /// # Errors
    /// The interrupt could not be raised.
    pub fn press_power_button(&mut self) -> std::io::Result<()> {
        self.state.status |= POWER_BUTTON;
        self.interrupt()
    }

    /// The state to carry to another host.
    #[must_use]
    pub fn save(&self) -> AcpiPmState {
        self.state
    }

    /// Takes over a state saved elsewhere. An event that the guest has not seen yet is raised
    /// again: one interrupt too many finds no status, and drivers expect that.
    ///
    /// # Errors
    /// The interrupt could not be raised.
    pub fn restore(&mut self, state: &AcpiPmState) -> std::io::Result<()> {
        self.state = AcpiPmState {
            status: state.status & POWER_BUTTON,
            enable: state.enable,
            control: state.control & !SLEEP_ENABLE,
        };
        self.interrupt()
    }

    fn interrupt(&self) -> std::io::Result<()> {
        if self.state.status & self.state.enable == 0 {
            return Ok(());
        }
        self.sci.trigger()
    }

    fn register(&self, offset: u64) -> u16 {
        match offset / 2 {
            0 => self.state.status,
            1 => self.state.enable,
            _ => self.state.control | SCI_ENABLED,
        }
    }

    /// Writes the bits of `mask`, those of one byte.
    fn set(&mut self, offset: u64, value: u16, mask: u16) {
        let state = &mut self.state;
        match offset / 2 {
            0 => state.status &= !(value & mask),
            1 => state.enable = state.enable & !mask | value & mask,
            _ => {
                state.control = (state.control & !mask | value & mask) & !SLEEP_ENABLE;
                let off = state.control & SLEEP_TYPE == u16::from(SLEEP_TYPE_OFF) << 10;
                if value & mask & SLEEP_ENABLE != 0 && off {
                    // A machine that cannot be told to end goes on; its guest says so and halts.
                    let _ = self.power_off.trigger();
                }
            }
        }
    }
}

impl BusDevice for AcpiPm {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.register(at).to_le_bytes()[usize::from(at % 2 == 1)];
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            let shift = if at % 2 == 1 { 8 } else { 0 };
            self.set(at, u16::from(*byte) << shift, 0xff << shift);
        }
        // Enabling an event that has happened already raises it. A lost interrupt is a
        // button press that the guest missed.
        let _ = self.interrupt();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Clone, Default)]
    struct Count(Arc<AtomicUsize>);
    impl Trigger for Count {
        fn trigger(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }
    impl Count {
        fn get(&self) -> usize {
            self.0.load(Ordering::SeqCst)
        }
    }

    fn device() -> (AcpiPm, Count, Count) {
        let (sci, off) = (Count::default(), Count::default());
        let device = AcpiPm::new(Box::new(sci.clone()), Box::new(off.clone()));
        (device, sci, off)
    }

    fn word(device: &mut AcpiPm, offset: u64) -> u16 {
        let mut data = [0; 2];
        device.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn only_s5_with_sleep_enable_switches_off_whatever_the_width() {
        let (mut device, _, off) = device();
        assert_eq!(word(&mut device, 4), 1, "ACPI is on from the start");
        device.write(4, &(5u16 << 10).to_le_bytes());
        device.write(4, &(1u16 << 10 | SLEEP_ENABLE).to_le_bytes());
        assert_eq!(off.get(), 0);
        device.write(4, &(5u16 << 10 | SLEEP_ENABLE).to_le_bytes());
        assert_eq!(off.get(), 1);
        device.write(5, &[0x34]);
        assert_eq!(off.get(), 2, "by its upper byte alone");
        assert_eq!(word(&mut device, 4), 5 << 10 | 1, "SLP_EN reads as 0");
    }

    #[test]
    fn the_button_interrupts_where_it_is_enabled_and_is_cleared_by_a_one() {
        let (mut device, sci, _) = device();
        device.press_power_button().unwrap();
        assert_eq!(sci.get(), 0);
        device.write(2, &[0, 1]);
        assert_eq!(sci.get(), 1, "pending when it is enabled");
        let (mut other, elsewhere, _) = self::device();
        other.restore(&device.save()).unwrap();
        assert_eq!(elsewhere.get(), 1, "raised again at the destination");
        assert_eq!(other.save(), device.save());
        device.write(0, &[0, 1]);
        assert_eq!((word(&mut device, 0), sci.get()), (0, 1));
        device.press_power_button().unwrap();
        assert_eq!(sci.get(), 2);
    }
}
