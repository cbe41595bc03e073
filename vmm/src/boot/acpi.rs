//! ACPI tables: how an unmodified kernel finds processors, interrupt controllers, the serial port,
//! virtio devices, the VM generation id, VMClock, NUMA nodes, and the way to switch the machine
//! off. ACPI specification 6.5, chapter 5.
//!
//! ```text
//! RSDP ─▶ XSDT ─┬▶ FADT ─┬▶ DSDT   serial port, virtio devices, generation id, VMClock, \_S5
//!               │        └▶ FACS
//!               ├▶ MADT            local APICs, IOAPIC
//!               └▶ SRAT, SLIT      which processors and memory are a node, and distances
//! ```
//!
//! All lie one after the other from [`TABLES`] on, where a kernel that was not told where to look
//! finds them too.

mod nodes;

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Else, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify,
    Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use ferry_devices::acpi_pm::{
    ACPI_PM_BASE, ACPI_PM_CONTROL_LEN, ACPI_PM_EVENT_LEN, ACPI_PM_IRQ, SLEEP_TYPE_OFF,
};
use ferry_devices::i8042::I8042_BASE;
use ferry_devices::serial::{COM1_BASE, COM1_IRQ, COM1_LEN};

use super::mmio_device::MmioDevice;
use super::vmclock::VMCLOCK_BYTES;
use super::{GENERATION_GSI, GENERATION_ID, Platform, VMCLOCK_GSI, VMCLOCK_PAGE};
use crate::memory::RamLayout;

/// Where the tables are.
pub(super) const TABLES: u64 = 0xe_0000;

const OEM: [u8; 6] = *b"FERRY ";
const OEM_TABLE: [u8; 8] = *b"FERRYVMM";
const OEM_REVISION: u32 = 1;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
/// The keyboard controller's command port, and the command that resets the machine.
const RESET_PORT: u64 = I8042_BASE + 4;
const RESET_COMMAND: u8 = 0xfe;

/// FADT IA-PC boot flags: there is no VGA, and no CMOS clock.
const BOOT_FLAGS: u16 = 1 << 2 | 1 << 5;
/// The notification of a generation id, or of a VMClock, that has changed.
const CHANGED: u8 = 0x80;
/// MADT: there are 8259s beside the APICs.
const PC_AT_COMPATIBLE: u32 = 1;
/// MADT: active high, an edge (ACPI 6.5, table 5.26).
const EDGE_HIGH: u16 = 1 | 1 << 2;

