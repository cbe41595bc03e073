//! The OCF resource agent without a cluster: its meta-data, and the exit status of every action.
//!
//! Most tests give it a pretended `ferry`, `ssh` and `attrd_updater`, so that every end of a
//! migration can be had. `tests/pacemaker/run` is the agent on a real cluster.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_tests::book::root;
use ferry_tests::{ferry, guests_run, until};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

const SUCCESS: i32 = 0;
const ERR_GENERIC: i32 = 1;
const ERR_UNIMPLEMENTED: i32 = 3;
const ERR_INSTALLED: i32 = 5;
const ERR_CONFIGURED: i32 = 6;
const NOT_RUNNING: i32 = 7;

/// `status` tells the file `state`; `migrate` and `recover` leave the state that the files
/// `migrate` and `recover` name behind their exit status. A missing `state` is a VMM that is not
/// there.
const FERRY: &str = r#"#!/bin/sh
cd "$(dirname "$0")" || exit 99
echo "ferry $1 $2 $3" >>calls
after() {
    read -r status state <"$1" || exit 1
    if [ "$state" = gone ]; then rm -f state; else echo "$state" >state; fi
    exit "$status"
}
case "$1" in
status) [ -e state ] && printf '{\n  "schema": 1,\n  "state": "%s"\n}\n' "$(cat state)" ;;
migrate) after migrate ;;
recover) after recover ;;
stop) rm -f state ;;
esac
"#;

/// What the file `there-VERB` says; a missing one is a host that does not answer.
const SSH: &str = r#"#!/bin/sh
cd "$(dirname "$0")" || exit 99
while [ "$1" != door ]; do shift; done
echo "ssh $2" >>calls
cat "there-$2" 2>/dev/null || exit 255
"#;

/// Keeps the names of marked nodes in the file `marks`.
const ATTRD_UPDATER: &str = r#"#!/bin/sh
cd "$(dirname "$0")" || exit 99
touch marks
case "$*" in
*-Q*) sed 's/.*/name="arriving-vm" host="&" value="1"/' marks ;;
*"-U 1") echo "$4" >>marks ;;
*-D) sed -i "/^$4\$/d" marks ;;
esac
"#;

/// This node's name, and all nodes.
const CRM_NODE: &str = "#!/bin/sh\n[ \"$1\" = -n ] && echo here || echo here there\n";
/// Neither fencing nor parameters are known.
const NOTHING: &str = "#!/bin/sh\nexit 1\n";

/// An agent and what is around it.
struct Node {
    folder: tempfile::TempDir,
    set: Vec<(String, String)>,
}

impl Node {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let programs = [
            ("ferry", FERRY),
            ("ssh", SSH),
            ("attrd_updater", ATTRD_UPDATER),
            ("crm_node", CRM_NODE),
            ("crm_attribute", NOTHING),
            ("crm_resource", NOTHING),
            ("stonith_admin", NOTHING),
        ];
        for (name, text) in programs {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let at = |name: &str| folder.path().join(name).display().to_string();
        let set = vec![
            ("OCF_RESKEY_binary".into(), at("ferry")),
            ("OCF_RESKEY_state_dir".into(), at("run")),
            ("OCF_RESKEY_options".into(), "--nas idle:fill=none".into()),
            ("OCF_RESKEY_force_stop".into(), "true".into()),
            // Not Pacemaker's own functions: what the agent brings along for where they are
            // missing.
            ("OCF_ROOT".into(), at("no-such")),
        ];
        fs::create_dir(folder.path().join("run")).unwrap();
        Self { folder, set }.with("CRM_meta_timeout", "9000")
    }

    fn with(mut self, parameter: &str, value: &str) -> Self {
        let name = format!("OCF_RESKEY_{parameter}");
        self.set.retain(|(known, _)| *known != name);
        self.set.push((name, value.into()));
        self
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), format!("{text}\n")).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// Runs an action; its exit status and both of its streams.
    fn act(&self, action: &str) -> (i32, String) {
        let path = std::env::var("PATH").unwrap_or_default();
        let out = Command::new(root().join("packaging/ocf/ferry"))
            .arg(action)
            .env("PATH", format!("{}:{path}", self.folder.path().display()))
            .env("OCF_RESOURCE_INSTANCE", "vm")
            .envs(self.set.clone())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = [out.stdout, out.stderr].concat();
        (out.status.code().unwrap(), String::from_utf8(text).unwrap())
    }

    fn expect(&self, action: &str, status: i32) -> String {
        let (found, text) = self.act(action);
        assert_eq!(found, status, "{action}: {text}");
        text
    }
}

