//! Where a migration goes, and how the connections there are secured.

use std::path::Path;
use std::sync::{Arc, Mutex};

use ferry_devices::sync::lock;
use ferry_migration::net::tls::{ClientTls, Credentials, PairingLine, Secret};

use super::Uri;
use crate::api::types::Security;
use crate::sandbox::may_read;

/// Where a migration goes, and how the connections there are secured.
#[derive(Clone, Debug)]
pub struct Peer {
    uri: Uri,
    secured: Option<Arc<Secured>>,
}

/// How the connections of one migration are secured.
#[derive(Debug)]
struct Secured {
    tls: ClientTls,
    /// What was asked for, to do it again for a recovery.
    how: Security,
    /// The control channel's secret, once there is one: later channels prove by it that they belong
    /// to the session.
    session: Mutex<Option<Secret>>,
}

/// In clear.
impl From<Uri> for Peer {
    fn from(uri: Uri) -> Self {
        Self { uri, secured: None }
    }
}

/// In clear.
impl From<&Uri> for Peer {
    fn from(uri: &Uri) -> Self {
        uri.clone().into()
    }
}

impl Peer {
    /// A receiver at `uri`, secured as `how` asks for.
    ///
    /// # Errors
    /// The files or the line are of no use, or `uri` is on this host; a sentence.
    pub fn new(uri: Uri, how: &Security) -> Result<Self, String> {
        let Uri::Tcp { host, .. } = &uri else {
            return match how.is_wanted() {
                true => Err(format!(
                    "{uri} stays on this host, where the permissions of the socket's file say who may connect: leave out \
                     --tls and --pair"
                )),
                false => Ok(uri.into()),
            };
        };
        let tls = match (&how.tls, &how.pair) {
            (None, None) => return Ok(uri.into()),
            (Some(_), Some(_)) => {
                return Err("give --tls or --pair, and not both".into());
            }
            (Some(files), None) => {
                let name = files.authz.as_ref().unwrap_or(host);
                source_credentials(&files.dir, name)?
            }
            (None, Some(line)) => {
                let line: PairingLine = line.parse().map_err(|e| format!("{e}"))?;
                ClientTls::paired(&line).map_err(|e| e.to_string())?
            }
        };
        let secured = Secured {
            tls,
            how: how.clone(),
            session: Mutex::new(None),
        };
        Ok(Self {
            uri,
            secured: Some(Arc::new(secured)),
        })
    }

    /// The receiver of the same migration at `uri`, where it listens now: secured as before, or as
    /// `how` asks for.
    ///
    /// # Errors
    /// As [`Peer::new`].
    pub fn again(&self, uri: Uri, how: &Security) -> Result<Self, String> {
        let before = self.secured.as_ref();
        let how = match before {
            Some(before) if !how.is_wanted() => &before.how,
            _ => how,
        };
        let peer = Self::new(uri, how)?;
        if let (Some(before), Some(now)) = (before, &peer.secured) {
            *lock(&now.session) = *lock(&before.session);
        }
        Ok(peer)
    }

    /// The place.
    #[must_use]
    pub const fn uri(&self) -> &Uri {
        &self.uri
    }

    /// How its connections are secured, and what a further channel of the session proves itself by.
    pub(super) fn tls(&self) -> Option<(&ClientTls, Option<Secret>)> {
        let secured = self.secured.as_ref()?;
        Some((&secured.tls, *lock(&secured.session)))
    }

    /// The control channel is secured.
    pub(super) fn began(&self, secret: Option<Secret>) {
        if let Some(secured) = &self.secured {
            *lock(&secured.session) = secret;
        }
    }
}

fn source_credentials(dir: &Path, name: &str) -> Result<ClientTls, String> {
    may_read(dir).map_err(|e| e.to_string())?;
    let credentials = Credentials::source(dir).map_err(|e| e.to_string())?;
    ClientTls::with_credentials(&credentials, name).map_err(|e| e.to_string())
}
