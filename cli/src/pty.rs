//! `--serial pty`, `--console pty`: a pseudo-terminal that `ferry console`, or any terminal
//! program, attaches to.
//!
//! Output is dropped while nothing is attached, as QEMU does it: otherwise who attaches would read
//! the oldest megabyte first. Bytes in flight when the program detaches are lost.

use super::lines::{Line, Size};
use ferry_terminal::output::say;
use ferry_vmm::thread;
use ferry_vmm::vmm::Vmm;
use nix::pty::openpty;
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::ttyname;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often it is looked whether something is attached.
const LOOK: Duration = Duration::from_millis(100);

/// How often, and how long after another, a busy console is told the terminal's size.
const AGAIN: u32 = 50;
const MOMENT: Duration = Duration::from_millis(20);

/// The VMM's side of a pseudo-terminal.
#[derive(Debug)]
pub struct Pty {
    master: File,
    path: PathBuf,
}

impl Pty {
    /// Makes one. It passes every byte as it is.
    pub fn open() -> io::Result<Self> {
        let pair = openpty(None, None)?;
        fcntl_setfd(&pair.master, FdFlags::CLOEXEC)?;
        let mut raw = tcgetattr(&pair.slave)?;
        cfmakeraw(&mut raw);
        tcsetattr(&pair.slave, SetArg::TCSANOW, &raw)?;
        let path = ttyname(&pair.slave)?;
        // From here on poll(2) says POLLHUP of the master until a program opens the slave.
        drop(pair.slave);
        Ok(Self {
            master: pair.master.into(),
            path,
        })
    }

    /// What a program opens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the guest's output.
    pub fn output(&self) -> io::Result<Output> {
        Ok(Output(self.master.try_clone()?))
    }

    /// Gives the guest what is typed, as fast as it takes it, and with it the size of the terminal
    /// that it is typed at.
    pub fn feed(&self, vmm: Vmm, line: Line) -> io::Result<()> {
        let mut master = self.master.try_clone()?;
        let feed = move || {
            let mut bytes = [0; 1024];
            let mut size = Size::default();
            let mut again = 0;
            loop {
                // A console is busy for moments, or as long as a snapshot or a migration has the
                // guest paused; where it waits for a page to come, it may be for longer.
                if again > 0 && !has_input(&master).map_err(|e| e.to_string())? {
                    let known = size.update(&vmm, line, &master);
                    again = if known { 0 } else { again - 1 };
                    continue;
                }
                match master.read(&mut bytes) {
                    Ok(n) if n > 0 => {
                        let known = size.update(&vmm, line, &master);
                        again = if known { 0 } else { AGAIN };
                        super::console::hand_over(&vmm, line, &bytes[..n]);
                    }
                    // Nothing is attached.
                    Ok(_) => std::thread::sleep(LOOK),
                    Err(e) if e.raw_os_error() == Some(Errno::IO.raw_os_error()) => {
                        std::thread::sleep(LOOK);
                    }
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(e.to_string()),
                }
            }
        };
        let failure = |why: String| say(&format!("the guest gets no more input: {why}"));
        thread::spawn(thread::Kind::Vmm, "ferry-pty", feed, failure).map(drop)
    }
}

/// Whether reading returns at once: input, or the end of it, came before a moment was over.
fn has_input(master: &File) -> io::Result<bool> {
    let mut fds = [PollFd::new(master, PollFlags::IN)];
    let moment = Timespec::try_from(MOMENT).ok();
    match poll(&mut fds, moment.as_ref()) {
        Err(Errno::INTR) => Ok(false),
        ready => Ok(ready? > 0),
    }
}

/// The guest's output on its way to whatever is attached.
#[derive(Debug)]
pub struct Output(File);

impl Output {
    fn is_attached(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(&self.0, PollFlags::OUT)];
        poll(&mut fds, Some(&Timespec::default()))?;
        Ok(!fds[0].revents().contains(PollFlags::HUP))
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.is_attached()? {
            return Ok(bytes.len());
        }
        match self.0.write(bytes) {
            // It detached while we waited for it to read.
            Err(e) if e.raw_os_error() == Some(Errno::IO.raw_os_error()) => Ok(bytes.len()),
            written => written,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::os::unix::fs::OpenOptionsExt;

    fn attach(pty: &Pty) -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NOCTTY);
        options.open(pty.path()).unwrap()
    }

    #[test]
    fn output_is_dropped_until_something_is_attached_and_then_passes_as_it_is() {
        let pty = Pty::open().unwrap();
        let mut output = pty.output().unwrap();
        // More than a terminal holds: this would wait for a reader.
        output.write_all(&[b'x'; 1 << 20]).unwrap();
        let mut attached = attach(&pty);
        output.write_all(b"a\nb\x03").unwrap();
        let mut found = [0; 4];
        attached.read_exact(&mut found).unwrap();
        assert_eq!(&found, b"a\nb\x03");
        drop(attached);
        output.write_all(&[b'y'; 1 << 20]).unwrap();
        let mut again = attach(&pty);
        output.write_all(b"z").unwrap();
        let mut found = [0; 1];
        again.read_exact(&mut found).unwrap();
        assert_eq!(&found, b"z");
    }
}
