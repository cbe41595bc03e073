//! `ferry console`: this terminal as the console of a guest with `--console pty` or `--serial pty`.

use super::console::{Key, Terminal};
use super::lines::Line;
use super::outcome::Ended;
use ferry_terminal::flags::Target;
use ferry_terminal::output::{Failure, say};
use ferry_vmm::api::client::Client;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::{Errno, read, write};
use rustix::termios::{tcgetwinsize, tcsetwinsize};
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;

/// Bytes that wait for a guest that takes none; further ones are not read.
const MAX_PENDING: usize = 64 << 10;
const KEYS: &str =
    "keys: Ctrl-A x leaves the console, Ctrl-A h shows this, Ctrl-A Ctrl-A sends Ctrl-A";

/// Attach this terminal to a guest's console or serial port, which `--console pty` or `--serial
/// pty` made for that. Where both did, to the console.
///
/// Ctrl-A x leaves the console, and the guest runs on. What the guest writes while nothing is
/// attached is dropped. stdin may be a file or a pipe, too.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry console web")]
pub struct Args {
    #[command(flatten)]
    target: Target,
    /// The serial port, where the console could be attached to as well.
    #[arg(long)]
    serial: bool,
}

pub fn run(args: &Args) -> Result<ExitCode, Ended> {
    let status = Client::new(&args.target.socket()?).status()?;
    let console = status.console.as_deref().filter(|_| !args.serial);
    let serial = status.serial.as_deref();
    let mut ptys = [console, serial].into_iter().flatten();
    let Some(path) = ptys.find_map(|place| place.strip_prefix("pty:")) else {
        let place = serial.unwrap_or("a place that its VMM does not tell");
        let console = console.map_or(String::new(), |place| {
            format!(", and its console to {place}")
        });
        let sentence = format!(
            "the guest's serial port goes to {place}{console}; a guest of `ferry run` with --serial pty or --console pty \
             can be attached to"
        );
        return Err(Failure(sentence).into());
    };
    let pty = open(Path::new(path))?;
    let terminal = Terminal::take(Line::Console);
    if terminal.is_some() {
        say(KEYS);
    }
    // A process in the background must not read its terminal: reading would stop it.
    let stdin = (terminal.is_some() || !io::stdin().is_terminal()).then(io::stdin);
    let left = Attached {
        pty,
        stdin,
        terminal,
        pending: Vec::new(),
    }
    .run();
    say(
        match left.map_err(|e| Failure(format!("the console is lost ({e})")))? {
            Left::Vmm => "the guest's VMM has ended",
            Left::User => "left the console; the guest runs on",
        },
    );
    Ok(ExitCode::SUCCESS)
}

fn open(path: &Path) -> Result<File, Failure> {
    let failed = |e: io::Error| {
        Failure(format!(
            "the console {} cannot be opened ({e})",
            path.display()
        ))
    };
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK);
    let pty = options.open(path).map_err(failed)?;
    // Two would get a part of the output each.
    match flock(&pty, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Err(Failure(format!(
            "another `ferry console` is attached to {}; leave that one first",
            path.display()
        ))),
        locked => locked.map(|()| pty).map_err(|e| failed(e.into())),
    }
}

/// Why a console was left.
#[derive(Clone, Copy, Debug)]
enum Left {
    Vmm,
    User,
}

struct Attached {
    pty: File,
    /// `None` after its end.
    stdin: Option<io::Stdin>,
    terminal: Option<Terminal>,
    /// For the guest.
    pending: Vec<u8>,
}

impl Attached {
    fn run(mut self) -> io::Result<Left> {
        loop {
            let (from_guest, typed) = self.wait()?;
            if from_guest && !self.show()? {
                return Ok(Left::Vmm);
            }
            if typed && self.read()? {
                return Ok(Left::User);
            }
            self.send()?;
        }
    }

    /// Waits until the guest has written or keys can be read. Two descriptors of one thread that
    /// does nothing else: an event manager would hold no more of it.
    fn wait(&self) -> io::Result<(bool, bool)> {
        let mut wanted = PollFlags::IN;
        if !self.pending.is_empty() {
            wanted |= PollFlags::OUT;
        }
        let mut fds = vec![PollFd::new(&self.pty, wanted)];
        let stdin = self
            .stdin
            .as_ref()
            .filter(|_| self.pending.len() < MAX_PENDING);
        fds.extend(stdin.map(|stdin| PollFd::new(stdin, PollFlags::IN)));
        match poll(&mut fds, None) {
            Err(Errno::INTR) => return Ok((false, false)),
            polled => polled?,
        };
        let readable = |fd: &PollFd<'_>| {
            let found = fd.revents();
            found.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR)
        };
        Ok((readable(&fds[0]), fds.get(1).is_some_and(readable)))
    }

    /// Shows what the guest has written; false when its VMM is gone.
    fn show(&self) -> io::Result<bool> {
        let mut bytes = [0; 4096];
        match read(&self.pty, &mut bytes) {
            Ok(0) | Err(Errno::IO) => Ok(false),
            Ok(n) => {
                let mut out = io::stdout().lock();
                out.write_all(&bytes[..n])?;
                out.flush()?;
                Ok(true)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(true),
            Err(e) => Err(e.into()),
        }
    }

    /// Reads keys; true when the user leaves.
    fn read(&mut self) -> io::Result<bool> {
        if let Some(terminal) = &mut self.terminal {
            let Some(keys) = terminal.read() else {
                return Ok(true);
            };
            self.pending.append(&mut terminal.take_pending());
            // The VMM tells the guest with the next key.
            if let Ok(size) = tcgetwinsize(terminal.device()) {
                let _ = tcsetwinsize(&self.pty, size);
            }
            for key in keys {
                match key {
                    Key::Quit => return Ok(true),
                    Key::Help => say(KEYS),
                }
            }
            return Ok(false);
        }
        let mut bytes = [0; 4096];
        let stdin: BorrowedFd<'_> = match &self.stdin {
            Some(stdin) => stdin.as_fd(),
            None => return Ok(false),
        };
        match read(stdin, &mut bytes) {
            // The guest may have more to say.
            Ok(0) => self.stdin = None,
            Ok(n) => self.pending.extend_from_slice(&bytes[..n]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(false)
    }

    fn send(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        match write(&self.pty, &self.pending) {
            Ok(n) => drop(self.pending.drain(..n)),
            // A VMM that is gone is found when it is read from.
            Err(Errno::AGAIN | Errno::INTR | Errno::IO) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }
}
