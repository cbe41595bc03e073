//! The guest's nodes.

use serde::{Deserialize, Serialize};

/// The most nodes of a guest: an SLIT of 4 KiB.
pub const MAX_NODES: usize = 64;
/// The distance of a node to itself (ACPI 6.5, 5.2.17).
pub const NEAR: u8 = 10;
/// The distance between two nodes where none is given: what firmware says of two sockets.
pub const REMOTE: u8 = 20;
/// What 255 says instead: there is no way from one to the other.
const FARTHEST: u8 = 254;
/// So that no huge page lies in two nodes.
const GRAIN: u64 = 2 << 20;

/// A node: processors, and memory that is near them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its vCPUs.
    pub cpus: Vec<u32>,
    /// Its memory in bytes. The nodes' memory follows one another in the guest's RAM.
    pub memory: u64,
    /// The host's node that it is on; true on one host only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<u32>,
}

/// The guest's nodes, and how far they are from each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// By their numbers.
    pub nodes: Vec<Node>,
    /// For each node its distance to each.
    pub distances: Vec<Vec<u8>>,
}

/// Why nodes cannot be those of a guest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TopologyError {
    /// None, or more than there can be.
    #[error("the guest has {0} NUMA nodes, but 1 to {MAX_NODES} are possible")]
    Count(usize),
    /// A node without processors.
    #[error("the guest's NUMA node {0} has no processors: give it some, such as cpus=0-1")]
    NoCpus(usize),
    /// Memory that a huge page would share with another node.
    #[error(
        "the guest's NUMA node {node} has {bytes} bytes of memory, which is not 2 MiB or a multiple of it: round it to one"
    )]
    Grain {
        /// The node.
        node: usize,
        /// Its memory.
        bytes: u64,
    },
    /// Not the guest's memory.
    #[error(
        "the guest's NUMA nodes have {} MiB of memory together, but the guest has {} MiB: make them add up",
        nodes >> 20,
        guest >> 20
    )]
    Memory {
        /// Bytes of all nodes.
        nodes: u64,
        /// Bytes of the guest.
        guest: u64,
    },
    /// A vCPU that the guest does not have.
    #[error(
        "the guest's NUMA node {node} has processor {cpu}, but the guest has {cpus} (from 0 on): give it more, or leave that one out"
    )]
    Range {
        /// The node.
        node: usize,
        /// The vCPU.
        cpu: u32,
        /// How many the guest has.
        cpus: u32,
    },
    /// A vCPU in two nodes.
    #[error("processor {0} is in a NUMA node of the guest twice: leave it in one of them")]
    Twice(u32),
    /// A vCPU in no node.
    #[error("processor {0} is in no NUMA node of the guest: add it to one")]
    Missing(u32),
    /// Distances that cannot be.
    #[error(
        "the guest's NUMA node {node} needs {nodes} distances: {NEAR} to itself, and {} to {FARTHEST} to each other node",
        NEAR + 1
    )]
    Distances {
        /// The node.
        node: usize,
        /// How many nodes there are.
        nodes: usize,
    },
}

impl Topology {
    /// These nodes, as far from each other as [`REMOTE`] says.
    #[must_use]
    pub fn even(nodes: Vec<Node>) -> Self {
        let row = |from| {
            let to = |to| if to == from { NEAR } else { REMOTE };
            (0..nodes.len()).map(to).collect()
        };
        let distances = (0..nodes.len()).map(row).collect();
        Self { nodes, distances }
    }

    /// The memory of all nodes in bytes.
    #[must_use]
    pub fn memory(&self) -> u64 {
        let sizes = self.nodes.iter().map(|node| node.memory);
        sizes.fold(0, u64::saturating_add)
    }

