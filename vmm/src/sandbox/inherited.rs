//! Descriptors that this process was started with: who starts it opens what it may not.
//!
//! A descriptor is given by its number, or, for sockets, by systemd (sd_listen_fds(3)). What it is
//! is checked before it is used; then it is this process's own, and close-on-exec, so that the same
//! number is not taken twice.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::str::FromStr;
use std::sync::{Arc, Mutex};

use ferry_devices::sync::lock;
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat, major, minor};
use rustix::net::SocketType;
use rustix::net::sockopt::{socket_acceptconn, socket_type};

/// The first that systemd passes, `SD_LISTEN_FDS_START`; those before it are the standard ones.
const FIRST: RawFd = 3;
/// The device number of /dev/net/tun (Documentation/admin-guide/devices.txt).
const TUN_DEVICE: (u32, u32) = (10, 200);

/// Which descriptor: `fd:N`, `systemd` or `systemd:NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Passed {
    /// By its number.
    Number(RawFd),
    /// By systemd; with the name that the socket unit gives it (`FileDescriptorName=`).
    Activated(Option<String>),
}

/// Why a descriptor is not used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DescriptorError {
    /// One of the first three.
    #[error("descriptor {0} is standard input, output or error; pass another one, from {FIRST} on")]
    Standard(RawFd),
    /// There is none.
    #[error("descriptor {0} is not open; who starts ferry must open it, without close-on-exec")]
    Closed(RawFd),
    /// It is used already.
    #[error(
        "descriptor {0} is given twice, or is ferry's own; pass each device and socket its own"
    )]
    Twice(RawFd),
    /// It is something else.
    #[error("descriptor {number} is {found}, where {wanted} is needed")]
    Kind {
        /// Its number.
        number: RawFd,
        /// What it is.
        found: &'static str,
        /// What it is to be.
        wanted: &'static str,
    },
    /// It was opened in another way.
    #[error("descriptor {number} is not open for {wanted}; {hint}")]
    Access {
        /// Its number.
        number: RawFd,
        /// For what.
        wanted: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// The kernel does not tell what it is.
    #[error("descriptor {number} cannot be examined: {source}")]
    Examine {
        /// Its number.
        number: RawFd,
        /// Why.
        source: io::Error,
    },
    /// systemd has passed nothing to this process.
    #[error(
        "systemd has passed no socket to this process (LISTEN_PID and LISTEN_FDS); start it by its socket unit, or with \
         `systemd-socket-activate`"
    )]
    NotActivated,
    /// None has that name.
    #[error("systemd has passed no socket named {wanted}, but {}; set FileDescriptorName={wanted} in the socket unit", Names(.found))]
    Unnamed {
        /// The name.
        wanted: String,
        /// Those that there are.
        found: Vec<String>,
    },
}

struct Names<'a>(&'a [String]);

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(", "))
    }
}

impl FromStr for Passed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |number: &str| {
            let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
            number.parse().ok().filter(|_| digits).map(Self::Number)
        };
        let passed = match text.split_once(':') {
            Some(("fd", n)) => number(n),
            Some(("systemd", name)) if !name.is_empty() => {
                Some(Self::Activated(Some(name.to_owned())))
            }
            None if text == "systemd" => Some(Self::Activated(None)),
            _ => None,
        };
        passed.ok_or_else(|| {
            format!("'{text}' is no descriptor; write fd:N, systemd or systemd:NAME, such as fd:3")
        })
    }
}

impl fmt::Display for Passed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "fd:{number}"),
            Self::Activated(None) => f.write_str("systemd"),
            Self::Activated(Some(name)) => write!(f, "systemd:{name}"),
        }
    }
}

impl Passed {
    /// Whether a text is meant as one, so that it is no path.
    #[must_use]
    pub fn is_meant(text: &str) -> bool {
        text == "systemd" || text.starts_with("fd:") || text.starts_with("systemd:")
    }

    /// The socket, which must listen for streams. Without a name it is the one that systemd calls
    /// `usual`, or the only one.
    ///
    /// # Errors
    /// [`DescriptorError`].
    pub fn listener(&self, usual: &str) -> Result<Descriptor, DescriptorError> {
        let number = match self {
            Self::Number(number) => *number,
            Self::Activated(name) => {
                let variable = |name| std::env::var(name).ok();
                let sockets = Activation::of(std::process::id(), variable)?;
                sockets.find(name.as_deref(), usual)?
            }
        };
        Descriptor::take(number, |fd| listens(number, fd))
    }
}

/// What systemd has passed to this process: name and number of each.
#[derive(Debug, PartialEq, Eq)]
struct Activation(Vec<(String, RawFd)>);

impl Activation {
    fn of(
        own: u32,
        variable: impl Fn(&'static str) -> Option<String>,
    ) -> Result<Self, DescriptorError> {
        let number = |name| variable(name).and_then(|text| text.parse::<u32>().ok());
        // They are inherited by processes that they are not for.
        let count = number("LISTEN_FDS")
            .filter(|count| *count > 0 && number("LISTEN_PID") == Some(own))
            .ok_or(DescriptorError::NotActivated)?;
        let names = variable("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':');
        let name = || names.next().unwrap_or_default().to_owned();
        let names: Vec<String> = std::iter::repeat_with(name)
            .take(count.min(1024) as usize)
            .collect();
        Ok(Self(names.into_iter().zip(FIRST..).collect()))
    }

    fn find(&self, name: Option<&str>, usual: &str) -> Result<RawFd, DescriptorError> {
        let wanted = name.unwrap_or(usual);
        let named = self.0.iter().find(|(name, _)| name == wanted);
        match (named, self.0.as_slice(), name) {
            (Some((_, number)), _, _) | (None, [(_, number)], None) => Ok(*number),
            _ => Err(DescriptorError::Unnamed {
                wanted: wanted.to_owned(),
                found: self.0.iter().map(|(name, _)| name.clone()).collect(),
            }),
        }
    }
}

/// A descriptor that this process was started with, and has taken for its own.
#[derive(Clone, Debug)]
pub struct Descriptor {
    fd: Arc<OwnedFd>,
    number: RawFd,
}

impl PartialEq for Descriptor {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.fd, &other.fd)
    }
}

