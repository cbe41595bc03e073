//! Guests with NUMA nodes: where their memory and their processors are, before and after moves.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;

use ferry_migration::options::{Handover, Options, PolicyKind};
use ferry_migration::report::Status;
use ferry_tests::{Host, NestedHost, NestedVmm, State, guests_run, nested_hosts, run};
use ferry_vmm::api::types::Configuration;

const MIB: u64 = 1 << 20;
/// Memory of the guest's nodes in MiB: unlike, so that the counts tell which is where.
const SIZES: [u64; 2] = [48, 32];
/// Memory that the writer fills, in MiB, from the beginning on but for what its kernel has; how
/// much of it is at least on each node.
const WSS: u64 = 64;
const WRITTEN: [u64; 2] = [SIZES[0] - 12, WSS - SIZES[0]];

fn numa_maps(host: &NestedHost, vmm: &NestedVmm<'_>) -> String {
    let path = format!("/proc/{}/numa_maps", vmm.pid());
    host.run_well(&["/init", "cat", &path])
}

/// Memory of a VMM's guest by node of its host, in MiB, by the kernel's account.
fn resident(host: &NestedHost, vmm: &NestedVmm<'_>) -> BTreeMap<u32, u64> {
    let maps = numa_maps(host, vmm);
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
    let host = NestedHost::start_with_nodes(0);
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

/// Pages of 2 MiB in the pools of both nodes together.
const POOL: u32 = 80;

/// A guest whose memory is of the nodes' pools: there the policy is of the mapping, and is made
/// anew where the memory is handed over to.
fn pools_are_used(host: &NestedHost) {
    let mut guest = boot(
        host,
        &[
            "--nas",
            "dirty:wss=8M,rate=100",
            "--memory-backing",
            "hugetlb",
            "--memory-prealloc",
        ],
        [1, 0],
    );
    for _ in 0..2 {
        guest.goes_on();
        let maps = numa_maps(host, &guest);
        let maps: Vec<&str> = maps
            .lines()
            .filter(|line| line.contains(" huge "))
            .collect();
        eprintln!("{maps:#?}");
        // Of 2 MiB each.
        let [first, second] = maps[..] else {
            panic!("{maps:?}")
        };
        let pages = SIZES.map(|mib| mib / 2);
        assert!(
            first.contains(" prefer:1 ") && second.contains(" prefer:0 "),
            "{maps:?}"
        );
        assert!(
            first.contains(&format!(" N1={} ", pages[0])) && !first.contains(" N0="),
            "{maps:?}"
        );
        assert!(
            second.contains(&format!(" N0={} ", pages[1])) && !second.contains(" N1="),
            "{maps:?}"
        );
        assert_eq!(told(&guest), [Some(1), Some(0)]);
        let there = host.receive_at("unix:/tmp/pool.link", &[]);
        let report = guest.migrate(there.uri(), &["--verify"]);
        assert_eq!((report.policy.as_str(), guest.ends().code), ("handover", 0));
        guest = there;
    }
    assert!(guest.verdict().writes > 0);
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
        assert!(kib <= size && kib > size / 4, "{line}");
    }
    assert_eq!(parts[2], "disbelieved=0 end-of-nodes", "{line}");
}

