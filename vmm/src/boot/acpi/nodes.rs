//! The guest's NUMA nodes: System Resource Affinity Table and System Locality Information Table
//! (ACPI 6.5, 5.2.16 and 5.2.17).

use acpi_tables::sdt::Sdt;

use super::{OEM, OEM_REVISION, OEM_TABLE};
use crate::memory::RamLayout;
use crate::numa::Topology;

/// Flag of every entry: it is to be used.
const ENABLED: u32 = 1;

pub(super) fn srat(topology: &Topology, ram: &RamLayout) -> Sdt {
    let mut table = Sdt::new(*b"SRAT", 36, 3, OEM, OEM_TABLE, OEM_REVISION);
    // Reserved: a one, and a zero of 8 bytes.
    table.append_slice(&1_u32.to_le_bytes());
    table.append_slice(&0_u64.to_le_bytes());
    for (domain, node) in (0_u32..).zip(&topology.nodes) {
        // APIC ids are the vCPUs' numbers, as in the MADT.
        for id in node.cpus.iter().filter_map(|id| u8::try_from(*id).ok()) {
            table.append_slice(&processor(domain, id));
        }
    }
    for (domain, (first, bytes)) in (0_u32..).zip(topology.stretches()) {
        for (address, bytes) in ram.pieces(first, bytes) {
            table.append_slice(&memory(domain, address, bytes));
        }
    }
    table
}

/// Processor Local APIC/SAPIC Affinity (5.2.16.1).
fn processor(domain: u32, apic_id: u8) -> [u8; 16] {
    let mut entry = [0; 16];
    let domain = domain.to_le_bytes();
    (entry[0], entry[1]) = (0, 16);
    (entry[2], entry[3]) = (domain[0], apic_id);
    entry[4..8].copy_from_slice(&ENABLED.to_le_bytes());
    // Byte 8 is a SAPIC's; the clock's domain, from 12 on, is one for all.
    entry[9..12].copy_from_slice(&domain[1..]);
    entry
}

/// Memory Affinity (5.2.16.2).
fn memory(domain: u32, address: u64, bytes: u64) -> [u8; 40] {
    let mut entry = [0; 40];
    (entry[0], entry[1]) = (1, 40);
    entry[2..6].copy_from_slice(&domain.to_le_bytes());
    entry[8..16].copy_from_slice(&address.to_le_bytes());
    entry[16..24].copy_from_slice(&bytes.to_le_bytes());
    entry[28..32].copy_from_slice(&ENABLED.to_le_bytes());
    entry
}

