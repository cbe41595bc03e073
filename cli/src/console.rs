//! The user's terminal as the guest's console: raw while the guest runs, with QEMU's keys to get
//! out of it.
//!
//! Ctrl-A x ends the guest, Ctrl-A h shows the keys, Ctrl-A Ctrl-A sends one Ctrl-A to the guest.
//! All other keys, Ctrl-C too, are the guest's.

use super::lines::{Line, Size};
use ferry_terminal::output::say;
use ferry_vmm::thread;
use ferry_vmm::vmm::Vmm;
use nix::sys::termios::{OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp};
use std::io::{self, Read, Stdin};
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

/// Bytes typed or pasted while the guest takes none. Further ones are dropped, as a serial line's
/// receiver does.
const MAX_PENDING: usize = 1 << 20;

/// What the keys are, for people.
pub const KEYS: &str =
    "keys: Ctrl-A x ends the guest, Ctrl-A h shows this, Ctrl-A Ctrl-A sends Ctrl-A";

/// What a key sequence asks of us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// End the guest.
    Quit,
    /// Show the keys.
    Help,
}

/// Finds our own keys among the guest's.
#[derive(Debug, Default)]
struct Escape {
    armed: bool,
}

impl Escape {
    /// Appends the guest's bytes to `guest` and returns our keys.
    fn feed(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> Vec<Key> {
        let mut keys = Vec::new();
        for &byte in typed {
            match (std::mem::take(&mut self.armed), byte) {
                (false, 0x01) => self.armed = true,
                (false, byte) | (true, byte @ 0x01) => guest.push(byte),
                (true, b'x' | b'X') => keys.push(Key::Quit),
                (true, b'h' | b'H' | b'?') => keys.push(Key::Help),
                // As in QEMU: nothing.
                (true, _) => {}
            }
        }
        keys
    }
}

/// A terminal in raw mode. Dropping it restores what was, also when a panic unwinds.
pub struct Terminal {
    stdin: Stdin,
    before: Termios,
    escape: Escape,
    pending: Vec<u8>,
    line: Line,
    size: Size,
}

impl Terminal {
    /// Takes the terminal on stdin. `None` where stdin is no terminal, or where this process is in
    /// the background.
    pub fn take(line: Line) -> Option<Self> {
        let stdin = io::stdin();
        if tcgetpgrp(&stdin).ok()? != getpgrp() {
            return None;
        }
        let before = tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        // Our own messages, and guests that end lines with a bare newline, need the carriage
        // return.
        raw.output_flags = before.output_flags | OutputFlags::OPOST;
        tcsetattr(&stdin, SetArg::TCSANOW, &raw).ok()?;
        Some(Self {
            stdin,
            before,
            escape: Escape::default(),
            pending: Vec::new(),
            line,
            size: Size::default(),
        })
    }

    /// Reads what was typed, when the descriptor is readable. `None` at its end.
    pub fn read(&mut self) -> Option<Vec<Key>> {
        let mut typed = [0; 4096];
        // Past `Stdin`'s buffer: what stayed there would make no descriptor readable.
        let n = match rustix::io::read(&self.stdin, &mut typed) {
            Ok(0) => return None,
            Ok(n) => n,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return Some(Vec::new()),
            Err(_) => return None,
        };
        let keys = self.escape.feed(&typed[..n], &mut self.pending);
        self.pending.truncate(MAX_PENDING);
        Some(keys)
    }

    /// Hands pending keys to the guest, and the terminal's size; whether keys are left.
    pub fn flush(&mut self, vmm: &Vmm) -> bool {
        self.size.update(vmm, self.line, &self.stdin);
        let taken = self.line.input(vmm, &self.pending);
        let taken = taken.min(self.pending.len());
        self.pending.drain(..taken);
        !self.pending.is_empty()
    }

    /// The terminal, for its size.
    pub const fn device(&self) -> &Stdin {
        &self.stdin
    }

    /// The keys that were typed for the guest and not [flushed](Terminal::flush).
    pub fn take_pending(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.pending)
    }
}

impl AsRawFd for Terminal {
    fn as_raw_fd(&self) -> RawFd {
        self.stdin.as_raw_fd()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = tcsetattr(&self.stdin, SetArg::TCSANOW, &self.before);
    }
}

/// Gives the guest these bytes, as fast as it takes them.
pub fn hand_over(vmm: &Vmm, line: Line, mut bytes: &[u8]) {
    while !bytes.is_empty() && vmm.outcome().is_none() {
        let taken = line.input(vmm, bytes).min(bytes.len());
        bytes = &bytes[taken..];
        if taken == 0 {
            // The port's queue is short and the guest empties it in its own time.
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// stdin that is no terminal: a file or a pipe, given to the guest as fast as it takes it.
pub fn feed_from_pipe(vmm: Vmm, line: Line) -> io::Result<()> {
    let feed = move || {
        let mut bytes = [0; 1024];
        let mut stdin = io::stdin().lock();
        loop {
            let n = match stdin.read(&mut bytes) {
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e.to_string()),
            };
            hand_over(&vmm, line, &bytes[..n]);
        }
    };
    let failure = |why: String| say(&format!("the guest gets no more input from stdin: {why}"));
    thread::spawn(thread::Kind::Vmm, "ferry-stdin", feed, failure).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(pieces: &[&[u8]]) -> (Vec<u8>, Vec<Key>) {
        let (mut escape, mut guest, mut keys) = (Escape::default(), Vec::new(), Vec::new());
        for piece in pieces {
            keys.extend(escape.feed(piece, &mut guest));
        }
        (guest, keys)
    }

    #[test]
    fn our_keys_are_found_and_the_rest_is_the_guests() {
        assert_eq!(feed(&[b"ls\r\x03"]), (b"ls\r\x03".to_vec(), vec![]));
        assert_eq!(feed(&[b"a\x01xb"]), (b"ab".to_vec(), vec![Key::Quit]));
        assert_eq!(feed(&[b"\x01", b"h"]), (vec![], vec![Key::Help]));
        assert_eq!(feed(&[b"\x01\x01x"]), (b"\x01x".to_vec(), vec![]));
        assert_eq!(feed(&[b"\x01qx"]), (b"x".to_vec(), vec![]));
    }
}
