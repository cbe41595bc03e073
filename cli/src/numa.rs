//! `--numa` of `ferry run`: a guest's NUMA nodes.

use super::memory::Memory;
use super::outcome::Ended;
use ferry_terminal::units::size;
use ferry_vmm::kvm::MAX_CPUS;
use ferry_vmm::numa::{Node, NumaMap, Topology};
use std::str::FromStr;

const USAGE: &str = "a NUMA node is cpus=A-B and memory=SIZE, and host=N and distance=D:D if they matter, such as cpus=0-1,memory=512M";

/// A node, as one `--numa` gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeOption {
    cpus: Vec<u32>,
    memory: u64,
    host: Option<u32>,
    /// From this node to each.
    distances: Option<Vec<u8>>,
}

impl FromStr for NodeOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let usage = || USAGE.to_owned();
        let (mut cpus, mut memory, mut host, mut distances) = (Vec::new(), None, None, None);
        for part in text.split(',') {
            match part.split_once('=').ok_or_else(usage)? {
                // Ranges with a hole take more than one.
                ("cpus", range) => cpus.extend(processors(range)?),
                ("memory", bytes) if memory.is_none() => memory = Some(size(bytes)?),
                ("host", node) if host.is_none() => {
                    let wrong = || format!("host={node} is no node of this host; give a number");
                    host = Some(node.parse().map_err(|_| wrong())?);
                }
                ("distance", row) if distances.is_none() => {
                    let row: Result<Vec<u8>, _> = row.split(':').map(str::parse).collect();
                    let wrong = "distance= is a number for each node, 10 for the node itself, such as distance=10:21";
                    distances = Some(row.map_err(|_| wrong.to_owned())?);
                }
                _ => return Err(usage()),
            }
        }
        match memory {
            Some(memory) if !cpus.is_empty() => Ok(Self {
                cpus,
                memory,
                host,
                distances,
            }),
            _ => Err(usage()),
        }
    }
}

/// `3` or `0-1`.
fn processors(range: &str) -> Result<impl Iterator<Item = u32>, String> {
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    match (first.parse::<u32>(), last.parse::<u32>()) {
        // More than any guest has would only take memory.
        (Ok(first), Ok(last)) if first <= last && last < MAX_CPUS => Ok(first..=last),
        _ => Err(format!(
            "cpus={range} is no range of processors; give one from 0 to {}, such as cpus=0-1",
            MAX_CPUS - 1
        )),
    }
}

/// The guest's nodes, if it has some.
pub fn topology(nodes: &[NodeOption]) -> Option<Topology> {
    if nodes.is_empty() {
        return None;
    }
    let node = |option: &NodeOption| Node {
        cpus: option.cpus.clone(),
        memory: option.memory,
        host: None,
    };
    let mut topology = Topology::even(nodes.iter().map(node).collect());
    for (row, option) in topology.distances.iter_mut().zip(nodes) {
        if let Some(distances) = &option.distances {
            row.clone_from(distances);
        }
    }
    Some(topology)
}

/// Where on this host they are, as far as was said.
pub fn map(nodes: &[NodeOption]) -> NumaMap {
    let places = (0..).zip(nodes);
    places
        .filter_map(|(guest, node)| Some((guest, node.host?)))
        .collect()
}

