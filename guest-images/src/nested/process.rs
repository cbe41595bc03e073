//! A process in a nested host.

use std::io;
use std::net::TcpStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ferry_linux_init::frames::{Kind, MAX_PAYLOAD, read, write};

use super::NestedError;

/// Time for the agent to say its token: it is connected already.
const HELLO: Duration = Duration::from_secs(60);
/// Output that is kept, in bytes each of stdout and stderr; what comes beyond ends the process.
const MAX_OUTPUT: usize = 64 << 20;

/// What a process that has ended printed.
#[derive(Clone, Debug, Default)]
pub struct Ran {
    /// Its exit status; 128 and the signal's number where one ended it.
    pub code: i32,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

#[derive(Debug, Default)]
struct State {
    output: Vec<u8>,
    errors: Vec<u8>,
    /// Its exit status, or why there is none.
    end: Option<Result<i32, String>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is whole when the lock is given back.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A process in a nested host; dropping it kills the process.
#[derive(Debug)]
pub struct Process {
    stream: TcpStream,
    shared: Arc<Shared>,
}

impl Process {
    /// Runs a command over a connection that the agent has made; `None` if it was not the agent who
    /// made it.
    pub(super) fn start(
        stream: TcpStream,
        token: &str,
        arguments: &[&str],
    ) -> io::Result<Option<Self>> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(HELLO))?;
        // Every user of this machine can connect; without the token the connection is closed.
        match read(&stream) {
            Ok(Some((Kind::Hello, word))) if word == token.as_bytes() => {}
            _ => return Ok(None),
        }
        stream.set_read_timeout(None)?;
        let mut payload = Vec::new();
        for argument in arguments {
            payload.extend(argument.as_bytes());
            payload.push(0);
        }
        write(&stream, Kind::Run, &payload)?;
        let shared = Arc::new(Shared::default());
        let (from, to) = (stream.try_clone()?, Arc::clone(&shared));
        std::thread::spawn(move || follow(from, &to));
        Ok(Some(Self { stream, shared }))
    }

