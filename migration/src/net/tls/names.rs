//! The names that a certificate carries.

use super::TlsError;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::ParsedCertificate;

/// The attribute type `commonName`, 2.5.4.3 (RFC 5280, appendix A.1).
const COMMON_NAME: [u8; 3] = [0x55, 4, 3];

/// A name of `--tls-authz`.
#[derive(Clone, Debug)]
pub(super) struct Name {
    text: String,
    parsed: ServerName<'static>,
}

impl Name {
    pub(super) fn new(text: &str) -> Result<Self, TlsError> {
        let parsed = ServerName::try_from(text.to_owned());
        Ok(Self {
            parsed: parsed.map_err(|_| TlsError::Name(text.to_owned()))?,
            text: text.to_owned(),
        })
    }

    /// Whether a certificate carries it: as an alternative name, or as the common name, which is
    /// all that many clients' certificates have.
    pub(super) fn is_in(&self, certificate: &CertificateDer<'_>) -> Result<bool, TlsError> {
        let parsed = ParsedCertificate::try_from(certificate).map_err(TlsError::Config)?;
        Ok(
            rustls::client::verify_server_name(&parsed, &self.parsed).is_ok()
                || identity(certificate)
                    .is_some_and(|(subject, _)| has_common_name(&subject, &self.text)),
        )
    }
}

/// The subject and the public key of a certificate, as X.509 codes them.
fn identity(certificate: &CertificateDer<'_>) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut store = RootCertStore::empty();
    store.add(certificate.clone().into_owned()).ok()?;
    let anchor = store.roots.first()?;
    Some((
        anchor.subject.to_vec(),
        anchor.subject_public_key_info.to_vec(),
    ))
}

/// What tells authorities apart: the subject and the public key of the first certificate of a PEM
/// text.
#[must_use]
pub fn identity_of(pem: &str) -> Option<(Vec<u8>, Vec<u8>)> {
    identity(&CertificateDer::from_pem_slice(pem.as_bytes()).ok()?)
}

/// Takes one element off DER (X.690 §8.1): its tag, its content, and what follows.
fn element(input: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, input) = input.split_first()?;
    let (&first, input) = input.split_first()?;
    // A subject is far shorter than what three bytes of length could say.
    let (length, input) = match first {
        0..=0x7f => (usize::from(first), input),
        0x81 => (usize::from(*input.first()?), input.get(1..)?),
        0x82 => (
            usize::from(u16::from_be_bytes([*input.first()?, *input.get(1)?])),
            input.get(2..)?,
        ),
        _ => return None,
    };
    let (content, rest) = input.split_at_checked(length)?;
    Some((tag, content, rest))
}

/// Whether a subject, a sequence of sets of attributes, has this common name.
fn has_common_name(subject: &[u8], name: &str) -> bool {
    const OBJECT_IDENTIFIER: u8 = 6;
    const UTF8: u8 = 0x0c;
    const PRINTABLE: u8 = 0x13;
    const SEQUENCE: u8 = 0x30;
    const SET: u8 = 0x31;
    let mut sets = subject;
    while let Some((SET, mut attributes, rest)) = element(sets) {
        sets = rest;
        while let Some((SEQUENCE, attribute, rest)) = element(attributes) {
            attributes = rest;
            if let Some((OBJECT_IDENTIFIER, kind, value)) = element(attribute)
                && kind == COMMON_NAME
                && let Some((UTF8 | PRINTABLE, text, _)) = element(value)
                && text.eq_ignore_ascii_case(name.as_bytes())
            {
                return true;
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_common_name_is_found_among_other_attributes() {
        let attribute = |kind: &[u8], text: &[u8]| {
            let parts = [
                &[6, 3][..],
                kind,
                &[0x0c, text.len().to_le_bytes()[0]],
                text,
            ]
            .concat();
            let all = [&[0x30, parts.len().to_le_bytes()[0]][..], &parts].concat();
            [&[0x31, all.len().to_le_bytes()[0]][..], &all].concat()
        };
        let country = attribute(&[0x55, 4, 6], b"node2");
        let subject = [country, attribute(&COMMON_NAME, b"Node1")].concat();
        assert!(has_common_name(&subject, "node1"));
        assert!(!has_common_name(&subject, "node2") && !has_common_name(&subject, "node"));
        for end in 0..subject.len() {
            assert!(!has_common_name(&subject[..end], "node1"), "{end}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(!has_common_name(&bytes, "a name that no test makes"));
        }
    }
}