/// The tables, to be put at [`TABLES`].
pub(super) fn tables(platform: &Platform, ram: &RamLayout) -> Vec<u8> {
    // The root comes first and is written last.
    let mut all = Tables(vec![0; Rsdp::len()]);
    // The FACS must be aligned to 64 bytes.
    let facs = all.put(&FACS::new());
    let dsdt = all.put(&dsdt(platform));
    let fadt = all.put(&fadt(facs, dsdt).finalize());
    let madt = all.put(&madt(platform.cpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if let Some(topology) = &platform.numa {
        xsdt.add_entry(all.put(&nodes::srat(topology, ram)));
        xsdt.add_entry(all.put(&nodes::slit(topology)));
    }
    let xsdt = all.put(&xsdt);
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    all.0[..root.len()].copy_from_slice(&root);
    all.0
}

struct Tables(Vec<u8>);

impl Tables {
    /// Puts a table behind the others; returns its address.
    fn put(&mut self, table: &dyn Aml) -> u64 {
        self.0.resize(self.0.len().next_multiple_of(64), 0);
        let at = TABLES + u64::try_from(self.0.len()).unwrap_or(0);
        table.to_aml_bytes(&mut self.0);
        at
    }
}

fn madt(cpus: u32) -> Sdt {
    let mut table = Sdt::new(*b"APIC", 36, 4, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&LOCAL_APIC.to_le_bytes());
    table.append_slice(&PC_AT_COMPATIBLE.to_le_bytes());
    // APIC ids are the vCPUs' numbers, and there are at most 254: the old, small entry holds them.
    for id in (0..cpus).filter_map(|id| u8::try_from(id).ok()) {
        table.append_slice(&[0, 8, id, id, 1, 0, 0, 0]);
    }
    let mut io_apic = vec![1, 12, 0, 0];
    io_apic.extend(IO_APIC.to_le_bytes());
    io_apic.extend(0u32.to_le_bytes());
    table.append_slice(&io_apic);
    // ACPI's own interrupt would be level-triggered and active low by the book.
    let line = u8::try_from(ACPI_PM_IRQ).unwrap_or(0);
    let mut sci = vec![2, 10, 0, line];
    sci.extend(ACPI_PM_IRQ.to_le_bytes());
    sci.extend(EDGE_HIGH.to_le_bytes());
    table.append_slice(&sci);
    // The local APICs' LINT1 is the NMI, on all processors.
    table.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    table
}

fn fadt(facs: u64, dsdt: u64) -> FADTBuilder {
    let port = |address, bytes: u8, access| {
        GAS::new(AddressSpace::SystemIo, bytes * 8, 0, access, address)
    };
    let event = ACPI_PM_BASE;
    let control = event + u64::from(ACPI_PM_EVENT_LEN);
    let low32 = |address: u64| u32::try_from(address).unwrap_or(0);
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(low32(facs))
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // No sleep button and no wake-up by a clock; the power button is there.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    table.dsdt = low32(dsdt).into();
    table.sci_int = u16::try_from(ACPI_PM_IRQ).unwrap_or(0).into();
    table.pm1a_evt_blk = low32(event).into();
    table.pm1a_cnt_blk = low32(control).into();
    table.pm1_evt_len = ACPI_PM_EVENT_LEN;
    table.pm1_cnt_len = ACPI_PM_CONTROL_LEN;
    table.x_pm1a_evt_blk = port(event, ACPI_PM_EVENT_LEN, AccessSize::WordAccess);
    table.x_pm1a_cnt_blk = port(control, ACPI_PM_CONTROL_LEN, AccessSize::WordAccess);
    table.iapc_boot_arch = BOOT_FLAGS.into();
    table.reset_reg = port(RESET_PORT, 1, AccessSize::ByteAccess);
    table.reset_value = RESET_COMMAND;
    // C2 and C3 do not exist: latencies above 100 and 1000 µs say so.
    table.p_lvl2_lat = 101.into();
    table.p_lvl3_lat = 1001.into();
    table
}

fn dsdt(platform: &Platform) -> Sdt {
    let mut devices = Vec::new();
    serial(&mut devices);
    for (number, device) in platform.mmio.iter().enumerate() {
        virtio(number, device, &mut devices);
    }
    generation(&mut devices);
    vmclock(&mut devices);
    events(&mut devices);
    let mut body = Scope::raw(Path::new("\\_SB_"), devices);
    Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&SLEEP_TYPE_OFF, &SLEEP_TYPE_OFF]),
    )
    .to_aml_bytes(&mut body);
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&body);
    table
}

/// COM1, as PNP0501: a 16550A.
fn serial(to: &mut Vec<u8>) {
    let base = u16::try_from(COM1_BASE).unwrap_or(0);
    let len = u8::try_from(COM1_LEN).unwrap_or(0);
    Device::new(
        Path::new("COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &0u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &IO::new(base, base, 0, len),
                    &Interrupt::new(true, true, false, false, COM1_IRQ),
                ]),
            ),
        ],
    )
    .to_aml_bytes(to);
}