    /// Writes to its standard input.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn input(&self, bytes: &[u8]) -> io::Result<()> {
        bytes
            .chunks(MAX_PAYLOAD)
            .try_for_each(|part| write(&self.stream, Kind::Input, part))
    }

    /// Ends its standard input.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn end_input(&self) -> io::Result<()> {
        write(&self.stream, Kind::InputEnd, &[])
    }

    /// What it has written to stdout so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().output).into_owned()
    }

    /// What it has written to stderr so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().errors).into_owned()
    }

    /// What it has written to stdout after the first `seen` bytes, as soon as there is something;
    /// `None` when it ends before that, or after `patience`.
    #[must_use]
    pub fn stdout_after(&self, seen: usize, patience: Duration) -> Option<Vec<u8>> {
        self.wait_for(patience, |state| {
            let new = state.output.get(seen..)?;
            (!new.is_empty()).then(|| new.to_vec())
        })
    }

    /// Its exit status, if it has ended.
    #[must_use]
    pub fn ended(&self) -> Option<i32> {
        self.shared
            .lock()
            .end
            .as_ref()
            .map(|end| end.as_ref().map_or(-1, |code| *code))
    }

    /// Waits until `find` finds something in what it has printed, stdout and stderr; `None` when it
    /// ends before that, or after `patience`.
    pub fn until<T>(
        &self,
        patience: Duration,
        mut find: impl FnMut(&str, &str) -> Option<T>,
    ) -> Option<T> {
        self.wait_for(patience, |state| {
            let text = String::from_utf8_lossy;
            find(&text(&state.output), &text(&state.errors))
        })
    }

    fn wait_for<T>(
        &self,
        patience: Duration,
        mut find: impl FnMut(&State) -> Option<T>,
    ) -> Option<T> {
        let deadline = Instant::now() + patience;
        let mut state = self.shared.lock();
        loop {
            if let Some(found) = find(&state) {
                return Some(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.end.is_some() || left.is_zero() {
                return None;
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It takes longer than `patience` (and is killed), could not be started, or the nested host is
    /// gone.
    pub fn wait(self, patience: Duration) -> Result<Ran, NestedError> {
        let _: Option<()> = self.until(patience, |_, _| None);
        let state = self.shared.lock();
        let (stdout, stderr) = (
            String::from_utf8_lossy(&state.output),
            String::from_utf8_lossy(&state.errors),
        );
        match &state.end {
            Some(Ok(code)) => Ok(Ran {
                code: *code,
                stdout: stdout.into_owned(),
                stderr: stderr.into_owned(),
            }),
            Some(Err(sentence)) => Err(NestedError::Agent(io::Error::other(sentence.clone()))),
            None => Err(NestedError::Agent(io::Error::other(format!(
                "a command did not end within {patience:?}; it printed {stdout:?} and {stderr:?}"
            )))),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The agent kills a process without a listener.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

fn follow(stream: TcpStream, shared: &Shared) {
    let mut end = None;
    while end.is_none() {
        let frame = read(&stream);
        let mut state = shared.lock();
        end = match frame {
            Ok(Some((Kind::Output, bytes))) => keep(&mut state.output, &bytes),
            Ok(Some((Kind::Errors, bytes))) => keep(&mut state.errors, &bytes),
            Ok(Some((Kind::Exit, code))) => {
                let code = code.try_into().map(i32::from_le_bytes);
                Some(code.map_err(|_| "an exit status that is none".to_owned()))
            }
            Ok(Some((Kind::Failed, sentence))) => {
                Some(Err(String::from_utf8_lossy(&sentence).into_owned()))
            }
            Ok(Some(_)) => Some(Err("it said something that only this side says".to_owned())),
            Ok(None) => Some(Err("the connection has ended".to_owned())),
            Err(e) => Some(Err(e.to_string())),
        };
        state.end.clone_from(&end);
        shared.changed.notify_all();
    }
    // Also after too much output: the agent kills a process without a listener.
    let _ = stream.shutdown(std::net::Shutdown::Both);
}

fn keep(to: &mut Vec<u8>, bytes: &[u8]) -> Option<Result<i32, String>> {
    if to.len() + bytes.len() > MAX_OUTPUT {
        return Some(Err(format!("it printed more than {MAX_OUTPUT} bytes")));
    }
    to.extend(bytes);
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Plays the agent.
    fn agent(token: &str) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let agent = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        write(&agent, Kind::Hello, token.as_bytes()).unwrap();
        (agent, listener.accept().unwrap().0)
    }

    #[test]
    fn a_command_is_run_and_its_output_kept_apart() {
        let (agent, stream) = agent("secret");
        let process = Process::start(stream, "secret", &["a", "b c"])
            .unwrap()
            .unwrap();
        assert_eq!(
            read(&agent).unwrap(),
            Some((Kind::Run, b"a\0b c\0".to_vec()))
        );
        process.input(b"in").unwrap();
        assert_eq!(read(&agent).unwrap(), Some((Kind::Input, b"in".to_vec())));
        write(&agent, Kind::Output, b"out").unwrap();
        write(&agent, Kind::Errors, b"err").unwrap();
        let patience = Duration::from_secs(60);
        assert_eq!(
            process.until(patience, |o, e| (o == "out" && e == "err").then_some(7)),
            Some(7)
        );
        write(&agent, Kind::Exit, &3i32.to_le_bytes()).unwrap();
        let ran = process.wait(patience).unwrap();
        assert_eq!(
            (ran.code, ran.stdout.as_str(), ran.stderr.as_str()),
            (3, "out", "err")
        );
    }

    #[test]
    fn strangers_are_sent_away_and_a_lost_agent_is_told() {
        let (_stranger, stream) = agent("guess");
        assert!(Process::start(stream, "secret", &["a"]).unwrap().is_none());
        let (lost, stream) = agent("secret");
        let process = Process::start(stream, "secret", &["a"]).unwrap().unwrap();
        drop(lost);
        let error = process
            .wait(Duration::from_secs(60))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("ended") || error.contains("reset"),
            "{error}"
        );
    }
}
