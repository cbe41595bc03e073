//! Guests with NUMA nodes: where their memory and their processors are, before and after moves.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;

use ferry_tests::{NestedHost, NestedVmm, nested_hosts};
use ferry_vmm::api::types::Configuration;

const MIB: u64 = 1 << 20;
/// Memory of the guest's nodes in MiB: unlike, so that the counts tell which is where.
const SIZES: [u64; 2] = [48, 32];
/// Memory that the writer fills, in MiB, from the beginning on but for what its kernel has; how much
/// of it is at least on each node.
const WSS: u64 = 64;
const WRITTEN: [u64; 2] = [SIZES[0] - 12, WSS - SIZES[0]];

/// Memory of a VMM's guest by node of its host, in MiB, by the kernel's account.
fn resident(host: &NestedHost, vmm: &NestedVmm<'_>) -> BTreeMap<u32, u64> {
    let path = format!("/proc/{}/numa_maps", vmm.pid());
    let maps = host.run_well(&["/init", "cat", &path]);
    let mut found = BTreeMap::new();
    // The memory file, in a private tmpfs or a memfd; the policy of its first node.
    let lines = maps
        .lines()
        .filter(|line| line.contains("file=") && line.contains("kernelpagesize"));
    for line in lines.filter(|l| l.contains("bind:") || l.contains("prefer:")) {
        eprintln!("{line}");
        for word in line.split(' ').filter_map(|word| word.strip_prefix('N')) {
            if let Some((node, pages)) = word.split_once('=') {
                let (node, pages): (u32, u64) = (node.parse().unwrap(), pages.parse().unwrap());
                *found.entry(node).or_default() += pages * 4096 / MIB;
            }
        }
    }
    found
}

/// The host's processors of each vCPU's thread.
fn processors(host: &NestedHost, vmm: &NestedVmm<'_>) -> Vec<String> {
    let tasks = host.run_well(&["/init", "tasks"]);
    let process = format!("process {}:", vmm.pid());
    let ours = tasks
        .lines()
        .skip_while(|line| !line.starts_with(&process))
        .skip(1);
    let ours = ours.take_while(|line| line.starts_with("  "));
    let mut found: Vec<(String, String)> = ours
        .filter_map(|line| {
            let (name, rest) = line.trim().split_once(' ')?.1.split_once(": on ")?;
            let cpus = rest.split_once(';')?.0;
            name.starts_with("vcpu")
                .then(|| (name.to_owned(), cpus.to_owned()))
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, cpus)| cpus).collect()
}

/// The host's nodes of the guest's, as `GET /v1/vm` has them.
fn told(vmm: &NestedVmm<'_>) -> Vec<Option<u32>> {
    let ran = vmm.command(&["status", "--config", "--json"]);
    let found: Configuration =
        serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("{e}: {ran:?}"));
    found.memory.nodes.iter().map(|node| node.host).collect()
}

/// The guest's nodes are on these of the host: memory, processors, and what is told of them.
fn is_on(host: &NestedHost, vmm: &NestedVmm<'_>, nodes: [u32; 2]) {
    let found = resident(host, vmm);
    eprintln!("MiB by node of the host: {found:?}");
    // At least what the writer has there, and at most all.
    let mut wanted: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
    for (node, (least, most)) in nodes.into_iter().zip(WRITTEN.into_iter().zip(SIZES)) {
        let (low, high) = wanted.entry(node).or_default();
        (*low, *high) = (*low + least, *high + most);
    }
    assert!(found.keys().eq(wanted.keys()), "{nodes:?}: {found:?}");
    for (node, (least, most)) in wanted {
        assert!(
            (least..=most).contains(&found[&node]),
            "{nodes:?}: {found:?}"
        );
    }
    assert_eq!(processors(host, vmm), nodes.map(|node| node.to_string()));
    assert_eq!(told(vmm), nodes.map(Some));
}

fn options(hosts: [u32; 2]) -> Vec<String> {
    let node = |n: usize, distances: &str| {
        format!(
            "cpus={n},memory={}M,host={},distance={distances}",
            SIZES[n], hosts[n]
        )
    };
    let nodes = [node(0, "10:21"), node(1, "31:10")];
    let mut all = vec!["--cpus".to_owned(), "2".to_owned()];
    all.extend(
        nodes
            .into_iter()
            .flat_map(|node| ["--numa".to_owned(), node]),
    );
    all
}

fn boot<'a>(host: &'a NestedHost, what: &[&str], hosts: [u32; 2]) -> NestedVmm<'a> {
    let nodes = options(hosts);
    let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
    host.guest(&[what, &nodes].concat())
}