/// A virtio-mmio device, by the name that Linux knows it by (`drivers/virtio/virtio_mmio.c`).
fn virtio(number: usize, device: &MmioDevice, to: &mut Vec<u8>) {
    let number = u16::try_from(number).unwrap_or(u16::MAX);
    Device::new(
        Path::new(&format!("V{:03X}", number & 0xfff)),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &number),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, device.base, device.size),
                    &Interrupt::new(true, true, false, false, device.gsi),
                ]),
            ),
        ],
    )
    .to_aml_bytes(to);
}

/// What Microsoft's specification calls VGEN.
fn generation(to: &mut Vec<u8>) {
    let (low, high) = (
        u32::try_from(GENERATION_ID & 0xffff_ffff).unwrap_or(0),
        u32::try_from(GENERATION_ID >> 32).unwrap_or(0),
    );
    Device::new(
        Path::new("VGEN"),
        vec![
            &Name::new(Path::new("_HID"), &"QEMUVGID"),
            &Name::new(Path::new("_CID"), &"VM_Gen_Counter"),
            &Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
            &Name::new(Path::new("ADDR"), &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(to);
}

/// By the name that Linux knows it by (`drivers/ptp/ptp_vmclock.c`).
fn vmclock(to: &mut Vec<u8>) {
    let base = u32::try_from(VMCLOCK_PAGE).unwrap_or(0);
    Device::new(
        Path::new("VCLK"),
        vec![
            &Name::new(Path::new("_HID"), &"AMZNC10C"),
            &Name::new(Path::new("_CID"), &"VMCLOCK"),
            &Name::new(Path::new("_DDN"), &"VMCLOCK"),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(false, base, VMCLOCK_BYTES)]),
            ),
        ],
    )
    .to_aml_bytes(to);
}