/// The names of all elements, and the value of their `name`; panics where the document is not
/// well-formed.
fn elements(xml: &str) -> Vec<(String, String)> {
    let body = xml.split_once("]>").unwrap().1;
    let (mut open, mut found) = (Vec::new(), Vec::new());
    for piece in body.split('<').skip(1) {
        let (tag, text) = piece.split_once('>').unwrap();
        assert!(!text.contains(['&', '>']), "{text}");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name), "{xml}");
            continue;
        }
        let (name, rest) = tag.split_once(' ').unwrap_or((tag, ""));
        assert_eq!(rest.matches('"').count() % 2, 0, "{tag}");
        let value = |rest: &str| Some(rest.split_once("name=\"")?.1.split_once('"')?.0.to_owned());
        found.push((
            name.trim_end_matches('/').to_owned(),
            value(rest).unwrap_or_default(),
        ));
        if !tag.ends_with('/') {
            open.push(name.to_owned());
        }
    }
    assert!(open.is_empty(), "{open:?} are left open");
    found
}

#[test]
fn meta_data_is_well_formed_and_names_every_action_and_parameter() {
    let found = elements(&Node::new().expect("meta-data", SUCCESS));
    let named = |kind: &str| -> BTreeSet<String> {
        let those = found.iter().filter(|(name, _)| name == kind);
        those.map(|(_, value)| value.clone()).collect()
    };
    let actions = [
        "start",
        "stop",
        "monitor",
        "migrate_to",
        "migrate_from",
        "reload-agent",
        "validate-all",
        "meta-data",
    ];
    assert_eq!(named("action"), actions.map(str::to_owned).into());
    // Every parameter that the script reads is declared, and the other way about.
    let script = fs::read_to_string(root().join("packaging/ocf/ferry")).unwrap();
    let words = script.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let read: BTreeSet<String> = words
        .filter_map(|word| word.strip_prefix("OCF_RESKEY_"))
        .filter(|name| !name.is_empty() && !name.starts_with("CRM_meta") && !name.ends_with('_'))
        .map(str::to_owned)
        .collect();
    assert_eq!(read, named("parameter"));
}

#[test]
fn an_unknown_action_is_unimplemented() {
    Node::new().expect("promote", ERR_UNIMPLEMENTED);
}

#[test]
fn validate_all_says_what_is_wrong() {
    let kvm = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    let fits = if kvm { SUCCESS } else { ERR_INSTALLED };
    Node::new().expect("validate-all", fits);
    let wrong = [
        ("options", "", ERR_CONFIGURED, "kernel"),
        ("binary", "/no/such/ferry", ERR_INSTALLED, "/no/such/ferry"),
        ("name", "../vm", ERR_CONFIGURED, "../vm"),
        ("migrateport", "http", ERR_CONFIGURED, "http"),
        ("migration_transport", "none", ERR_CONFIGURED, "migrateuri"),
        ("disks", "/no/such/disk,ro", ERR_INSTALLED, "/no/such/disk"),
        ("config", "/no/such/file", ERR_INSTALLED, "/no/such/file"),
    ];
    for (parameter, value, status, word) in wrong {
        let said = Node::new()
            .with(parameter, value)
            .expect("validate-all", status);
        assert!(said.contains(word), "{said}");
    }
}

#[test]
fn without_the_program_nothing_runs_and_nothing_is_to_be_stopped() {
    let node = Node::new().with("binary", "/no/such/ferry");
    node.expect("stop", SUCCESS);
    node.expect("monitor", NOT_RUNNING);
    node.with("CRM_meta_interval", "10000")
        .expect("monitor", ERR_INSTALLED);
}

#[test]
fn monitor_tells_the_states_apart() {
    let table = [
        ("running", SUCCESS, SUCCESS),
        ("paused", SUCCESS, SUCCESS),
        ("migrating", SUCCESS, SUCCESS),
        ("receiving", NOT_RUNNING, NOT_RUNNING),
        ("moved", NOT_RUNNING, NOT_RUNNING),
        ("ended", NOT_RUNNING, NOT_RUNNING),
        ("in-doubt", ERR_GENERIC, NOT_RUNNING),
        ("interrupted", ERR_GENERIC, NOT_RUNNING),
    ];
    for (state, monitor, probe) in table {
        let node = Node::new();
        node.write("state", state);
        node.write("recover", &format!("1 {state}"));
        node.expect("monitor", probe);
        node.with("CRM_meta_interval", "10000")
            .expect("monitor", monitor);
    }
}

