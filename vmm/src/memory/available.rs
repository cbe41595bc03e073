//! How much memory this process can still have: of the host, and of the memory cgroups that it is
//! in.

use std::fs;
use std::path::Path;

use super::RamError;

/// Memory to be had, and what limits it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Available {
    bytes: u64,
    by: String,
}

/// Whether `bytes` of memory can be had. A host that does not tell is believed to.
pub(crate) fn check_available(bytes: u64) -> Result<(), RamError> {
    match least(Path::new("/")) {
        Some(found) if bytes > found.bytes => Err(RamError::NotAvailable {
            bytes,
            available: found.bytes,
            by: found.by,
        }),
        _ => Ok(()),
    }
}

/// Bytes that can be had without swapping and without the OOM killer, where the host tells.
#[must_use]
pub fn available_memory() -> Option<u64> {
    least(Path::new("/")).map(|found| found.bytes)
}

/// What limits most, with the host's files under `root`.
fn least(root: &Path) -> Option<Available> {
    let meminfo = fs::read_to_string(root.join("proc/meminfo")).unwrap_or_default();
    let host = host(&meminfo).map(|bytes| Available {
        bytes,
        by: "this host".into(),
    });
    host.into_iter()
        .chain(cgroups(root))
        .min_by_key(|found| found.bytes)
}

fn host(meminfo: &str) -> Option<u64> {
    field(meminfo, "MemAvailable:")
}

/// What a line of meminfo says, the host's or a node's (`Node 0 MemTotal:  5 kB`), in bytes; the
/// file has it in KiB.
pub(crate) fn field(meminfo: &str, name: &str) -> Option<u64> {
    let (_, value) = meminfo.lines().find_map(|line| line.split_once(name))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// What the memory cgroups leave, this process' own and those above it.
fn cgroups(root: &Path) -> Vec<Available> {
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let (own, mounts) = (read("proc/self/cgroup"), read("proc/self/mountinfo"));
    let mut found = Vec::new();
    for hierarchy in own.lines() {
        // "4:memory:/path" of version 1, "0::/path" of version 2.
        let mut fields = hierarchy.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let version = match controllers {
            "" => Version::Two,
            list if list.split(',').any(|name| name == "memory") => Version::One,
            _ => continue,
        };
        let Some((mount, top)) = mounts.lines().find_map(|line| version.mount(line)) else {
            continue;
        };
        // In a container the mount may show a part of the tree only.
        let below = path.strip_prefix(top.as_str()).unwrap_or(path);
        let mount = root.join(mount.trim_start_matches('/'));
        let mut directory = mount.join(below.trim_start_matches('/'));
        while directory.starts_with(&mount) {
            found.extend(version.headroom(&directory));
            if !directory.pop() {
                break;
            }
        }
    }
    found
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Version {
    /// Where a line of mountinfo mounts this hierarchy, and which of its directories is the top
    /// there.
    fn mount(self, line: &str) -> Option<(String, String)> {
        let (mount, system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (top, point) = (fields.next()?, fields.next()?);
        let mut system = system.split(' ');
        let kind = system.next()?;
        let fits = match self {
            Self::One => {
                kind == "cgroup" && system.nth(1)?.split(',').any(|option| option == "memory")
            }
            Self::Two => kind == "cgroup2",
        };
        fits.then(|| (point.to_owned(), top.trim_end_matches('/').to_owned()))
    }

    /// What one cgroup leaves; `None` where it sets no limit.
    fn headroom(self, directory: &Path) -> Option<Available> {
        let read = |name: &str| fs::read_to_string(directory.join(name)).ok();
        let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
        let (limit, usage, cache) = match self {
            Self::One => (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                ["total_active_file", "total_inactive_file"],
            ),
            Self::Two => (
                "memory.max",
                "memory.current",
                ["active_file", "inactive_file"],
            ),
        };
        // "max" is no number. Version 1 has a huge one instead, which the host's memory is below.
        let bytes = number(limit)?;
        let used = number(usage)?;
        // The page cache goes before anything is killed; a guest's own memory does not count as
        // such.
        let stat = read("memory.stat").unwrap_or_default();
        let cached: u64 = stat
            .lines()
            .filter_map(|line| line.split_once(' '))
            .filter(|(name, _)| cache.contains(name))
            .filter_map(|(_, value)| value.trim().parse::<u64>().ok())
            .sum();
        Some(Available {
            bytes: bytes.saturating_sub(used.saturating_sub(cached)),
            by: format!("the memory cgroup {}", directory.display()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host_with(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    fn bytes(files: &[(&str, &str)]) -> Option<u64> {
        least(host_with(files).path()).map(|found| found.bytes)
    }

    #[test]
    fn meminfo_is_read_and_nonsense_is_not() {
        assert_eq!(host("MemTotal: 9 kB\nMemAvailable:    3 kB\n"), Some(3072));
        assert_eq!(host("MemAvailable: lots"), None);
        assert_eq!(host(""), None);
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemAvailable:    1000 kB\n");

    #[test]
    fn without_cgroups_the_host_decides() {
        assert_eq!(bytes(&[]), None);
        assert_eq!(bytes(&[MEMINFO]), Some(1_024_000));
        let damaged = ("proc/self/cgroup", "0:\n:::\nnonsense\n\n7\n");
        let mounts = ("proc/self/mountinfo", "x - \n - cgroup2\n1 2 3\n");
        assert_eq!(bytes(&[MEMINFO, damaged, mounts]), Some(1_024_000));
    }

    #[test]
    fn the_tightest_cgroup_of_version_2_decides() {
        let files = [
            MEMINFO,
            ("proc/self/cgroup", "0::/a/b\n"),
            (
                "proc/self/mountinfo",
                "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n",
            ),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/b/memory.current", "5\n"),
            ("sys/fs/cgroup/a/memory.max", "9000\n"),
            ("sys/fs/cgroup/a/memory.current", "8000\n"),
            (
                "sys/fs/cgroup/a/memory.stat",
                "anon 7000\nactive_file 100\ninactive_file 200\ninactive_anon 900\n",
            ),
        ];
        assert_eq!(bytes(&files), Some(1300));
        let found = least(host_with(&files).path()).unwrap();
        assert!(found.by.ends_with("/sys/fs/cgroup/a"), "{}", found.by);
    }

    #[test]
    fn a_container_sees_a_part_of_version_1() {
        let files = [
            MEMINFO,
            ("proc/self/cgroup", "5:pids:/box\n4:cpu,memory:/box/7\n"),
            (
                "proc/self/mountinfo",
                "9 8 0:1 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                 30 24 0:26 /box /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
            ),
            ("sys/fs/cgroup/memory/7/memory.limit_in_bytes", "4096\n"),
            ("sys/fs/cgroup/memory/7/memory.usage_in_bytes", "4000\n"),
            (
                "sys/fs/cgroup/memory/7/memory.stat",
                "active_file 9\ntotal_inactive_file 4\n",
            ),
            (
                "sys/fs/cgroup/memory/memory.limit_in_bytes",
                "9223372036854771712\n",
            ),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1\n"),
        ];
        assert_eq!(bytes(&files), Some(100));
    }

    /// More used than allowed, as after a limit was lowered.
    #[test]
    fn a_limit_that_is_passed_leaves_nothing() {
        let files = [
            MEMINFO,
            ("proc/self/cgroup", "0::/\n"),
            (
                "proc/self/mountinfo",
                "30 24 0:26 / /cg rw - cgroup2 none rw\n",
            ),
            ("cg/memory.max", "10\n"),
            ("cg/memory.current", "20\n"),
        ];
        assert_eq!(bytes(&files), Some(0));
    }
}
