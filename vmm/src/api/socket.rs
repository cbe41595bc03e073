//! The socket file: made without a moment in which others may open it, never stolen from a living VMM, removed at exit.

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The longest path that a Unix socket address holds, in bytes.
pub const MAX_PATH: usize = 107;

/// Connections that the kernel queues for us.
const BACKLOG: i32 = 128;

/// Why the socket cannot be made.
#[derive(Debug, thiserror::Error)]
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
    /// Somebody answers there.
    #[error("a VMM already answers on {}; stop it or choose another socket path", path.display())]
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
        let system = |cause: io::Error| BindError::System {
            path: path.to_owned(),
            cause,
        };
        let length = path.as_os_str().len();
        if length > MAX_PATH {
            return Err(BindError::TooLong {
                path: path.to_owned(),
                length,
            });
        }
        let address = UnixAddr::new(path).map_err(|_| BindError::NoPath {
            path: path.to_owned(),
        })?;
        // A leading NUL would be Linux's abstract namespace, which has no permissions.
        if length == 0 || address.path().is_none() {
            return Err(BindError::NoPath {
                path: path.to_owned(),
            });
        }
        let directory = match path.parent() {
            Some(d) if !d.as_os_str().is_empty() => d,
            _ => Path::new("."),
        };
        if !directory.is_dir() {
            return Err(BindError::NoDirectory {
                path: directory.to_owned(),
            });
        }
        // Of two that find the same dead socket, the second would remove the first one's new one.
        let _lock = lock_directory(directory);
        match fs::symlink_metadata(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(system(e)),
            Ok(m) if !m.file_type().is_socket() => {
                return Err(BindError::NotASocket {
                    path: path.to_owned(),
                });
            }
            Ok(_) => match probe(path) {
                Probe::Alive => {
                    return Err(BindError::InUse {
                        path: path.to_owned(),
                    });
                }
                Probe::Dead => fs::remove_file(path).map_err(system)?,
                Probe::Gone => {}
                Probe::Unknown(e) => return Err(system(e.into())),
            },
        }
        let fd = new_socket(SockFlag::SOCK_NONBLOCK).map_err(|e| system(e.into()))?;
        // Linux gives the file the mode of the unbound socket: there is no moment with a wider one.
        fchmod(fd.as_fd(), Mode::S_IRUSR | Mode::S_IWUSR).map_err(|e| system(e.into()))?;
        bind(fd.as_raw_fd(), &address).map_err(|e| match e {
            Errno::EADDRINUSE => BindError::InUse {
                path: path.to_owned(),
            },
            e => system(e.into()),
        })?;
        let identity = fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()));
        // From here on a failure removes the file.
        let made = Self {
            listener: UnixListener::from(fd),
            path: path.to_owned(),
            identity,
        };
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(system)?;
        let backlog = Backlog::new(BACKLOG).unwrap_or(Backlog::MAXCONN);
        listen(&made.listener, backlog).map_err(|e| system(e.into()))?;
        Ok(made)
    }

    /// The listener; it does not block.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// The file's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let now = fs::symlink_metadata(&self.path)
            .ok()
            .map(|m| (m.dev(), m.ino()));
        if now.is_some() && now == self.identity {
            // Nothing is left to do about a file that cannot be removed: the next VMM finds it dead and replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

enum Probe {
    Alive,
    Dead,
    Gone,
    Unknown(Errno),
}

fn new_socket(flags: SockFlag) -> nix::Result<OwnedFd> {
    socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | flags,
        None,
    )
}

fn probe(path: &Path) -> Probe {
    let attempt = || -> nix::Result<()> {
        let fd = new_socket(SockFlag::SOCK_NONBLOCK)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)
    };
    match attempt() {
        // EAGAIN: its queue of connections is full, so somebody listens.
        Ok(()) | Err(Errno::EAGAIN) => Probe::Alive,
        Err(Errno::ECONNREFUSED) => Probe::Dead,
        Err(Errno::ENOENT) => Probe::Gone,
        Err(e) => Probe::Unknown(e),
    }
}

