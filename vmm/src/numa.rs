//! NUMA: which memory is near which processors, of the guest and of this host.
//!
//! ```text
//!  --numa …   ─▶ Topology ─┐                     ┌─▶ memory: mbind(2) of the memory file
//!  --numa-map ─▶ NumaMap  ─┼─▶ place ─▶ Placement ┤
//!  sysfs      ─▶ HostNodes ┘                     └─▶ vCPU threads: sched_setaffinity(2)
//! ```
//!
//! The topology belongs to the guest and goes where it goes: its kernel has read it once, from the
//! SRAT and the SLIT. The placement belongs to a host, and each host makes its own.

mod host;
mod placement;
mod topology;

pub use host::{HostNode, HostNodes};
pub use placement::{Choice, NumaMap, Place, Placement, PlacementError, keep, place};
pub use topology::{MAX_NODES, NEAR, Node, REMOTE, Topology, TopologyError};