/// A Linux guest finds the nodes that it was given, and finds them still after a move.
#[test]
fn a_linux_guest_sees_its_nodes() {
    let Some(_turn) = nested_hosts() else { return };
    let host = NestedHost::start_with_nodes(POOL);
    pools_are_used(&host);
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

const TWO_NODES: [&str; 4] = ["--numa", "cpus=0,memory=40M", "--numa", "cpus=1,memory=24M"];

/// On any host, with one node as with more: the nodes go where the guest goes, and a map that the
/// guest cannot follow leaves it where it is.
#[test]
fn nodes_travel_by_every_way() {
    if !guests_run() {
        return;
    }
    let work = "dirty:wss=8M,rate=2000";
    let mut guest = Host::run_with(work, "64M", 2, &TWO_NODES);
    let is_there = |guest: &Host| {
        let nodes = guest.client().configuration().unwrap().memory.nodes;
        let found: Vec<_> = nodes
            .iter()
            .map(|n| (n.cpus.clone(), n.bytes / MIB))
            .collect();
        assert_eq!(found, [(vec![0], 40), (vec![1], 24)]);
        assert_eq!(nodes[1].distances, [20, 10]);
        assert!(nodes.iter().all(|node| node.host.is_some()));
    };
    is_there(&guest);
    for policy in [
        PolicyKind::Precopy,
        PolicyKind::Postcopy,
        PolicyKind::Hybrid,
    ] {
        let there = Host::receive_with(&["--numa-map", "1=0"]);
        let options = Options {
            policy,
            ..Host::options()
        };
        guest.migrate_well(there.uri(), &options);
        assert_eq!(guest.ends(), Some(0));
        is_there(&there);
        guest = there;
    }
    let there = Host::receive_unix();
    let handover = Options {
        handover: Handover::On,
        ..Host::options()
    };
    let report = guest.migrate_well(there.uri(), &handover);
    assert_eq!(
        (report.policy.as_str(), guest.ends()),
        ("handover", Some(0))
    );
    is_there(&there);
    for wrong in ["2=0", "0=0,9=0"] {
        let nowhere = Host::receive_with(&["--numa-map", wrong]);
        let report = there.migrate(nowhere.uri(), &Host::options());
        assert_eq!(report.status, Status::Failed);
        let why = report.error.unwrap_or_default();
        assert!(
            why.contains("of the guest, but the guest has 2 (from 0 on)"),
            "{why}"
        );
        assert_eq!(there.state(), State::Running);
    }
    assert!(there.verdict().writes > 0);
    // One that has no nodes.
    let plain = Host::run(work, "64M", 1);
    let nowhere = Host::receive_with(&["--numa-map", "0=0"]);
    let report = plain.migrate(nowhere.uri(), &Host::options());
    let why = report.error.unwrap_or_default();
    assert!(
        why.contains("the guest has no NUMA nodes: leave it out"),
        "{why}"
    );
    plain.verdict();
}

/// One sentence each, and the exit status that says whether the command line or the host is wrong.
#[test]
fn nodes_that_cannot_be_are_one_sentence() {
    let two = |first: &'static str, second: &'static str| {
        [
            "run", "--nas", "is.S", "--cpus", "2", "--memory", "64M", "--numa", first, "--numa",
            second,
        ]
    };
    let good = "cpus=0,memory=32M";
    for (arguments, code, part) in [
        (
            two(good, "cpus=1,memory=30M"),
            2,
            "62 MiB of memory together, but the guest has 64 MiB",
        ),
        (
            two(good, "cpus=0-1,memory=32M"),
            2,
            "processor 0 is in a NUMA node of the guest twice",
        ),
        (
            two(good, "cpus=2,memory=32M"),
            2,
            "node 1 has processor 2, but the guest has 2",
        ),
        (
            two("cpus=1,memory=32M", "cpus=1,memory=32M"),
            2,
            "processor 1 is in a NUMA node",
        ),
        (
            two(good, "memory=32M"),
            2,
            "a NUMA node is cpus=A-B and memory=SIZE",
        ),
        (
            two(good, "cpus=1,memory=32M,distance=20:11"),
            2,
            "needs 2 distances",
        ),
        (
            two("cpus=0,memory=31M", "cpus=1,memory=33M"),
            2,
            "2 MiB or a multiple",
        ),
        (
            two(good, "cpus=1,memory=32M,host=999"),
            1,
            "this host has no NUMA node 999",
        ),
    ] {
        if code == 1 && !guests_run() {
            continue;
        }
        let ran = run(&arguments);
        assert_eq!(ran.code, Some(code), "{ran:?}");
        let said = &ran.stderr;
        assert!(said.contains(part) && said.lines().count() == 1, "{ran:?}");
    }
    let missing = [
        "run",
        "--nas",
        "is.S",
        "--cpus",
        "2",
        "--numa",
        "cpus=0,memory=64M",
    ];
    let growing = [
        "run",
        "--linux",
        "--memory",
        "64M,max=128M",
        "--numa",
        "cpus=0,memory=128M",
    ];
    let place = |map| {
        [
            "receive",
            "tcp:127.0.0.1:0",
            "--insecure",
            "--numa-map",
            map,
        ]
    };
    for (arguments, code, part) in [
        (&missing[..], 2, "processor 1 is in no NUMA node"),
        (
            &growing,
            2,
            "--numa and --memory with max= do not go together",
        ),
        (&place("0"), 2, "'0' is no GUEST=HOST"),
        (&place("0=0,0=0"), 2, "node 0 to two places"),
        (&place("0=999"), 1, "this host has no NUMA node 999"),
        (
            &["restore", "/nonexistent", "--numa-map", "0=999"],
            1,
            "no NUMA node 999",
        ),
    ] {
        let ran = run(arguments);
        assert_eq!(ran.code, Some(code), "{ran:?}");
        assert!(
            ran.stderr.contains(part) && ran.stderr.lines().count() == 1,
            "{ran:?}"
        );
    }
}
