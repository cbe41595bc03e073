//! Which devices a new machine has, and whether what is given on this host fits a guest's.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use ferry_devices::block::Disk;
use ferry_devices::net::MacAddress;
use ferry_devices::vsock::CIDS;

use super::{
    Backends, DeviceDescription, DeviceError, MAX_DEVICES, NetOptions, VsockError, VsockOptions,
};
use crate::tap::Tap;

/// What is behind a network card.
pub(super) enum Card<'a> {
    /// A tap that is to be opened.
    Named(&'a str),
    /// One that is open, and came from the guest's process.
    Shared(Tap),
}

impl Card<'_> {
    pub(super) fn tap(self) -> Result<Tap, DeviceError> {
        match self {
            Self::Named(name) => Tap::open(name).map_err(DeviceError::Tap),
            Self::Shared(tap) => Ok(tap),
        }
    }
}

/// What is behind the cards, in order: what is given here, and where that is a tap that came, or
/// nothing is given at all, what came.
pub(super) fn cards(
    backends: &Backends,
    shared: Vec<OwnedFd>,
) -> Result<Vec<Card<'_>>, DeviceError> {
    let shared = shared.into_iter().map(Tap::adopt);
    let mut shared = shared
        .collect::<Result<Vec<_>, _>>()
        .map_err(DeviceError::Tap)?;
    if backends.nets.is_empty() {
        return Ok(shared.into_iter().map(Card::Shared).collect());
    }
    let card = |options: &'_ NetOptions| {
        let came = shared.iter().position(|tap| tap.name() == options.tap);
        came.map(|at| shared.swap_remove(at))
    };
    let came: Vec<_> = backends.nets.iter().map(card).collect();
    let given = backends.nets.iter().zip(came);
    let cards = given.map(|(options, came)| match (&options.open, came) {
        (Some(open), _) => {
            let file = open.duplicate().map_err(DeviceError::Resources)?;
            let tap = Tap::given(file, open.number()).map_err(DeviceError::Tap)?;
            Ok(Card::Shared(tap))
        }
        (None, Some(tap)) => Ok(Card::Shared(tap)),
        (None, None) => Ok(Card::Named(&options.tap)),
    });
    cards.collect()
}

/// The devices of a new machine.
pub(super) fn wanted(
    backends: &Backends,
    disks: &[Arc<Disk>],
) -> Result<Vec<DeviceDescription>, DeviceError> {
    let mut devices: Vec<DeviceDescription> = disks
        .iter()
        .map(|disk| DeviceDescription::Disk {
            bytes: disk.bytes(),
            read_only: disk.read_only(),
            backing: None,
        })
        .collect();
    for options in &backends.nets {
        let mac = match options.mac {
            Some(mac) => mac,
            None => random_mac()?,
        };
        devices.push(DeviceDescription::Net { mac });
    }
    devices.extend(backends.balloon.then_some(DeviceDescription::Balloon));
    devices.extend(backends.rng.then_some(DeviceDescription::Rng));
    let vsock = backends.vsock.as_ref();
    devices.extend(vsock.map(|options| DeviceDescription::Vsock {
        cid: options.wanted_cid(),
    }));
    let console = backends.console.as_ref();
    devices.extend(console.map(|_| DeviceDescription::Console));
    if devices.len() > MAX_DEVICES {
        return Err(DeviceError::TooMany(devices.len()));
    }
    Ok(devices)
}

fn random_mac() -> Result<MacAddress, DeviceError> {
    let mut bytes = [0; 6];
    getrandom::fill(&mut bytes)
        .map_err(|e| DeviceError::Resources(std::io::Error::other(e.to_string())))?;
    Ok(MacAddress::local(bytes))
}

/// Checks that what is given here is behind what the guest has.
pub(super) fn check(
    devices: &[DeviceDescription],
    (cards, backends): (&[Card<'_>], &Backends),
    disks: &[Arc<Disk>],
) -> Result<(), DeviceError> {
    let theirs = |disk: &&DeviceDescription| matches!(disk, DeviceDescription::Disk { .. });
    let guest = devices.iter().filter(theirs).count();
    if guest != disks.len() {
        return Err(DeviceError::Disks {
            guest,
            here: disks.len(),
        });
    }
    let macs = devices.iter().filter_map(|device| match device {
        DeviceDescription::Net { mac } => Some(*mac),
        _ => None,
    });
    let macs: Vec<MacAddress> = macs.collect();
    if macs.len() != cards.len() {
        return Err(DeviceError::Nets {
            guest: macs.len(),
            here: cards.len(),
        });
    }
    for (disk, device) in disks.iter().zip(devices.iter().filter(theirs)) {
        let same = matches!(device, DeviceDescription::Disk { bytes, read_only, .. }
            if (*bytes, *read_only) == (disk.bytes(), disk.read_only()));
        if !same {
            return Err(DeviceError::other_disk(disk, device));
        }
    }
    for (guest, options) in macs.into_iter().zip(&backends.nets) {
        if let Some(here) = options.mac.filter(|mac| *mac != guest) {
            return Err(DeviceError::Mac { guest, here });
        }
    }
    let console = |device: &&DeviceDescription| matches!(device, DeviceDescription::Console);
    match devices.iter().filter(console).count() {
        0 if backends.console.is_some() => return Err(DeviceError::NoConsole),
        0 | 1 => {}
        several => return Err(DeviceError::Consoles(several)),
    }
    check_vsock(devices, backends.vsock.as_ref())
}

fn check_vsock(
    devices: &[DeviceDescription],
    here: Option<&VsockOptions>,
) -> Result<(), DeviceError> {
    let cids = devices.iter().filter_map(|device| match device {
        DeviceDescription::Vsock { cid } => Some(*cid),
        _ => None,
    });
    let cids: Vec<u32> = cids.collect();
    match (cids.as_slice(), here) {
        ([], None) => Ok(()),
        ([], Some(_)) => Err(DeviceError::NoVsock),
        ([_], None) => Err(DeviceError::Vsock),
        ([guest], Some(options)) => match options.cid().filter(|cid| cid != guest) {
            None if CIDS.contains(guest) => Ok(()),
            None => Err(VsockError::Cid(*guest).into()),
            Some(here) => Err(DeviceError::Cid {
                guest: *guest,
                here,
            }),
        },
        _ => Err(DeviceError::Vsocks(cids.len())),
    }
}
