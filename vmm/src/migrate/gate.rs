//! Whom a receiver lets in, and how large a guest it takes.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ferry_migration::net::tls::ServerTls;

use crate::machine::MachineDescription;

/// Which sources a receiver lets in, and how large a guest it takes. The default lets in every
/// source.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Gate {
    /// Secures every connection.
    pub tls: Option<ServerTls>,
    /// The addresses that may connect; empty: all.
    pub from: Vec<Network>,
    /// The most memory of a guest, in bytes.
    pub max_memory: Option<u64>,
    /// The most processors of a guest.
    pub max_cpus: Option<u32>,
}

impl Gate {
    /// Whether a connection may come from there; `None` is this host, over a Unix socket.
    pub(super) fn admits(&self, address: Option<IpAddr>) -> bool {
        let listed = |address| self.from.iter().any(|network| network.contains(address));
        self.from.is_empty() || address.is_none_or(listed)
    }

    /// Whether a guest is small enough.
    pub(super) fn check(&self, guest: &MachineDescription) -> Result<(), String> {
        match (self.max_memory, self.max_cpus) {
            (Some(most), _) if guest.memory > most => Err(format!(
                "the guest has {} MiB of memory, and this receiver takes at most {} MiB (--max-memory)",
                guest.memory >> 20,
                most >> 20
            )),
            (_, Some(most)) if guest.cpus > most => Err(format!(
                "the guest has {} processors, and this receiver takes at most {most} (--max-cpus)",
                guest.cpus
            )),
            _ => Ok(()),
        }
    }
}

/// Addresses that begin with the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

/// Why a text is no [`Network`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no network; write ADDRESS or ADDRESS/BITS, such as 192.0.2.0/24 or 2001:db8::/32"
)]
pub struct NetworkError(String);

impl Network {
    /// Whether an address is of this network. An IPv4 address in IPv6's form is the IPv4 address.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let same = |ours: u128, theirs: u128, width: u32| {
            let differing = width - u32::from(self.bits);
            // A shift by all 128 bits is none.
            (ours ^ theirs).checked_shr(differing).unwrap_or(0) == 0
        };
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(ours), IpAddr::V4(theirs)) => {
                same(ours.to_bits().into(), theirs.to_bits().into(), 32)
            }
            (IpAddr::V6(ours), IpAddr::V6(theirs)) => same(ours.to_bits(), theirs.to_bits(), 128),
            _ => false,
        }
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let wrong = || NetworkError(text.to_owned());
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let width = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(width), |bits| bits.parse().map_err(|_| wrong()))?;
        if bits > width {
            return Err(wrong());
        }
        Ok(Self { address, bits })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_contains_what_begins_as_it_does() {
        let contains = |network: &str, address: &str| {
            let network: Network = network.parse().unwrap();
            network.contains(address.parse().unwrap())
        };
        for (network, address) in [
            ("192.0.2.7", "192.0.2.7"),
            ("192.0.2.0/24", "192.0.2.255"),
            ("192.0.2.0/24", "::ffff:192.0.2.9"),
            ("0.0.0.0/0", "203.0.113.1"),
            ("2001:db8::/32", "2001:db8:ffff::1"),
            ("::/0", "2001:db8::1"),
        ] {
            assert!(contains(network, address), "{network} {address}");
        }
        for (network, address) in [
            ("192.0.2.7", "192.0.2.6"),
            ("192.0.2.0/24", "192.0.3.0"),
            ("0.0.0.0/0", "::1"),
            ("2001:db8::/32", "2001:db9::1"),
            ("::/0", "192.0.2.1"),
        ] {
            assert!(!contains(network, address), "{network} {address}");
        }
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for text in [
            "",
            "host",
            "10.0.0.0/33",
            "10.0.0.0/-1",
            "10.0.0/8",
            "::/129",
            "10.0.0.0/",
        ] {
            let error = text.parse::<Network>().unwrap_err().to_string();
            assert!(error.contains("ADDRESS/BITS"), "{error}");
        }
        assert_eq!(
            "10.0.0.1".parse::<Network>().unwrap().to_string(),
            "10.0.0.1/32"
        );
    }

    #[test]
    fn the_default_lets_in_everybody_and_a_list_those_on_it() {
        let address = |text: &str| Some(text.parse().unwrap());
        assert!(Gate::default().admits(address("203.0.113.9")));
        let gate = Gate {
            from: vec!["192.0.2.0/24".parse().unwrap()],
            ..Gate::default()
        };
        assert!(gate.admits(address("192.0.2.1")) && gate.admits(None));
        assert!(!gate.admits(address("203.0.113.9")));
    }
}
