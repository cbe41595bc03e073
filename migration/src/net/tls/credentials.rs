//! Certificates and keys in a folder, under the file names that QEMU and Cloud Hypervisor use.

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The certificate of the authority that both sides trust.
pub const CA_CERT: &str = "ca-cert.pem";
/// A receiver's certificate chain.
pub const SERVER_CERT: &str = "server-cert.pem";
/// A receiver's private key.
pub const SERVER_KEY: &str = "server-key.pem";
/// A source's certificate chain.
pub const CLIENT_CERT: &str = "client-cert.pem";
/// A source's private key.
pub const CLIENT_KEY: &str = "client-key.pem";

/// The most bytes that such a file can have: far above any chain of certificates.
const MAX_FILE: u64 = 1 << 20;

/// Why connections cannot be secured, or one is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {path} ({error}); `ferry pki host` makes the files of a host")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file holds nothing of what it should.
    #[error(
        "{path} is no {what} in PEM form ({error}); `ferry pki host` makes the files of a host"
    )]
    Content {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// Why it does not.
        error: String,
    },
    /// A key that others can read is no secret.
    #[error("{path} can be read by others (mode {mode:04o}); chmod 600 it, or make a new key")]
    Exposed {
        /// The key.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Key and certificate are not of one pair.
    #[error("{certificate} and {key} do not belong together ({error})")]
    Mismatch {
        /// The certificate.
        certificate: PathBuf,
        /// The key.
        key: PathBuf,
        /// What rustls says.
        error: rustls::Error,
    },
    /// Not a name that a certificate can carry.
    #[error("'{0}' is neither a host name nor an IP address, so no certificate can carry it")]
    Name(String),
    /// The authority's certificate is of no use.
    #[error("the certificates of {CA_CERT} cannot be used to check others ({0})")]
    Authorities(rustls::server::VerifierBuilderError),
    /// rustls does not take the configuration.
    #[error("TLS cannot be set up ({0})")]
    Config(rustls::Error),
    /// The connection may not be a channel.
    #[error("the connection was refused: {0}")]
    Refused(&'static str),
}

/// What one side shows and trusts.
pub struct Credentials {
    pub(super) authorities: Arc<RootCertStore>,
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
    certificate_path: PathBuf,
    key_path: PathBuf,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials")
            .field("certificate", &self.certificate_path)
            .finish_non_exhaustive()
    }
}

impl Credentials {
    /// A source's, from `ca-cert.pem`, `client-cert.pem` and `client-key.pem`.
    ///
    /// # Errors
    /// A file is missing, unreadable or not what it should be; a key that others can read.
    pub fn source(dir: &Path) -> Result<Self, TlsError> {
        Self::load(dir, CLIENT_CERT, CLIENT_KEY)
    }

    /// A receiver's, from `ca-cert.pem`, `server-cert.pem` and `server-key.pem`.
    ///
    /// # Errors
    /// As [`Credentials::source`].
    pub fn receiver(dir: &Path) -> Result<Self, TlsError> {
        Self::load(dir, SERVER_CERT, SERVER_KEY)
    }

    fn load(dir: &Path, certificate: &str, key: &str) -> Result<Self, TlsError> {
        let ca = dir.join(CA_CERT);
        let mut authorities = RootCertStore::empty();
        for certificate in certificates(&ca)? {
            authorities
                .add(certificate)
                .map_err(|error| content(&ca, "certificate", &error))?;
        }
        let certificate_path = dir.join(certificate);
        let key_path = dir.join(key);
        Ok(Self {
            authorities: Arc::new(authorities),
            chain: certificates(&certificate_path)?,
            key: private_key(&key_path)?,
            certificate_path,
            key_path,
        })
    }

    pub(super) fn mismatch(&self, error: rustls::Error) -> TlsError {
        TlsError::Mismatch {
            certificate: self.certificate_path.clone(),
            key: self.key_path.clone(),
            error,
        }
    }
}

fn content(path: &Path, what: &'static str, error: &dyn std::fmt::Display) -> TlsError {
    TlsError::Content {
        path: path.to_owned(),
        what,
        error: error.to_string(),
    }
}

/// Reads a file of at most [`MAX_FILE`] bytes, and its permissions.
fn read(path: &Path) -> Result<(Vec<u8>, u32), TlsError> {
    let failed = |error| TlsError::Read {
        path: path.to_owned(),
        error,
    };
    let file = fs::File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(failed(io::Error::other("it is no regular file")));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    Ok((bytes, metadata.mode() & 0o7777))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let (bytes, _) = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(chain) if chain.is_empty() => Err(content(path, "certificate", &"it holds none")),
        Ok(chain) => Ok(chain),
        Err(error) => Err(content(path, "certificate", &error)),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let (bytes, mode) = read(path)?;
    if mode & 0o077 != 0 {
        return Err(TlsError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| content(path, "private key", &error))
}