/// Held while a dead socket is replaced. Without it (the directory cannot be read, or somebody holds it for long) all
/// works but the race of two starters, so it is not insisted on.
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

/// As [`dial`], and `Interrupted` as soon as `cancelled` says so.
pub(crate) fn dial_unless(
    path: &Path,
    timeout: Duration,
    cancelled: &dyn Fn() -> bool,
) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path).map_err(|e| match e {
        Errno::ENAMETOOLONG => io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("the path is longer than {MAX_PATH} bytes"),
        ),
        e => e.into(),
    })?;
    let deadline = Instant::now().checked_add(timeout);
    loop {
        let fd = new_socket(SockFlag::SOCK_NONBLOCK)?;
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
            Err(Errno::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_private_and_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let socket = Socket::bind(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        dial(&path, Duration::from_secs(1)).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_living_owner_keeps_its_socket_and_a_dead_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let socket = Socket::bind(&path).unwrap();
        let e = Socket::bind(&path).unwrap_err();
        assert!(matches!(e, BindError::InUse { .. }), "{e}");
        assert!(
            dial(&path, Duration::from_secs(1)).is_ok(),
            "the refusal left the owner alone"
        );
        // What a killed VMM leaves: the file, and nobody behind it.
        drop(socket);
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        Socket::bind(&path).unwrap();
    }

    #[test]
    fn of_many_that_find_the_same_dead_socket_one_wins() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let won: Vec<_> = std::thread::scope(|s| {
            let all: Vec<_> = (0..8).map(|_| s.spawn(|| Socket::bind(&path))).collect();
            all.into_iter()
                .filter_map(|t| t.join().unwrap().ok())
                .collect()
        });
        assert_eq!(won.len(), 1);
        assert!(dial(&path, Duration::from_secs(1)).is_ok());
    }

    #[test]
    fn leaves_other_files_alone_and_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("precious");
        fs::write(&file, "x").unwrap();
        let e = Socket::bind(&file).unwrap_err().to_string();
        assert!(e.contains("is no socket"), "{e}");
        assert_eq!(fs::read(&file).unwrap(), b"x");

        let e = Socket::bind(&dir.path().join("no/such/s"))
            .unwrap_err()
            .to_string();
        assert!(e.contains("there is no directory"), "{e}");
        let e = Socket::bind(&dir.path().join("x".repeat(120)))
            .unwrap_err()
            .to_string();
        assert!(e.contains("at most 107"), "{e}");
        for odd in ["", "\0abstract", "a\0b"] {
            let e = Socket::bind(Path::new(odd)).unwrap_err().to_string();
            assert!(e.contains("is no path for a socket"), "{odd:?}: {e}");
        }
        let e = Socket::bind(Path::new("/proc/ferry.sock"))
            .unwrap_err()
            .to_string();
        assert!(e.contains("cannot make the socket /proc/ferry.sock"), "{e}");
    }

    #[test]
    fn does_not_remove_a_file_that_took_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let socket = Socket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        // Keep the old inode from being reused: the listener is still open.
        fs::write(&path, "another").unwrap();
        drop(socket);
        assert!(path.exists());
    }

    #[test]
    fn connecting_to_a_server_that_accepts_nobody_is_bounded_and_can_be_cancelled() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let fd = new_socket(SockFlag::empty()).unwrap();
        bind(fd.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&fd, Backlog::new(0).unwrap()).unwrap();
        // Linux queues one connection more than it was asked to.
        let _queued = dial(&path, Duration::ZERO).unwrap();
        let late = dial(&path, Duration::from_millis(50)).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        let cancelled = dial_unless(&path, Duration::MAX, &|| true).unwrap_err();
        assert_eq!(cancelled.kind(), io::ErrorKind::Interrupted);
    }
}
