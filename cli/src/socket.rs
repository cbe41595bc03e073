//! Where a VMM makes its control socket: `--api`, or by the guest's name, or by the process.

use super::passed::{Api, control_socket};
use ferry_terminal::names::{GuestName, RuntimeFolder};
use ferry_terminal::output::{Failure, say};
use ferry_vmm::api::server::{Limits, Server};
use ferry_vmm::sandbox::Descriptor;
use ferry_vmm::socket::BindError;
use ferry_vmm::vmm::Vmm;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A control socket that is not made yet.
#[derive(Debug, PartialEq, Eq)]
pub enum ControlSocket {
    /// Where `--api` says.
    Given(PathBuf),
    /// It listens already.
    Passed(Descriptor),
    /// In the folder of named guests.
    Named(GuestName, PathBuf),
    /// Where nothing was said: its path is printed.
    Unnamed(PathBuf),
}

impl ControlSocket {
    /// Chooses its place, and makes the folder of named guests where it goes there. To be called
    /// before the sandbox is entered.
    pub fn choose(api: Option<&Api>, name: Option<&GuestName>) -> Result<Self, Failure> {
        match (api, name) {
            (Some(Api::Path(path)), _) => Ok(Self::Given(path.clone())),
            (Some(Api::Passed(passed)), _) => Ok(Self::Passed(control_socket(passed)?)),
            (None, Some(name)) => {
                let folder = RuntimeFolder::find()?;
                folder.make()?;
                Ok(Self::Named(name.clone(), folder.socket(name)))
            }
            (None, None) => Ok(Self::Unnamed(unnamed())),
        }
    }

    /// The file to make, if one is to be made.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Given(path) | Self::Named(_, path) | Self::Unnamed(path) => Some(path),
            Self::Passed(_) => None,
        }
    }

    /// Makes it.
    pub fn bind(&self, vmm: &Vmm) -> Result<Server, Failure> {
        let (control, limits) = (Arc::new(vmm.clone()), Limits::default());
        let path = match self {
            Self::Given(path) | Self::Named(_, path) | Self::Unnamed(path) => path,
            Self::Passed(socket) => {
                let server = socket
                    .duplicate()
                    .and_then(|fd| Server::given(fd, control, limits));
                return server.map_err(|e| Failure(format!("the control socket: {e}")));
            }
        };
        let server = Server::bind(path, control, limits);
        let server = server.map_err(|error| match (error, self) {
            (BindError::InUse { .. }, Self::Named(name, _)) => Failure(format!(
                "a guest named {name} is here already; choose another --name, or end it with `ferry stop {name}`"
            )),
            (error, _) => error.into(),
        })?;
        if let Self::Unnamed(path) = self {
            say(&format!("control socket: {}", path.display()));
        }
        Ok(server)
    }
}

/// Where a VMM without `--api` and `--name` is found.
fn unnamed() -> PathBuf {
    let directory = std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .filter(|d| d.is_dir());
    directory
        .unwrap_or_else(|| PathBuf::from("/tmp"))
        .join(format!("ferry-{}.sock", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_given_wins_and_without_a_name_the_process_is_in_it() {
        let name = "web".parse().unwrap();
        let api = Api::Path("a/s".into());
        let given = ControlSocket::choose(Some(&api), Some(&name)).unwrap();
        assert_eq!(given, ControlSocket::Given("a/s".into()));
        let ControlSocket::Unnamed(path) = ControlSocket::choose(None, None).unwrap() else {
            panic!("it is unnamed");
        };
        let own = format!("ferry-{}.sock", std::process::id());
        assert_eq!(path.file_name().unwrap().to_str(), Some(own.as_str()));
    }
}
