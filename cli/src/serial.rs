//! Where a line of the guest's goes: `--serial` and `--console` `stdio|file:PATH|pty|null`.
//!
//! Output passes through a [`Spool`](super::spool::Spool), so that no vCPU and no pause of a
//! migration waits for a terminal, a pipe or a disk.

use super::lines::Line;
use super::pty::Pty;
use ferry_terminal::output::Failure;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf, absolute};
use std::str::FromStr;

/// `--serial`, `--console`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serial {
    /// This process's stdin and stdout.
    Stdio,
    /// Output to a file, no input.
    File(PathBuf),
    /// A pseudo-terminal, which the VMM makes.
    Pty,
    /// Neither.
    Null,
}

impl FromStr for Serial {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "pty" => Ok(Self::Pty),
            None if text == "null" => Ok(Self::Null),
            _ => Err("a serial port or console goes to stdio, file:PATH, pty or null".into()),
        }
    }
}

/// A line's place, as far as it is made before the sandbox is entered.
pub struct Port<'a> {
    line: Line,
    place: &'a Serial,
    pty: Option<Pty>,
}

impl Serial {
    /// Makes the pseudo-terminal, where it is one.
    pub fn prepare(&self, line: Line) -> Result<Port<'_>, Failure> {
        let pty = match self {
            Self::Pty => Some(Pty::open().map_err(|e| {
                Failure(format!(
                    "cannot make a pseudo-terminal ({e}); choose another place for {}",
                    line.option()
                ))
            })?),
            _ => None,
        };
        Ok(Port {
            line,
            place: self,
            pty,
        })
    }
}

impl Port<'_> {
    /// Which line it is of.
    pub const fn line(&self) -> Line {
        self.line
    }

    /// The pseudo-terminal, if it is one.
    pub const fn pty(&self) -> Option<&Pty> {
        self.pty.as_ref()
    }

    /// Opens it, so that errors come before the guest does: what a spool writes to.
    pub fn open(&self) -> Result<Box<dyn Write + Send>, Failure> {
        Ok(match (self.place, &self.pty) {
            (_, Some(pty)) => Box::new(pty.output()?),
            // A descriptor of our own: std's buffer would keep prompts back.
            (Serial::Stdio, _) => Box::new(File::from(io::stdout().as_fd().try_clone_to_owned()?)),
            (Serial::File(path), _) => Box::new(open_file(path).map_err(|e| {
                Failure(format!(
                    "cannot write the {} to {} ({e}); choose another file",
                    self.line.output(),
                    path.display()
                ))
            })?),
            (Serial::Pty | Serial::Null, None) => Box::new(io::sink()),
        })
    }

    /// Whether it is this process's terminal.
    pub fn is_stdio(&self) -> bool {
        *self.place == Serial::Stdio
    }

    /// Where it goes, for `ferry logs` and `ferry console`, whose working directory is another.
    pub fn place(&self) -> String {
        match (self.place, &self.pty) {
            (_, Some(pty)) => format!("pty:{}", pty.path().display()),
            (Serial::File(path), _) => {
                let path = absolute(path).unwrap_or_else(|_| path.clone());
                format!("file:{}", path.display())
            }
            (Serial::Stdio, _) => "stdio".into(),
            (Serial::Pty | Serial::Null, None) => "null".into(),
        }
    }
}

/// Opens a log at its end and keeps what it holds: another guest may be writing to it, and a log
/// that is truncated (logrotate's copytruncate) goes on at its start.
fn open_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    // A terminal does not become this process's own, and its carrier is not waited for.
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let fifo = std::fs::metadata(path).is_ok_and(|m| m.file_type().is_fifo());
    if fifo {
        // Open for both, a FIFO needs no reader yet and survives one that leaves (fifo(7)).
        options.read(true).write(true);
    } else {
        options.append(true).create(true);
    }
    let file = options.open(path)?;
    // The spool's thread may wait: that is what it is for.
    fcntl_setfl(&file, fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spool::Spool;
    use nix::sys::stat::Mode;
    use std::io::Read;
    use std::time::Duration;

    const LONG: Duration = Duration::from_secs(60);

    fn spool(path: &Path) -> Spool {
        let place = Serial::File(path.to_owned());
        let sink = place.prepare(Line::Serial).unwrap().open();
        Spool::new(sink.unwrap(), Line::Serial.output()).unwrap()
    }

    #[test]
    fn reads_its_forms() {
        assert_eq!("stdio".parse(), Ok(Serial::Stdio));
        assert_eq!("null".parse(), Ok(Serial::Null));
        assert_eq!("pty".parse(), Ok(Serial::Pty));
        assert_eq!("file:/tmp/a:b".parse(), Ok(Serial::File("/tmp/a:b".into())));
        for odd in ["", "file:", "file", "stdio:x", "/tmp/x"] {
            assert!(
                odd.parse::<Serial>().unwrap_err().contains("file:PATH"),
                "{odd:?}"
            );
        }
    }

    #[test]
    fn a_log_keeps_what_it_holds_and_goes_on_at_its_start_when_it_is_truncated() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "before\n").unwrap();
        let mut spool = spool(&path);
        spool.write_all(b"one\n").unwrap();
        spool.drain(LONG);
        assert_eq!(std::fs::read(&path).unwrap(), b"before\none\n");
        std::fs::write(&path, "").unwrap();
        spool.write_all(b"two\n").unwrap();
        spool.drain(LONG);
        assert_eq!(std::fs::read(&path).unwrap(), b"two\n");
    }

    #[test]
    fn a_fifo_needs_no_reader_and_its_reader_finds_the_output() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let mut spool = spool(&path);
        spool.write_all(b"early").unwrap();
        spool.drain(LONG);
        let mut found = [0; 5];
        File::open(&path).unwrap().read_exact(&mut found).unwrap();
        assert_eq!(&found, b"early");
        // The first reader has left; the next one finds what came since.
        spool.write_all(b"later").unwrap();
        spool.drain(LONG);
        File::open(&path).unwrap().read_exact(&mut found).unwrap();
        assert_eq!(&found, b"later");
    }
}
