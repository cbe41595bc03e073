//! What a stock Linux guest, in nested hosts, sees of being moved and of being copied.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use ferry_guest_images::linux::RamDisk;
use ferry_tests::{NestedHost, NestedVmm, nested_hosts};

/// The value of `name=value` in a line.
fn value<'a>(line: &'a str, name: &str) -> &'a str {
    let words = line.split_ascii_whitespace();
    let mut pairs = words.filter_map(|word| word.split_once('='));
    let found = pairs.find(|pair| pair.0 == name);
    found.unwrap_or_else(|| panic!("no {name} in {line}")).1
}

/// What a Linux guest says of its identity: its VM generation id, how often it was told of a new
/// one, and how often that changed its random numbers.
fn identity(guest: &NestedVmm<'_>) -> (String, u64, u64) {
    guest.types("identity");
    identity_with(guest, "end-of-identity")
}

/// What it says of it on a line with this part.
fn identity_with(guest: &NestedVmm<'_>, part: &str) -> (String, u64, u64) {
    let line = guest.line_with(|line| line.contains(part));
    let value = |name: &str| value(&line, name);
    let id = value("generation");
    assert!(id.len() == 32 && id.contains(|c| c != '0'), "{line}");
    (
        id.to_owned(),
        value("told").parse().unwrap(),
        value("reseeded").parse().unwrap(),
    )
}

/// What it says of its VMClock: the marker of disruptions, that of copies, and how often it was
/// told of a change. The count of changes must be even, and a driver show the same.
fn vmclock(guest: &NestedVmm<'_>, driver: &str) -> (u64, u64, u64) {
    guest.types("vmclock");
    let line = guest.line_with(|line| line.contains("end-of-vmclock"));
    let number = |name: &str| value(&line, name).parse::<u64>().unwrap();
    assert_eq!(value(&line, "driver"), driver, "{line}");
    assert_eq!(number("sequence") % 2, 0, "{line}");
    (number("marker"), number("copies"), number("told"))
}

/// What of it the guest's kernel has a driver for.
#[derive(Clone, Copy)]
struct Drivers {
    generation: bool,
    vmclock: bool,
}

/// A guest sees its generation id, is interrupted for a new one when it is a copy, and neither when
/// it moves nor when it keeps its identity. Its VMClock has another marker after each of these, and
/// counts the copies. With a kernel that has the driver, its random numbers change with the id.
fn copies_of(host: &NestedHost, guest: NestedVmm<'_>, drivers: Drivers) {
    let driver = if drivers.vmclock { "same" } else { "none" };
    let (id, told, reseeded) = identity(&guest);
    assert_eq!((told, reseeded), (0, 0), "{}", guest.all());
    assert_eq!(vmclock(&guest, driver), (0, 0, 0));
    let there = host.receive();
    guest.migrate(there.uri(), &[]);
    assert_eq!(guest.ends().code, 0);
    assert_eq!(identity(&there), (id.clone(), 0, 0), "{}", there.all());
    assert_eq!(vmclock(&there, driver), (1, 0, 1));
    // Where its page is still missing when the guest is restored.
    let followed = host.receive();
    there.migrate(followed.uri(), &["--policy", "postcopy"]);
    assert_eq!(there.ends().code, 0);
    assert_eq!(vmclock(&followed, driver), (2, 0, 2));
    let saved = followed.command(&["snapshot", "/tmp/copied.snap", "--then", "stop"]);
    assert_eq!(saved.code, 0, "{saved:?}");
    assert_eq!(followed.ends().code, 0);

    let copy = host.restore("/tmp/copied.snap");
    let reseeds = u64::from(drivers.generation);
    // After the interrupt the driver is notified by a thread of its own.
    let seen = format!("told=1 reseeded={reseeds} end-of-identity");
    for _ in 0..60 {
        copy.types("identity");
        std::thread::sleep(Duration::from_millis(500));
        if copy.all().contains(&seen) {
            break;
        }
    }
    let (other, told, reseeded) = identity_with(&copy, &seen);
    assert_ne!(other, id);
    assert_eq!((told, reseeded), (1, reseeds), "{}", copy.all());
    assert_eq!(vmclock(&copy, driver), (3, 1, 3));
    copy.types("poweroff");
    assert_eq!(copy.ends().code, 0);

    let same = host.restore_with("/tmp/copied.snap", &["--same-identity"]);
    assert_eq!(identity(&same), (id, 0, 0), "{}", same.all());
    assert_eq!(vmclock(&same, driver), (3, 0, 3));
    same.types("poweroff");
    assert_eq!(same.ends().code, 0);
}

/// Debian's kernel for clouds lacks both drivers; its ACPI has the events.
#[test]
fn a_restored_linux_is_told_that_it_is_a_copy() {
    let Some(_turn) = nested_hosts() else { return };
    let host = NestedHost::start();
    let guest = host.guest(&["--linux", "--memory", "128M"]);
    guest.prints("ferry-guest: ready");
    let none = Drivers {
        generation: false,
        vmclock: false,
    };
    copies_of(&host, guest, none);
}

/// Debian's kernel for all machines has the driver of the generation id, and from Linux 6.13 on
/// each has that of VMClock as a module. They are up to 70 MB to download, so this test is given
/// the files.
#[test]
#[ignore = "wants Debian's generic kernel: tests/run --long with FERRY_VMGENID_KERNEL"]
fn a_restored_linux_with_the_driver_makes_new_random_numbers() {
    let Some(_turn) = nested_hosts() else { return };
    let Some(image) = std::env::var_os("FERRY_VMGENID_KERNEL") else {
        eprintln!(
            "NOT RUN: Linux's driver of the generation id (FERRY_VMGENID_KERNEL names no kernel: the vmlinuz of Debian's \
             linux-image-amd64 has it)"
        );
        return;
    };
    // It needs no module to boot.
    let mut initrd = RamDisk::new(&[]).unwrap();
    let modules = std::env::var_os("FERRY_VMCLOCK_MODULES");
    let modules: Vec<PathBuf> = modules.iter().flat_map(std::env::split_paths).collect();
    for (number, path) in modules.iter().enumerate() {
        // init goes by the order of names.
        let name = format!("modules/{number:03}.ko");
        initrd
            .add(Path::new(&name), &std::fs::read(path).unwrap())
            .unwrap();
    }
    if modules.is_empty() {
        eprintln!(
            "NOT RUN: Linux's driver of VMClock (FERRY_VMCLOCK_MODULES names no modules: ptp.ko, where it is one, and \
             ptp_vmclock.ko of the same kernel, separated by a colon)"
        );
    }
    let files = vec![
        ("generic/vmlinuz".into(), std::fs::read(image).unwrap()),
        ("generic/initrd".into(), initrd.finish()),
    ];
    let host = NestedHost::start_with_files(files);
    let guest = host.guest(&[
        "--kernel",
        "/generic/vmlinuz",
        "--initrd",
        "/generic/initrd",
        "--cmdline",
        "console=ttyS0 quiet mitigations=off random.trust_cpu=on",
        "--memory",
        "256M",
        // The nested host has AVX without XSAVE: a newer kernel's ciphers would fault. RDRAND
        // stays, or the random numbers are not ready to be made anew.
        "--cpu",
        "host,-avx",
    ]);
    guest.prints("ferry-guest: ready");
    let drivers = Drivers {
        generation: true,
        vmclock: !modules.is_empty(),
    };
    copies_of(&host, guest, drivers);
}
