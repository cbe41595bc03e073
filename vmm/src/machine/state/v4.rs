//! State version 4: a CBOR sequence (RFC 8742) of one map for VM and devices and one for each vCPU.
//! KVM's structures are byte strings as the kernel lays them out; zeros stand for what a shorter
//! one lacks.

use ciborium::de::Error as CborError;
use ferry_devices::acpi_pm::AcpiPmState;
use ferry_devices::i8042::I8042State;
use ferry_devices::serial::SerialState;
use ferry_devices::virtio::VirtioState;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{DevicesState, MachineState, StateError, checked, vcpu_name};
use crate::kvm::{VCPU_FIELDS, VmState};
use crate::machine::requires::{quoted, unknown};

/// The nesting that is read. The deepest field is at 8; a hostile one costs no more stack.
const DEPTH: usize = 24;
/// The name of the first map in messages.
const MACHINE: &str = "devices";
/// The fields of the first map.
const MACHINE_FIELDS: [&str; 5] = ["serial", "i8042", "acpi_pm", "virtio", "vm"];

/// The first map.
#[derive(Deserialize)]
struct Machine {
    serial: SerialState,
    i8042: I8042State,
    acpi_pm: AcpiPmState,
    virtio: Vec<VirtioState>,
    vm: VmState,
}

/// The same, to be written.
#[derive(Serialize)]
struct MachineRef<'a> {
    serial: &'a SerialState,
    i8042: &'a I8042State,
    acpi_pm: &'a AcpiPmState,
    virtio: &'a [VirtioState],
    vm: &'a VmState,
}

/// What is looked at first in each map.
#[derive(Deserialize)]
struct Head {
    /// Fields without which the guest would not be the same.
    #[serde(default)]
    requires: Vec<String>,
}

/// Appends the state to `bytes`.
pub(super) fn encode(state: &MachineState, mut bytes: Vec<u8>) -> Result<Vec<u8>, StateError> {
    let devices = &state.devices;
    let machine = MachineRef {
        serial: &devices.serial,
        i8042: &devices.i8042,
        acpi_pm: &devices.acpi_pm,
        virtio: &devices.virtio,
        vm: &state.vm,
    };
    put(&machine, &mut bytes)?;
    for vcpu in &state.vcpus {
        put(vcpu, &mut bytes)?;
    }
    Ok(bytes)
}

/// Reads what [`encode`] wrote.
pub(super) fn decode(cpus: u32, mut body: &[u8]) -> Result<MachineState, StateError> {
    let machine: Machine = take(&mut body, &MACHINE_FIELDS, || MACHINE.to_owned())?;
    let mut vcpus = Vec::new();
    for id in 0..cpus {
        let vcpu = take(&mut body, &VCPU_FIELDS, || vcpu_name(id))?;
        vcpus.push(checked(vcpu)?);
    }
    if !body.is_empty() {
        return Err(StateError::Absurd("bytes after its end"));
    }
    Ok(MachineState {
        devices: DevicesState {
            serial: machine.serial,
            i8042: machine.i8042,
            acpi_pm: machine.acpi_pm,
            virtio: machine.virtio,
        },
        vm: machine.vm,
        vcpus,
    })
}

fn put(part: &impl Serialize, bytes: &mut Vec<u8>) -> Result<(), StateError> {
    ciborium::into_writer(part, bytes).map_err(|error| StateError::Encode(error.to_string()))
}

/// Reads the next map, whose fields are `known`.
fn take<T: DeserializeOwned>(
    bytes: &mut &[u8],
    known: &[&str],
    part: impl Fn() -> String,
) -> Result<T, StateError> {
    let failed = |error| StateError::Part {
        part: part(),
        why: sentence(error),
    };
    let mut ahead = *bytes;
    let head: Head = read(&mut ahead).map_err(failed)?;
    if let Some(names) = unknown(&head.requires, known) {
        return Err(StateError::Requires {
            part: part(),
            names,
        });
    }
    read(bytes).map_err(failed)
}

fn read<T: DeserializeOwned>(bytes: &mut &[u8]) -> Result<T, CborError<std::io::Error>> {
    ciborium::de::from_reader_with_recursion_limit(bytes, DEPTH)
}