    /// Whether they are the nodes of a guest with so much memory and so many vCPUs.
    ///
    /// # Errors
    /// [`TopologyError`].
    pub fn check(&self, memory: u64, cpus: u32) -> Result<(), TopologyError> {
        let count = self.nodes.len();
        if count == 0 || count > MAX_NODES {
            return Err(TopologyError::Count(count));
        }
        let mut seen = vec![false; usize::try_from(cpus).unwrap_or(0)];
        for (number, node) in self.nodes.iter().enumerate() {
            let bytes = node.memory;
            if bytes == 0 || !bytes.is_multiple_of(GRAIN) {
                let node = number;
                return Err(TopologyError::Grain { node, bytes });
            }
            if node.cpus.is_empty() {
                return Err(TopologyError::NoCpus(number));
            }
            for &cpu in &node.cpus {
                let at = usize::try_from(cpu).unwrap_or(usize::MAX);
                let place = seen.get_mut(at).ok_or(TopologyError::Range {
                    node: number,
                    cpu,
                    cpus,
                })?;
                if std::mem::replace(place, true) {
                    return Err(TopologyError::Twice(cpu));
                }
            }
        }
        if let Some(cpu) = (0..)
            .zip(&seen)
            .find_map(|(cpu, seen)| (!seen).then_some(cpu))
        {
            return Err(TopologyError::Missing(cpu));
        }
        let nodes = self.memory();
        if nodes != memory {
            let guest = memory;
            return Err(TopologyError::Memory { nodes, guest });
        }
        self.check_distances()
    }

    fn check_distances(&self) -> Result<(), TopologyError> {
        let nodes = self.nodes.len();
        for node in 0..nodes {
            let sound = |(to, distance): (usize, &u8)| match to == node {
                true => *distance == NEAR,
                false => (NEAR + 1..=FARTHEST).contains(distance),
            };
            let row = self.distances.get(node);
            let row = row.filter(|row| row.len() == nodes && row.iter().enumerate().all(sound));
            if row.is_none() || self.distances.len() != nodes {
                return Err(TopologyError::Distances { node, nodes });
            }
        }
        Ok(())
    }

    /// The node of a vCPU.
    #[must_use]
    pub fn node_of(&self, cpu: u32) -> Option<usize> {
        self.nodes.iter().position(|node| node.cpus.contains(&cpu))
    }

    /// For each node where its memory begins in the guest's RAM, and how much it is, in bytes. The
    /// hole below 4 GiB is no RAM.
    pub fn stretches(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.nodes.iter().scan(0_u64, |at, node| {
            let first = *at;
            *at = at.saturating_add(node.memory);
            Some((first, node.memory))
        })
    }

