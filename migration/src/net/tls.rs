//! TLS 1.3 (RFC 8446) on a migration's channels, by rustls.
//!
//! ```text
//! source                                         receiver
//!   ├── TLS handshake: both show a certificate ────▶┤   with --tls DIR
//!   ├── TLS handshake: receiver's fingerprint ─────▶┤   with --pair LINE
//!   ├── ADMISSION: kind, proof ────────────────────▶┤   refused: the connection ends
//!   ├── preamble, HELLO … ─────────────────────────▶┤
//! ```
//!
//! The admission says why this connection may be a channel of the migration: the first one brings
//! nothing more than its certificate, or the one-time token of a pairing line; every later one
//! brings the session's secret. That is an exported key of the control channel's handshake
//! (RFC 8446 §7.5), so only the two ends of the control channel know it.

mod credentials;
pub(super) mod kernel;
mod names;
mod pairing;
mod session;

pub use credentials::{
    CA_CERT, CLIENT_CERT, CLIENT_KEY, Credentials, SERVER_CERT, SERVER_KEY, TlsError,
};
pub use kernel::codes_in_kernel;
pub use names::identity_of;
pub use pairing::{Pairing, PairingError, PairingLine};
pub(super) use session::TlsSession;
pub use session::sentence;

pub use rustls::pki_types;

use names::Name;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, ServerConfig, SupportedProtocolVersion};
use std::sync::Arc;

/// The only version: earlier ones have weaker handshakes, and no peer needs them.
const VERSIONS: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];

/// Bytes of the exported secret and of a pairing token.
pub const SECRET_BYTES: usize = 32;

/// What only the two ends of a control channel know.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Secret([u8; SECRET_BYTES]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Secret {
    /// Compares without telling by its time where two secrets differ.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        let differing = self
            .0
            .iter()
            .zip(&other.0)
            .fold(0, |all, (a, b)| all | (a ^ b));
        std::hint::black_box(differing) == 0
    }
}

/// Why a connection may be a channel of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Admission {
    /// The peer's certificate says it all: a control channel between hosts of one CA.
    Certificate,
    /// The one-time token of a pairing line.
    Token(Secret),
    /// A further channel of a session whose control channel has this secret.
    Session(Secret),
}

impl Admission {
    /// Bytes on the wire: the kind, then the proof.
    pub const BYTES: usize = 1 + SECRET_BYTES;

    /// The bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let (kind, proof) = match self {
            Self::Certificate => (0, [0; SECRET_BYTES]),
            Self::Token(token) => (1, token.0),
            Self::Session(secret) => (2, secret.0),
        };
        let mut bytes = [kind; Self::BYTES];
        bytes[1..].copy_from_slice(&proof);
        bytes
    }

    /// From bytes of the peer; `None` for a kind that this build does not know.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let mut proof = [0; SECRET_BYTES];
        proof.copy_from_slice(&bytes[1..]);
        match bytes[0] {
            0 => Some(Self::Certificate),
            1 => Some(Self::Token(Secret(proof))),
            2 => Some(Self::Session(Secret(proof))),
            _ => None,
        }
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// How a source secures its connections.
#[derive(Clone, Debug)]
pub struct ClientTls {
    pub(crate) config: Arc<ClientConfig>,
    /// The name that the receiver's certificate must carry.
    pub(crate) name: ServerName<'static>,
    /// What the control channel brings.
    admission: Admission,
}

impl ClientTls {
    /// Both sides show certificates of one CA; the receiver's must be for `host`.
    ///
    /// # Errors
    /// The credentials do not fit together, or `host` cannot be a certificate's name.
    pub fn with_credentials(credentials: &Credentials, host: &str) -> Result<Self, TlsError> {
        let name =
            ServerName::try_from(host.to_owned()).map_err(|_| TlsError::Name(host.to_owned()))?;
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)
            .map_err(TlsError::Config)?
            .with_root_certificates(Arc::clone(&credentials.authorities))
            .with_client_auth_cert(credentials.chain.clone(), credentials.key.clone_key())
            .map_err(|error| credentials.mismatch(error))?;
        Ok(Self::new(config, name, Admission::Certificate))
    }

    /// The receiver is the one that printed `line`, and it gets the line's token.
    ///
    /// # Errors
    /// [`TlsError::Config`].
    pub fn paired(line: &PairingLine) -> Result<Self, TlsError> {
        let verifier: Arc<dyn ServerCertVerifier> =
            Arc::new(pairing::Pinned::new(line.fingerprint(), &provider()));
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)
            .map_err(TlsError::Config)?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        Ok(Self::new(
            config,
            pairing::name(),
            Admission::Token(line.token()),
        ))
    }

    fn new(mut config: ClientConfig, name: ServerName<'static>, admission: Admission) -> Self {
        // Every channel makes a full handshake: a resumed one would skip the certificates.
        config.resumption = rustls::client::Resumption::disabled();
        // For the kernel, where it codes the records.
        config.enable_secret_extraction = true;
        Self {
            config: Arc::new(config),
            name,
            admission,
        }
    }

    /// As rustls wants it, for a client of another protocol with the same certificates.
    #[must_use]
    pub fn config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.config)
    }

    /// The name that the peer's certificate must carry.
    #[must_use]
    pub const fn name(&self) -> &ServerName<'static> {
        &self.name
    }

    /// What a connection says first: the control channel why it may begin a migration, a further
    /// one the secret of the session.
    #[must_use]
    pub const fn admission(&self, session: Option<Secret>) -> Admission {
        match session {
            Some(secret) => Admission::Session(secret),
            None => self.admission,
        }
    }
}

