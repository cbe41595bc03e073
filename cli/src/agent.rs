//! `ferry agent`.

use super::outcome::Ended;
use ferry_agent::{Listening, Settings, serve};
use ferry_terminal::output::{Failure, say};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

/// Prepare this host for guests that others send here, and let them be started and stopped.
///
/// One agent runs on each host. `ferry migrate NAME HOST` and `ferry evacuate` ask it to check that
/// a guest can come (memory, disks, taps, /dev/kvm) and to start its receiver. Both sides show
/// certificates of one authority (`ferry pki`). Guests and receivers are processes of their own:
/// they go on when the agent ends.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry agent --listen 192.0.2.7:7007 --tls /etc/ferry/pki")]
pub struct Args {
    /// Settings as TOML: listen, tls, tls_authz, guests, peers, page, and the tables disks and taps
    /// with the names that disks and taps of other hosts have here.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where to listen [default: 0.0.0.0:7007].
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// The folder with ca-cert.pem, server-cert.pem and server-key.pem [default: /etc/ferry/pki].
    #[arg(long, value_name = "DIR")]
    tls: Option<PathBuf>,
    /// Names of which a client's certificate must carry one; without it, any certificate of the
    /// authority will do.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    tls_authz: Vec<String>,
    /// Serve a page for browsers of this host: hosts, guests and migrations as they go. A loopback
    /// address, such as 127.0.0.1:7008; it is in clear, for reading only, and for every user of
    /// this host.
    #[arg(long, value_name = "ADDRESS:PORT")]
    page: Option<SocketAddr>,
    /// The folder with guest files, NAME.toml each [default: /etc/ferry/guests].
    #[arg(long, value_name = "DIR")]
    guests: Option<PathBuf>,
}

impl Args {
    fn settings(&self) -> Result<Settings, Failure> {
        let mut settings = match &self.config {
            Some(path) => Settings::read(path).map_err(|e| Failure(e.to_string()))?,
            None => Settings::default(),
        };
        if let Some(listen) = self.listen {
            settings.listen = listen;
        }
        if let Some(tls) = &self.tls {
            settings.tls.clone_from(tls);
        }
        if !self.tls_authz.is_empty() {
            settings.tls_authz.clone_from(&self.tls_authz);
        }
        if let Some(guests) = &self.guests {
            settings.guests.clone_from(guests);
        }
        settings.page = self.page.or(settings.page);
        Ok(settings)
    }
}

pub fn run(args: &Args) -> Result<ExitCode, Ended> {
    let listening = |places: &Listening| {
        say(&format!("the agent listens on {}", places.agent));
        if let Some(url) = &places.page {
            say(&format!("its page is {url}"));
        }
    };
    serve(args.settings()?, listening).map_err(|e| Failure(e.to_string()))?;
    Ok(ExitCode::SUCCESS)
}