    /// How many of `cpus` vCPUs share a package: as many as no package has of two nodes. A kernel
    /// does not believe in a cache that spans nodes. Packages are told apart by bits of the APIC
    /// id, so that it is a power of two, or all.
    #[must_use]
    pub fn package(&self, cpus: u32) -> u32 {
        let nodes: Vec<_> = (0..cpus).map(|cpu| self.node_of(cpu)).collect();
        let alike = |package: &[Option<usize>]| package.iter().all(|node| *node == package[0]);
        let mut size = nodes.len().next_power_of_two();
        while size > 1 && !nodes.chunks(size).all(alike) {
            size /= 2;
        }
        u32::try_from(size.max(1)).map_or(cpus, |size| size.min(cpus))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn nodes(parts: &[(&[u32], u64)]) -> Topology {
        let node = |(cpus, mib): &(&[u32], u64)| Node {
            cpus: cpus.to_vec(),
            memory: mib << 20,
            host: None,
        };
        Topology::even(parts.iter().map(node).collect())
    }

    #[test]
    fn sound_nodes_are_taken() {
        let two = nodes(&[(&[0, 1], 512), (&[2, 3], 256)]);
        assert_eq!(two.check(768 << 20, 4), Ok(()));
        assert_eq!(two.distances, [[10, 20], [20, 10]]);
        let stretches: Vec<_> = two.stretches().collect();
        assert_eq!(stretches, [(0, 512 << 20), (512 << 20, 256 << 20)]);
        assert_eq!((two.node_of(3), two.node_of(4)), (Some(1), None));
    }

    #[test]
    fn each_fault_has_its_sentence() {
        let check = |parts: &[(&[u32], u64)]| {
            let error = nodes(parts).check(64 << 20, 4).unwrap_err();
            error.to_string()
        };
        for (wrong, part) in [
            (check(&[]), "has 0 NUMA nodes"),
            (
                check(&[(&[0, 1, 2, 3], 32)]),
                "32 MiB of memory together, but the guest has 64",
            ),
            (
                check(&[(&[0, 1], 32), (&[1, 2, 3], 32)]),
                "processor 1 is in a NUMA node of the guest twice",
            ),
            (
                check(&[(&[0, 0, 1, 2, 3], 64)]),
                "processor 0 is in a NUMA node of the guest twice",
            ),
            (
                check(&[(&[0, 1], 32), (&[3], 32)]),
                "processor 2 is in no NUMA node",
            ),
            (
                check(&[(&[0, 1], 32), (&[2, 3, 4], 32)]),
                "node 1 has processor 4, but the guest has 4",
            ),
            (
                check(&[(&[0, 1, 2, 3], 64), (&[], 0)]),
                "node 1 has 0 bytes",
            ),
            (
                check(&[(&[0, 1, 2, 3], 32), (&[], 32)]),
                "node 1 has no processors",
            ),
            (
                check(&[(&[0, 1, 2, 3], 63), (&[], 1)]),
                "is not 2 MiB or a multiple",
            ),
        ] {
            assert!(wrong.contains(part), "{wrong}");
        }
        let many: Vec<(&[u32], u64)> = vec![(&[0], 2); MAX_NODES + 1];
        assert!(matches!(
            nodes(&many).check(1, 1),
            Err(TopologyError::Count(65))
        ));
    }

    #[test]
    fn distances_are_those_of_a_slit() {
        let mut two = nodes(&[(&[0], 32), (&[1], 32)]);
        let far = |d: [[u8; 2]; 2]| d.map(Vec::from).to_vec();
        for good in [[[10, 11], [254, 10]], [[10, 21], [21, 10]]] {
            two.distances = far(good);
            assert_eq!(two.check(64 << 20, 2), Ok(()));
        }
        for (node, bad) in [
            (0, [[11, 20], [20, 10]]),
            (0, [[10, 10], [20, 10]]),
            (1, [[10, 20], [255, 10]]),
            (1, [[10, 20], [20, 9]]),
        ] {
            two.distances = far(bad);
            let nodes = 2;
            let wrong = TopologyError::Distances { node, nodes };
            assert_eq!(two.check(64 << 20, 2), Err(wrong));
        }
        for odd in [
            vec![],
            vec![vec![10, 20]],
            vec![vec![10], vec![20, 10]],
            vec![vec![10, 20]; 3],
        ] {
            two.distances = odd;
            assert!(two.check(64 << 20, 2).is_err());
        }
    }

    #[test]
    fn packages_do_not_span_nodes() {
        let of = |parts: &[(&[u32], u64)], cpus| nodes(parts).package(cpus);
        assert_eq!(of(&[(&[0, 1, 2], 2)], 3), 3);
        assert_eq!(of(&[(&[0, 1], 2), (&[2, 3], 2)], 4), 2);
        assert_eq!(of(&[(&[0, 2], 2), (&[1, 3], 2)], 4), 1);
        assert_eq!(of(&[(&[0, 1, 2, 3], 2), (&[4, 5], 2)], 6), 4);
        assert_eq!(of(&[(&[0, 1, 2], 2), (&[3], 2)], 4), 1);
        assert_eq!(of(&[(&[0], 2), (&[1], 2)], 2), 1);
    }

    proptest! {
        /// By its definition: aligned blocks of so many, each within one node, and no larger ones.
        #[test]
        fn a_package_is_as_large_as_can_be(of in prop::collection::vec(0..3_u32, 1..20)) {
            let cpus = u32::try_from(of.len()).unwrap();
            let mut found: Vec<Node> = Vec::new();
            for node in 0..3 {
                let cpus: Vec<u32> = (0..cpus).filter(|c| of[*c as usize] == node).collect();
                found.push(Node { cpus, memory: 2 << 20, host: None });
            }
            let size = Topology::even(found).package(cpus);
            let fits = |size: u32| (0..cpus).all(|a| (0..cpus).all(|b| {
                a / size != b / size || of[a as usize] == of[b as usize]
            }));
            let powers = (0..6).map(|bits| 1 << bits).take_while(|n| *n < cpus * 2);
            let best = powers.filter(|n| fits(*n)).max().unwrap_or(1);
            prop_assert_eq!(size, best.min(cpus));
        }
    }
}
