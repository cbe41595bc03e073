//! The single checks.

use super::{Check, Files, Kind, Need, on_path};
use crate::kvm::probe::{self, KvmFacts, ProbeError};
use crate::memory::{
    Backing, GuestRam, PAGE_SIZE, RamError, UserfaultBy, UserfaultError, available_memory,
    check_userfault,
};
use crate::sandbox::{Support, support};
use ferry_migration::net::tls::codes_in_kernel;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::io;

/// A check that succeeded.
fn good(name: &str, need: Need, found: impl Into<String>) -> Check {
    Check {
        name: name.into(),
        ok: true,
        need,
        found: found.into(),
        advice: None,
    }
}

/// A check that failed, and what to do.
fn bad(name: &str, need: Need, found: impl Into<String>, advice: impl Into<String>) -> Check {
    Check {
        name: name.into(),
        ok: false,
        need,
        found: found.into(),
        advice: Some(advice.into()),
    }
}

/// All checks, the important ones first.
pub fn all(files: &Files) -> Vec<Check> {
    let mut checks = vec![processor(files)];
    match probe::kvm() {
        Ok(facts) => {
            checks.push(good("kvm", Need::Required, "/dev/kvm opens for this user"));
            checks.push(capabilities(&facts));
            checks.push(guest());
            checks.extend(features(&facts));
            checks.push(cpuid(files));
            checks.push(huge_page_split(files));
        }
        Err(e) => checks.push(no_kvm(files, &e)),
    }
    checks.extend([
        memfd(),
        userfaultfd(files),
        memory(files),
        guest_pages(GuestRam::new(PROBE, Backing::Auto)),
        hugepages(files),
        clocksource(files),
        kernel_tls(codes_in_kernel()),
        confinement(support()),
    ]);
    checks.extend(tools());
    checks
}

fn processor(files: &Files) -> Check {
    let name = "processor";
    match (files.virtualisation(), files.kind()) {
        (Some(flag), Kind::Software) => good(
            name,
            Need::Useful,
            format!("has {flag}, which the loaded KVM does not use"),
        ),
        (Some(flag), _) => good(
            name,
            Need::Useful,
            format!("has {flag}: guests run at full speed"),
        ),
        (None, Kind::Software) => bad(
            name,
            Need::Useful,
            "has neither VT-x nor AMD-V to offer: guests' kernels are emulated",
            "for Linux guests use a machine with VT-x or AMD-V, or let the outer hypervisor offer it (nested virtualisation)",
        ),
        (None, _) => bad(
            name,
            Need::Useful,
            "has neither VT-x nor AMD-V to offer",
            "turn virtualisation on in the firmware, or nested virtualisation in the outer hypervisor",
        ),
    }
}

fn no_kvm(files: &Files, error: &ProbeError) -> Check {
    let kind = match error {
        ProbeError::Open(e) => e.kind(),
        _ => io::ErrorKind::Other,
    };
    let advice = match kind {
        io::ErrorKind::PermissionDenied => {
            "add the user to the group that owns /dev/kvm (`sudo usermod -aG kvm $USER`, then log in again)"
        }
        io::ErrorKind::NotFound if files.virtualisation() == Some("vmx") => {
            "load the module: `sudo modprobe kvm_intel`"
        }
        io::ErrorKind::NotFound if files.virtualisation() == Some("svm") => {
            "load the module: `sudo modprobe kvm_amd`"
        }
        io::ErrorKind::NotFound => {
            "turn virtualisation on in the firmware (or nested virtualisation in the outer hypervisor) and load kvm_intel or \
             kvm_amd; in a container, pass --device /dev/kvm"
        }
        _ => "the kernel's log (`dmesg`) may say more",
    };
    bad("kvm", Need::Required, error.to_string(), advice)
}

fn capabilities(facts: &KvmFacts) -> Check {
    let name = "kvm-api";
    if facts.api_version != 12 {
        let found = format!("speaks KVM API version {}, not 12", facts.api_version);
        return bad(name, Need::Required, found, "use a current Linux kernel");
    }
    if facts.lacks.is_empty() {
        let found = format!(
            "has all that guests need; up to {} processors a guest",
            facts.max_vcpus
        );
        return good(name, Need::Required, found);
    }
    bad(
        name,
        Need::Required,
        format!("lacks {}", facts.lacks.join(", ")),
        "use a newer Linux kernel",
    )
}

fn guest() -> Check {
    match probe::run_instructions() {
        Ok(()) => good("guest", Need::Required, "a guest of two instructions ran"),
        Err(e) => bad(
            "guest",
            Need::Required,
            format!("no guest runs: {e}"),
            "another hypervisor may hold the processor; the kernel's log (`dmesg`) may say more",
        ),
    }
}

