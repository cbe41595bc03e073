//! Every Unix socket of ferry, the listening side and the connecting side.
//!
//! [`Socket::bind`] is the only place that makes a socket file, for the API and for
//! `receive unix:PATH` alike:
//!
//! - Only a socket that no process has bound is replaced. A file, a symbolic link, a FIFO, a
//!   device, a directory and a socket of a living process are left as they are.
//! - The file has mode 0600 from its first moment on.
//! - Two starters on one path are kept apart by a lock on the directory.
//! - Dropping the socket removes its own file only: device and inode are compared.

use crate::new_file::directory;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf, absolute};
use std::time::{Duration, Instant};

/// The longest path that a Unix socket address holds, in bytes.
pub const MAX_PATH: usize = 107;

/// Connections that the kernel queues for us.
const BACKLOG: i32 = 128;

/// Why the socket cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// Longer than [`MAX_PATH`].
    #[error("the socket path {} is {length} bytes long; Unix sockets take at most {MAX_PATH}, choose a shorter one", path.display())]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// Empty, or with a NUL in it.
    #[error("{path:?} is no path for a socket; give the name of a file that does not exist yet")]
    NoPath {
        /// What was given.
        path: PathBuf,
    },
    /// A process has bound it.
    #[error("a process already uses the socket {}; stop it or choose another path", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something else is there.
    #[error("{} exists and is no socket; choose another path, it is left as it is", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The directory is missing.
    #[error("there is no directory {}; make it or choose another socket path", path.display())]
    NoDirectory {
        /// The directory.
        path: PathBuf,
    },
    /// The system said no.
    #[error("cannot make the socket {} ({cause}); check the directory's permissions or choose another path", path.display())]
    System {
        /// The path.
        path: PathBuf,
        /// The cause.
        cause: io::Error,
    },
}

/// A listening socket file of mode 0600. Dropping it removes the file.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode, so that only our own file is removed.
    identity: Option<(u64, u64)>,
}

impl Socket {
    /// Makes the socket; replaces one whose owner is dead.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let address = address(path)?;
        let system = |cause: io::Error| BindError::System {
            path: path.to_owned(),
            cause,
        };
        let directory = directory(path);
        if !directory.is_dir() {
            return Err(BindError::NoDirectory {
                path: directory.to_owned(),
            });
        }
        // Of two that find the same dead socket, the second would remove the first one's new one.
        let _lock = lock_directory(directory);
        clear(path)?;
        let fd =
            new_socket(SockType::Stream, SockFlag::SOCK_NONBLOCK).map_err(|e| system(e.into()))?;
        // Linux gives the file the mode of the unbound socket: there is no moment with a wider one.
        fchmod(fd.as_fd(), Mode::S_IRUSR | Mode::S_IWUSR).map_err(|e| system(e.into()))?;
        bind(fd.as_raw_fd(), &address).map_err(|e| match e {
            Errno::EADDRINUSE => BindError::InUse {
                path: path.to_owned(),
            },
            e => system(e.into()),
        })?;
        // From here on a failure removes the file.
        let made = Self {
            listener: UnixListener::from(fd),
            path: absolute(path).unwrap_or_else(|_| path.to_owned()),
            identity: identity(path),
        };
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(system)?;
        let backlog = Backlog::new(BACKLOG).unwrap_or(Backlog::MAXCONN);
        listen(&made.listener, backlog).map_err(|e| system(e.into()))?;
        Ok(made)
    }

    /// One that listens already, and whose file is another's to remove.
    ///
    /// # Errors
    /// It is no Unix socket, or one without a file, which every user of this host could reach.
    pub fn given(fd: OwnedFd) -> io::Result<Self> {
        let listener = UnixListener::from(fd);
        let address = listener.local_addr()?;
        let path = address.as_pathname().ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "a Unix socket without a file has no permissions; give it a path",
            )
        })?;
        listener.set_nonblocking(true)?;
        if fs::metadata(path).is_ok_and(|m| m.mode() & 0o002 != 0) {
            tracing::warn!(socket = %path.display(), "every user of this host may use this socket; give it the mode 0600 (SocketMode=0600 in a socket unit)");
        }
        Ok(Self {
            path: path.to_owned(),
            listener,
            identity: None,
        })
    }

    /// The listener; it does not block.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// The file's path, absolute.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the file, as dropping the socket does: no further process connects to it.
    pub fn remove_file(&self) {
        // Without the lock another process could replace the file between the question and the
        // removal.
        let _lock = lock_directory(directory(&self.path));
        let now = identity(&self.path);
        if now.is_some() && now == self.identity {
            // A file that cannot be removed is dead for the next starter, who replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.remove_file();
    }
}

