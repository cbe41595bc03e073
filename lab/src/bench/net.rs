//! Where the bytes go: this machine's loopback, or a link between two network namespaces that is
//! shaped at both ends.

use super::cell::Link;
use ferry_terminal::output::Failure;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::process::{Command, Stdio};

/// The addresses of the two ends; they exist in namespaces of their own only.
const SOURCE: &str = "10.55.0.1";
const DESTINATION: &str = "10.55.0.2";
/// Beginning of the names of our namespaces; the process' number follows, then the end.
const PREFIX: &str = "ferry-bench-";

/// What a TCP connection carries of a shaped link's rate: 1,448 bytes in a packet of 1,514.
pub const PAYLOAD: f64 = 1448.0 / 1514.0;

/// How a link gets its rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shaping {
    /// Not at all.
    Loopback,
    /// `tc` with a token bucket at both ends of a pair of virtual cards.
    Tc,
    /// By the sender's own cap, because only root may shape. Senders differ in their bursts.
    Cap,
}

impl Shaping {
    /// How this user can have a link.
    pub fn of(link: &Link) -> Self {
        match link.rate {
            None => Self::Loopback,
            Some(_) if nix::unistd::geteuid().is_root() => Self::Tc,
            Some(_) => Self::Cap,
        }
    }
}

/// A link that is up; taken down when dropped.
pub struct Net {
    /// What the senders are told, in bytes per second.
    pub cap: Option<u64>,
    /// The namespaces of source and destination.
    spaces: Option<[String; 2]>,
}

/// Bytes that crossed the link from the source to the destination, and back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub sent: u64,
    pub received: u64,
}

impl Counters {
    /// What was added since.
    pub const fn since(self, before: Self) -> Self {
        Self {
            sent: self.sent.saturating_sub(before.sent),
            received: self.received.saturating_sub(before.received),
        }
    }
}

/// Runs a command of iproute2.
fn run(program: &str, arguments: &[&str]) -> Result<String, Failure> {
    let shown = || format!("{program} {}", arguments.join(" "));
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| {
            Failure(format!(
                "{program} cannot be run ({e}); install iproute2, which shapes the link"
            ))
        })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Failure(format!(
        "`{}` failed ({}); a shaped link needs root and the kernel's veth and tbf",
        shown(),
        said.split_whitespace().collect::<Vec<_>>().join(" ")
    )))
}

impl Net {
    /// Puts a link up.
    pub fn up(link: &Link) -> Result<Self, Failure> {
        let shaping = Shaping::of(link);
        let mut net = Self {
            cap: link.rate.filter(|_| shaping == Shaping::Cap),
            spaces: None,
        };
        if let (Some(rate), Shaping::Tc) = (link.rate, shaping) {
            let pid = std::process::id();
            let spaces = ["a", "b"].map(|end| format!("{PREFIX}{pid}-{end}"));
            // First, so that a failure on the way takes down what there is.
            net.spaces = Some(spaces.clone());
            shape(&spaces, rate)?;
        }
        Ok(net)
    }

    /// A command at the source's end of it.
    pub fn at_source(&self, program: &std::path::Path) -> Command {
        self.at(0, program)
    }

    /// A command at the destination's end of it.
    pub fn at_destination(&self, program: &std::path::Path) -> Command {
        self.at(1, program)
    }