fn features(facts: &KvmFacts) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut check = |name: &str, ok: bool, yes: String, no: &str, advice: &str| {
        checks.push(if ok {
            good(name, Need::Useful, yes)
        } else {
            bad(name, Need::Useful, no, advice)
        });
    };
    let initially = if facts.dirty_log_initially_set {
        ", and enabling it is cheap (INITIALLY_SET)"
    } else {
        ""
    };
    check(
        "dirty-log",
        facts.manual_dirty_log,
        format!(
            "pages are marked clean just before they are sent (MANUAL_DIRTY_LOG_PROTECT2){initially}"
        ),
        "reading the dirty log also clears it: a migration sends some pages twice",
        "nothing need be done; Linux 5.2 and later have MANUAL_DIRTY_LOG_PROTECT2",
    );
    check(
        "dirty-ring",
        facts.dirty_ring_entries > 0,
        format!(
            "dirty pages can be reported by a ring of up to {} entries for each processor (--dirty ring{})",
            facts.dirty_ring_entries,
            if facts.manual_dirty_log {
                "; auto takes the log, which sends fewer pages twice"
            } else {
                ", and auto takes it"
            }
        ),
        "no dirty ring: the dirty log is used",
        "nothing need be done; Linux 5.11 and later have the dirty ring",
    );
    let khz = facts
        .tsc_khz
        .map(|k| format!(" ({}.{:03} MHz here)", k / 1000, k % 1000))
        .unwrap_or_default();
    check(
        "tsc-control",
        facts.tsc_control,
        format!("guests keep their TSC frequency when they arrive from another processor{khz}"),
        &format!(
            "the TSC cannot be scaled{khz}: time runs differently in guests from hosts of another frequency"
        ),
        "migrate between hosts of one TSC frequency",
    );
    check(
        "tsc-offset",
        facts.tsc_offset,
        "a guest's TSC goes on by what its clock counts of a move (KVM_VCPU_TSC_OFFSET)".into(),
        "a guest's TSC cannot be set exactly: one that keeps time by it, and not by KVM's clock, may see it jump",
        "nothing need be done on Linux 5.16 and later with VT-x or AMD-V; a software KVM shows guests the host's TSC",
    );
    check(
        "xsave2",
        facts.xsave_bytes > 0,
        format!(
            "all of the processors' extended state is carried ({} bytes)",
            facts.xsave_bytes
        ),
        "extended processor state beyond 4 KiB (AMX) cannot be carried",
        "nothing need be done unless guests use AMX; Linux 5.17 and later have it",
    );
    check(
        "nested-state",
        facts.nested_state_bytes > 0,
        "a guest that is itself a hypervisor can be migrated".into(),
        "a guest that is itself a hypervisor cannot be migrated",
        "nothing need be done unless guests run guests; `modprobe kvm_intel nested=1` (or kvm_amd) offers it",
    );
    checks
}

/// Whether the guest's CPU can be another than the host's.
fn cpuid(files: &Files) -> Check {
    let name = "cpuid";
    if files.kind() == Kind::Software {
        return bad(
            name,
            Need::Useful,
            "guests see this host's CPU, whatever `ferry run --cpu` says: CPUID runs on the processor itself",
            "nothing need be done between hosts of one processor; else start guests that are to move on hardware KVM",
        );
    }
    good(
        name,
        Need::Useful,
        "guests see the CPU that they are given (`ferry run --cpu`)",
    )
}

/// Whether KVM splits huge pages ahead of the guest's writes; only a parameter of its module
/// decides.
fn huge_page_split(files: &Files) -> Check {
    let name = "huge-page-split";
    match files
        .read("sys/module/kvm/parameters/eager_page_split")
        .as_str()
    {
        "Y" => good(
            name,
            Need::Useful,
            "a migration's own threads split guests' huge pages (eager_page_split)",
        ),
        "" => bad(
            name,
            Need::Useful,
            "guests' huge pages are split by the guests' writes during a migration, if there are any",
            "nothing need be done without --memory-backing hugetlb; Linux 5.18 and later split them ahead",
        ),
        _ => bad(
            name,
            Need::Useful,
            "guests' huge pages are split by the guests' writes during a migration: eager_page_split is off",
            "only for --memory-backing hugetlb: load the module kvm with eager_page_split=1",
        ),
    }
}

fn confinement(support: Support) -> Check {
    match support.missing() {
        None => good(
            "sandbox",
            Need::Useful,
            format!(
                "is whole here (--sandbox require): no_new_privs, seccomp filters for each kind of thread, files by landlock \
                 (version {})",
                support.landlock
            ),
        ),
        Some(missing) => bad(
            "sandbox",
            Need::Useful,
            format!("is not whole here: {missing}"),
            "`--sandbox on`, the default, goes on with the rest: no_new_privs, no core files",
        ),
    }
}

fn memfd() -> Check {
    match memfd_create("ferry-doctor", MFdFlags::MFD_CLOEXEC) {
        Ok(_) => good(
            "memfd",
            Need::Required,
            "guest memory can be made (memfd_create)",
        ),
        Err(e) => bad(
            "memfd",
            Need::Required,
            format!("guest memory cannot be made: memfd_create failed ({e})"),
            "a sandbox may forbid it; allow the system call memfd_create",
        ),
    }
}