fn sentence(error: CborError<std::io::Error>) -> String {
    match error {
        CborError::Io(_) => "it is cut short".to_owned(),
        CborError::Syntax(at) => format!("byte {at} is no CBOR"),
        CborError::Semantic(_, why) => quoted(&why),
        CborError::RecursionLimitExceeded => "it is nested too deeply".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use ciborium::Value;

    use super::super::recorded::sample;
    use super::super::tests::framed;
    use super::*;

    /// The sample's two maps.
    fn maps() -> [Vec<(Value, Value)>; 2] {
        let bytes = encode(&sample(), Vec::new()).unwrap();
        let mut rest = bytes.as_slice();
        [(); 2].map(|()| {
            let map: Value = ciborium::from_reader(&mut rest).unwrap();
            map.into_map().unwrap()
        })
    }

    /// Reads two maps as a state.
    fn parse(maps: &[Vec<(Value, Value)>; 2]) -> Result<MachineState, StateError> {
        let mut body = Vec::new();
        for map in maps {
            ciborium::into_writer(&Value::Map(map.clone()), &mut body).unwrap();
        }
        MachineState::from_bytes(&framed(4, 1, &body))
    }

    fn names(map: &[(Value, Value)]) -> Vec<&str> {
        map.iter()
            .map(|(name, _)| name.as_text().unwrap())
            .collect()
    }

    #[test]
    fn the_fields_have_their_names() {
        let maps = maps();
        assert_eq!(names(&maps[0]), MACHINE_FIELDS);
        assert_eq!(names(&maps[1]), VCPU_FIELDS);
        // What is long is a string of bytes, not a list of numbers.
        let xsave = &maps[1].iter().find(|(n, _)| n.as_text() == Some("xsave"));
        assert!(xsave.unwrap().1.is_bytes());
    }

    #[test]
    fn an_unknown_field_is_skipped_unless_it_is_required() {
        let field = |name: &str, value: Value| (Value::from(name), value);
        let requires = |names: &[&str]| {
            let names = names.iter().map(|name| Value::from(*name)).collect();
            field("requires", Value::Array(names))
        };
        let deep = Value::Map(vec![field("x", Value::Bytes(vec![1; 9000]))]);
        for at in [0, 1] {
            let mut maps = maps();
            maps[at].insert(0, field("colour", deep.clone()));
            parse(&maps).unwrap();
            // What this build knows may be required.
            let known = names(&maps[at])[2].to_owned();
            maps[at].push(requires(&[&known]));
            parse(&maps).unwrap();
            maps[at].pop();
            maps[at].push(requires(&["colour", &known, "taste\x1b[31m"]));
            let error = parse(&maps).unwrap_err();
            let part = ["devices", "vCPU 0"][at];
            let names = "colour, taste?[31m".to_owned();
            let part = part.to_owned();
            assert_eq!(error, StateError::Requires { part, names });
        }
    }

    #[test]
    fn what_is_missing_or_of_an_unknown_kind_is_named() {
        let mut without = maps();
        without[1].remove(1);
        let text = parse(&without).unwrap_err().to_string();
        assert!(text.contains("vCPU 0") && text.contains("`regs`"), "{text}");
        // What not every guest has may be left out.
        let mut optional = maps();
        optional[1].retain(|(name, _)| name.as_text() != Some("pdptrs"));
        parse(&optional).unwrap();

        let mut sound = maps();
        let virtio = sound[0][3].1.as_array_mut().unwrap();
        let device = &mut virtio[0].as_map_mut().unwrap()[1].1;
        device.as_map_mut().unwrap()[0].0 = Value::from("sound");
        let text = parse(&sound).unwrap_err().to_string();
        assert!(text.contains("`sound`") && text.contains("newer"), "{text}");
    }

    #[test]
    fn a_map_that_ends_early_or_never_is_refused() {
        let bytes = encode(&sample(), Vec::new()).unwrap();
        for len in (0..bytes.len()).step_by(7) {
            let error = MachineState::from_bytes(&framed(4, 1, &bytes[..len])).unwrap_err();
            assert!(matches!(error, StateError::Part { .. }), "{len}: {error}");
        }
        let error = MachineState::from_bytes(&framed(4, 1, &bytes[..500])).unwrap_err();
        assert!(error.to_string().contains("cut short"), "{error}");
        // Maps in arrays in tags without end; and a string that is longer than all there is.
        for hostile in [
            vec![0x81; 60_000],
            [0xa1, 0x61, b'x'].repeat(20_000),
            vec![0xc1; 60_000],
            [
                vec![0xa1, 0x65],
                b"xsave".to_vec(),
                vec![0x5b],
                vec![0x7f; 8],
            ]
            .concat(),
            [
                vec![0xa1, 0x66],
                b"virtio".to_vec(),
                vec![0x9b],
                vec![0x7f; 8],
            ]
            .concat(),
        ] {
            assert!(MachineState::from_bytes(&framed(4, 1, &hostile)).is_err());
        }
    }
}
