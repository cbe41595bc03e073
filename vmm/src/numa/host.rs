//! This host's nodes, as far as this process may use them.

use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::thread::{CpuSet, sched_getaffinity};

use crate::memory::meminfo_field;

/// How long the processors are watched to know their load: ten ticks of `/proc/stat`.
const WATCH: Duration = Duration::from_millis(100);
/// The most numbers that a list of the kernel's is believed to have.
const MOST: u32 = 1 << 16;

/// A node of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostNode {
    /// Its number.
    pub id: u32,
    /// Those of its processors that this process may use.
    pub cpus: Vec<usize>,
    /// Its memory in bytes; 0 where this process may have none of it.
    pub memory: u64,
    /// Of that, what can be had without swapping.
    pub available: u64,
    /// Bytes that are free in its pool of 2 MiB pages.
    pub pool: u64,
}

/// The nodes of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostNodes(Vec<HostNode>);

impl HostNodes {
    /// What sysfs and procfs say. A kernel that knows no nodes has one, number 0.
    #[must_use]
    pub fn read() -> Self {
        let allowed = sched_getaffinity(None).ok();
        let may = |cpu| {
            let known = cpu < CpuSet::MAX_CPU;
            allowed.as_ref().is_none_or(|set| known && set.is_set(cpu))
        };
        Self::of(Path::new("/"), &may)
    }

    /// With the host's files under `root`, for a process that may use some of its processors.
    fn of(root: &Path, may: &dyn Fn(usize) -> bool) -> Self {
        let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
        let status = read("proc/self/status");
        let mems = status
            .lines()
            .find_map(|l| l.strip_prefix("Mems_allowed_list:"));
        let mems = mems.map(list);
        let online = list(&read("sys/devices/system/node/online"));
        let node = |id: u32| {
            let path = format!("sys/devices/system/node/node{id}");
            let (meminfo, cpus) = (
                read(&format!("{path}/meminfo")),
                read(&format!("{path}/cpulist")),
            );
            let pool = read(&format!("{path}/hugepages/hugepages-2048kB/free_hugepages"));
            let has = |id| mems.as_ref().is_none_or(|mems| mems.contains(&id));
            let (memory, available) = match has(id) {
                true => (field(&meminfo, "MemTotal:"), available(&meminfo)),
                false => (0, 0),
            };
            let cpus = list(&cpus)
                .into_iter()
                .filter_map(|cpu| usize::try_from(cpu).ok());
            HostNode {
                id,
                cpus: cpus.filter(|cpu| may(*cpu)).collect(),
                memory,
                available,
                pool: pool.trim().parse::<u64>().unwrap_or(0) << 21,
            }
        };
        let mut nodes: Vec<HostNode> = online.into_iter().map(node).collect();
        if nodes.iter().all(|node| node.memory == 0) {
            nodes = vec![HostNode {
                id: 0,
                cpus: Vec::new(),
                memory: u64::MAX,
                available: u64::MAX,
                pool: u64::MAX,
            }];
        }
        Self(nodes)
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> &[HostNode] {
        &self.0
    }

    /// The one of this number.
    #[must_use]
    pub fn get(&self, id: u32) -> Option<&HostNode> {
        self.0.iter().find(|node| node.id == id)
    }

    /// How many have memory.
    #[must_use]
    pub fn with_memory(&self) -> usize {
        self.0.iter().filter(|node| node.memory > 0).count()
    }

    /// How busy the processors of each node are, from 0 to 1. Takes a tenth of a second.
    #[must_use]
    pub fn busy(&self) -> Vec<f64> {
        let read = || fs::read_to_string("/proc/stat").unwrap_or_default();
        let before = read();
        std::thread::sleep(WATCH);
        self.busy_between(&before, &read())
    }

    fn busy_between(&self, before: &str, after: &str) -> Vec<f64> {
        let ticks = |stat: &str, cpus: &[usize]| {
            let found = stat.lines().filter_map(ticks);
            let found = found.filter(|(cpu, ..)| cpus.contains(cpu));
            found.fold((0, 0), |(a, b), (_, busy, all)| (a + busy, b + all))
        };
        let share = |node: &HostNode| {
            let ((a, from), (b, to)) = (ticks(before, &node.cpus), ticks(after, &node.cpus));
            // Counters of idle time may step back.
            let all = to.saturating_sub(from).max(1);
            let busy = b.saturating_sub(a).min(all);
            // Ticks of a tenth of a second: exact.
            #[allow(clippy::cast_precision_loss)]
            let share = busy as f64 / all as f64;
            share
        };
        self.0.iter().map(share).collect()
    }
}

#[cfg(test)]
impl From<Vec<HostNode>> for HostNodes {
    fn from(nodes: Vec<HostNode>) -> Self {
        Self(nodes)
    }
}

/// A line of `/proc/stat` about one processor (proc_stat(5)): its number, its ticks at work, and
/// all.
fn ticks(line: &str) -> Option<(usize, u64, u64)> {
    let mut fields = line.strip_prefix("cpu")?.split(' ');
    let cpu = fields.next()?.parse().ok()?;
    // user, nice, system, idle, iowait, irq, softirq, steal; guests are in user.
    let values: Vec<u64> = fields.take(8).map_while(|f| f.parse().ok()).collect();
    let all = values.iter().sum::<u64>();
    let idle = values.iter().skip(3).take(2).sum::<u64>();
    Some((cpu, all - idle, all))
}

/// The kernel's lists, such as `0-1,4`.
fn list(text: &str) -> Vec<u32> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<u32>().ok()?, last.parse::<u32>().ok()?);
        (last < MOST).then_some(first..=last)
    };
    text.trim().split(',').filter_map(range).flatten().collect()
}

