//! Which of this host's nodes a guest's nodes go to.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use super::{HostNode, HostNodes, Topology};

/// Which node of this host a node of the guest goes to, as far as that was said: `--numa-map`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NumaMap(BTreeMap<u32, u32>);

impl NumaMap {
    /// Where this node of the guest goes, if that was said.
    #[must_use]
    pub fn get(&self, guest: u32) -> Option<u32> {
        self.0.get(&guest).copied()
    }

    /// Whether nothing was said.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the nodes that it names are on this host and have memory.
    ///
    /// # Errors
    /// [`PlacementError::Unknown`], [`PlacementError::NoMemory`].
    pub fn check(&self, host: &HostNodes) -> Result<(), PlacementError> {
        self.0
            .values()
            .try_for_each(|id| usable(*id, host).map(drop))
    }

    /// Whether the guest has the nodes that it names.
    fn names(&self, guest: &Topology) -> Result<(), PlacementError> {
        let nodes = guest.nodes.len();
        let beyond = |node: &&u32| usize::try_from(**node).is_ok_and(|n| n >= nodes);
        match self.0.keys().find(beyond) {
            Some(&node) => Err(PlacementError::Guest { node, nodes }),
            None => Ok(()),
        }
    }
}

impl FromIterator<(u32, u32)> for NumaMap {
    fn from_iter<I: IntoIterator<Item = (u32, u32)>>(pairs: I) -> Self {
        Self(pairs.into_iter().collect())
    }
}

impl FromStr for NumaMap {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut map = BTreeMap::new();
        for part in text.split(',') {
            let pair = part.split_once('=').and_then(|(guest, host)| {
                Some((guest.parse::<u32>().ok()?, host.parse::<u32>().ok()?))
            });
            let Some((guest, host)) = pair else {
                return Err(format!(
                    "'{part}' is no GUEST=HOST: give the guest's nodes and where each goes here, such as 0=1,1=0"
                ));
            };
            if map.insert(guest, host).is_some() {
                return Err(format!(
                    "it sends the guest's node {guest} to two places: give one"
                ));
            }
        }
        Ok(Self(map))
    }
}

impl fmt::Display for NumaMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (guest, host)) in self.0.iter().enumerate() {
            write!(f, "{}{guest}={host}", if at > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

/// Who has chosen a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// An operator: the node's memory comes from there and from nowhere else.
    Asked,
    /// This program: it comes from elsewhere where that node has none left.
    Chosen,
}

/// Where a node of the guest goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The host's node.
    pub node: u32,
    /// Who says so.
    pub choice: Choice,
    /// The host's processors that its vCPUs run on; empty: any.
    pub cpus: Vec<usize>,
}

/// Where a guest's nodes go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placement {
    /// For each node of the guest.
    pub places: Vec<Place>,
    /// What an operator should know of it, in a sentence.
    pub note: Option<String>,
}

/// Why a guest's nodes cannot be placed as was said.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlacementError {
    /// A guest without nodes.
    #[error("--numa-map {0} was given, but the guest has no NUMA nodes: leave it out")]
    NoNodes(NumaMap),
    /// A node that the guest does not have.
    #[error(
        "--numa-map names node {node} of the guest, but the guest has {nodes} (from 0 on): leave that one out"
    )]
    Guest {
        /// The node.
        node: u32,
        /// How many there are.
        nodes: usize,
    },
    /// A node that this host does not have.
    #[error("this host has no NUMA node {node}: choose among {known}")]
    Unknown {
        /// The node.
        node: u32,
        /// Those with memory.
        known: String,
    },
    /// A node without memory.
    #[error(
        "this host's NUMA node {node} has no memory that this process may use: choose among {known}"
    )]
    NoMemory {
        /// The node.
        node: u32,
        /// Those with memory.
        known: String,
    },
    /// A node with too little memory.
    #[error(
        "{} MiB of the guest's memory are to be on this host's NUMA node {node}, which has {} MiB available: free memory there, \
         or choose another node",
        wanted >> 20,
        available >> 20
    )]
    TooLittle {
        /// The node.
        node: u32,
        /// Bytes that are to go there.
        wanted: u64,
        /// Bytes that it has.
        available: u64,
    },
    /// Memory that is handed over does not move.
    #[error(
        "the guest's NUMA node {guest} is on this host's node {now}, and --numa-map sends it to node {wanted}: memory that is \
         handed over stays where it is"
    )]
    Stays {
        /// The guest's node.
        guest: usize,
        /// Where it is.
        now: u32,
        /// Where it should be.
        wanted: u32,
    },
}

/// The host's node of this number, if a guest can have memory of it.
fn usable(node: u32, host: &HostNodes) -> Result<&HostNode, PlacementError> {
    let known = || {
        let ids = host
            .all()
            .iter()
            .filter(|n| n.memory > 0)
            .map(|n| n.id.to_string());
        ids.collect::<Vec<_>>().join(", ")
    };
    match host.get(node) {
        None => Err(PlacementError::Unknown {
            node,
            known: known(),
        }),
        Some(found) if found.memory == 0 => Err(PlacementError::NoMemory {
            node,
            known: known(),
        }),
        Some(found) => Ok(found),
    }
}

