//! Whom the two ends of a migration trust: the options of `ferry migrate`, `recover` and `receive`.

use super::pki;
use ferry_migration::net::tls::{Credentials, PairingLine, ServerTls};
use ferry_terminal::output::Failure;
use ferry_terminal::units::size;
use ferry_vmm::api::types::TlsFiles;
use ferry_vmm::migrate::{Gate, Network, Uri};
use std::io::{self, BufRead};
use std::path::{PathBuf, absolute};
use std::sync::Arc;

/// Where certificates for agents are, if not said otherwise.
pub const AGENTS: &str = "/etc/ferry/pki";

/// Certificates, at the source.
#[derive(Debug, clap::Args)]
#[group(skip)]
#[command(next_help_heading = "Security")]
pub struct Certificates {
    /// Encrypt every connection, and let both sides show certificates of one authority: the folder
    /// with ca-cert.pem, client-cert.pem and client-key.pem (`ferry pki` makes them).
    #[arg(long, value_name = "DIR")]
    tls: Option<PathBuf>,
    /// The name that the receiver's certificate must carry, if it is not the host of the URI.
    #[arg(long, value_name = "NAME", requires = "tls")]
    tls_authz: Option<String>,
}

impl Certificates {
    /// The folder for an agent.
    pub fn folder_or_default(&self) -> PathBuf {
        self.tls.clone().unwrap_or_else(|| AGENTS.into())
    }

    /// The folder, as it was given.
    pub fn folder(&self) -> Option<String> {
        self.tls.as_ref().map(|dir| dir.display().to_string())
    }

    /// The name that the receiver's certificate must carry, as it was given.
    pub fn name(&self) -> Option<&str> {
        self.tls_authz.as_deref()
    }

    /// As the VMM is to be told, which has another working directory.
    pub fn files(&self) -> Result<Option<TlsFiles>, Failure> {
        let Some(dir) = &self.tls else {
            return Ok(None);
        };
        let authz = self.tls_authz.clone();
        let dir = absolute(dir).map_err(|e| Failure(format!("{}: {e}", dir.display())))?;
        Ok(Some(TlsFiles { dir, authz }))
    }
}

/// Pairing, at the source.
#[derive(Debug, clap::Args)]
#[group(skip)]
#[command(next_help_heading = "Security")]
pub struct Pair {
    /// Encrypt every connection to the receiver that printed this line (`ferry receive --pair`),
    /// which lets in this guest by it. `-` reads it from stdin, where no list of processes shows
    /// it.
    #[arg(long, value_name = "LINE", conflicts_with = "tls")]
    pair: Option<String>,
}

impl Pair {
    /// The line.
    pub fn line(&self) -> Result<Option<String>, Failure> {
        if self.pair.as_deref() != Some("-") {
            return Ok(self.pair.clone());
        }
        let mut line = String::new();
        let read = io::stdin().lock().read_line(&mut line);
        read.map_err(|e| Failure(format!("cannot read the pairing line from stdin ({e})")))?;
        Ok(Some(line.trim().to_owned()))
    }
}

/// Whom a receiver lets in.
#[derive(Debug, clap::Args)]
#[group(skip)]
#[command(next_help_heading = "Security")]
pub struct Receiver {
    /// Encrypt every connection, and take only sources that show a certificate of the same
    /// authority: the folder with ca-cert.pem, server-cert.pem and server-key.pem (`ferry pki`
    /// makes them).
    #[arg(long, value_name = "DIR", conflicts_with_all = ["pair", "insecure"])]
    tls: Option<PathBuf>,
    /// Names of which the source's certificate must carry one; without it, any certificate of the
    /// authority will do.
    #[arg(long, value_name = "NAME", value_delimiter = ',', requires = "tls")]
    tls_authz: Vec<String>,
    /// Encrypt every connection by a certificate made for this guest alone, and print the line that
    /// the source is to give to `ferry migrate --pair`.
    #[arg(long, conflicts_with = "insecure")]
    pair: bool,
    /// Listen beyond this host without encryption: every host that reaches the port can place a
    /// guest here, and every host on the path can read and change the guest's memory.
    #[arg(long)]
    insecure: bool,
    /// Take connections only from these addresses or networks, such as 192.0.2.0/24.
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',')]
    accept_from: Vec<Network>,
    /// The most memory that a guest may have.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    max_memory: Option<u64>,
    /// The most processors that a guest may have.
    #[arg(long, value_name = "N")]
    max_cpus: Option<u32>,
}

impl Receiver {
    /// The gate, and the line to tell the user where the source is to bring it.
    pub fn gate(&self, uri: &Uri) -> Result<(Gate, Option<PairingLine>), Failure> {
        let secured = self.tls.is_some() || self.pair;
        match uri {
            Uri::Unix(_) if secured || !self.accept_from.is_empty() => {
                return Err(Failure(format!(
                    "{uri} stays on this host, where the permissions of the socket's file say who may connect: leave out \
                     --tls, --pair and --accept-from"
                )));
            }
            Uri::Tcp { .. } if !secured && !self.insecure && !uri.is_on_this_host() => {
                return Err(Failure(format!(
                    "every host that reaches {uri} could place a guest here, with this host's disks and network, and every \
                     host on the path could read its memory: give --tls DIR or --pair, or --insecure where only the two hosts reach it"
                )));
            }
            _ => {}
        }
        let mut gate = Gate::default();
        let mut line = None;
        if let Some(dir) = &self.tls {
            let credentials = Credentials::receiver(dir)?;
            gate.tls = Some(ServerTls::with_credentials(&credentials, &self.tls_authz)?);
        } else if self.pair {
            let pairing = Arc::new(pki::pairing()?);
            line = Some(pairing.line());
            gate.tls = Some(ServerTls::paired(pairing)?);
        }
        gate.from.clone_from(&self.accept_from);
        gate.max_memory = self.max_memory;
        gate.max_cpus = self.max_cpus;
        Ok((gate, line))
    }
}