/// A line of a node's meminfo in bytes; 0 where it is not there.
fn field(meminfo: &str, name: &str) -> u64 {
    meminfo_field(meminfo, name).unwrap_or(0)
}

/// What of a node's memory is free, or a cache that can be dropped.
fn available(meminfo: &str) -> u64 {
    let names = [
        " MemFree:",
        " Active(file):",
        " Inactive(file):",
        " SReclaimable:",
    ];
    names.iter().map(|name| field(meminfo, name)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> HostNodes {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        HostNodes::of(dir.path(), &|cpu| cpu != 3)
    }

    const MEMINFO: &str = "Node 1 MemTotal:       1000 kB\nNode 1 MemFree:         300 kB\nNode 1 Active:         77 kB\n\
        Node 1 Active(file):    20 kB\nNode 1 Inactive(file):  30 kB\nNode 1 SReclaimable:  4 kB\n";

    #[test]
    fn nodes_are_read_as_far_as_this_process_may_use_them() {
        let node = "sys/devices/system/node";
        let files = [
            (&format!("{node}/online"), "0-1,4\n"),
            (&format!("{node}/node0/cpulist"), "0-1\n"),
            (&format!("{node}/node0/meminfo"), "Node 0 MemTotal: 9 kB\n"),
            (&format!("{node}/node1/cpulist"), "2-3\n"),
            (&format!("{node}/node1/meminfo"), MEMINFO),
            (
                &format!("{node}/node1/hugepages/hugepages-2048kB/free_hugepages"),
                "3\n",
            ),
            (&format!("{node}/node4/cpulist"), "\n"),
            (&format!("{node}/node4/meminfo"), "Node 4 MemTotal: 7 kB\n"),
            (
                &"proc/self/status".to_owned(),
                "Name:\tx\nMems_allowed_list:\t1,4\n",
            ),
        ];
        let files: Vec<_> = files
            .iter()
            .map(|(path, text)| (path.as_str(), *text))
            .collect();
        let found = host(&files);
        let one = HostNode {
            id: 1,
            cpus: vec![2],
            memory: 1000 << 10,
            available: 354 << 10,
            pool: 6 << 20,
        };
        assert_eq!(found.get(1), Some(&one));
        // Another process may have that one's memory.
        let zero = found.get(0).unwrap();
        assert_eq!((zero.memory, zero.available, zero.cpus.len()), (0, 0, 2));
        assert_eq!((found.get(2), found.with_memory()), (None, 2));
        assert!(found.get(4).unwrap().cpus.is_empty());
    }

    #[test]
    fn a_kernel_without_nodes_has_one() {
        for files in [
            vec![],
            vec![("sys/devices/system/node/online", "none, 7-x, 9-8\n")],
        ] {
            let found = host(&files);
            assert_eq!((found.all().len(), found.with_memory()), (1, 1));
            assert!(found.get(0).unwrap().available > 1 << 50);
        }
        assert!(HostNodes::read().with_memory() > 0);
    }

    #[test]
    fn load_is_what_is_not_idle() {
        let node = |id, cpus: &[usize]| HostNode {
            id,
            cpus: cpus.to_vec(),
            memory: 1,
            available: 1,
            pool: 0,
        };
        let nodes = HostNodes(vec![node(0, &[0, 1]), node(1, &[10]), node(2, &[])]);
        let before = "cpu  9 9 9 9\ncpu0 1 0 1 8 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\ncpu10 0 0 0 5 5 0 0 0\nintr 5\n";
        let after = "cpu  9 9 9 9\ncpu0 6 0 1 8 5 0 0 0 0 0\ncpu1 0 0 0 9 1 0 0 0 0 0\ncpu10 1 1 1 3 5 1 0 6\nintr 5\n";
        let found = nodes.busy_between(before, after);
        assert_eq!(found, [0.25, 1.0, 0.0]);
        assert_eq!(nodes.busy_between("", "cpu0\ncpu\n"), [0.0; 3]);
        assert!(
            HostNodes::read()
                .busy()
                .iter()
                .all(|b| (0.0..=1.0).contains(b))
        );
    }
}
