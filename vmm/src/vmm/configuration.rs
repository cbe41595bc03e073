//! What a [`Machine`] is made of, for `GET /v1/vm`.

use crate::api::types::{
    Configuration, Cpu, DiskConfiguration, MemoryConfiguration, NetworkConfiguration,
    NodeConfiguration, VsockConfiguration,
};
use crate::kvm::CpuidEntry;
use crate::machine::{DeviceDescription, Machine};
use crate::numa::{Node, Topology};

pub(super) fn of(machine: &Machine) -> Configuration {
    let description = machine.description();
    let ram = machine.ram();
    let mut configuration = Configuration {
        schema: Configuration::SCHEMA,
        name: Some(description.name.clone()),
        cpus: description.cpus,
        cpu: Cpu {
            vendor: vendor(&description.cpuid),
            brand: brand(&description.cpuid),
            tsc_khz: description.tsc_khz,
        },
        memory: MemoryConfiguration {
            bytes: description.memory,
            backing: ram.backing().name().into(),
            preallocated: ram.is_preallocated(),
            nodes: description.numa.as_ref().map_or_else(Vec::new, nodes),
        },
        dirty: machine.dirty_log().kind().tracking().name().into(),
        ..Configuration::default()
    };
    let mut files = machine.disks().iter();
    for device in &description.devices {
        match device {
            DeviceDescription::Disk {
                bytes, read_only, ..
            } => configuration.disks.push(DiskConfiguration {
                path: files.next().map(|disk| disk.path().display().to_string()),
                bytes: *bytes,
                read_only: *read_only,
            }),
            DeviceDescription::Net { mac } => {
                configuration.networks.push(NetworkConfiguration {
                    tap: None,
                    mac: mac.to_string(),
                });
            }
            DeviceDescription::Balloon => configuration.balloon = true,
            DeviceDescription::Rng => configuration.rng = true,
            // Where it goes is for the embedding program to say.
            DeviceDescription::Console => configuration.console = Some("null".into()),
            DeviceDescription::Vsock { cid } => {
                configuration.vsock = Some(VsockConfiguration {
                    cid: *cid,
                    socket: machine.vsock().map(|path| path.display().to_string()),
                });
            }
        }
    }
    configuration
}

fn nodes(topology: &Topology) -> Vec<NodeConfiguration> {
    let nodes = topology.nodes.iter().zip(&topology.distances);
    let node = |(node, distances): (&Node, &Vec<u8>)| NodeConfiguration {
        cpus: node.cpus.clone(),
        bytes: node.memory,
        distances: distances.clone(),
        host: node.host,
    };
    nodes.map(node).collect()
}

/// Registers as the text that their bytes are; a guest's terminal is given no control characters.
fn text(registers: &[u32]) -> String {
    let bytes = registers.iter().flat_map(|register| register.to_le_bytes());
    let shown = bytes.filter(|byte| byte.is_ascii_graphic() || *byte == b' ');
    let text: String = shown.map(char::from).collect();
    text.trim().to_owned()
}

fn leaf(cpuid: &[CpuidEntry], function: u32) -> Option<&CpuidEntry> {
    cpuid.iter().find(|entry| entry.function == function)
}

fn vendor(cpuid: &[CpuidEntry]) -> String {
    leaf(cpuid, 0).map_or_else(String::new, |l| text(&[l.ebx, l.edx, l.ecx]))
}

fn brand(cpuid: &[CpuidEntry]) -> Option<String> {
    let leaves = (0x8000_0002..=0x8000_0004).map(|function| leaf(cpuid, function));
    let registers: Option<Vec<[u32; 4]>> = leaves
        .map(|found| found.map(|l| [l.eax, l.ebx, l.ecx, l.edx]))
        .collect();
    let brand = text(&registers?.concat());
    (!brand.is_empty()).then_some(brand)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vendor_and_brand_are_read_from_cpuid() {
        let entry = |function, [eax, ebx, ecx, edx]: [u32; 4]| CpuidEntry {
            function,
            index: 0,
            flags: 0,
            eax,
            ebx,
            ecx,
            edx,
        };
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        let mut cpuid = vec![entry(0, [1, word(b"Genu"), word(b"ntel"), word(b"ineI")])];
        assert_eq!(vendor(&cpuid), "GenuineIntel");
        assert_eq!(brand(&cpuid), None);
        let words = |a, b, c, d| [word(a), word(b), word(c), word(d)];
        cpuid.push(entry(
            0x8000_0002,
            words(b"  A ", b"CPU\x1b", b" of ", b"mine"),
        ));
        cpuid.push(entry(0x8000_0003, [0; 4]));
        cpuid.push(entry(0x8000_0004, [0; 4]));
        assert_eq!(brand(&cpuid).as_deref(), Some("A CPU of mine"));
        assert_eq!(vendor(&[]), "");
    }
}
