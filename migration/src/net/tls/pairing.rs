//! Pairing without an authority: one line from the receiver's terminal to the source's.
//!
//! The line carries the SHA-256 of the receiver's throw-away certificate, which the source pins,
//! and a one-time token, which the source sends inside TLS. Each side so knows the other; nothing
//! of this is cryptography of our own.

use super::{SECRET_BYTES, Secret};
use crate::sync::{lock, wait_while};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, Error, SignatureScheme};
use sha2::{Digest, Sha256};
use std::fmt;
use std::str::FromStr;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// How long a source that tries again waits for the end of the migration that used its token.
const SETTLING: Duration = Duration::from_secs(2);
/// What a pairing line begins with: its form, so that a later one can differ.
const PREFIX: &str = "ferry-pair-1";
/// The name in a throw-away certificate: the fingerprint is what counts.
const NAME: &str = "ferry-pair";

type Fingerprint = [u8; 32];

pub(super) fn name() -> ServerName<'static> {
    ServerName::try_from(NAME).unwrap_or_else(|_| ServerName::from(std::net::Ipv4Addr::LOCALHOST))
}

fn fingerprint(certificate: &CertificateDer<'_>) -> Fingerprint {
    Sha256::digest(certificate.as_ref()).into()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; SECRET_BYTES]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * SECRET_BYTES {
        return None;
    }
    let digit = |byte: u8| {
        char::from(byte)
            .to_digit(16)
            .and_then(|d| u8::try_from(d).ok())
    };
    let mut bytes = [0; SECRET_BYTES];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

/// Why a text is no pairing line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a pairing line is what `ferry receive --pair` prints: {PREFIX}:FINGERPRINT:TOKEN, on one line"
)]
pub struct PairingError;

/// The line that `ferry receive --pair` prints.
#[derive(Clone, PartialEq, Eq)]
pub struct PairingLine {
    fingerprint: Fingerprint,
    pub(super) token: Secret,
}

impl PairingLine {
    pub(super) const fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    pub(super) const fn token(&self) -> Secret {
        self.token
    }
}

impl fmt::Display for PairingLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{PREFIX}:{}:{}",
            hex(&self.fingerprint),
            hex(&self.token.0)
        )
    }
}

impl fmt::Debug for PairingLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PairingLine({})", hex(&self.fingerprint))
    }
}

impl FromStr for PairingLine {
    type Err = PairingError;

    fn from_str(text: &str) -> Result<Self, PairingError> {
        let mut parts = text.trim().split(':');
        let (prefix, fingerprint, token) = (parts.next(), parts.next(), parts.next());
        if prefix != Some(PREFIX) || parts.next().is_some() {
            return Err(PairingError);
        }
        Ok(Self {
            fingerprint: fingerprint.and_then(unhex).ok_or(PairingError)?,
            token: Secret(token.and_then(unhex).ok_or(PairingError)?),
        })
    }
}

/// A receiver's throw-away certificate and its token, which can be spent once.
pub struct Pairing {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    token: Secret,
    unspent: Mutex<bool>,
    restored: Condvar,
}

impl fmt::Debug for Pairing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pairing").finish_non_exhaustive()
    }
}

impl Pairing {
    /// With a certificate that the caller has made for this purpose alone, and a random token.
    #[must_use]
    pub fn new(
        certificate: CertificateDer<'static>,
        key: PrivateKeyDer<'static>,
        token: [u8; SECRET_BYTES],
    ) -> Self {
        Self {
            certificate,
            key,
            token: Secret(token),
            unspent: Mutex::new(true),
            restored: Condvar::new(),
        }
    }

    /// What the source must be given.
    #[must_use]
    pub fn line(&self) -> PairingLine {
        PairingLine {
            fingerprint: fingerprint(&self.certificate),
            token: self.token,
        }
    }

    pub(super) const fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    pub(super) fn key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }

    /// Makes the token good for one more use: the guest that came with it has stayed at its source.
    pub fn restore(&self) {
        *self.unspent() = true;
        self.restored.notify_all();
    }

    fn unspent(&self) -> MutexGuard<'_, bool> {
        lock(&self.unspent)
    }

    /// Whether this is the token, unused so far. A wrong one does not spend it: 256 random bits
    /// are not guessed, and a stranger must not lock the source out.
    pub(super) fn spend(&self, token: &Secret) -> bool {
        if !self.token.matches(token) {
            return false;
        }
        let spent = |unspent: &mut bool| !*unspent;
        let (mut unspent, _) = wait_while(&self.restored, self.unspent(), Some(SETTLING), spent);
        std::mem::take(&mut *unspent)
    }
}

/// Accepts the one certificate that has the fingerprint.
#[derive(Debug)]
pub(super) struct Pinned {
    fingerprint: Fingerprint,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Pinned {
    pub(super) fn new(fingerprint: Fingerprint, provider: &CryptoProvider) -> Self {
        Self {
            fingerprint,
            algorithms: provider.signature_verification_algorithms,
        }
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if fingerprint(end_entity) == self.fingerprint {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(Error::InvalidCertificate(
                rustls::CertificateError::ApplicationVerificationFailure,
            ))
        }
    }

    // TLS 1.2 is not offered.
    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(
            rustls::PeerIncompatible::ServerDoesNotSupportTls12Or13,
        ))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
