//! The JSON of the agent. Names are an interface: fields are added, never renamed.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The answer to `GET /v1/host`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Host {
    /// Version of this object; grows when a field is added.
    pub schema: u32,
    /// The host's name.
    pub name: String,
    /// The version of its ferry.
    pub version: String,
    /// Its processors.
    pub processors: u32,
    /// Memory that a guest could have, in bytes; 0 where the host does not tell.
    pub memory_available_bytes: u64,
    /// Its NUMA nodes with memory; 0 where its ferry does not say.
    pub numa_nodes: usize,
    /// The names of the guests there.
    pub guests: Vec<String>,
}

/// The body of `POST /v1/receivers`: the guest to receive.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// Its name, there as here.
    pub name: String,
    /// Its RAM in bytes.
    pub memory_bytes: u64,
    /// Its virtual processors.
    pub cpus: u32,
    /// Its disks, in order.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// Its network cards, in order.
    #[serde(default)]
    pub networks: Vec<Network>,
    /// The socket of its vsock device, which has the same path there; nothing where it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<PathBuf>,
    /// Whether its disks' contents come along: their files are made there.
    #[serde(default)]
    pub copy_disk: bool,
    /// Only say whether it could come; start nothing.
    #[serde(default)]
    pub dry_run: bool,
}

/// A disk of a guest, as it is named where the guest is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its file or device.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub read_only: bool,
}

/// A network card of a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Its tap, as it is named where the guest is.
    pub tap: String,
}

/// The answer to `POST /v1/receivers`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Receiver {
    /// Version of this object.
    pub schema: u32,
    /// Where the receiver waits; empty for a dry run.
    pub uri: String,
    /// What the source gives to `--pair`: good for one guest. Empty for a dry run.
    pub pair: String,
}