pub(super) fn slit(topology: &Topology) -> Sdt {
    let mut table = Sdt::new(*b"SLIT", 36, 1, OEM, OEM_TABLE, OEM_REVISION);
    let count = u64::try_from(topology.nodes.len()).unwrap_or(0);
    table.append_slice(&count.to_le_bytes());
    for row in &topology.distances {
        table.append_slice(row);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::super::super::{GENERATION_PAGE, Platform};
    use super::super::{TABLES, tables};
    use super::*;
    use crate::memory::{HIGH_RAM_START, LOW_RAM_END};
    use crate::numa::{MAX_NODES, Node};

    /// What a kernel would find, by a reader that knows nothing of the writer.
    #[derive(Debug, Default, PartialEq)]
    struct Found {
        /// APIC id and domain.
        processors: Vec<(u32, u32)>,
        /// Domain, address and length.
        memory: Vec<(u32, u64, u64)>,
        distances: Vec<Vec<u8>>,
    }

    fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
        let one = |n, b: &u8| n << 8 | u64::from(*b);
        bytes[at..at + len].iter().rev().fold(0, one)
    }

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::try_from(number(bytes, at, 4)).unwrap()
    }

    /// The table of this signature that the XSDT has.
    fn table<'a>(all: &'a [u8], signature: &[u8; 4]) -> Option<&'a [u8]> {
        let at = |address: u64| {
            let bytes = &all[usize::try_from(address - TABLES).unwrap()..];
            let bytes = &bytes[..word(bytes, 4) as usize];
            let sum = bytes.iter().fold(0_u8, |n, b| n.wrapping_add(*b));
            assert_eq!(sum, 0, "{:?}", &bytes[..4]);
            bytes
        };
        let xsdt = at(number(all, 24, 8));
        let entries = xsdt[36..].chunks(8).map(|entry| at(number(entry, 0, 8)));
        entries
            .into_iter()
            .find(|table| table.starts_with(signature))
    }

    fn read(platform: &Platform, ram: &RamLayout) -> Option<Found> {
        let all = tables(platform, ram);
        assert!(TABLES + all.len() as u64 <= GENERATION_PAGE);
        let (srat, slit) = (table(&all, b"SRAT")?, table(&all, b"SLIT")?);
        let mut found = Found::default();
        assert_eq!((srat[8], word(srat, 36), number(srat, 40, 8)), (3, 1, 0));
        let mut rest = &srat[48..];
        while let [kind, len, ..] = *rest {
            let (entry, more) = rest.split_at(len.into());
            rest = more;
            match (kind, len) {
                (0, 16) => {
                    let domain = u32::from(entry[2]) | word(entry, 8) >> 8 << 8;
                    assert_eq!((word(entry, 4), entry[8], word(entry, 12)), (1, 0, 0));
                    found.processors.push((entry[3].into(), domain));
                }
                (1, 40) => {
                    assert_eq!((number(entry, 6, 2), word(entry, 24)), (0, 0));
                    assert_eq!((word(entry, 28), number(entry, 32, 8)), (1, 0));
                    let range = (word(entry, 2), number(entry, 8, 8), number(entry, 16, 8));
                    found.memory.push(range);
                }
                other => panic!("an entry {other:?}"),
            }
        }
        let count = usize::try_from(number(slit, 36, 8)).unwrap();
        assert_eq!((slit[8], slit.len()), (1, 44 + count * count));
        found.distances = slit[44..].chunks(count).map(<[u8]>::to_vec).collect();
        Some(found)
    }

    fn guest(parts: &[(&[u32], u64)]) -> (Platform, RamLayout) {
        let node = |(cpus, mib): &(&[u32], u64)| Node {
            cpus: cpus.to_vec(),
            memory: mib << 20,
            host: Some(1),
        };
        let topology = Topology::even(parts.iter().map(node).collect());
        let cpus = parts.iter().map(|(cpus, _)| cpus.len()).sum::<usize>();
        let cpus = u32::try_from(cpus).unwrap();
        topology.check(topology.memory(), cpus).unwrap();
        let ram = RamLayout::new(topology.memory(), false).unwrap();
        let platform = Platform {
            cpus,
            numa: Some(topology),
            ..Platform::default()
        };
        (platform, ram)
    }

    #[test]
    fn a_guest_without_nodes_has_neither_table() {
        let ram = RamLayout::new(64 << 20, false).unwrap();
        assert_eq!(read(&Platform::default(), &ram), None);
    }

    #[test]
    fn processors_memory_and_distances_are_found_again() {
        let (mut platform, ram) = guest(&[(&[0, 3], 512), (&[2, 1], 256)]);
        if let Some(topology) = &mut platform.numa {
            topology.distances = vec![vec![10, 31], vec![17, 10]];
        }
        let wanted = Found {
            processors: vec![(0, 0), (3, 0), (2, 1), (1, 1)],
            memory: vec![(0, 0, 512 << 20), (1, 512 << 20, 256 << 20)],
            distances: vec![vec![10, 31], vec![17, 10]],
        };
        assert_eq!(read(&platform, &ram), Some(wanted));
    }

    #[test]
    fn the_hole_is_in_no_node() {
        const GIB: u64 = 1 << 30;
        let (platform, ram) = guest(&[(&[0], 2048), (&[1], 2048), (&[2], 1024)]);
        let found = read(&platform, &ram).unwrap();
        let wanted = [
            (0, 0, 2 * GIB),
            (1, 2 * GIB, LOW_RAM_END - 2 * GIB),
            (1, HIGH_RAM_START, GIB),
            (2, HIGH_RAM_START + GIB, GIB),
        ];
        assert_eq!(found.memory, wanted);
    }

    /// The largest that can be: the tables end before what lies behind them.
    #[test]
    fn as_many_as_there_can_be_fit() {
        let cpus: Vec<Vec<u32>> = (0..64_u32)
            .map(|node| (0..254).filter(|cpu| cpu % 64 == node).collect())
            .collect();
        let parts: Vec<(&[u32], u64)> = cpus.iter().map(|c| (c.as_slice(), 128)).collect();
        assert_eq!(parts.len(), MAX_NODES);
        let (mut platform, ram) = guest(&parts);
        platform.mmio = vec![
            crate::boot::MmioDevice {
                base: 0xd000_0000,
                size: 0x1000,
                gsi: 5
            };
            16
        ];
        let found = read(&platform, &ram).unwrap();
        assert_eq!((found.processors.len(), found.distances.len()), (254, 64));
        let total: u64 = found.memory.iter().map(|(.., bytes)| bytes).sum();
        assert_eq!(total, ram.size());
        let of = |id: u32| {
            found
                .processors
                .iter()
                .find(|(found, _)| *found == id)
                .unwrap()
                .1
        };
        assert_eq!((of(0), of(63), of(64), of(253)), (0, 63, 0, 61));
    }
}
