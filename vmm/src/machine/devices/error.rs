use std::io;

use ferry_devices::block::{Disk, DiskError};
use ferry_devices::net::MacAddress;

use super::{DeviceDescription, MAX_DEVICES, VsockError};
use crate::tap::TapError;

/// Why a machine cannot have its virtio devices.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A disk.
    #[error(transparent)]
    Disk(DiskError),
    /// A network card's other end.
    #[error(transparent)]
    Tap(TapError),
    /// More than there are places.
    #[error(
        "{0} virtio devices were asked for, but at most {MAX_DEVICES} are possible: ask for fewer"
    )]
    TooMany(usize),
    /// Other disks than the guest has.
    #[error(
        "the guest has {guest} disks, but {here} were given here: give the same disks with --disk, in the same order"
    )]
    Disks {
        /// Disks of the guest.
        guest: usize,
        /// Disks given.
        here: usize,
    },
    /// Other network cards than the guest has.
    #[error(
        "the guest has {guest} network cards, but {here} were given here: give a tap for each with --net, in the same order"
    )]
    Nets {
        /// Cards of the guest.
        guest: usize,
        /// Cards given.
        here: usize,
    },
    /// A disk that cannot be the guest's.
    #[error(
        "the disk {path} has {here}, but the guest's has {guest}: give the guest's own disk, or a copy of it, in the right order"
    )]
    OtherDisk {
        /// The disk given.
        path: String,
        /// What it is like.
        here: String,
        /// What the guest's is like.
        guest: String,
    },
    /// Another file than the guest uses on this host.
    #[error(
        "the disk {path} is not the file that the guest uses, which is {guest} on this same host: give that file (in the \
         right order, if there are several), or --copy-disk to copy the disk into another, or insist with --force"
    )]
    OtherFile {
        /// The disk given.
        path: String,
        /// The guest's.
        guest: String,
    },
    /// Another address.
    #[error(
        "the guest's network card has the address {guest}, but {here} was given here: leave mac= out"
    )]
    Mac {
        /// The guest's.
        guest: MacAddress,
        /// The one given.
        here: MacAddress,
    },
    /// What is behind its vsock is not known.
    #[error(
        "the guest has a vsock device, and its socket was not given here: give --vsock socket=PATH"
    )]
    Vsock,
    /// It has none.
    #[error("the guest has no vsock device, but one was given here: leave --vsock out")]
    NoVsock,
    /// It has several.
    #[error("the machine's description has {0} vsock devices, but one is possible: it is damaged")]
    Vsocks(usize),
    /// It has no console.
    #[error("the guest has no console, but one was given here: leave --console out")]
    NoConsole,
    /// It has several consoles.
    #[error("the machine's description has {0} consoles, but one is possible: it is damaged")]
    Consoles(usize),
    /// Another context.
    #[error(
        "the guest's vsock device has the context {guest}, but {here} was given here: leave cid= out"
    )]
    Cid {
        /// The guest's.
        guest: u32,
        /// The one given.
        here: u32,
    },
    /// A context that cannot be.
    #[error(transparent)]
    Context(#[from] VsockError),
    /// A description that disagrees with itself.
    #[error("nothing was given for a {0} of the guest's")]
    Missing(&'static str),
    /// Out of descriptors or threads.
    #[error("a virtio device could not be made: {0}")]
    Resources(io::Error),
}

impl DeviceError {
    pub(super) fn other_disk(disk: &Disk, guest: &DeviceDescription) -> Self {
        let like = |bytes, read_only| {
            let access = if read_only { "read-only" } else { "writable" };
            format!("{bytes} bytes, {access}")
        };
        let guest = match guest {
            DeviceDescription::Disk {
                bytes, read_only, ..
            } => like(*bytes, *read_only),
            _ => "no disk".to_owned(),
        };
        Self::OtherDisk {
            path: disk.path().display().to_string(),
            here: like(disk.bytes(), disk.read_only()),
            guest,
        }
    }
}