#[test]
fn monitor_tells_a_vmm_that_is_gone_from_one_that_died_or_hangs() {
    let node = Node::new().with("CRM_meta_interval", "10000");
    node.expect("monitor", NOT_RUNNING);
    node.write("run/vm.sock", "");
    node.expect("monitor", ERR_GENERIC);
    // A process that is told this socket, and does not answer on it.
    let api = node.path("run/vm.sock");
    let mut hangs = Command::new("tail")
        .args(["-f", "/dev/null"])
        .arg(&api)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    node.write("run/vm.pid", &hangs.id().to_string());
    let said = node.expect("monitor", ERR_GENERIC);
    assert!(said.contains("silent"), "{said}");
    // It is not a guest's end: a probe does not report it as stopped.
    let node = node.with("CRM_meta_interval", "0");
    node.expect("monitor", ERR_GENERIC);
    node.expect("stop", SUCCESS);
    let ended = hangs.wait().unwrap();
    assert_eq!(ended.signal(), Some(9));
    node.expect("monitor", NOT_RUNNING);
}

/// A node with a guest that moves to `there`.
fn moving(migrate: &str) -> Node {
    let node = Node::new()
        .with("CRM_meta_migrate_target", "there")
        .with("CRM_meta_interval", "0");
    node.write("state", "running");
    node.write("migrate", migrate);
    node.write("recover", "1 in-doubt");
    node.write("there-receiver", "tcp:192.0.2.2:7000");
    node.write("there-release", "");
    node
}

#[test]
fn a_guest_that_has_moved_is_reported_so() {
    for ended in ["0 gone", "0 moved", "6 gone"] {
        moving(ended).expect("migrate_to", SUCCESS);
    }
}

#[test]
fn a_migration_that_failed_leaves_no_mark_and_no_receiver() {
    for ended in [
        "1 running",
        "3 running",
        "1 paused",
        "130 running",
        "4 running",
    ] {
        let node = moving(ended);
        let said = node.expect("migrate_to", ERR_GENERIC);
        assert!(said.contains("the guest runs here"), "{ended}: {said}");
        assert_eq!(node.read("marks").trim(), "", "{ended}");
        assert!(node.read("calls").contains("ssh release"), "{ended}");
    }
}

#[test]
fn a_target_without_a_receiver_is_a_failure_that_touches_nothing() {
    let node = moving("0 gone");
    fs::remove_file(node.path("there-receiver")).unwrap();
    node.expect("migrate_to", ERR_GENERIC);
    assert!(!node.read("calls").contains("ferry migrate"));
    assert_eq!(node.read("state").trim(), "running");
}

#[test]
fn in_doubt_is_never_reported_as_moved_and_keeps_the_mark() {
    for ended in ["4 in-doubt", "4 gone", "5 interrupted"] {
        let node = moving(ended);
        if ended.starts_with('5') {
            node.write("recover", "1 interrupted");
        }
        let said = node.expect("migrate_to", ERR_GENERIC);
        assert!(said.contains("in doubt"), "{ended}: {said}");
        assert_eq!(node.read("marks").trim(), "there", "{ended}");
        assert!(!node.read("calls").contains("ferry stop"), "{ended}");
        assert!(!node.read("calls").contains("--take-over"), "{ended}");
    }
}

#[test]
fn recover_resolves_a_doubt_in_either_direction() {
    let node = moving("4 in-doubt");
    node.write("recover", "0 moved");
    node.expect("migrate_to", SUCCESS);
    let node = moving("4 in-doubt");
    node.write("recover", "1 running");
    node.expect("migrate_to", ERR_GENERIC);
    assert_eq!(node.read("marks").trim(), "");
}

#[test]
fn a_target_that_runs_the_guest_resolves_a_doubt() {
    let node = moving("4 in-doubt");
    node.write("there-state", "running");
    node.expect("migrate_to", SUCCESS);
    let node = moving("4 gone");
    node.write("there-take-over", "running");
    node.expect("migrate_to", SUCCESS);
}

#[test]
fn the_copy_here_ends_before_the_one_there_is_taken_over() {
    let node = moving("4 in-doubt");
    node.write("there-state", "in-doubt");
    node.write("there-take-over", "running");
    node.expect("migrate_to", SUCCESS);
    let calls = node.read("calls");
    let (stop, take_over) = (calls.find("ferry stop"), calls.find("ssh take-over"));
    assert!(stop.is_some() && stop < take_over, "{calls}");
}

#[test]
fn a_guest_that_arrived_nowhere_is_lost_and_said_so() {
    let node = moving("4 gone");
    node.write("there-take-over", "receiving");
    let said = node.expect("migrate_to", ERR_GENERIC);
    assert!(said.contains("has not arrived"), "{said}");
    assert_eq!(node.read("marks").trim(), "");
}