impl Eq for Descriptor {}

/// One at a time: between the look and the taking.
static TAKING: Mutex<()> = Mutex::new(());

impl Descriptor {
    /// The file or block device behind a disk.
    ///
    /// # Errors
    /// [`DescriptorError`].
    pub fn disk(number: RawFd, read_only: bool) -> Result<Self, DescriptorError> {
        Self::take(number, |fd| {
            match kind(number, fd)? {
                FileType::RegularFile | FileType::BlockDevice => {}
                other => return Err(wrong(number, other, "a regular file or a block device")),
            }
            opened(number, fd, read_only, "open it for both, or add `,ro`")
        })
    }

    /// The tap device behind a network card.
    ///
    /// # Errors
    /// [`DescriptorError`].
    pub fn tap(number: RawFd) -> Result<Self, DescriptorError> {
        const WANTED: &str = "a tap device (/dev/net/tun)";
        Self::take(number, |fd| {
            let status = fstat(fd).map_err(|e| examine(number, e))?;
            let device = (major(status.st_rdev), minor(status.st_rdev));
            match FileType::from_raw_mode(status.st_mode) {
                FileType::CharacterDevice if device == TUN_DEVICE => {}
                other => return Err(wrong(number, other, WANTED)),
            }
            opened(number, fd, false, "open it for both")
        })
    }

    /// Its number at the start.
    #[must_use]
    pub const fn number(&self) -> RawFd {
        self.number
    }

    /// A further descriptor of the same open file.
    ///
    /// # Errors
    /// There are no more.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    /// What `check` lets through, for this process alone.
    fn take(
        number: RawFd,
        check: impl FnOnce(BorrowedFd<'_>) -> Result<(), DescriptorError>,
    ) -> Result<Self, DescriptorError> {
        if (0..FIRST).contains(&number) {
            return Err(DescriptorError::Standard(number));
        }
        let _one = lock(&TAKING);
        // SAFETY: F_GETFD takes no pointer and changes nothing, whatever the number stands for.
        let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
        if flags < 0 {
            return Err(DescriptorError::Closed(number));
        }
        if flags & libc::FD_CLOEXEC != 0 {
            return Err(DescriptorError::Twice(number));
        }
        // SAFETY: it is open, and is borrowed for the checks alone, which change nothing of it. Who
        // might close it meanwhile would own it, and nothing here does; see below.
        check(unsafe { BorrowedFd::borrow_raw(number) })?;
        // SAFETY: nothing in this process owns it. All files, devices and sockets that it opens are
        // close-on-exec from their first moment, as std and rustix open them; this one is not, so
        // execve(2) has let it through. It is of one of those kinds, by `check`. It is made
        // close-on-exec now, under the lock, so that it is taken once.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)
            .map_err(|e| examine(number, e))?;
        Ok(Self {
            fd: Arc::new(fd),
            number,
        })
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn examine(number: RawFd, error: rustix::io::Errno) -> DescriptorError {
    DescriptorError::Examine {
        number,
        source: error.into(),
    }
}

fn kind(number: RawFd, fd: BorrowedFd<'_>) -> Result<FileType, DescriptorError> {
    let status = fstat(fd).map_err(|e| examine(number, e))?;
    Ok(FileType::from_raw_mode(status.st_mode))
}

fn wrong(number: RawFd, kind: FileType, wanted: &'static str) -> DescriptorError {
    let found = match kind {
        FileType::RegularFile => "a regular file",
        FileType::BlockDevice => "a block device",
        FileType::CharacterDevice => "another device",
        FileType::Directory => "a folder",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        _ => "something else",
    };
    DescriptorError::Kind {
        number,
        found,
        wanted,
    }
}

fn opened(
    number: RawFd,
    fd: BorrowedFd<'_>,
    read_only: bool,
    hint: &'static str,
) -> Result<(), DescriptorError> {
    let flags = fcntl_getfl(fd).map_err(|e| examine(number, e))?;
    let mode = flags & OFlags::ACCMODE;
    let fits = !flags.contains(OFlags::PATH)
        && (mode == OFlags::RDWR || read_only && mode == OFlags::RDONLY);
    match (fits, read_only) {
        (true, _) => Ok(()),
        (false, true) => Err(DescriptorError::Access {
            number,
            wanted: "reading",
            hint: "open it for that",
        }),
        (false, false) => Err(DescriptorError::Access {
            number,
            wanted: "reading and writing",
            hint,
        }),
    }
}

fn listens(number: RawFd, fd: BorrowedFd<'_>) -> Result<(), DescriptorError> {
    const WANTED: &str = "a stream socket that listens";
    match kind(number, fd)? {
        FileType::Socket => {}
        other => return Err(wrong(number, other, WANTED)),
    }
    let found = if socket_type(fd).map_err(|e| examine(number, e))? != SocketType::STREAM {
        "a socket for datagrams or packets"
    } else if !socket_acceptconn(fd).map_err(|e| examine(number, e))? {
        "a socket that does not listen"
    } else {
        return Ok(());
    };
    Err(DescriptorError::Kind {
        number,
        found,
        wanted: WANTED,
    })
}

#[cfg(test)]
mod tests;
