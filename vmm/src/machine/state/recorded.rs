//! States in every format that is read, recorded under `tests/data` by the build that was the first
//! to write the format, and read back by this one.
//!
//! After a new format: `cargo test -p ferry-vmm --lib record_states -- --ignored` writes the file
//! of the current one; those of older formats are never written again.

use std::path::PathBuf;

use ferry_devices::acpi_pm::AcpiPmState;
use ferry_devices::balloon::{BalloonState, Statistics, auto};
use ferry_devices::block::BlockState;
use ferry_devices::console::ConsoleState;
use ferry_devices::i8042::I8042State;
use ferry_devices::net::{MacAddress, NetState};
use ferry_devices::rng::RngState;
use ferry_devices::serial::SerialState;
use ferry_devices::virtio::{DeviceState, QueueState, TransportState, VirtioState};
use ferry_devices::vsock::{Reset, VsockState};

use super::{DevicesState, MachineState, STATE_VERSION};
use crate::kvm::{VcpuState, VmState};

fn queue(seed: u16) -> QueueState {
    QueueState {
        size: 256 + seed,
        ready: seed.is_multiple_of(2),
        descriptors: 0x1000 + u64::from(seed),
        available: 0x2000 + u64::from(seed),
        used: 0xffff_ffff_ffff_0000 + u64::from(seed),
        next_available: 65535 - seed,
        next_used: 300 + seed,
        returned: vec![seed, 1, 65535],
    }
}

fn virtio(seed: u16, device: DeviceState) -> VirtioState {
    VirtioState {
        transport: TransportState {
            status: 15,
            device_features_sel: 1,
            driver_features_sel: 2,
            driver_features: 1 << 32 | u64::from(seed),
            queue_sel: seed.into(),
            interrupt_status: 3,
            config_generation: 77,
            queues: (0..seed).map(|n| queue(seed * 10 + n)).collect(),
        },
        device,
    }
}

/// A machine of one vCPU with one of each device, and another value in every field.
pub(super) fn sample() -> MachineState {
    let statistics = Statistics {
        swap_in: Some(1),
        swap_out: Some(2),
        major_faults: Some(3),
        minor_faults: Some(u64::MAX),
        free_memory: Some(5),
        total_memory: Some(6),
        available_memory: Some(7),
        disk_caches: Some(8),
        hugetlb_allocations: Some(9),
        hugetlb_failures: Some(10),
        oom_kills: Some(11),
        allocation_stalls: None,
    };
    let balloon = BalloonState {
        target: 1000,
        actual: 999,
        statistics: Some(statistics),
        auto: Some(auto::Settings {
            interval_ms: 700,
            reserve_bytes: 1 << 33,
        }),
    };
    MachineState {
        devices: DevicesState {
            serial: SerialState {
                baud_divisor_low: 1,
                baud_divisor_high: 2,
                interrupt_enable: 3,
                interrupt_identification: 4,
                line_control: 5,
                line_status: 6,
                modem_control: 7,
                modem_status: 8,
                scratch: 9,
                input: b"typed\xff".to_vec(),
            },
            i8042: I8042State {},
            acpi_pm: AcpiPmState {
                status: 0x101,
                enable: 0x102,
                control: 0x103,
            },
            virtio: vec![
                virtio(
                    1,
                    DeviceState::Block(BlockState {
                        sectors: 1 << 40,
                        read_only: true,
                    }),
                ),
                virtio(
                    2,
                    DeviceState::Net(NetState {
                        mac: MacAddress([0x52, 0x54, 0, 1, 2, 3]),
                        announce: true,
                    }),
                ),
                virtio(3, DeviceState::Rng(RngState {})),
                virtio(4, DeviceState::Balloon(Box::new(balloon))),
            ],
        },
        vm: VmState::sample(),
        vcpus: vec![VcpuState::sample()],
    }
}

