//! The devices as state version 3 laid them out: postcard, by position. Frozen; it goes when
//! version 5 comes.

use ferry_devices::acpi_pm::AcpiPmState;
use ferry_devices::balloon::{BalloonState, Statistics, auto};
use ferry_devices::block::BlockState;
use ferry_devices::i8042::I8042State;
use ferry_devices::net::{MacAddress, NetState};
use ferry_devices::rng::RngState;
use ferry_devices::serial::SerialState;
use ferry_devices::virtio::{DeviceState, QueueState, TransportState, VirtioState};
use serde::{Deserialize, Serialize};

use super::{DevicesState, MachineState, StateError, checked, vcpu_name};
use crate::kvm::{VcpuV3, VmV3};

/// Appends the state to `bytes`.
pub(super) fn encode(state: &MachineState, mut bytes: Vec<u8>) -> Result<Vec<u8>, StateError> {
    let failed = |error: postcard::Error| StateError::Encode(error.to_string());
    let machine = (Devices::try_from(&state.devices)?, VmV3::from(&state.vm));
    bytes = postcard::to_extend(&machine, bytes).map_err(failed)?;
    for vcpu in &state.vcpus {
        bytes = postcard::to_extend(&VcpuV3::from(vcpu), bytes).map_err(failed)?;
    }
    Ok(bytes)
}

/// Reads what [`encode`] wrote.
pub(super) fn decode(cpus: u32, body: &[u8]) -> Result<MachineState, StateError> {
    let ((devices, vm), mut rest) = take::<(Devices, VmV3)>(body, || "devices".to_owned())?;
    let mut vcpus = Vec::new();
    for id in 0..cpus {
        let (vcpu, after) = take::<VcpuV3>(rest, || vcpu_name(id))?;
        vcpus.push(checked(vcpu.into())?);
        rest = after;
    }
    if !rest.is_empty() {
        return Err(StateError::Absurd("bytes after its end"));
    }
    Ok(MachineState {
        devices: devices.into(),
        vm: vm.into(),
        vcpus,
    })
}

fn take<'a, T: Deserialize<'a>>(
    bytes: &'a [u8],
    part: impl Fn() -> String,
) -> Result<(T, &'a [u8]), StateError> {
    postcard::take_from_bytes(bytes).map_err(|error| StateError::Part {
        part: part(),
        why: error.to_string(),
    })
}

/// [`DevicesState`]. The keyboard controller had no fields.
#[derive(Serialize, Deserialize)]
pub(super) struct Devices {
    serial: Serial,
    acpi_pm: (u16, u16, u16),
    virtio: Vec<Virtio>,
}

#[derive(Serialize, Deserialize)]
struct Serial {
    /// The nine registers, in the order of [`SerialState`]'s fields.
    registers: [u8; 9],
    input: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
struct Virtio {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    interrupt_status: u32,
    config_generation: u32,
    queues: Vec<Queue>,
    device: Device,
}

#[derive(Serialize, Deserialize)]
struct Queue {
    size: u16,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    next_available: u16,
    next_used: u16,
    returned: Vec<u16>,
}

/// In this order: a kind is told by its number.
#[derive(Serialize, Deserialize)]
enum Device {
    Block { sectors: u64, read_only: bool },
    Net { mac: [u8; 6], announce: bool },
    Rng,
    Balloon(Box<Balloon>),
}

#[derive(Serialize, Deserialize)]
struct Balloon {
    target: u32,
    actual: u32,
    /// In the order of [`Statistics`]' fields.
    statistics: Option<[Option<u64>; 12]>,
    /// Milliseconds between two steps, and bytes that stay available.
    auto: Option<(u32, u64)>,
}

impl TryFrom<&DevicesState> for Devices {
    type Error = StateError;

    fn try_from(state: &DevicesState) -> Result<Self, StateError> {
        let (serial, acpi_pm) = (&state.serial, &state.acpi_pm);
        let virtio = state.virtio.iter().map(Virtio::try_from);
        Ok(Self {
            serial: Serial {
                registers: [
                    serial.baud_divisor_low,
                    serial.baud_divisor_high,
                    serial.interrupt_enable,
                    serial.interrupt_identification,
                    serial.line_control,
                    serial.line_status,
                    serial.modem_control,
                    serial.modem_status,
                    serial.scratch,
                ],
                input: serial.input.clone(),
            },
            acpi_pm: (acpi_pm.status, acpi_pm.enable, acpi_pm.control),
            virtio: virtio.collect::<Result<_, _>>()?,
        })
    }
}

impl From<Devices> for DevicesState {
    fn from(state: Devices) -> Self {
        let registers = state.serial.registers;
        let (status, enable, control) = state.acpi_pm;
        Self {
            serial: SerialState {
                baud_divisor_low: registers[0],
                baud_divisor_high: registers[1],
                interrupt_enable: registers[2],
                interrupt_identification: registers[3],
                line_control: registers[4],
                line_status: registers[5],
                modem_control: registers[6],
                modem_status: registers[7],
                scratch: registers[8],
                input: state.serial.input,
            },
            i8042: I8042State {},
            acpi_pm: AcpiPmState {
                status,
                enable,
                control,
            },
            virtio: state.virtio.into_iter().map(VirtioState::from).collect(),
        }
    }
}

impl TryFrom<&VirtioState> for Virtio {
    type Error = StateError;

