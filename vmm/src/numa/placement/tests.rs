use super::*;
use crate::numa::Node;
use proptest::prelude::*;

fn guest(mib: &[u64]) -> Topology {
    let node = |(cpu, mib): (u32, &u64)| Node {
        cpus: vec![cpu],
        memory: mib << 20,
        host: None,
    };
    Topology::even((0..).zip(mib).map(node).collect())
}

/// Nodes from 0 on, with so many MiB available of 1 GiB, and two processors each.
fn host(mib: &[u64]) -> HostNodes {
    let node = |(id, mib): (u32, &u64)| HostNode {
        id,
        cpus: vec![id as usize * 2, id as usize * 2 + 1],
        memory: 1 << 30,
        available: mib << 20,
        pool: mib << 19,
    };
    (0..).zip(mib).map(node).collect::<Vec<_>>().into()
}

fn map(text: &str) -> NumaMap {
    text.parse().unwrap()
}

fn placed(guest: &Topology, map: &NumaMap, host: &HostNodes, busy: &[f64]) -> Vec<u32> {
    let placement = place(guest, map, (host, false), || busy.to_vec()).unwrap();
    placement.places.iter().map(|place| place.node).collect()
}

#[test]
fn a_map_is_read_and_nonsense_is_told() {
    let two = map("1=0,0=1");
    assert_eq!(
        (two.get(0), two.get(1), two.get(2)),
        (Some(1), Some(0), None)
    );
    assert_eq!((two.to_string(), two.is_empty()), ("0=1,1=0".into(), false));
    for (bad, part) in [
        ("", "'' is no GUEST=HOST"),
        ("0", "'0' is no"),
        ("0=1,", "'' is no"),
        ("0=-1", "'0=-1' is no"),
        ("0=4294967296", "is no"),
        ("0=1,0=0", "node 0 to two places"),
    ] {
        let error = bad.parse::<NumaMap>().unwrap_err();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_map_is_followed_to_the_letter() {
    let (guest, host) = (guest(&[256, 128]), host(&[512, 512]));
    for text in ["0=1,1=0", "0=0,1=0", "0=1,1=1"] {
        let never = || panic!("load decides nothing");
        let found = place(&guest, &map(text), (&host, false), never).unwrap();
        let wanted = map(text);
        for (at, place) in (0..).zip(&found.places) {
            assert_eq!(
                (Some(place.node), place.choice),
                (wanted.get(at), Choice::Asked)
            );
            assert_eq!(place.cpus, host.get(place.node).unwrap().cpus);
        }
        assert_eq!(found.note, None);
    }
}

#[test]
fn each_fault_of_a_map_has_its_sentence() {
    let (two, pair) = (guest(&[256, 128]), host(&[300, 512]));
    let error = |text: &str, host: &HostNodes| {
        let error = place(&two, &map(text), (host, false), Vec::new).unwrap_err();
        error.to_string()
    };
    let empty = HostNode {
        id: 2,
        cpus: vec![8],
        memory: 0,
        available: 0,
        pool: 0,
    };
    let three: HostNodes = [pair.all(), &[empty]].concat().into();
    for (found, part) in [
        (
            error("2=0", &pair),
            "names node 2 of the guest, but the guest has 2",
        ),
        (error("0=7", &pair), "no NUMA node 7: choose among 0, 1"),
        (
            error("0=1,1=2", &three),
            "node 2 has no memory that this process may use: choose among 0, 1",
        ),
        (
            error("0=0,1=0", &pair),
            "384 MiB of the guest's memory are to be on this host's NUMA node 0, which has 300",
        ),
    ] {
        assert!(found.contains(part), "{found}");
    }
    assert_eq!(map("0=1").check(&three), Ok(()));
    assert!(map("5=2").check(&three).is_err());
}

#[test]
fn free_memory_and_load_decide() {
    let idle = [0.0; 2];
    let (one, two) = (guest(&[256]), guest(&[256, 128]));
    let no = NumaMap::default();
    // More memory; a node that is not so busy; memory again where both are about as busy.
    assert_eq!(placed(&one, &no, &host(&[400, 500]), &idle), [1]);
    assert_eq!(placed(&one, &no, &host(&[400, 500]), &[0.1, 0.6]), [0]);
    assert_eq!(placed(&one, &no, &host(&[400, 500]), &[0.4, 0.6]), [1]);
    // A busy node is better than one without room.
    assert_eq!(placed(&one, &no, &host(&[200, 500]), &[0.0, 1.0]), [1]);
    // Apart, the largest first, unless one of the host's nodes is too small.
    assert_eq!(placed(&two, &no, &host(&[600, 500]), &idle), [0, 1]);
    assert_eq!(placed(&two, &no, &host(&[500, 600]), &idle), [1, 0]);
    assert_eq!(placed(&two, &no, &host(&[100, 600]), &idle), [1, 1]);
    // Beside those of the map.
    assert_eq!(placed(&two, &map("1=1"), &host(&[300, 900]), &idle), [0, 1]);
    // Where nothing fits, on the one that has most.
    assert_eq!(placed(&one, &no, &host(&[100, 200]), &idle), [1]);
    // Of a pool.
    let pool = place(&one, &no, (&host(&[300, 900]), true), || idle.to_vec()).unwrap();
    assert_eq!(
        (pool.places[0].node, pool.places[0].choice),
        (1, Choice::Chosen)
    );
}

#[test]
fn a_node_without_processors_is_not_chosen() {
    let mut nodes = host(&[300, 900]).all().to_vec();
    nodes[1].cpus.clear();
    let found = placed(
        &guest(&[256, 128]),
        &NumaMap::default(),
        &nodes.clone().into(),
        &[],
    );
    assert_eq!(found, [0, 0]);
    // It can be asked for: the guest's processors are anywhere then.
    let far = place(
        &guest(&[256]),
        &map("0=1"),
        (&nodes.into(), false),
        Vec::new,
    )
    .unwrap();
    assert_eq!((far.places[0].node, far.places[0].cpus.len()), (1, 0));
}

#[test]
fn a_host_with_one_node_takes_all_and_says_so() {
    let found = place(
        &guest(&[256, 128]),
        &NumaMap::default(),
        (&host(&[900]), false),
        || panic!("there is nothing to choose"),
    );
    let found = found.unwrap();
    assert_eq!(
        found.note.unwrap(),
        "this host has one NUMA node, so that all 2 of the guest are on it"
    );
    assert!(
        found
            .places
            .iter()
            .all(|place| place.node == 0 && place.cpus.is_empty())
    );
}

#[test]
fn memory_that_is_here_stays_where_it_is() {
    let mut two = guest(&[256, 128]);
    (two.nodes[0].host, two.nodes[1].host) = (Some(1), Some(0));
    // Nothing is available any more: the guest has it.
    let host = host(&[0, 0]);
    for same in [NumaMap::default(), map("0=1"), map("0=1,1=0")] {
        let found = keep(&two, &same, &host).unwrap().unwrap();
        let nodes: Vec<u32> = found.places.iter().map(|place| place.node).collect();
        assert_eq!(nodes, [1, 0]);
    }
    let error = keep(&two, &map("0=0"), &host).unwrap_err().to_string();
    assert!(
        error.contains("node 0 is on this host's node 1") && error.contains("stays"),
        "{error}"
    );
    assert!(keep(&two, &map("2=0"), &host).is_err());
    // A peer that says nothing, or something that cannot be.
    for said in [None, Some(9)] {
        two.nodes[1].host = said;
        assert_eq!(keep(&two, &NumaMap::default(), &host), Ok(None));
    }
}

proptest! {
    /// What is printed is read back.
    #[test]
    fn a_map_is_read_back(pairs in prop::collection::btree_map(any::<u32>(), any::<u32>(), 1..9)) {
        let map: NumaMap = pairs.clone().into_iter().collect();
        prop_assert_eq!(map.to_string().parse::<NumaMap>(), Ok(map));
    }

    /// Whatever is asked for: each node has a place that the host has, or there is a sentence; and
    /// nothing is chosen that does not fit while another of the host's nodes would.
    #[test]
    fn every_node_is_placed_on_one_that_is_there(
        sizes in prop::collection::vec(1..9_u64, 1..6),
        rooms in prop::collection::vec(0..20_u64, 1..5),
        busy in prop::collection::vec(0.0..1.0, 5),
        pairs in prop::collection::btree_map(0..7_u32, 0..6_u32, 0..4),
    ) {
        let (guest, host) = (guest(&sizes), host(&rooms));
        let map: NumaMap = pairs.into_iter().collect();
        let Ok(found) = place(&guest, &map, (&host, false), || busy.clone()) else {
            let beyond = |(guest, node): (&u32, &u32)| {
                *guest as usize >= sizes.len() || *node as usize >= rooms.len()
            };
            let asked = |node: usize| -> u64 {
                let there = map.0.iter().filter(|(_, to)| **to as usize == node);
                there.map(|(from, _)| sizes.get(*from as usize).copied().unwrap_or(0)).sum()
            };
            prop_assert!(map.0.iter().any(beyond) || (0..rooms.len()).any(|n| asked(n) > rooms[n]));
            return Ok(());
        };
        prop_assert_eq!(found.places.len(), sizes.len());
        for (at, place) in (0..).zip(&found.places) {
            prop_assert!(host.get(place.node).is_some());
            match map.get(at) {
                Some(node) => prop_assert_eq!((place.node, place.choice), (node, Choice::Asked)),
                None => prop_assert_eq!(place.choice, Choice::Chosen),
            }
        }
    }
}