#[test]
fn a_source_in_doubt_takes_over_once_the_target_was_fenced() {
    let node = moving("4 in-doubt");
    node.expect("migrate_to", ERR_GENERIC);
    let node = node.with("CRM_meta_interval", "10000");
    node.expect("monitor", ERR_GENERIC);
    assert!(!node.read("calls").contains("--take-over"));
    // Fenced, and before the migration began: of that the guest knows nothing.
    let fenced = |when: &str| {
        let event = format!(
            "#!/bin/sh\necho '<fence_event action=\"off\" target=\"there\" status=\"success\" completed=\"{when}\"/>'"
        );
        node.write("stonith_admin", &event);
    };
    node.write("crm_attribute", "#!/bin/sh\necho true");
    fenced("2001-01-01 00:00:00Z");
    node.expect("monitor", ERR_GENERIC);
    assert!(!node.read("calls").contains("--take-over"));
    node.write("recover", "0 in-doubt");
    fenced("2101-01-01 00:00:00Z");
    node.act("monitor");
    assert!(node.read("calls").contains("recover --take-over"));
}

#[test]
fn a_repeated_attempt_resolves_the_doubt_of_the_first() {
    let node = moving("4 in-doubt");
    node.expect("migrate_to", ERR_GENERIC);
    node.write("there-state", "running");
    node.expect("migrate_to", SUCCESS);
    assert_eq!(node.read("calls").matches("ferry migrate").count(), 1);
}

#[test]
fn a_guest_that_is_not_here_does_not_move() {
    let node = moving("0 gone");
    fs::remove_file(node.path("state")).unwrap();
    node.expect("migrate_to", ERR_GENERIC);
    assert!(!node.read("calls").contains("ferry migrate"));
}

#[test]
fn migrate_from_waits_for_the_guest_and_removes_the_mark() {
    let node = Node::new().with("CRM_meta_migrate_source", "there");
    node.write("marks", "here");
    node.write("state", "in-doubt");
    node.expect("migrate_from", ERR_GENERIC);
    assert_eq!(node.read("marks").trim(), "here");
    node.write("state", "running");
    node.expect("migrate_from", SUCCESS);
    assert_eq!(node.read("marks").trim(), "");
    fs::remove_file(node.path("state")).unwrap();
    node.expect("migrate_from", ERR_GENERIC);
}

#[test]
fn stop_ends_whatever_is_here() {
    for state in ["running", "paused", "receiving", "moved", "in-doubt"] {
        let node = Node::new();
        node.write("state", state);
        node.write("recover", &format!("1 {state}"));
        node.expect("stop", SUCCESS);
        assert!(!node.path("state").exists(), "{state}");
        node.expect("stop", SUCCESS);
    }
}

#[test]
fn start_boots_nothing_where_the_guest_is_or_may_be_elsewhere() {
    if !guests_run() {
        return;
    }
    let node = Node::new();
    node.write("state", "running");
    node.expect("start", SUCCESS);
    assert!(!node.read("calls").contains("ferry run"));
    // Another node has the mark, and does not say that the guest is not there.
    let node = Node::new();
    node.write("marks", "there");
    let said = node.expect("start", ERR_GENERIC);
    assert!(said.contains("there"), "{said}");
    assert!(!node.read("calls").contains("ferry run"));
    // In doubt, without fencing.
    let node = Node::new();
    node.write("state", "in-doubt");
    node.write("recover", "1 in-doubt");
    node.expect("start", ERR_GENERIC);
    let calls = node.read("calls");
    assert!(
        !calls.contains("ferry run") && !calls.contains("--take-over"),
        "{calls}"
    );
}

#[test]
fn a_real_guest_starts_once_is_seen_and_stops() {
    if !guests_run() {
        return;
    }
    let node = Node::new();
    node.write(
        "guest",
        "# A guest file: options of `ferry run`\n\n--nas dirty:wss=1M,rate=10\n--memory 32M",
    );
    let guest = node.path("guest").display().to_string();
    let node = node
        .with("binary", &ferry().display().to_string())
        .with("options", "")
        .with("config", &guest)
        .with("CRM_meta_timeout", "120000");
    node.expect("monitor", NOT_RUNNING);
    node.expect("start", SUCCESS);
    let first = node.read("run/vm.pid");
    node.expect("start", SUCCESS);
    assert_eq!(node.read("run/vm.pid"), first);
    node.expect("monitor", SUCCESS);
    // Its death is a failure and not a stop.
    let killed = Command::new("kill").args(["-9", first.trim()]).status();
    assert!(killed.unwrap().success());
    let node = node.with("CRM_meta_interval", "10000");
    until("the dead VMM is seen", || {
        node.act("monitor").0 == ERR_GENERIC
    });
    node.expect("stop", SUCCESS);
    node.expect("monitor", NOT_RUNNING);
}