/// What a stream socket's file at a path is.
enum Probe {
    /// A process has bound it.
    Alive,
    /// No process has.
    Dead,
    Gone,
    Unknown(Errno),
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

fn address(path: &Path) -> Result<UnixAddr, BindError> {
    let length = path.as_os_str().len();
    if length > MAX_PATH {
        return Err(BindError::TooLong {
            path: path.to_owned(),
            length,
        });
    }
    UnixAddr::new(path)
        .ok()
        // A leading NUL would be Linux's abstract namespace, which has no permissions.
        .filter(|address| length > 0 && address.path().is_some())
        .ok_or_else(|| BindError::NoPath {
            path: path.to_owned(),
        })
}

/// Removes a dead socket; leaves everything else.
fn clear(path: &Path) -> Result<(), BindError> {
    let system = |cause: io::Error| BindError::System {
        path: path.to_owned(),
        cause,
    };
    let found = match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(system(e)),
        Ok(m) if !m.file_type().is_socket() => {
            return Err(BindError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(m) => (m.dev(), m.ino()),
    };
    let in_use = || BindError::InUse {
        path: path.to_owned(),
    };
    match probe(path) {
        Probe::Alive => Err(in_use()),
        // A program without our lock may have replaced it since.
        Probe::Dead if identity(path) != Some(found) => Err(in_use()),
        Probe::Dead => fs::remove_file(path).map_err(system),
        Probe::Gone => Ok(()),
        Probe::Unknown(e) => Err(system(e.into())),
    }
}

fn new_socket(kind: SockType, flags: SockFlag) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | flags;
    socket(AddressFamily::Unix, kind, flags, None)
}

fn probe(path: &Path) -> Probe {
    let attempt = |kind| -> nix::Result<()> {
        let fd = new_socket(kind, SockFlag::SOCK_NONBLOCK)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)
    };
    match attempt(SockType::Stream) {
        // EAGAIN: its queue of connections is full. EPROTOTYPE: it is no stream socket.
        Ok(()) | Err(Errno::EAGAIN | Errno::EPROTOTYPE) => Probe::Alive,
        // Refused by a socket that is bound and does not listen yet, too. Linux looks for any bound
        // socket first and compares the kinds then, so a datagram socket is refused only where
        // there is none.
        Err(Errno::ECONNREFUSED) => match attempt(SockType::Datagram) {
            Err(Errno::ECONNREFUSED) => Probe::Dead,
            Err(Errno::ENOENT) => Probe::Gone,
            Ok(()) | Err(Errno::EPROTOTYPE) => Probe::Alive,
            Err(e) => Probe::Unknown(e),
        },
        Err(Errno::ENOENT) => Probe::Gone,
        Err(e) => Probe::Unknown(e),
    }
}

/// Held while a socket file is replaced or removed. Without it (the directory cannot be read, or
/// another process holds it for long) only the race of two starters is open, so it is not insisted
/// on.
fn lock_directory(directory: &Path) -> Option<Flock<File>> {
    let mut file = File::open(directory).ok()?;
    for _ in 0..20 {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Some(lock),
            Err((back, Errno::EWOULDBLOCK)) => file = back,
            Err(_) => return None,
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    None
}

/// Connects as a client, waiting at most `timeout` for a server whose queue is full.
///
/// # Errors
/// Those of connect(2); `InvalidInput` for a path that is too long.
pub fn dial(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    dial_unless(path, timeout, &|| false)
}

/// As [`dial`]; ends early where `cancelled` says so.
///
/// # Errors
/// As [`dial`]; `Interrupted` when it was cancelled.
pub fn dial_unless(
    path: &Path,
    timeout: Duration,
    cancelled: &dyn Fn() -> bool,
) -> io::Result<UnixStream> {
    let reach = Reach::of(path)?;
    let address = UnixAddr::new(reach.path.as_path()).map_err(|e| match e {
        Errno::ENAMETOOLONG => io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("the path is longer than {MAX_PATH} bytes"),
        ),
        e => e.into(),
    })?;
    let deadline = Instant::now().checked_add(timeout);
    loop {
        let fd = new_socket(SockType::Stream, SockFlag::SOCK_NONBLOCK)?;
        match connect(fd.as_raw_fd(), &address) {
            Ok(()) => {
                let stream = UnixStream::from(fd);
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(Errno::EAGAIN) if cancelled() => {
                return Err(io::Error::new(
                    io::ErrorKind::Interrupted,
                    "cancelled while connecting",
                ));
            }
            Err(Errno::EAGAIN) if deadline.is_none_or(|at| Instant::now() < at) => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(Errno::EAGAIN) => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!(
                        "its queue of connections has been full for {} s",
                        timeout.as_secs()
                    ),
                ));
            }
            Err(e) => return Err(e.into()),
        }
    }
}

/// Connects as a client to a server that has room in its queue now; the stream does not block. Two
/// system calls, for a thread whose sandbox has few: the path must fit into an address.
///
/// # Errors
/// Those of connect(2); `WouldBlock` where the server's queue is full.
pub(crate) fn connect_at_once(path: &Path) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    let fd = new_socket(SockType::Stream, SockFlag::SOCK_NONBLOCK)?;
    connect(fd.as_raw_fd(), &address)?;
    Ok(UnixStream::from(fd))
}

/// A path by which a socket can be addressed. A longer one than an address holds goes by way of its
/// directory, for a path that was short as its user wrote it may be long when it is made absolute.
struct Reach {
    path: PathBuf,
    /// Open for as long as the path is used.
    _directory: Option<File>,
}

/// Whether [`dial`] can address a socket there.
pub(crate) fn is_addressable(path: &Path) -> bool {
    let name = path.file_name().map_or(usize::MAX, |name| name.len());
    path.as_os_str().len() <= MAX_PATH || path.is_absolute() && name <= Reach::MAX_NAME
}

impl Reach {
    /// Of a name that goes by way of its directory: what `/proc/self/fd/N/` leaves of an address.
    const MAX_NAME: usize = 80;

    fn of(path: &Path) -> io::Result<Self> {
        let plain = || Self {
            path: path.to_owned(),
            _directory: None,
        };
        let Some(name) = path.file_name() else {
            return Ok(plain());
        };
        if path.as_os_str().len() <= MAX_PATH {
            return Ok(plain());
        }
        // Only to name it: neither its permissions nor the sandbox forbid that.
        let named = File::options()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(directory(path));
        let Ok(directory) = named else {
            return Ok(plain());
        };
        let short = Path::new("/proc/self/fd")
            .join(directory.as_raw_fd().to_string())
            .join(name);
        Ok(Self {
            path: short,
            _directory: Some(directory),
        })
    }
}

#[cfg(test)]
pub(crate) mod tests;