fn userfaultfd(files: &Files) -> Check {
    let sysctl = files.read("proc/sys/vm/unprivileged_userfaultfd");
    match check_userfault() {
        Ok(by) => {
            let by = match by {
                UserfaultBy::Device => "/dev/userfaultfd",
                UserfaultBy::Syscall => "the system call",
            };
            let note = if sysctl == "0" && by == "the system call" {
                ", as a privileged user only"
            } else {
                ""
            };
            good(
                "userfaultfd",
                Need::Useful,
                format!("post-copy can receive here, by {by}{note}"),
            )
        }
        Err(UserfaultError::Forbidden { source }) => bad(
            "userfaultfd",
            Need::Useful,
            format!("post-copy cannot receive here: userfaultfd failed ({source})"),
            "give the user access to /dev/userfaultfd, or `sudo sysctl vm.unprivileged_userfaultfd=1`",
        ),
        Err(e) => bad(
            "userfaultfd",
            Need::Useful,
            format!("post-copy cannot receive here: {e}"),
            "nothing need be done for the other policies",
        ),
    }
}

/// Memory that is made to see of what: a few pages of 2 MiB.
const PROBE: u64 = 8 << 20;

/// Of what pages guests' memory is made by default: asked of memory, since many settings decide
/// together.
fn guest_pages(probe: Result<GuestRam, RamError>) -> Check {
    let name = "guest-pages";
    let (found, advice) = match probe {
        Ok(ram) => {
            ram.populate(0, PROBE / PAGE_SIZE);
            let resident = ram.resident();
            let share = resident.huge_bytes * 100 / resident.bytes.max(1);
            match (ram.backing(), ram.note()) {
                (Backing::Transparent, _) if share > 0 => {
                    let found = format!(
                        "guests get transparent 2 MiB pages ({share} % of {} MiB just now)",
                        PROBE >> 20
                    );
                    return good(name, Need::Useful, found);
                }
                (Backing::Transparent, _) => (
                    "guests ask for transparent 2 MiB pages, and the host had none just now".into(),
                    "free memory, or `echo 1 | sudo tee /proc/sys/vm/compact_memory`",
                ),
                (_, note) => (
                    note.unwrap_or("guest memory has 4 KiB pages").to_owned(),
                    "guests are slower and take longer to arrive; see --memory-backing",
                ),
            }
        }
        Err(error) => (error.to_string(), "see the checks of memory"),
    };
    bad(name, Need::Useful, found, advice)
}

fn memory(files: &Files) -> Check {
    let free = available_memory().map_or(files.meminfo("MemAvailable") / 1024, |bytes| bytes >> 20);
    if free >= 256 {
        good("memory", Need::Useful, format!("{free} MiB available"))
    } else {
        let found = format!("{free} MiB available: too little for most guests");
        bad(
            "memory",
            Need::Useful,
            found,
            "end other programs or add memory",
        )
    }
}

fn hugepages(files: &Files) -> Check {
    let (free, size) = (
        files.meminfo("HugePages_Free"),
        files.meminfo("Hugepagesize"),
    );
    if free > 0 {
        let found = format!("{free} free pages of {size} KiB for --memory-backing hugetlb");
        good("hugepages", Need::Useful, found)
    } else {
        bad(
            "hugepages",
            Need::Useful,
            "the pool of huge pages is empty: --memory-backing hugetlb will not work",
            "nothing need be done without --memory-backing hugetlb; `sudo sysctl vm.nr_hugepages=1024` reserves 2 GiB where pages are 2 MiB",
        )
    }
}

fn clocksource(files: &Files) -> Check {
    let name = "clocksource";
    let current = files.read("sys/devices/system/clocksource/clocksource0/current_clocksource");
    match current.as_str() {
        "tsc" => good(name, Need::Useful, "the host trusts its TSC, so guests may"),
        "" => bad(
            name,
            Need::Useful,
            "the host's clock source is unknown",
            "mount /sys to see it",
        ),
        other => bad(
            name,
            Need::Useful,
            format!("the host uses {other}, not its TSC: guests' clocks may be slow or jump"),
            "the kernel's log says why the TSC was rejected (`dmesg | grep -i tsc`)",
        ),
    }
}

fn kernel_tls(codes: bool) -> Check {
    let name = "kernel TLS";
    if codes {
        let found = "the kernel codes TLS records: pages of secured migrations are not copied";
        return good(name, Need::Useful, found);
    }
    bad(
        name,
        Need::Useful,
        "the kernel does not code TLS records: pages of secured migrations are copied and cost \
         more processor time",
        "load the module, where the kernel has it: `sudo modprobe tls`",
    )
}

fn tools() -> Vec<Check> {
    let tool = |name: &str, program: &str, what: &str, package: &str| {
        if on_path(program) {
            good(name, Need::Tests, format!("{program} is here ({what})"))
        } else {
            let found = format!("no {program} ({what})");
            bad(
                name,
                Need::Tests,
                found,
                format!("only for tests and benchmarks: `sudo apt install {package}`"),
            )
        }
    };
    vec![
        tool("tc", "tc", "shapes links in benchmarks", "iproute2"),
        tool("ip", "ip", "makes networks for tests", "iproute2"),
        tool(
            "qemu",
            "qemu-system-x86_64",
            "emulates whole hosts in tests",
            "qemu-system-x86",
        ),
    ]
}
