//! Looking on: `--metrics` and `--linger`, which every command has that is a VMM.

use ferry_terminal::output::{Failure, say};
use ferry_terminal::units::duration;
use ferry_vmm::api::scrape::{ScrapeListener, Scraped};
use ferry_vmm::vmm::Vmm;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug, clap::Args)]
// The commands have a group of this name already.
#[group(skip)]
pub struct Args {
    /// Serve /metrics for Prometheus over TCP, and nothing else: on this port of the loopback
    /// address, or on the address given. Every process that reaches it may read it; port 0 takes a
    /// free one.
    #[arg(long, value_name = "[ADDR:]PORT", help_heading = "VMM")]
    metrics: Option<Address>,
    /// How long the control socket and --metrics stay after the guest has moved away, for `ferry
    /// report` and a last scrape. Its memory is given back. SIGTERM or `ferry stop` end it sooner.
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "VMM")]
    linger: Option<Duration>,
}

/// Where `/metrics` is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Address(SocketAddr);

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(port) = text.parse::<u16>() {
            return Ok(Self((IpAddr::V4(Ipv4Addr::LOCALHOST), port).into()));
        }
        text.parse().map(Self).map_err(|_| {
            "give a port, such as 9100, or an IP address and a port, such as 192.0.2.1:9100 or [::]:9100".into()
        })
    }
}

impl Args {
    /// How long to stay after the guest has moved away.
    pub fn linger(&self) -> Duration {
        self.linger.unwrap_or_default()
    }

    /// Listens for scrapers. To be called before the sandbox is entered.
    pub fn bind(&self) -> Result<Scraping, Failure> {
        let Some(Address(address)) = self.metrics else {
            return Ok(Scraping(None));
        };
        let failed = |e: std::io::Error| {
            Failure(format!(
                "--metrics {address} cannot be listened on ({e}); choose another port or address"
            ))
        };
        let listener = ScrapeListener::bind(address).map_err(failed)?;
        let address = listener.address().map_err(failed)?;
        Ok(Scraping(Some((listener, address))))
    }
}

/// A listener for scrapers, if one was wanted.
pub struct Scraping(Option<(ScrapeListener, SocketAddr)>);

impl Scraping {
    /// Where it is, for `GET /v1/vm`.
    pub fn url(&self) -> Option<String> {
        let (_, address) = self.0.as_ref()?;
        Some(format!("http://{address}/metrics"))
    }

    /// Serves from now on, until what is returned is dropped.
    pub fn serve(self, vmm: &Vmm) -> Result<Option<Scraped>, Failure> {
        let url = self.url();
        let Some((listener, _)) = self.0 else {
            return Ok(None);
        };
        let scraped = listener.serve(Arc::new(vmm.clone()))?;
        say(&format!("metrics: {}", url.unwrap_or_default()));
        Ok(Some(scraped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_alone_is_on_the_loopback_address() {
        let parse = |text: &str| text.parse::<Address>().map(|a| a.0.to_string());
        assert_eq!(parse("9100").as_deref(), Ok("127.0.0.1:9100"));
        assert_eq!(parse("192.0.2.1:9100").as_deref(), Ok("192.0.2.1:9100"));
        assert_eq!(parse("[::]:0").as_deref(), Ok("[::]:0"));
        for odd in ["", "localhost:9100", "70000", "192.0.2.1"] {
            assert!(parse(odd).unwrap_err().contains("9100"), "{odd}");
        }
    }
}
