//! A matrix in flags, for what is not worth a file.

use super::cell::{Cell, Cloud, CloudMode, Guest, Link, Policy, Qemu, QemuMode};
use super::spec::{Spec, product};
use ferry_guest_images::Workload;
use ferry_migration::options::Options;
use ferry_terminal::output::Failure;
use ferry_terminal::units::{duration, rate, size};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Guests, links and policies.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Matrix")]
pub struct Flags {
    /// A guest's work: KERNEL.CLASS such as mg.A, dirty:… or idle:…; may be repeated.
    #[arg(long, value_name = "WORK", value_parser = guest)]
    guest: Vec<(String, Workload)>,
    /// The guests' memory; by default what the work needs, and at least 256M.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// The guests' processors.
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// A link: loopback, or a rate such as 1Gbit; may be repeated.
    #[arg(long, value_name = "RATE", value_parser = link)]
    link: Vec<Link>,
    /// ferry's policy and its options, such as precopy or postcopy,order=flush,channels=2, and
    /// tls=true for connections that are secured; may be repeated.
    #[arg(long, value_name = "NAME[,OPTION=VALUE…]", value_parser = ours)]
    policy: Vec<Policy>,
    /// What else to measure on the same guests and links: qemu or cloud-hypervisor, with
    /// all of its ways, or one, such as qemu:multifd; may be repeated. A binary of Cloud Hypervisor
    /// can be named here, as cloud-hypervisor=PATH.
    #[arg(long, value_name = "PEER[:MODE][=PATH]", value_parser = peer)]
    peer: Vec<Peer>,
    /// The longest acceptable pause, for all.
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "20ms")]
    downtime: Duration,
}

/// A peer's ways.
#[derive(Clone, Debug)]
enum Peer {
    Qemu(Vec<QemuMode>),
    Cloud(Vec<CloudMode>, Option<PathBuf>),
}

/// A guest is called as it was typed: its full form has every default in it.
fn guest(text: &str) -> Result<(String, Workload), String> {
    let work = Workload::parse(text).map_err(|e| e.to_string())?;
    Ok((text.to_owned(), work))
}

fn link(text: &str) -> Result<Link, String> {
    Ok(Link {
        name: text.to_owned(),
        rate: match text {
            "loopback" => None,
            _ => Some(rate(text)?),
        },
    })
}

/// `postcopy,order=flush` in the names of the options' own JSON.
fn ours(text: &str) -> Result<Policy, String> {
    let mut object = Map::new();
    for (index, part) in text.split(',').enumerate() {
        let (name, value) = match part.split_once('=') {
            Some(pair) => pair,
            None if index == 0 => ("policy", part),
            None => return Err(format!("`{part}` has no value; write {part}=…")),
        };
        // Numbers, true and false are what they look like; everything else is a name.
        let value = serde_json::from_str(value)
            .ok()
            .filter(|v: &Value| v.is_u64() || v.is_boolean())
            .unwrap_or_else(|| Value::String(value.to_owned()));
        object.insert(name.to_owned(), value);
    }
    let tls = match object.remove("tls") {
        None => false,
        Some(Value::Bool(tls)) => tls,
        Some(other) => return Err(format!("tls={other}: give true or false")),
    };
    let options: Options = serde_json::from_value(Value::Object(object))
        .map_err(|e| e.to_string().replace('`', "'"))?;
    options.check().map_err(|e| e.to_string())?;
    let name = format!("ferry {}", text.replace(',', " "));
    Ok(Policy {
        tls,
        ..Policy::of_ferry(&name, options)
    })
}

fn peer(text: &str) -> Result<Peer, String> {
    let (text, path) = match text.split_once('=') {
        Some((text, path)) => (text, Some(PathBuf::from(path))),
        None => (text, None),
    };
    let (who, way) = match text.split_once(':') {
        Some((who, way)) => (who, Some(way)),
        None => (text, None),
    };
    match who {
        "qemu" if path.is_some() => Err("QEMU's binary is named by --qemu PATH".into()),
        "qemu" => ways("QEMU", &QemuMode::ALL, QemuMode::name, way).map(Peer::Qemu),
        "cloud-hypervisor" => ways("Cloud Hypervisor", &CloudMode::ALL, CloudMode::name, way)
            .map(|modes| Peer::Cloud(modes, path)),
        _ => Err(format!(
            "`{who}` is no known peer; give qemu or cloud-hypervisor"
        )),
    }
}

/// The way that was named, or all.
fn ways<M: Copy>(
    who: &str,
    all: &[M],
    name: fn(M) -> &'static str,
    way: Option<&str>,
) -> Result<Vec<M>, String> {
    let Some(way) = way else {
        return Ok(all.to_vec());
    };
    let found = all.iter().find(|mode| name(**mode) == way);
    found.map(|mode| vec![*mode]).ok_or_else(|| {
        let known: Vec<&str> = all.iter().map(|mode| name(*mode)).collect();
        let known = known.join(", ");
        format!("`{way}` is none of {who}'s ways; choose one of {known}")
    })
}

/// Less would be over before it can be measured.
const SMALLEST: u64 = 256 << 20;

