//! QEMU's control socket: the machine protocol (docs/interop/qmp-spec).

use super::interrupt;
use ferry_terminal::output::Failure;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// A connection.
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to a QEMU that is starting.
    pub fn connect(path: &Path) -> Result<Self, Failure> {
        let stream = interrupt::until(
            Duration::from_secs(10),
            || "QEMU does not answer on its control socket".to_owned(),
            || Ok(UnixStream::connect(path).ok()),
        )?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut qmp = Self {
            reader: BufReader::new(stream),
        };
        qmp.message()?;
        qmp.command("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn message(&mut self) -> Result<Value, Failure> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(Failure("QEMU closed its control socket".into()));
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Gives a command and returns its answer; events in between are skipped.
    pub fn command(&mut self, name: &str, arguments: &Value) -> Result<Value, Failure> {
        let mut command = json!({ "execute": name, "arguments": arguments }).to_string();
        command.push('\n');
        let failed = |e: Failure| Failure(format!("QEMU was told {name}: {}", e.0));
        // In one write: QEMU can quit at the closing bracket, and a write after that would fail.
        let sent = self.reader.get_mut().write_all(command.as_bytes());
        sent.map_err(|e| failed(e.into()))?;
        loop {
            let mut message = self.message().map_err(failed)?;
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = message.get("error") {
                let why = error
                    .get("desc")
                    .and_then(Value::as_str)
                    .unwrap_or("no reason given");
                return Err(Failure(format!("QEMU refuses {name}: {why}")));
            }
        }
    }
}