/// How a receiver secures its connections.
#[derive(Clone, Debug)]
pub struct ServerTls {
    pub(crate) config: Arc<ServerConfig>,
    /// Names of which the source's certificate must carry one; empty: any of the CA.
    allowed: Arc<[Name]>,
    pairing: Option<Arc<Pairing>>,
}

impl ServerTls {
    /// Both sides show certificates of one CA; the source's must carry one of `allowed`, if any
    /// are given.
    ///
    /// # Errors
    /// The credentials do not fit together, or a name cannot be a certificate's.
    pub fn with_credentials(
        credentials: &Credentials,
        allowed: &[String],
    ) -> Result<Self, TlsError> {
        let allowed = allowed
            .iter()
            .map(|name| Name::new(name))
            .collect::<Result<_, _>>()?;
        let verifier = WebPkiClientVerifier::builder_with_provider(
            Arc::clone(&credentials.authorities),
            provider(),
        )
        .build()
        .map_err(TlsError::Authorities)?;
        let config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)
            .map_err(TlsError::Config)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(credentials.chain.clone(), credentials.key.clone_key())
            .map_err(|error| credentials.mismatch(error))?;
        Ok(Self::new(config, allowed, None))
    }

    /// A source that has the pairing line may come, once.
    ///
    /// # Errors
    /// [`TlsError::Config`].
    pub fn paired(pairing: Arc<Pairing>) -> Result<Self, TlsError> {
        let config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)
            .map_err(TlsError::Config)?
            .with_no_client_auth()
            .with_single_cert(vec![pairing.certificate().clone()], pairing.key())
            .map_err(TlsError::Config)?;
        Ok(Self::new(config, Arc::new([]), Some(pairing)))
    }

    fn new(mut config: ServerConfig, allowed: Arc<[Name]>, pairing: Option<Arc<Pairing>>) -> Self {
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.enable_secret_extraction = true;
        Self {
            config: Arc::new(config),
            allowed,
            pairing,
        }
    }

    /// As rustls wants it, for a server of another protocol with the same certificates.
    #[must_use]
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }

    /// Whether a peer's certificate, which the handshake has found good, carries an allowed name.
    ///
    /// # Errors
    /// [`TlsError::Refused`], with the reason.
    pub fn permits(&self, certificate: Option<&CertificateDer<'_>>) -> Result<(), TlsError> {
        if self.allowed.is_empty() {
            return Ok(());
        }
        let certificate = certificate.ok_or(TlsError::Refused("it shows no certificate"))?;
        for name in self.allowed.iter() {
            if name.is_in(certificate)? {
                return Ok(());
            }
        }
        Err(TlsError::Refused(
            "its certificate carries none of the names of --tls-authz",
        ))
    }

    /// Whether the connection may be a channel: its certificate carries an allowed name, and its
    /// admission is a certificate where those are asked for, or an unused token where pairing is.
    /// A session's secret is for the caller to compare: it knows the sessions.
    ///
    /// # Errors
    /// [`TlsError::Refused`], with the reason.
    pub(super) fn admit(
        &self,
        certificate: Option<&CertificateDer<'_>>,
        admission: &Admission,
    ) -> Result<(), TlsError> {
        self.permits(certificate)?;
        match (admission, &self.pairing) {
            (Admission::Certificate, None) | (Admission::Session(_), _) => Ok(()),
            (Admission::Token(token), Some(pairing)) if pairing.spend(token) => Ok(()),
            (Admission::Token(_), Some(_)) => {
                Err(TlsError::Refused("its token is wrong or was used before"))
            }
            (Admission::Certificate, Some(_)) => Err(TlsError::Refused(
                "it brings no token: give the line to migrate --pair",
            )),
            (Admission::Token(_), None) => Err(TlsError::Refused(
                "it brings a token, but this receiver wants certificates: use migrate --tls DIR",
            )),
        }
    }

    /// The guest that was let in has stayed at its source: a pairing line is good once more.
    pub fn restore(&self) {
        if let Some(pairing) = &self.pairing {
            pairing.restore();
        }
    }
}

#[cfg(test)]
mod tests;
