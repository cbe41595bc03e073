//! The kernel's command line, as far as it is meant for init.

/// An address for a network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// The interface: `eth0`.
    pub name: String,
    /// Its address.
    pub address: [u8; 4],
    /// Length of its network's prefix in bits.
    pub prefix: u32,
    /// The way to everything else.
    pub gateway: Option<[u8; 4]>,
}

/// What this machine is to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// A nested host rather than a guest.
    pub host: bool,
    /// Where a host's agent reports to, and its token.
    pub agent: Option<String>,
    /// Addresses.
    pub networks: Vec<Network>,
    /// What a guest runs.
    pub run: Option<String>,
    /// How often.
    pub repeat: Option<String>,
    /// On how many threads.
    pub cpus: Option<String>,
    /// The disk that a guest tries.
    pub disk: Option<String>,
    /// The random numbers that a guest reads.
    pub rng: Option<String>,
    /// Tokens that are not understood.
    pub odd: Vec<String>,
}

impl Options {
    /// Those of the running kernel.
    pub fn of_this_kernel() -> Self {
        Self::parse(&std::fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let mut options = Self::default();
        for token in text.split_ascii_whitespace() {
            let Some((key, value)) = token.strip_prefix("ferry.").and_then(|t| t.split_once('='))
            else {
                continue;
            };
            let text = Some(value.to_owned());
            match (key, value) {
                ("role", "host") => options.host = true,
                ("role", "guest") => options.host = false,
                ("agent", _) => options.agent = text,
                ("run", _) => options.run = text,
                ("repeat", _) => options.repeat = text,
                ("cpus", _) => options.cpus = text,
                ("disk", _) => options.disk = text,
                ("rng", _) => options.rng = text,
                ("net", _) => match network(value) {
                    Some(network) => options.networks.push(network),
                    None => options.odd.push(token.to_owned()),
                },
                _ => options.odd.push(token.to_owned()),
            }
        }
        options
    }
}

/// Reads `NAME=ADDRESS/PREFIX[,GATEWAY]`.
pub fn network(text: &str) -> Option<Network> {
    let (name, rest) = text.split_once('=')?;
    let (address, gateway) = match rest.split_once(',') {
        Some((address, gateway)) => (address, Some(ip(gateway)?)),
        None => (rest, None),
    };
    let (address, prefix) = address.split_once('/')?;
    Some(Network {
        name: Some(name)
            .filter(|n| (1..16).contains(&n.len()))?
            .to_owned(),
        address: ip(address)?,
        prefix: prefix.parse().ok().filter(|n| *n <= 32)?,
        gateway,
    })
}

fn ip(text: &str) -> Option<[u8; 4]> {
    text.parse::<std::net::Ipv4Addr>().ok().map(|a| a.octets())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_others_are_left_alone_and_odd_ones_are_told() {
        let options = Options::parse(
            "console=ttyS0 ferry.role=host ferry.agent=10.0.2.2:4000,abc ferry.net=eth0=10.0.2.15/24,10.0.2.2 \
             ferry.net=eth1=10.9.0.1/24 ferry.net=eth2 ferry.what=1 root=/dev/vda\n",
        );
        assert!(options.host);
        assert_eq!(options.agent.as_deref(), Some("10.0.2.2:4000,abc"));
        assert_eq!(options.networks.len(), 2);
        assert_eq!(options.networks[0].gateway, Some([10, 0, 2, 2]));
        assert_eq!(
            (options.networks[1].address, options.networks[1].prefix),
            ([10, 9, 0, 1], 24)
        );
        assert_eq!(options.odd, ["ferry.net=eth2", "ferry.what=1"]);
    }

    #[test]
    fn impossible_addresses_are_refused() {
        for text in [
            "eth0=1.2.3.4/33",
            "eth0=1.2.3/8",
            "=1.2.3.4/8",
            "a-name-that-is-too-long=1.2.3.4/8",
            "eth0=1.2.3.4/8,x",
        ] {
            assert_eq!(network(text), None, "{text}");
        }
    }
}
