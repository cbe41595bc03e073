//! Certificates as a test wants them, in folders for `--tls`.

use ferry_migration::net::tls::{
    CA_CERT, CLIENT_CERT, CLIENT_KEY, ClientTls, Credentials, SERVER_CERT, SERVER_KEY,
};
use ferry_vmm::api::types::{Security, TlsFiles};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use tempfile::TempDir;

/// Where receivers of tests listen.
pub const HERE: &str = "127.0.0.1";
/// A year that is far away.
pub const FAR: i32 = 4000;

/// Makes certificates.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Default for Authority {
    fn default() -> Self {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }
}

impl Authority {
    /// A host's folder, with certificates for `name` and [`HERE`].
    pub fn host(&self, name: &str) -> Certificates {
        self.host_of(&[name, HERE], FAR)
    }

    /// A host's folder, with certificates for `names` that are valid until `year`.
    pub fn host_of(&self, names: &[&str], year: i32) -> Certificates {
        let host = Certificates(tempfile::tempdir().unwrap());
        host.put(CA_CERT, &self.pem);
        for (cert, key) in [(SERVER_CERT, SERVER_KEY), (CLIENT_CERT, CLIENT_KEY)] {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let mut params = CertificateParams::new(names).unwrap();
            params.not_before = date_time_ymd(2000, 1, 1);
            params.not_after = date_time_ymd(year, 1, 1);
            let pair = KeyPair::generate().unwrap();
            let signed = params.signed_by(&pair, &self.issuer).unwrap();
            host.put(cert, &signed.pem());
            host.put(key, &pair.serialize_pem());
        }
        host
    }
}

/// A host's folder.
#[derive(Debug)]
pub struct Certificates(TempDir);

impl Certificates {
    /// Where it is.
    pub fn dir(&self) -> &Path {
        self.0.path()
    }

    /// As an argument.
    pub fn text(&self) -> &str {
        self.dir().to_str().unwrap()
    }

    /// Writes a file of it, for its owner alone.
    pub fn put(&self, file: &str, text: &str) {
        let path = self.dir().join(file);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    /// For a migration's request.
    pub fn security(&self) -> Security {
        Security {
            tls: Some(TlsFiles {
                dir: self.dir().to_owned(),
                authz: None,
            }),
            pair: None,
        }
    }

    /// For a source made by hand.
    pub fn client(&self) -> ClientTls {
        let credentials = Credentials::source(self.dir()).unwrap();
        ClientTls::with_credentials(&credentials, HERE).unwrap()
    }
}