/// Whether these are the nodes of a guest with so much memory and so many vCPUs.
pub fn check(nodes: &[NodeOption], memory: Option<Memory>, cpus: u32) -> Result<(), Ended> {
    let Some(topology) = topology(nodes) else {
        return Ok(());
    };
    if memory.is_some_and(|memory| memory.max.is_some()) {
        return Err(Ended::usage(
            "--numa and --memory with max= do not go together, since a balloon takes memory of any node: leave one of them out",
        ));
    }
    let bytes = memory.map_or_else(|| topology.memory(), Memory::ram);
    let checked = topology.check(bytes, cpus);
    checked.map_err(|e| Ended::usage(format!("--numa: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node(text: &str) -> Result<NodeOption, String> {
        text.parse()
    }

    #[test]
    fn nodes_are_read_and_nonsense_is_told() {
        let full = node("cpus=0-1,cpus=4,memory=512M,host=1,distance=10:21").unwrap();
        let wanted = NodeOption {
            cpus: vec![0, 1, 4],
            memory: 512 << 20,
            host: Some(1),
            distances: Some(vec![10, 21]),
        };
        assert_eq!(full, wanted);
        for (bad, part) in [
            ("", "a NUMA node is"),
            ("cpus=0-1", "a NUMA node is"),
            ("memory=512M", "a NUMA node is"),
            ("cpus=0,memory=512M,size=1", "a NUMA node is"),
            ("cpus=0,memory=512M,memory=512M", "a NUMA node is"),
            ("cpus=0,memory=lots", "a size is"),
            ("cpus=1-0,memory=512M", "cpus=1-0 is no range"),
            ("cpus=0-254,memory=512M", "from 0 to 253"),
            ("cpus=0-99999999,memory=512M", "is no range"),
            ("cpus=,memory=512M", "is no range"),
            ("cpus=0,memory=512M,host=x", "host=x is no node"),
            ("cpus=0,memory=512M,host=1,host=1", "a NUMA node is"),
            ("cpus=0,memory=512M,distance=10:", "distance= is a number"),
            ("cpus=0,memory=512M,distance=256", "distance= is a number"),
        ] {
            let error = node(bad).unwrap_err();
            assert!(error.contains(part), "{bad}: {error}");
        }
    }

    #[test]
    fn they_make_a_topology_and_a_map() {
        let two = [
            node("cpus=0,memory=64M,distance=10:31").unwrap(),
            node("cpus=1,memory=32M,host=1").unwrap(),
        ];
        let made = topology(&two).unwrap();
        assert_eq!(made.distances, [[10, 31], [20, 10]]);
        assert_eq!((made.memory(), made.node_of(1)), (96 << 20, Some(1)));
        assert_eq!(map(&two).to_string(), "1=1");
        assert_eq!(topology(&[]), None);
        let memory = |text: &str| Some(text.parse().unwrap());
        check(&two, memory("96M"), 2).unwrap();
        check(&two, None, 2).unwrap();
        check(&[], memory("96M,max=1G"), 9).unwrap();
        for (memory, cpus, part) in [
            (memory("96M,max=96M"), 2, "do not go together"),
            (memory("1G"), 2, "make them add up"),
            (None, 3, "processor 2 is in no NUMA node"),
            (None, 1, "but the guest has 1 "),
        ] {
            let ended = check(&two, memory, cpus).unwrap_err();
            assert_eq!(ended.outcome.status, 2);
            assert!(ended.sentence.contains(part), "{}", ended.sentence);
        }
    }

    proptest! {
        /// Whatever a user types: a node that was typed, or a sentence.
        #[test]
        fn any_text_is_a_node_or_a_sentence(text in "(cpus=[0-9-]{0,4}|memory=[0-9]{0,3}[KMG]?|host=[0-9]{0,2}|distance=[0-9:]{0,6}|,){0,8}") {
            match node(&text) {
                Ok(found) => {
                    prop_assert!(!found.cpus.is_empty() && text.contains("memory="));
                    prop_assert!(found.cpus.iter().all(|cpu| *cpu < MAX_CPUS));
                }
                Err(sentence) => prop_assert!(!sentence.is_empty()),
            }
        }

        /// What is typed in full is read in full.
        #[test]
        fn a_node_is_read_as_it_is_typed(
            (first, more) in (0..200_u32, 0..50_u32),
            mib in 1..9999_u64,
            host in prop::option::of(0..99_u32),
            row in prop::option::of(prop::collection::vec(any::<u8>(), 1..5)),
        ) {
            let mut text = format!("memory={mib}M,cpus={first}-{}", first + more);
            if let Some(host) = host {
                text.push_str(&format!(",host={host}"));
            }
            if let Some(row) = &row {
                let row: Vec<String> = row.iter().map(u8::to_string).collect();
                text.push_str(&format!(",distance={}", row.join(":")));
            }
            let found = node(&text).unwrap();
            prop_assert_eq!(found.cpus, (first..=first + more).collect::<Vec<_>>());
            prop_assert_eq!((found.memory, found.host, found.distances), (mib << 20, host, row));
        }
    }
}
