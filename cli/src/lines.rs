//! The guest's lines to this host: its serial port, and its virtio console if it has one.
//!
//! Both are given in one form. Of the two, one can be this process's terminal.

use super::serial::{Port, Serial};
use super::spool::Spool;
use ferry_terminal::output::Failure;
use ferry_vmm::machine::ConsoleOptions;
use ferry_vmm::migrate::SerialFactory;
use ferry_vmm::vmm::Vmm;
use rustix::termios::tcgetwinsize;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

/// One of the guest's lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// COM1.
    Serial,
    /// The virtio console.
    Console,
}

impl Line {
    /// Its option.
    pub const fn option(self) -> &'static str {
        match self {
            Self::Serial => "--serial",
            Self::Console => "--console",
        }
    }

    /// What comes from the guest on it.
    pub const fn output(self) -> &'static str {
        match self {
            Self::Serial => "serial output",
            Self::Console => "console output",
        }
    }

    /// Gives the guest what was typed; how many bytes it took.
    pub fn input(self, vmm: &Vmm, bytes: &[u8]) -> usize {
        match self {
            Self::Serial => vmm.input(bytes),
            Self::Console => vmm.console_input(bytes),
        }
    }

    fn tell(self, vmm: &Vmm, place: String) {
        match self {
            Self::Serial => vmm.set_serial(place),
            Self::Console => vmm.set_console(place),
        }
    }
}

/// The size of a terminal, as far as the guest knows it.
#[derive(Debug, Default)]
pub struct Size(Option<(u16, u16)>);

impl Size {
    /// Tells the guest where it is news; a serial port has none. `false` while the console is busy:
    /// it is to be told again.
    pub fn update(&mut self, vmm: &Vmm, line: Line, terminal: &impl AsFd) -> bool {
        if line == Line::Serial {
            return true;
        }
        let Ok(now) = tcgetwinsize(terminal) else {
            return true;
        };
        // A new pseudo-terminal has no size: a guest that arrives keeps that of the terminal
        // before.
        if (now.ws_col, now.ws_row) == (0, 0) {
            return true;
        }
        let now = Some((now.ws_col, now.ws_row));
        if let (true, Some((columns, rows))) = (now != self.0, now)
            && vmm.set_console_size(columns, rows)
        {
            self.0 = now;
        }
        self.0 == now
    }
}

/// The lines, opened before the sandbox is entered, so that errors come before the guest does.
pub struct Opened<'a>(Vec<(Port<'a>, Box<dyn Write + Send>)>);

/// The lines of a guest.
pub struct Lines<'a>(Vec<(Port<'a>, Spool)>);

impl<'a> Opened<'a> {
    pub fn open(serial: &'a Serial, console: Option<&'a Serial>) -> Result<Self, Failure> {
        if *serial == Serial::Stdio && console == Some(&Serial::Stdio) {
            return Err(Failure(
                "--serial and --console both go to stdio, which is one terminal: add --serial null, or give --console \
                 another place"
                    .into(),
            ));
        }
        let console = console.map(|console| (Line::Console, console));
        let all = [(Line::Serial, serial)].into_iter().chain(console);
        let open = |(line, place): (Line, &'a Serial)| {
            let port = place.prepare(line)?;
            let sink = port.open()?;
            Ok((port, sink))
        };
        all.map(open).collect::<Result<_, _>>().map(Self)
    }

    /// Starts the threads that empty the queues before the sinks.
    pub fn spool(self) -> Result<Lines<'a>, Failure> {
        let spool = |(port, sink): (Port<'a>, _)| {
            let spool = Spool::new(sink, port.line().output())?;
            Ok((port, spool))
        };
        let all = self.0.into_iter().map(spool);
        all.collect::<Result<_, Failure>>().map(Lines)
    }
}

impl Lines<'_> {
    fn spool(&self, line: Line) -> Option<Spool> {
        let mut all = self.0.iter();
        let (_, spool) = all.find(|(port, _)| port.line() == line)?;
        Some(spool.clone())
    }

    /// Where the serial port's output goes, for each machine that comes.
    pub fn serial(&self) -> SerialFactory {
        let spool = self.spool(Line::Serial);
        Arc::new(move || {
            Ok(match &spool {
                Some(spool) => Box::new(spool.clone()) as _,
                None => Box::new(std::io::sink()) as _,
            })
        })
    }

    /// What is behind the console, if it is given.
    pub fn console(&self) -> Option<ConsoleOptions> {
        let spool = self.spool(Line::Console)?;
        Some(ConsoleOptions::new(
            move || Ok(Box::new(spool.clone()) as _),
        ))
    }

    /// Lets a status say where they go.
    pub fn tell(&self, vmm: &Vmm) {
        for (port, _) in &self.0 {
            port.line().tell(vmm, port.place());
        }
    }

    /// The line that is this process's terminal.
    pub fn on_stdio(&self) -> Option<Line> {
        let mut all = self.0.iter();
        let (port, _) = all.find(|(port, _)| port.is_stdio())?;
        Some(port.line())
    }

    /// Gives the guest what is typed at the pseudo-terminals.
    pub fn feed(&self, vmm: &Vmm) -> Result<(), Failure> {
        for (port, _) in &self.0 {
            if let Some(pty) = port.pty() {
                pty.feed(vmm.clone(), port.line())?;
            }
        }
        Ok(())
    }

    /// Waits until the sinks have what was written, at most `timeout` for each, and ends their
    /// threads.
    pub fn close(&self, timeout: Duration) {
        for (_, spool) in &self.0 {
            spool.drain(timeout);
            spool.close();
        }
    }
}