    fn at(&self, end: usize, program: &std::path::Path) -> Command {
        let Some(spaces) = &self.spaces else {
            return Command::new(program);
        };
        // It becomes the program, so that its number is the program's.
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &spaces[end]]).arg(program);
        command
    }

    /// Where a receiver waits for connections.
    pub const fn address(&self) -> &'static str {
        if self.spaces.is_some() {
            DESTINATION
        } else {
            "127.0.0.1"
        }
    }

    /// What has crossed the link until now.
    ///
    /// On a shaped link, the shapers' counters: virtual cards pass packets of up to 64 KiB and
    /// count one header for each, while a shaper counts the headers of every packet of 1,500 bytes.
    pub fn counters(&self) -> Result<Counters, Failure> {
        let Some([source, destination]) = &self.spaces else {
            let path = "/sys/class/net/lo/statistics/tx_bytes";
            let text = std::fs::read_to_string(path)
                .map_err(|e| Failure(format!("{path} cannot be read ({e})")))?;
            // What loopback sends it receives: only one of both means anything.
            return Ok(Counters {
                sent: text.trim().parse()?,
                received: 0,
            });
        };
        let shaped = |space: &str| -> Result<u64, Failure> {
            let arguments = ["-n", space, "-s", "-j", "qdisc", "show", "dev", "veth"];
            shaper_bytes(&run("tc", &arguments)?)
        };
        Ok(Counters {
            sent: shaped(source)?,
            received: shaped(destination)?,
        })
    }
}

/// Reads what a token bucket has let through from what `tc -s -j qdisc` shows.
fn shaper_bytes(text: &str) -> Result<u64, Failure> {
    let value: Value = serde_json::from_str(text)?;
    let shapers = value.as_array().map(Vec::as_slice).unwrap_or_default();
    let ours = shapers
        .iter()
        .find(|shaper| shaper.get("kind").and_then(Value::as_str) == Some("tbf"));
    ours.and_then(|shaper| shaper.get("bytes")?.as_u64())
        .ok_or_else(|| {
            Failure("`tc` shows no counter of the link's shaper; use a newer iproute2".into())
        })
}

/// Two namespaces, a pair of virtual cards between them, a token bucket at both ends.
fn shape(spaces: &[String; 2], rate: u64) -> Result<(), Failure> {
    clear_leftovers();
    let [a, b] = [&*spaces[0], &*spaces[1]];
    for space in [a, b] {
        run("ip", &["netns", "add", space])?;
        run("ip", &["-n", space, "link", "set", "lo", "up"])?;
    }
    run(
        "ip",
        &[
            "-n", a, "link", "add", "veth", "type", "veth", "peer", "name", "veth", "netns", b,
        ],
    )?;
    let bits = format!("{}bit", rate.saturating_mul(8));
    for (space, address) in [(a, SOURCE), (b, DESTINATION)] {
        let address = format!("{address}/30");
        run("ip", &["-n", space, "addr", "add", &address, "dev", "veth"])?;
        run("ip", &["-n", space, "link", "set", "veth", "up"])?;
        run(
            "tc",
            &[
                "-n", space, "qdisc", "add", "dev", "veth", "root", "tbf", "rate", &bits, "burst",
                "256kb", "latency", "50ms",
            ],
        )?;
    }
    Ok(())
}

/// Takes down what a benchmark that was killed has left.
fn clear_leftovers() {
    let list = run("ip", &["netns", "list"]).unwrap_or_default();
    for space in list.lines().filter_map(|line| line.split(' ').next()) {
        let owner = space
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next());
        if let Some(pid) = owner
            && pid != std::process::id().to_string()
            && pid.bytes().all(|b| b.is_ascii_digit())
            && !std::path::Path::new(&format!("/proc/{pid}")).exists()
        {
            let _ = run("ip", &["netns", "delete", space]);
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for space in self.spaces.iter().flatten() {
            // With the namespace goes its card, and with that the other's.
            let _ = run("ip", &["netns", "delete", space]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read() {
        let text = r#"[{"kind":"noqueue","bytes":1},{"kind":"tbf","handle":"8001:","root":true,"bytes":1200,"packets":3}]"#;
        assert_eq!(shaper_bytes(text).unwrap(), 1200);
        assert!(shaper_bytes("[]").unwrap_err().0.contains("newer iproute2"));
        assert!(shaper_bytes("{").is_err());
        let before = Counters {
            sent: 1200,
            received: 70,
        };
        let later = Counters {
            sent: 1300,
            received: 60,
        };
        let added = Counters {
            sent: 100,
            received: 0,
        };
        assert_eq!(later.since(before), added);
    }
}