/// After each way of moving, memory and processors are where the destination says, or where they
/// were, or apart from each other where nothing says.
#[test]
fn a_guests_nodes_move_to_others() {
    let Some(_turn) = nested_hosts() else { return };
    let host = NestedHost::start_with_nodes();
    let work = format!("dirty:wss={WSS}M,rate=500");
    let mut guest = boot(&host, &["--nas", &work], [0, 1]);
    guest.goes_on();
    is_on(&host, &guest, [0, 1]);
    let moves = |guest: NestedVmm<'_>, uri: &str, map: &[&str], way: &[&str]| {
        let there = host.receive_at(uri, map);
        let report = guest.migrate(there.uri(), &[way, &["--verify"]].concat());
        eprintln!("{uri} {map:?} {way:?}: by {}", report.policy);
        let ran = guest.ends();
        assert_eq!(ran.code, 0, "{ran:?}");
        there.goes_on();
        (there, report.policy)
    };
    let (tcp, unix) = ("tcp:127.0.0.1:0", "unix:/tmp/numa.link");
    for (policy, map, nodes) in [
        ("precopy", "0=1,1=0", [1, 0]),
        ("postcopy", "0=0,1=1", [0, 1]),
    ] {
        (guest, _) = moves(guest, tcp, &["--numa-map", map], &["--policy", policy]);
        is_on(&host, &guest, nodes);
    }
    // In the same memory, which stays where it is.
    let (kept, policy) = moves(guest, unix, &[], &[]);
    assert_eq!(policy, "handover");
    is_on(&host, &kept, [0, 1]);
    // It is copied where it is to be elsewhere.
    let (guest, policy) = moves(kept, unix, &["--numa-map", "0=1,1=0"], &[]);
    assert_ne!(policy, "handover");
    is_on(&host, &guest, [1, 0]);
    let (guest, _) = moves(guest, tcp, &[], &[]);
    let chosen = told(&guest);
    assert!(
        [[Some(0), Some(1)], [Some(1), Some(0)]].contains(&[chosen[0], chosen[1]]),
        "{chosen:?}"
    );
    is_on(&host, &guest, [chosen[0].unwrap(), chosen[1].unwrap()]);
    refuses(&host, &guest);
    let saved = guest.command(&["snapshot", "/tmp/numa.snap", "--then", "stop"]);
    assert_eq!(saved.code, 0, "{saved:?}");
    assert_eq!(guest.ends().code, 0);
    let copy = host.restore_with("/tmp/numa.snap", &["--eager", "--numa-map", "0=1,1=1"]);
    copy.says("the guest runs here");
    is_on(&host, &copy, [1, 1]);
    assert!(copy.verdict().writes > 0);
}

/// Maps that cannot be followed: one sentence each, and the guest runs on where it is.
fn refuses(host: &NestedHost, guest: &NestedVmm<'_>) {
    for (map, part) in [
        ("0=7", "this host has no NUMA node 7: choose among 0, 1"),
        (
            "0=0,1=2",
            "NUMA node 2 has no memory that this process may use: choose among 0, 1",
        ),
    ] {
        let ran = host.run(&[
            "ferry",
            "receive",
            "tcp:127.0.0.1:0",
            "--insecure",
            "--numa-map",
            map,
        ]);
        assert_eq!((ran.code, ran.stdout.as_str()), (1, ""), "{ran:?}");
        assert!(
            ran.stderr.contains(part) && ran.stderr.lines().count() == 1,
            "{ran:?}"
        );
    }
    let there = host.receive_with(&["--numa-map", "2=0"]);
    let ran = guest.command(&["migrate", there.uri()]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(
        ran.stderr
            .contains("--numa-map names node 2 of the guest, but the guest has 2"),
        "{ran:?}"
    );
    guest.goes_on();
}

/// What the guest's kernel knows of its nodes.
fn sees_its_nodes(guest: &NestedVmm<'_>) {
    guest.types("nodes");
    let line = guest.line_with(|line| line.contains("end-of-nodes"));
    eprintln!("{line}");
    let said = line.trim().split_once("nodes ").unwrap().1;
    let parts: Vec<&str> = said.split("; ").collect();
    assert_eq!(parts.len(), 3, "{line}");
    for (number, distances) in [(0, "10:21"), (1, "31:10")] {
        let part = parts[number];
        assert!(
            part.starts_with(&format!("node={number} cpus={number} ")),
            "{line}"
        );
        assert!(part.ends_with(&format!(" distances={distances}")), "{line}");
        let kib = part
            .split_once("kib=")
            .unwrap()
            .1
            .split(' ')
            .next()
            .unwrap();
        let kib: u64 = kib.parse().unwrap();
        // Its kernel and what that keeps for itself do not count.
        let size = SIZES[number] * 1024;
        assert!(kib <= size && kib > size / 3, "{line}");
    }
    assert_eq!(parts[2], "disbelieved=0 end-of-nodes", "{line}");
}

/// A Linux guest finds the nodes that it was given, and finds them still after a move.
#[test]
fn a_linux_guest_sees_its_nodes() {
    let Some(_turn) = nested_hosts() else { return };
    let host = NestedHost::start_with_nodes();
    let guest = boot(&host, &["--linux"], [0, 1]);
    guest.prints("ferry-guest: ready");
    sees_its_nodes(&guest);
    let there = host.receive_with(&["--numa-map", "0=1,1=0"]);
    guest.migrate(there.uri(), &["--policy", "postcopy"]);
    assert_eq!(guest.ends().code, 0);
    there.says("all of the guest's memory has arrived");
    assert_eq!(told(&there), [Some(1), Some(0)]);
    assert_eq!(processors(&host, &there), ["1", "0"]);
    sees_its_nodes(&there);
    there.types("poweroff");
    assert_eq!(there.ends().code, 0);
}