/// Places a guest's nodes: those of the map where it says, and the others by free memory and load.
/// `busy` tells how busy each of the host's nodes is, and is asked only where that decides. With
/// `pool` the memory is that of the nodes' pools of huge pages.
///
/// # Errors
/// [`PlacementError`].
pub fn place(
    topology: &Topology,
    map: &NumaMap,
    (host, pool): (&HostNodes, bool),
    busy: impl FnOnce() -> Vec<f64>,
) -> Result<Placement, PlacementError> {
    let nodes = topology.nodes.len();
    map.names(topology)?;
    let room = |node: &HostNode| if pool { node.pool } else { node.available };
    let mut taken: BTreeMap<u32, Taken> = BTreeMap::new();
    let mut places: Vec<Option<Place>> = vec![None; nodes];
    for (guest, node) in map.0.iter() {
        let found = usable(*node, host)?;
        let at = usize::try_from(*guest).unwrap_or(usize::MAX);
        let taken = taken.entry(*node).or_default();
        taken.add(topology.nodes.get(at).map_or(0, |n| n.memory));
        if taken.bytes > room(found) {
            return Err(PlacementError::TooLittle {
                node: *node,
                wanted: taken.bytes,
                available: room(found),
            });
        }
        if let Some(place) = places.get_mut(at) {
            *place = Some(Place::at(found, Choice::Asked, host));
        }
    }
    let mut free: Vec<usize> = (0..nodes).filter(|at| places[*at].is_none()).collect();
    // The largest first: it has the fewest places.
    free.sort_by_key(|at| Reverse(topology.nodes[*at].memory));
    let candidates = candidates(host);
    let busy = match free.is_empty() || candidates.len() < 2 {
        true => Vec::new(),
        false => busy(),
    };
    for at in free {
        let memory = topology.nodes[at].memory;
        let rank = |node: &&(usize, &HostNode)| {
            let (index, node) = **node;
            let taken = taken.get(&node.id).copied().unwrap_or_default();
            let left = room(node).saturating_sub(taken.bytes);
            let quarters = quarters(busy.get(index).copied().unwrap_or(0.0));
            // Guests' nodes apart from each other, as the guest believes them to be.
            (
                left >= memory,
                Reverse(taken.nodes),
                Reverse(quarters),
                left,
                Reverse(node.id),
            )
        };
        let Some((_, found)) = candidates.iter().max_by_key(rank).copied() else {
            continue;
        };
        taken.entry(found.id).or_default().add(memory);
        places[at] = Some(Place::at(found, Choice::Chosen, host));
    }
    Ok(Placement {
        places: places.into_iter().flatten().collect(),
        note: note(topology, host),
    })
}

/// Where a guest's nodes are whose memory is on this host already; `None` where that is not known.
///
/// # Errors
/// [`PlacementError`]: the map sends one elsewhere.
pub fn keep(
    topology: &Topology,
    map: &NumaMap,
    host: &HostNodes,
) -> Result<Option<Placement>, PlacementError> {
    map.names(topology)?;
    let mut places = Vec::new();
    for (guest, node) in topology.nodes.iter().enumerate() {
        let wanted = u32::try_from(guest).ok().and_then(|guest| map.get(guest));
        // A peer's word: where it is none of ours, the memory is somewhere and the vCPUs are too.
        let Some(found) = node.host.and_then(|now| usable(now, host).ok()) else {
            return Ok(None);
        };
        if let Some(wanted) = wanted.filter(|wanted| *wanted != found.id) {
            let now = found.id;
            return Err(PlacementError::Stays { guest, now, wanted });
        }
        places.push(Place::at(found, Choice::Chosen, host));
    }
    let note = note(topology, host);
    Ok(Some(Placement { places, note }))
}

#[derive(Debug, Clone, Copy, Default)]
struct Taken {
    nodes: usize,
    bytes: u64,
}

impl Taken {
    fn add(&mut self, bytes: u64) {
        self.nodes += 1;
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

impl Place {
    fn at(node: &HostNode, choice: Choice, host: &HostNodes) -> Self {
        // Among all of them there is nothing to choose.
        let cpus = match host.with_memory() {
            1 => Vec::new(),
            _ => node.cpus.clone(),
        };
        Self {
            node: node.id,
            choice,
            cpus,
        }
    }
}

/// The nodes to choose among, with their places in the list of all: those that have memory and
/// processors, or else those that have memory.
fn candidates(host: &HostNodes) -> Vec<(usize, &HostNode)> {
    let all = host.all().iter().enumerate();
    let all: Vec<_> = all.filter(|(_, node)| node.memory > 0).collect();
    let full: Vec<_> = all
        .iter()
        .copied()
        .filter(|(_, node)| !node.cpus.is_empty())
        .collect();
    if full.is_empty() { all } else { full }
}

/// Load in quarters: finer than that a tenth of a second tells nothing.
fn quarters(busy: f64) -> u8 {
    match busy {
        b if b < 0.125 => 0,
        b if b < 0.375 => 1,
        b if b < 0.625 => 2,
        b if b < 0.875 => 3,
        _ => 4,
    }
}

fn note(topology: &Topology, host: &HostNodes) -> Option<String> {
    (host.with_memory() == 1).then(|| {
        format!(
            "this host has one NUMA node, so that all {} of the guest are on it",
            topology.nodes.len()
        )
    })
}

#[cfg(test)]
mod tests;
