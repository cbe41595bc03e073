//! An older ferry and this one: `tests/versions`.

use super::show;
use ferry_guest_images::Line;
use ferry_migration::options::{Compress, Handover, Options, PolicyKind};
use ferry_tests::{Host, guests_run};
use ferry_vmm::api::types::{SnapshotRequest, Then};
use ferry_vmm::machine::OLDEST_STATE_VERSION;
use std::path::Path;

/// A program that is ferry.
#[derive(Clone, Copy)]
enum Ferry<'a> {
    /// This build.
    New,
    /// That of an earlier revision.
    Old(&'a str),
}

impl Ferry<'_> {
    const fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Old(_) => "old",
        }
    }

    fn start(self, args: &[&str]) -> Host {
        match self {
            Self::New => Host::start(args),
            // The program that would be started is the first word.
            Self::Old(path) => {
                let script = format!("shift; exec '{path}' \"$@\"");
                Host::start_by(&["sh", "-c", &script, "sh"], args)
            }
        }
    }

    fn run(self) -> Host {
        let host = self.start(&[
            "run",
            "--nas",
            "dirty:wss=16M,rate=4000",
            "--memory",
            "64M",
            "--cpus",
            "2",
            "--balloon",
            "--serial",
            "stdio",
        ]);
        host.guest_line("ready", |line| matches!(line, Line::Ready { .. }));
        host
    }

    fn receive(self, uri: &str) -> Host {
        Host::listening(self.start(&["receive", uri, "--serial", "stdio"]))
    }
}

fn move_guest(from: Ferry<'_>, to: Ferry<'_>, policy: PolicyKind, handover: Handover) {
    let dir = tempfile::tempdir().unwrap();
    let uri = match handover {
        Handover::On => format!("unix:{}", dir.path().join("link").display()),
        _ => "tcp:127.0.0.1:0".to_owned(),
    };
    let mut source = from.run();
    let destination = to.receive(&uri);
    let options = Options {
        policy,
        handover,
        // Nothing is compared where no page is sent.
        verify: handover != Handover::On,
        ..Host::options()
    };
    let report = source.migrate_well(destination.uri(), &options);
    assert_eq!(source.ends(), Some(0), "{:#?}", source.said());
    destination.proves_running();
    let name = format!(
        "{} to {}, {} (hand-over {:?})",
        from.name(),
        to.name(),
        policy.name(),
        handover
    );
    show(&name, &report, &destination);
    assert!(destination.verdict().writes > 0);
}

fn restore_guest(from: Ferry<'_>, to: Ferry<'_>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest");
    let mut source = from.run();
    let request = SnapshotRequest {
        path: path.clone(),
        compress: Compress::Auto,
        live: true,
        force: false,
        then: Then::Stop,
        // Only the newer one has the option, and need of it.
        state_version: matches!(from, Ferry::New).then_some(OLDEST_STATE_VERSION),
    };
    source.client().snapshot(&request).unwrap();
    assert_eq!(source.ends(), Some(0), "{:#?}", source.said());
    restores(to, &path);
    eprintln!("{} to {}, a snapshot", from.name(), to.name());
}

fn restores(ferry: Ferry<'_>, path: &Path) {
    let restored = ferry.start(&["restore", path.to_str().unwrap(), "--serial", "stdio"]);
    restored.guest_line("a line after its return", |line| {
        matches!(line, Line::Stat { .. })
    });
    assert!(restored.verdict().writes > 0);
}

/// Guests under load go from an older ferry to this one and back, over every way there is; the
/// older program is `FERRY_OLD_BIN`.
#[test]
#[ignore = "needs an older ferry: tests/versions"]
fn old_and_new_take_each_others_guests() {
    if !guests_run() {
        return;
    }
    let path = std::env::var("FERRY_OLD_BIN").expect("FERRY_OLD_BIN names an older ferry");
    let (old, new) = (Ferry::Old(&path), Ferry::New);
    for (from, to) in [(old, new), (new, old)] {
        for policy in [
            PolicyKind::Precopy,
            PolicyKind::Postcopy,
            PolicyKind::Hybrid,
        ] {
            move_guest(from, to, policy, Handover::Off);
        }
        move_guest(from, to, PolicyKind::Precopy, Handover::On);
        restore_guest(from, to);
    }
}
