//! What is behind a vsock device: a Unix socket, and those beside it.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ferry_devices::vsock::{CIDS, Host};

use crate::socket::{BindError, MAX_PATH, Socket, connect_at_once};

/// The guest's context where none is asked for: the first that a guest can have. Guests may have
/// the same one, for each has a socket of its own.
const FIRST_CID: u32 = *CIDS.start();
/// `_` and the largest port.
const SUFFIX: usize = 11;

/// A vsock device as it is given on a host.
#[derive(Debug, Clone)]
pub struct VsockOptions {
    /// The guest's context, if it matters. A guest that arrives brings its own.
    cid: Option<u32>,
    socket: Arc<Socket>,
}

impl PartialEq for VsockOptions {
    fn eq(&self, other: &Self) -> bool {
        self.cid == other.cid && Arc::ptr_eq(&self.socket, &other.socket)
    }
}

impl Eq for VsockOptions {}

/// Why there can be no vsock device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VsockError {
    /// The socket.
    #[error(transparent)]
    Socket(#[from] BindError),
    /// No room for the port behind it.
    #[error(
        "the socket path {} is {length} bytes long; with _PORT behind it Unix sockets take at most {}, choose a shorter one",
        path.display(), MAX_PATH - SUFFIX
    )]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// A context that no guest can have.
    #[error("a guest cannot have the context {0}; give a cid of {first} to {last}", first = CIDS.start(), last = CIDS.end())]
    Cid(u32),
}

impl VsockOptions {
    /// Makes the socket that programs of the host connect to. It is there as long as a clone of
    /// this or a machine with it, and so is its file, or until [`remove_file`](Self::remove_file).
    ///
    /// # Errors
    /// [`VsockError`].
    pub fn bind(path: &Path, cid: Option<u32>) -> Result<Self, VsockError> {
        if let Some(cid) = cid.filter(|cid| !CIDS.contains(cid)) {
            return Err(VsockError::Cid(cid));
        }
        let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let length = whole.as_os_str().len();
        if length + SUFFIX > MAX_PATH {
            return Err(VsockError::TooLong {
                path: path.to_owned(),
                length,
            });
        }
        Ok(Self {
            cid,
            socket: Arc::new(Socket::bind(path)?),
        })
    }

    /// Removes the socket's file, for machines outlive their guests where replies are still made.
    pub fn remove_file(&self) {
        self.socket.remove_file();
    }

    /// The socket's path, absolute.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.socket.path()
    }

    /// The guest's context, if it matters.
    #[must_use]
    pub const fn cid(&self) -> Option<u32> {
        self.cid
    }

    /// The context of a new guest.
    pub(super) fn wanted_cid(&self) -> u32 {
        self.cid.unwrap_or(FIRST_CID)
    }

    /// The device's way to the programs.
    pub(super) fn programs(&self) -> io::Result<Programs> {
        Ok(Programs {
            listener: self.socket.listener().try_clone()?,
            path: self.path().as_os_str().to_owned(),
        })
    }
}

/// Programs of this host. Without the socket itself: a device's threads may not remove files.
pub(super) struct Programs {
    listener: std::os::unix::net::UnixListener,
    path: OsString,
}

impl Host for Programs {
    fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    fn accept(&mut self) -> io::Result<UnixStream> {
        // Blocking or not is the descriptor's from its first moment, without a call for it.
        let flags = rustix::net::SocketFlags::NONBLOCK | rustix::net::SocketFlags::CLOEXEC;
        Ok(rustix::net::accept_with(&self.listener, flags)?.into())
    }

    fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone();
        path.push(format!("_{port}"));
        connect_at_once(Path::new(&path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    #[test]
    fn programs_are_reached_and_reach_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let options = VsockOptions::bind(&path, None).unwrap();
        assert_eq!(options.wanted_cid(), 3);
        let mut programs = options.programs().unwrap();
        let empty = programs.accept().unwrap_err();
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
        let refused = programs.connect(5).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::NotFound);
        let serving = UnixListener::bind(dir.path().join("v.sock_5")).unwrap();
        let mut ours = programs.connect(5).unwrap();
        ours.write_all(b"x").unwrap();
        let (mut theirs, _) = serving.accept().unwrap();
        theirs.read_exact(&mut [0]).unwrap();
        let waits = ours.read(&mut [0]).unwrap_err();
        assert_eq!(waits.kind(), io::ErrorKind::WouldBlock);
        drop(serving);
        let refused = programs.connect(5).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        // It goes with its owner, not with the device.
        assert_eq!(options.clone(), options);
        drop(options);
        assert!(!path.exists());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        for cid in [0, 2, u32::MAX] {
            let text = VsockOptions::bind(&path, Some(cid)).unwrap_err();
            assert!(text.to_string().contains("3 to 4294967294"), "{text}");
        }
        let long = dir.path().join("x".repeat(90));
        let error = VsockOptions::bind(&long, None).unwrap_err();
        assert!(matches!(error, VsockError::TooLong { .. }), "{error}");
        std::fs::write(&path, "").unwrap();
        let error = VsockOptions::bind(&path, None).unwrap_err();
        assert!(matches!(error, VsockError::Socket(_)), "{error}");
        assert!(path.exists());
    }
}