/// The same with a device that came later: a vsock.
fn with_vsock() -> MachineState {
    let vsock = VsockState {
        cid: 33,
        reset: true,
        owed: vec![Reset {
            cid: 2,
            host_port: 52,
            guest_port: 1025,
            kind: 1,
        }],
        next_port: 0x4000_0007,
    };
    let mut state = sample();
    let vsock = virtio(3, DeviceState::Vsock(vsock));
    state.devices.virtio.push(vsock);
    state
}

/// The same with another that came later: a console.
fn with_console() -> MachineState {
    let console = ConsoleState {
        input: b"typed\xff\n".to_vec(),
        columns: 132,
        rows: 43,
    };
    let mut state = sample();
    let console = virtio(2, DeviceState::Console(console));
    state.devices.virtio.push(console);
    state
}

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("../tests/data/{name}"))
}

fn file(version: u32) -> PathBuf {
    data(&format!("state-v{version}"))
}

/// All of a state, field by field.
fn fields(state: &MachineState) -> Vec<(String, Vec<u8>)> {
    let mut fields = Vec::new();
    for (name, bytes) in state.vm.fields() {
        fields.push((format!("vm.{name}"), bytes));
    }
    for (id, vcpu) in state.vcpus.iter().enumerate() {
        for (name, bytes) in vcpu.fields() {
            fields.push((format!("vcpu{id}.{name}"), bytes));
        }
    }
    fields
}

#[track_caller]
fn assert_same(state: &MachineState, wanted: &MachineState) {
    assert_eq!(state.devices, wanted.devices);
    assert_eq!(state.vcpus.len(), wanted.vcpus.len());
    for (found, wanted) in fields(state).iter().zip(fields(wanted)) {
        assert_eq!(*found, wanted);
    }
}

#[test]
fn recorded_states_are_read_field_by_field() {
    for version in [3, 4] {
        let bytes = std::fs::read(file(version)).unwrap();
        assert_eq!(bytes[8..12], version.to_le_bytes());
        let state = MachineState::from_bytes(&bytes).unwrap();
        assert_same(&state, &sample());
    }
}

/// What an older ferry is sent is byte for byte what it would have written itself.
#[test]
fn the_version_before_is_written_as_it_was() {
    let recorded = std::fs::read(file(3)).unwrap();
    assert_eq!(sample().to_bytes_as(3).unwrap(), recorded);
}

#[test]
fn every_version_round_trips() {
    for version in [3, 4] {
        let bytes = sample().to_bytes_as(version).unwrap();
        assert_same(&MachineState::from_bytes(&bytes).unwrap(), &sample());
    }
    assert!(sample().to_bytes_as(2).is_err());
    assert!(sample().to_bytes_as(5).is_err());
}

/// The devices that came within version 4: the file of each, a state with it, and its name.
fn later() -> [(PathBuf, MachineState, &'static str); 2] {
    [
        (data("state-v4-vsock"), with_vsock(), "no vsock"),
        (data("state-v4-console"), with_console(), "no console"),
    ]
}

#[test]
fn a_state_with_a_later_device_is_read_and_has_no_place_in_version_3() {
    for (file, wanted, none) in later() {
        let bytes = std::fs::read(file).unwrap();
        let state = MachineState::from_bytes(&bytes).unwrap();
        assert_same(&state, &wanted);
        assert_eq!(state.to_bytes().unwrap(), bytes);
        let text = wanted.to_bytes_as(3).unwrap_err().to_string();
        assert!(text.contains(none) && text.contains("upgrade"), "{text}");
    }
}

#[test]
#[ignore = "writes the file of a device that came within version 4, where there is none yet: tests/record"]
fn record_a_later_device() {
    for (file, state, _) in later() {
        if !file.exists() {
            std::fs::write(file, state.to_bytes().unwrap()).unwrap();
        }
    }
}

#[test]
#[ignore = "writes the file of the current format, where there is none yet: tests/record"]
fn record_states() {
    if !file(STATE_VERSION).exists() {
        let bytes = sample().to_bytes().unwrap();
        std::fs::write(file(STATE_VERSION), bytes).unwrap();
    }
}
