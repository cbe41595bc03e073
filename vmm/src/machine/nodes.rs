//! Where a machine's NUMA nodes are on this host.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::devices::Backends;
use crate::memory::{Backing, GuestRam, NodeMemory, RamError};
use crate::numa::{Choice, HostNodes, Placement, PlacementError, Topology, keep, place};

/// The nodes of a machine that is being built, and where they go.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    topology: Option<Topology>,
    placement: Placement,
    /// There are others to choose among.
    bound: bool,
}

impl Nodes {
    /// Places them. Those of a guest whose memory is here already stay where they are.
    pub(super) fn place(
        topology: Option<Topology>,
        backends: &Backends,
        is_here: bool,
    ) -> Result<Self, PlacementError> {
        let map = &backends.numa_map;
        let Some(mut topology) = topology else {
            return match map.is_empty() {
                true => Ok(Self::default()),
                false => Err(PlacementError::NoNodes(map.clone())),
            };
        };
        let host = HostNodes::read();
        let pool = backends.memory.backing == Backing::Hugetlb;
        let placement = match is_here {
            true => keep(&topology, map, &host)?.unwrap_or_default(),
            false => place(&topology, map, (&host, pool), || host.busy())?,
        };
        for (at, node) in topology.nodes.iter_mut().enumerate() {
            node.host = placement.places.get(at).map(|place| place.node);
        }
        tracing::info!(places = ?placement.places, "the guest's NUMA nodes are placed");
        Ok(Self {
            topology: Some(topology),
            placement,
            bound: host.with_memory() > 1,
        })
    }

    /// For the machine's description.
    pub(super) const fn topology(&self) -> Option<&Topology> {
        self.topology.as_ref()
    }

    /// How many vCPUs of `cpus` share a package.
    pub(super) fn package(&self, cpus: u32) -> u32 {
        let topology = self.topology.as_ref();
        topology.map_or(cpus, |topology| topology.package(cpus))
    }

    /// What is left to do for the guest's memory, which is there.
    pub(super) fn settle(&self, ram: &mut GuestRam) -> Result<(), RamError> {
        if ram.is_adopted() {
            ram.bind(&self.parts())?;
        }
        if let Some(note) = &self.placement.note {
            ram.add_note(note);
        }
        Ok(())
    }

    /// Where each part of the memory comes from.
    pub(super) fn parts(&self) -> Vec<NodeMemory> {
        let topology = self.topology.as_ref().filter(|_| self.bound);
        let stretches = topology.into_iter().flat_map(Topology::stretches);
        let parts = stretches.zip(&self.placement.places);
        let part = |((first, bytes), place): ((u64, u64), &crate::numa::Place)| NodeMemory {
            first,
            bytes,
            node: place.node,
            strict: place.choice == Choice::Asked,
        };
        parts.map(part).collect()
    }

    /// Starts the thread of a vCPU on the processors of its node. A thread inherits them from the
    /// one that starts it, so that no vCPU needs a right to change its own.
    pub(super) fn near<T>(
        &self,
        vcpu: usize,
        start: impl FnOnce() -> std::io::Result<T>,
    ) -> std::io::Result<T> {
        let topology = self.topology.as_ref();
        let node = topology
            .zip(u32::try_from(vcpu).ok())
            .and_then(|(topology, vcpu)| topology.node_of(vcpu));
        let place = node.and_then(|node| self.placement.places.get(node));
        let Some(place) = place.filter(|place| !place.cpus.is_empty()) else {
            return start();
        };
        let mut set = CpuSet::new();
        for cpu in place.cpus.iter().filter(|cpu| **cpu < CpuSet::MAX_CPU) {
            set.set(*cpu);
        }
        let before = sched_getaffinity(None)?;
        sched_setaffinity(None, &set)?;
        let started = start();
        sched_setaffinity(None, &before)?;
        started
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numa::{Node, Place};

    /// A thread is where its node is, and the one that starts it where it was.
    #[test]
    fn a_vcpu_runs_near_its_node() {
        let all = sched_getaffinity(None).unwrap();
        let allowed: Vec<usize> = (0..CpuSet::MAX_CPU)
            .filter(|cpu| all.is_set(*cpu))
            .collect();
        let last = *allowed.last().unwrap();
        let node = |cpu| Node {
            cpus: vec![cpu],
            memory: 2 << 20,
            host: None,
        };
        let place = |node, cpus: &[usize]| Place {
            node,
            choice: Choice::Asked,
            cpus: cpus.to_vec(),
        };
        let nodes = Nodes {
            topology: Some(Topology::even(vec![node(0), node(1)])),
            placement: Placement {
                places: vec![place(0, &[]), place(1, &[last])],
                note: None,
            },
            bound: true,
        };
        let runs_on = |vcpu| {
            let thread = nodes.near(vcpu, || {
                Ok(std::thread::spawn(|| sched_getaffinity(None).unwrap()))
            });
            let set = thread.unwrap().join().unwrap();
            let cpus = (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu));
            cpus.collect::<Vec<_>>()
        };
        assert_eq!(runs_on(1), [last]);
        // One that may run anywhere, and one that there is not.
        assert_eq!(runs_on(0), allowed);
        assert_eq!(runs_on(7), allowed);
        assert_eq!(nodes.package(2), 1);
    }

    #[test]
    fn a_guest_without_nodes_has_no_map() {
        let mut backends = Backends::default();
        let none = Nodes::place(None, &backends, false).unwrap();
        assert!(none.parts().is_empty() && none.package(3) == 3);
        backends.numa_map = "0=0".parse().unwrap();
        let error = Nodes::place(None, &backends, false)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("--numa-map 0=0 was given, but the guest has no NUMA nodes"),
            "{error}"
        );
    }
}