impl Flags {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.guest.is_empty()
            && self.policy.is_empty()
            && self.peer.is_empty()
            && self.link.is_empty()
    }

    /// The binary of Cloud Hypervisor, if it was named.
    pub fn cloud(&self) -> Option<&Path> {
        self.peer.iter().find_map(|peer| match peer {
            Peer::Cloud(_, path) => path.as_deref(),
            Peer::Qemu(_) => None,
        })
    }

    /// What they ask for.
    pub fn spec(&self, runs: u32) -> Result<Spec, Failure> {
        let works = match &*self.guest {
            [] => vec![
                guest("dirty:wss=16M,rate=5000,pattern=sequential,fill=random").map_err(Failure)?,
            ],
            some => some.to_vec(),
        };
        let cpus = usize::try_from(self.cpus).unwrap_or(usize::MAX);
        let guests: Vec<Guest> = works
            .into_iter()
            .map(|(name, work)| Guest {
                name,
                memory: self
                    .memory
                    .unwrap_or_else(|| work.memory_needed(cpus).max(SMALLEST))
                    .next_multiple_of(1 << 20),
                work,
                cpus: self.cpus,
            })
            .collect();
        let links = match &*self.link {
            [] => vec![link("loopback").map_err(Failure)?],
            some => some.to_vec(),
        };
        let downtime_ms = u64::try_from(self.downtime.as_millis()).unwrap_or(u64::MAX);
        let mut policies = match &*self.policy {
            [] => vec![ours("precopy").map_err(Failure)?],
            some => some.to_vec(),
        };
        for policy in &mut policies {
            // One that has a target of its own keeps it.
            if let Some(options) = &mut policy.ferry
                && options.downtime == Options::default().downtime
            {
                options.downtime = self.downtime;
            }
        }
        for peer in &self.peer {
            match peer {
                Peer::Qemu(modes) => policies.extend(modes.iter().map(|mode| {
                    let name = format!("qemu {}", mode.name());
                    Policy::of_qemu(&name, Qemu::new(*mode, downtime_ms))
                })),
                Peer::Cloud(modes, _) => policies.extend(modes.iter().map(|mode| {
                    let name = format!("cloud-hypervisor {}", mode.name());
                    Policy::of_cloud(&name, Cloud::new(*mode, downtime_ms))
                })),
            }
        }
        for guest in &guests {
            guest.check().map_err(Failure)?;
        }
        let cells: Vec<Cell> = product(
            &guests.iter().collect::<Vec<_>>(),
            &links.iter().collect::<Vec<_>>(),
            &policies.iter().collect::<Vec<_>>(),
        );
        Ok(Spec {
            title: "Migrations side by side".into(),
            runs,
            cells,
            goals: Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use ferry_migration::options::PolicyKind;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        flags: Flags,
    }

    fn spec(flags: &[&str]) -> Result<Spec, String> {
        let cli = Cli::try_parse_from(std::iter::once(&"bench").chain(flags))
            .map_err(|e| e.to_string())?;
        cli.flags.spec(3).map_err(|e| e.0)
    }

    #[test]
    fn flags_are_a_matrix() {
        let spec = spec(&[
            "--guest",
            "idle:fill=none",
            "--guest",
            "dirty:wss=1M",
            "--link",
            "loopback",
            "--link",
            "1Gbit",
            "--policy",
            "postcopy,order=flush,channels=2",
            "--peer",
            "qemu:multifd",
            "--memory",
            "64M",
        ])
        .unwrap();
        assert_eq!((spec.cells.len(), spec.runs), (8, 3));
        let options = spec.cells[0].policy.ferry.clone().unwrap();
        assert_eq!(
            (options.policy, options.channels),
            (PolicyKind::Postcopy, Some(2))
        );
        assert_eq!(options.downtime, Duration::from_millis(20));
        assert_eq!(spec.cells[1].policy.qemu.as_ref().unwrap().downtime_ms, 20);
    }

    #[test]
    fn all_of_qemus_ways_by_one_word() {
        assert_eq!(spec(&["--peer", "qemu"]).unwrap().cells.len(), 6);
    }

    #[test]
    fn cloud_hypervisor_is_a_peer_with_a_binary_of_its_own() {
        let cli = Cli::try_parse_from(["bench", "--peer", "cloud-hypervisor:precopy=/opt/ch"]);
        let flags = cli.unwrap_or_else(|e| panic!("{e}")).flags;
        assert_eq!(flags.cloud(), Some(Path::new("/opt/ch")));
        let cells = flags.spec(1).map_err(|e| e.0).unwrap().cells;
        assert_eq!(cells[1].policy.name, "cloud-hypervisor precopy");
        let key: Cell = serde_json::from_str(&cells[1].key()).unwrap();
        assert_eq!(key, cells[1]);
        assert!(cells[1].key().contains("\"cloud-hypervisor\":{\"mode\""));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_in_a_sentence() {
        for (flags, part) in [
            (["--policy", "magic"], "magic"),
            (["--policy", "precopy,speed=9"], "speed"),
            (["--policy", "precopy,channels"], "channels=…"),
            (["--policy", "precopy,channels=0"], "0 channels"),
            (["--policy", "precopy,tls=yes"], "true or false"),
            (["--peer", "vmware"], "vmware"),
            (["--peer", "cloud-hypervisor:multifd"], "postcopy"),
            (["--peer", "qemu=/bin/qemu"], "--qemu PATH"),
            (["--peer", "qemu:teleport"], "auto-converge"),
            (["--link", "fast"], "2.5Gbit"),
            (["--guest", "mg.Q"], "`Q`"),
        ] {
            let error = spec(&flags).unwrap_err();
            assert!(error.contains(part), "{flags:?}: {error}");
        }
        let error = spec(&["--guest", "mg.A", "--memory", "64M"]).unwrap_err();
        assert!(error.contains("64 MiB"), "{error}");
    }
}