/// What tells the drivers of both: a generic event device (ACPI 6.5, 5.6.9), which needs no
/// register that a guest could lose on the way.
fn events(to: &mut Vec<u8>) {
    let line = |gsi| Interrupt::new(true, true, false, false, gsi);
    Device::new(
        Path::new("GED_"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &0u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&line(VMCLOCK_GSI), &line(GENERATION_GSI)]),
            ),
            // Its argument is the line.
            &Method::new(
                Path::new("_EVT"),
                1,
                true,
                vec![
                    &If::new(
                        &Equal::new(&Arg(0), &VMCLOCK_GSI),
                        vec![&Notify::new(&Path::new("\\_SB_.VCLK"), &CHANGED)],
                    ),
                    &Else::new(vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &CHANGED)]),
                ],
            ),
        ],
    )
    .to_aml_bytes(to);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], at: usize, len: usize) -> usize {
        bytes[at..at + len]
            .iter()
            .rev()
            .fold(0, |n, b| n << 8 | usize::from(*b))
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |n, b| n.wrapping_add(*b))
    }

    /// A table by its address; its checksum must be right.
    fn table(all: &[u8], address: usize) -> &[u8] {
        let bytes = &all[address - usize::try_from(TABLES).unwrap()..];
        let bytes = &bytes[..word(bytes, 4, 4)];
        assert_eq!(sum(bytes), 0, "{:?}", &bytes[..4]);
        bytes
    }

    #[test]
    fn every_table_is_reached_from_the_root_and_whole() {
        let mmio = |n: u32| MmioDevice {
            base: 0xd000_0000 + n * 0x1000,
            size: 0x1000,
            gsi: 5 + n,
        };
        let platform = Platform {
            cpus: 254,
            mmio: (0..16).map(mmio).collect(),
            ..Platform::default()
        };
        let all = tables(&platform, &RamLayout::new(1 << 30, false).unwrap());
        let end = TABLES + u64::try_from(all.len()).unwrap();
        assert!(end <= VMCLOCK_PAGE, "they end at {end:#x}");
        assert_eq!(&all[..8], b"RSD PTR ");
        assert_eq!((sum(&all[..20]), sum(&all[..36])), (0, 0));
        let xsdt = table(&all, word(&all, 24, 8));
        assert_eq!((&xsdt[..4], xsdt.len()), (b"XSDT".as_slice(), 36 + 16));
        let fadt = table(&all, word(xsdt, 36, 8));
        assert_eq!(&fadt[..4], b"FACP");
        let dsdt = table(&all, word(fadt, 140, 8));
        assert_eq!(&dsdt[..4], b"DSDT");
        assert_eq!(
            word(fadt, 40, 4),
            word(fadt, 140, 8),
            "both pointers to it agree"
        );
        let facs = word(fadt, 36, 4);
        assert!(
            facs.is_multiple_of(64)
                && all[facs - usize::try_from(TABLES).unwrap()..].starts_with(b"FACS")
        );
        assert_eq!(
            (word(fadt, 46, 2), word(fadt, 56, 4), word(fadt, 64, 4)),
            (9, 0x600, 0x604)
        );
        let madt = table(&all, word(xsdt, 44, 8));
        assert_eq!(
            (&madt[..4], madt.len()),
            (b"APIC".as_slice(), 44 + 254 * 8 + 12 + 10 + 6)
        );
        let has = |what: &[u8]| dsdt.windows(what.len()).any(|w| w == what);
        assert!(has(b"_S5_") && has(b"COM1") && has(b"V00F") && !has(b"V010"));
        assert_eq!(dsdt.windows(8).filter(|w| w == b"LNRO0005").count(), 16);
    }

    /// Decoded by hand after ACPI 6.5, 20.2: what a driver evaluates.
    #[test]
    fn generation_id_and_vmclock_are_devices_with_addresses_and_events() {
        let mut aml = Vec::new();
        generation(&mut aml);
        vmclock(&mut aml);
        events(&mut aml);
        let find = |what: &[u8]| {
            let found = aml.windows(what.len()).position(|w| w == what);
            found.unwrap_or_else(|| panic!("{what:x?} in {aml:x?}"))
        };
        // DeviceOp with its length, and the name.
        assert_eq!(aml[..2], [0x5b, 0x82]);
        assert!(find(b"VGEN") < find(b"GED_"));
        find(b"\x08_HID\x0dQEMUVGID\0");
        find(b"\x08_CID\x0dVM_Gen_Counter\0");
        find(b"\x08_DDN\x0dVM_Gen_Counter\0");
        // A package of two: the lower and the upper half of the address. Zero has a code of its own.
        let at = find(b"\x08ADDR\x12");
        let package = &aml[at + 6..];
        let length = usize::from(package[0]);
        assert_eq!(package[1], 2);
        let low = u32::try_from(GENERATION_ID).unwrap().to_le_bytes();
        let halves = [&[0x0c][..], &low, &[0x00]].concat();
        assert_eq!(package[2..length], halves);
        assert_eq!((GENERATION_ID % 8, GENERATION_ID / 0x1000), (0, 0xef));
        // 32-bit fixed memory, read-only.
        assert!(find(b"VCLK") < find(b"\x08_HID\x0dAMZNC10C\0"));
        find(b"\x08_CID\x0dVMCLOCK\0");
        find(&[0x86, 9, 0, 0, 0x00, 0xe0, 0x0e, 0, 0x00, 0x10, 0, 0]);
        // Extended interrupts: a consumer's, an edge, active high, one, its number.
        find(b"\x08_HID\x0dACPI0013\0");
        find(&[0x89, 6, 0, 0b0011, 1, 14, 0, 0, 0]);
        find(&[0x89, 6, 0, 0b0011, 1, 15, 0, 0, 0]);
        // _EVT, serialized, of one argument: if it is 14, Notify (\_SB.VCLK, 0x80), else
        // Notify (\_SB.VGEN, 0x80).
        find(
            b"_EVT\x09\xa0\x12\x93\x68\x0a\x0e\x86\\\x2e_SB_VCLK\x0a\x80\
              \xa1\x0e\x86\\\x2e_SB_VGEN\x0a\x80",
        );
    }
}
