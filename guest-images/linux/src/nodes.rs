//! What the kernel knows of NUMA nodes, as its tools read it.

use std::fs;
use std::path::Path;

use crate::machine::kernel_log;

const NODES: &str = "/sys/devices/system/node";
/// What Linux says of processors that share a cache over nodes (`arch/x86/kernel/smpboot.c`).
const INSANE: &str = "is not on the same node";

/// The nodes, and how often the kernel did not believe what it was told, on one line.
pub fn line() -> String {
    let log = kernel_log();
    let disbelieved = log.iter().filter(|said| said.contains(INSANE)).count();
    let nodes = describe(Path::new(NODES)).join("; ");
    format!("ferry-linux: nodes {nodes}; disbelieved={disbelieved} end-of-nodes")
}

/// A part for each node: number, processors, memory in KiB, distances.
fn describe(folder: &Path) -> Vec<String> {
    let describe = |number: u32| {
        let read = |what: &str| {
            let path = folder.join(format!("node{number}")).join(what);
            fs::read_to_string(path).unwrap_or_default()
        };
        let meminfo = read("meminfo");
        let kib = meminfo.lines().find_map(|line| {
            let (_, value) = line.split_once("MemTotal:")?;
            value.split_ascii_whitespace().next()
        });
        let distances = read("distance");
        let distances: Vec<&str> = distances.split_ascii_whitespace().collect();
        format!(
            "node={number} cpus={} kib={} distances={}",
            read("cpulist").trim(),
            kib.unwrap_or("0"),
            distances.join(":")
        )
    };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut numbers: Vec<u32> = entries
        .filter_map(|e| e.file_name().to_str()?.strip_prefix("node")?.parse().ok())
        .collect();
    numbers.sort_unstable();
    numbers.into_iter().map(describe).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_described_in_order() {
        let folder = std::env::temp_dir().join(format!("ferry-nodes-{}", std::process::id()));
        for (number, cpus) in [(10, "2-3"), (0, "0,4")] {
            let node = folder.join(format!("node{number}"));
            fs::create_dir_all(&node).unwrap();
            let meminfo =
                format!("Node {number} MemTotal:  {number}77 kB\nNode {number} MemFree: 1 kB\n");
            fs::write(node.join("meminfo"), meminfo).unwrap();
            fs::write(node.join("cpulist"), format!("{cpus}\n")).unwrap();
            fs::write(node.join("distance"), "10  21\n").unwrap();
        }
        fs::write(folder.join("online"), "0,10\n").unwrap();
        let found = describe(&folder);
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(
            found,
            [
                "node=0 cpus=0,4 kib=077 distances=10:21",
                "node=10 cpus=2-3 kib=1077 distances=10:21"
            ]
        );
        assert!(describe(&folder).is_empty());
    }
}
