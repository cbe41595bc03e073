//! Moving a guest to a host, by that host's agent: checked and prepared there before anything is
//! sent, and cleaned up where the guest has not moved.

use super::migrate::to_its_end;
use super::outcome::{Ended, Outcome};
use ferry_agent::{Agent, AgentError, Disk, Host, Network, Wanted};
use ferry_migration::report::{Event, Report};
use ferry_terminal::flags::Guest;
use ferry_terminal::output::Failure;
use ferry_vmm::api::client::Client;
use ferry_vmm::api::types::{Configuration, MigrateRequest};

impl From<AgentError> for Ended {
    fn from(error: AgentError) -> Self {
        Failure(error.to_string()).into()
    }
}

/// Whether a word is a host, and no URI.
pub fn is_host(word: &str) -> bool {
    let scheme = |name: &str| word.starts_with(name);
    !["tcp:", "unix:", "file:", "fd:"].into_iter().any(scheme) && !word.contains('/')
}

/// The name under which a guest arrives: that by which it was asked for, or its own.
pub fn name_of(guest: &Guest, client: &Client) -> Result<String, Ended> {
    if let Guest::Named(name) = guest {
        return Ok(name.to_string());
    }
    let own = client.status()?.guest.and_then(|guest| guest.name);
    own.ok_or_else(|| {
        Failure(
            "the guest has no name, by which the other host would know it: start it with --name"
                .into(),
        )
        .into()
    })
}

/// What a guest needs where it goes.
pub fn wanted(guest: Configuration, name: &str) -> Result<Wanted, Failure> {
    let known = |what: &str, place: Option<String>| {
        place.ok_or_else(|| {
            Failure(format!(
                "{what} of the guest {name} has no path here that another host could know: prepare its receiver by hand, with \
                 `ferry receive`"
            ))
        })
    };
    let mut disks = Vec::new();
    for disk in guest.disks {
        disks.push(Disk {
            path: known("a disk", disk.path)?.into(),
            bytes: disk.bytes,
            read_only: disk.read_only,
        });
    }
    let mut networks = Vec::new();
    for network in guest.networks {
        networks.push(Network {
            tap: known("a network card", network.tap)?,
        });
    }
    Ok(Wanted {
        name: name.to_owned(),
        memory_bytes: guest.memory.bytes,
        cpus: guest.cpus,
        disks,
        networks,
        vsock: guest
            .vsock
            .map(|vsock| known("a vsock device", vsock.socket))
            .transpose()?
            .map(Into::into),
        ..Wanted::default()
    })
}

/// Refuses a host whose ferry is another.
pub fn check_version(host: &Host, place: &str) -> Result<(), Failure> {
    let here = env!("CARGO_PKG_VERSION");
    let major = |version: &str| version.split('.').take(2).collect::<Vec<_>>().join(".");
    if major(&host.version) == major(here) {
        return Ok(());
    }
    Err(Failure(format!(
        "{place} has ferry {}, and this is ferry {here}: upgrade the older one",
        host.version
    )))
}

/// What becomes there of a guest with so many NUMA nodes, where they have less room than they
/// should: a sentence.
pub fn nodes_note(host: &Host, place: &str, nodes: usize) -> Option<String> {
    // An agent that does not say has 0.
    let fewer = host.numa_nodes > 0 && host.numa_nodes < nodes;
    fewer.then(|| {
        format!(
            "the guest has {nodes} NUMA nodes and {place} has {}: some will share one there, and the guest goes on believing that \
             they are apart",
            host.numa_nodes
        )
    })
}

/// Has a receiver prepared, moves the guest to it, and has it ended where the guest stayed.
/// `events` takes the migration's events.
pub fn move_to(
    agent: &Agent,
    client: &Client,
    wanted: &Wanted,
    request: MigrateRequest,
    events: &mut dyn FnMut(&Event),
) -> Result<Report, Ended> {
    let receiver = agent.receive(wanted)?;
    let request = MigrateRequest {
        uri: receiver.uri,
        pair: Some(receiver.pair),
        tls: None,
        ..request
    };
    let moved = to_its_end(client, &request, events);
    let outcome = match &moved {
        Ok(report) => Outcome::of(report),
        Err(ended) => ended.outcome,
    };
    if outcome.guest_stays()
        && let Err(error) = agent.end_receiver(&wanted.name)
    {
        // It ends by itself in a minute.
        tracing::warn!(%error, "the receiver was left");
    }
    moved
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_no_uri() {
        for host in ["hostb", "hostb:7100", "192.0.2.1", "[2001:db8::1]:9"] {
            assert!(is_host(host), "{host}");
        }
        for uri in ["tcp:hostb:1", "unix:link", "file:x", "/tmp/link", "./link"] {
            assert!(!is_host(uri), "{uri}");
        }
    }

    #[test]
    fn fewer_nodes_are_told_and_nothing_else_is() {
        let host = |numa_nodes| Host {
            numa_nodes,
            ..Host::default()
        };
        let note = nodes_note(&host(1), "b", 2).unwrap();
        assert!(note.contains("2 NUMA nodes and b has 1"), "{note}");
        for (there, guest) in [(0, 2), (2, 2), (4, 2), (1, 0), (1, 1)] {
            assert_eq!(nodes_note(&host(there), "b", guest), None);
        }
    }

    #[test]
    fn another_minor_version_is_refused() {
        let host = |version: &str| Host {
            version: version.into(),
            ..Host::default()
        };
        check_version(&host(env!("CARGO_PKG_VERSION")), "b").unwrap();
        let why = check_version(&host("99.1.0"), "b").unwrap_err().0;
        assert!(why.contains("b has ferry 99.1.0"), "{why}");
    }
}
