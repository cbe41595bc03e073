//! Sockets that listen already when ferry is started: `--api fd:N`, `ferry receive systemd`.

use ferry_terminal::output::Failure;
use ferry_vmm::migrate::{Listener, Uri};
use ferry_vmm::sandbox::{Descriptor, Passed};
use std::path::PathBuf;
use std::str::FromStr;

/// What systemd's socket unit calls the control socket, and the one for a guest that arrives
/// (`FileDescriptorName=`).
const API: &str = "api";
const RECEIVE: &str = "receive";

/// `--api`: where the control socket is made, or the one that is passed on. A file with a name that
/// means the other has `./` before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Api {
    Path(PathBuf),
    Passed(Passed),
}

impl FromStr for Api {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match Passed::is_meant(text) {
            true => text.parse().map(Self::Passed),
            false => Ok(Self::Path(text.into())),
        }
    }
}

/// The control socket that is passed on.
pub fn control_socket(passed: &Passed) -> Result<Descriptor, Failure> {
    passed
        .listener(API)
        .map_err(|e| Failure(format!("--api {passed}: {e}")))
}

/// Where a guest comes from: a place, or a socket that is passed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Uri(Uri),
    Passed(Passed),
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match Passed::is_meant(text) {
            true => text.parse().map(Self::Passed),
            false => text
                .parse()
                .map(Self::Uri)
                .map_err(|e: <Uri as FromStr>::Err| e.to_string()),
        }
    }
}

impl Source {
    /// The listener, where it is there already.
    pub fn passed(&self) -> Result<Option<Listener>, Failure> {
        let Self::Passed(passed) = self else {
            return Ok(None);
        };
        let failed = |why: String| Failure(format!("{passed}: {why}"));
        let socket = passed
            .listener(RECEIVE)
            .map_err(|e| failed(e.to_string()))?;
        let fd = socket.duplicate().map_err(|e| failed(e.to_string()))?;
        Ok(Some(Listener::given(fd)?))
    }

    /// Where it is, whether it is there already or is to be made.
    pub fn uri<'a>(&'a self, passed: Option<&'a Listener>) -> Result<&'a Uri, Failure> {
        match (passed, self) {
            (Some(listener), _) => Ok(listener.local_uri()),
            (None, Self::Uri(uri)) => Ok(uri),
            (None, Self::Passed(passed)) => Err(Failure(format!("{passed} was not taken"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_descriptors_are_told_apart() {
        let api = str::parse::<Api>;
        assert_eq!(api("a/b.sock"), Ok(Api::Path("a/b.sock".into())));
        assert_eq!(api("./systemd"), Ok(Api::Path("./systemd".into())));
        assert_eq!(api("fd:3"), Ok(Api::Passed(Passed::Number(3))));
        assert!(api("fd:x").unwrap_err().contains("fd:N"));
        let source = str::parse::<Source>;
        assert_eq!(
            source("systemd"),
            Ok(Source::Passed(Passed::Activated(None)))
        );
        assert!(matches!(source("tcp:a:1"), Ok(Source::Uri(_))));
        assert!(source("nonsense").unwrap_err().contains("tcp:HOST:PORT"));
    }
}