    fn try_from(state: &VirtioState) -> Result<Self, StateError> {
        let transport = &state.transport;
        Ok(Self {
            status: transport.status,
            device_features_sel: transport.device_features_sel,
            driver_features_sel: transport.driver_features_sel,
            driver_features: transport.driver_features,
            queue_sel: transport.queue_sel,
            interrupt_status: transport.interrupt_status,
            config_generation: transport.config_generation,
            queues: transport.queues.iter().map(Queue::from).collect(),
            device: Device::try_from(&state.device)?,
        })
    }
}

impl From<Virtio> for VirtioState {
    fn from(state: Virtio) -> Self {
        Self {
            transport: TransportState {
                status: state.status,
                device_features_sel: state.device_features_sel,
                driver_features_sel: state.driver_features_sel,
                driver_features: state.driver_features,
                queue_sel: state.queue_sel,
                interrupt_status: state.interrupt_status,
                config_generation: state.config_generation,
                queues: state.queues.into_iter().map(QueueState::from).collect(),
            },
            device: DeviceState::from(state.device),
        }
    }
}

impl From<&QueueState> for Queue {
    fn from(queue: &QueueState) -> Self {
        Self {
            size: queue.size,
            ready: queue.ready,
            descriptors: queue.descriptors,
            available: queue.available,
            used: queue.used,
            next_available: queue.next_available,
            next_used: queue.next_used,
            returned: queue.returned.clone(),
        }
    }
}

impl From<Queue> for QueueState {
    fn from(queue: Queue) -> Self {
        Self {
            size: queue.size,
            ready: queue.ready,
            descriptors: queue.descriptors,
            available: queue.available,
            used: queue.used,
            next_available: queue.next_available,
            next_used: queue.next_used,
            returned: queue.returned,
        }
    }
}

impl TryFrom<&DeviceState> for Device {
    type Error = StateError;

    fn try_from(state: &DeviceState) -> Result<Self, StateError> {
        Ok(match state {
            DeviceState::Block(block) => Self::Block {
                sectors: block.sectors,
                read_only: block.read_only,
            },
            DeviceState::Net(net) => Self::Net {
                mac: net.mac.0,
                announce: net.announce,
            },
            DeviceState::Rng(RngState {}) => Self::Rng,
            DeviceState::Balloon(balloon) => Self::Balloon(Box::new(Balloon {
                target: balloon.target,
                actual: balloon.actual,
                statistics: balloon.statistics.as_ref().map(to_array),
                auto: balloon.auto.map(|a| (a.interval_ms, a.reserve_bytes)),
            })),
            DeviceState::Vsock(_) => {
                let why = "version 3 has no vsock device; upgrade the older side";
                return Err(StateError::Encode(why.into()));
            }
            DeviceState::Console(_) => {
                let why = "version 3 has no console; upgrade the older side";
                return Err(StateError::Encode(why.into()));
            }
        })
    }
}

impl From<Device> for DeviceState {
    fn from(state: Device) -> Self {
        match state {
            Device::Block { sectors, read_only } => Self::Block(BlockState { sectors, read_only }),
            Device::Net { mac, announce } => Self::Net(NetState {
                mac: MacAddress(mac),
                announce,
            }),
            Device::Rng => Self::Rng(RngState {}),
            Device::Balloon(balloon) => Self::Balloon(Box::new(BalloonState {
                target: balloon.target,
                actual: balloon.actual,
                statistics: balloon.statistics.map(from_array),
                auto: balloon
                    .auto
                    .map(|(interval_ms, reserve_bytes)| auto::Settings {
                        interval_ms,
                        reserve_bytes,
                    }),
            })),
        }
    }
}

fn to_array(s: &Statistics) -> [Option<u64>; 12] {
    [
        s.swap_in,
        s.swap_out,
        s.major_faults,
        s.minor_faults,
        s.free_memory,
        s.total_memory,
        s.available_memory,
        s.disk_caches,
        s.hugetlb_allocations,
        s.hugetlb_failures,
        s.oom_kills,
        s.allocation_stalls,
    ]
}

fn from_array(a: [Option<u64>; 12]) -> Statistics {
    Statistics {
        swap_in: a[0],
        swap_out: a[1],
        major_faults: a[2],
        minor_faults: a[3],
        free_memory: a[4],
        total_memory: a[5],
        available_memory: a[6],
        disk_caches: a[7],
        hugetlb_allocations: a[8],
        hugetlb_failures: a[9],
        oom_kills: a[10],
        allocation_stalls: a[11],
    }
}
