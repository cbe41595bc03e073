//! The house: which crate may use which, and where `unsafe` may stand.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

#[path = "house/circles.rs"]
mod circles;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// The packages that `package` is built with, itself among them; of its tests and build scripts
/// none.
fn dependencies(package: &str) -> BTreeSet<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let out = Command::new(cargo)
        .args(["tree", "--offline", "--locked", "--package", package])
        .args(["--edges", "normal", "--all-features"])
        .args(["--prefix", "none", "--format", "{p}"])
        .current_dir(root())
        .output()
        .unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(
        out.status.success(),
        "cargo tree {package}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    let names = text.lines().filter_map(|line| line.split(' ').next());
    let names: BTreeSet<String> = names.map(str::to_owned).collect();
    assert!(names.contains(package), "{text}");
    names
}

fn uses_none_of(package: &str, others: &[&str]) {
    let found = dependencies(package);
    let wrong: Vec<_> = others
        .iter()
        .filter(|name| found.contains(**name))
        .collect();
    assert!(wrong.is_empty(), "{package} depends on {wrong:?}");
}

#[test]
fn the_vmm_needs_nothing_of_a_command_line_or_a_laboratory() {
    uses_none_of(
        "ferry-vmm",
        &[
            "clap",
            "indicatif",
            "plotters",
            "toml",
            "tracing-subscriber",
            "ferry",
            "ferry-guest-images",
            "ferry-lab",
            "ferry-nas",
            "ferry-terminal",
        ],
    );
}

#[test]
fn migration_and_devices_do_not_know_each_other_nor_a_hypervisor() {
    let above = ["kvm-ioctls", "kvm-bindings", "ferry-vmm"];
    uses_none_of(
        "ferry-migration",
        &[&above[..], &["ferry-devices"]].concat(),
    );
    uses_none_of(
        "ferry-devices",
        &[&above[..], &["ferry-migration"]].concat(),
    );
}

#[test]
fn the_terminal_knows_no_vmm() {
    uses_none_of("ferry-terminal", &["ferry-vmm", "ferry-lab", "kvm-ioctls"]);
    assert!(!dependencies("ferry-lab").contains("ferry"));
}

/// Every Rust file of the repository, as its path from the root.
fn sources() -> Vec<String> {
    let found = files(".rs");
    assert!(found.len() > 100, "{found:?}");
    found
}

/// Every document.
fn documents() -> Vec<String> {
    let found = files(".md");
    assert!(found.len() > 20, "{found:?}");
    found
}

fn files(suffix: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut directories = vec![root()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                if name != "target" && !name.starts_with('.') {
                    directories.push(path);
                }
            } else if name.ends_with(suffix) {
                let path = path.strip_prefix(root()).unwrap();
                found.push(path.to_str().unwrap().to_owned());
            }
        }
    }
    found
}

/// Whether a line of code opens something unsafe: `unsafe` as a word, outside a comment.
fn is_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '"' || c == '`';
    code.match_indices("unsafe").any(|(at, word)| {
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        !before.is_some_and(is_word) && !after.is_some_and(is_word)
    })
}

#[test]
fn unsafe_is_found_where_it_is() {
    for line in [
        "    unsafe { f() };",
        "unsafe impl Sync for X {}",
        "    checked(unsafe {",
        "#[unsafe(no_mangle)]",
    ] {
        assert!(is_unsafe(line), "{line}");
    }
    for line in [
        "#![forbid(unsafe_code)]",
        "// unsafe { f() }",
        "fn is_unsafe()",
        "    f(\"unsafe\");",
    ] {
        assert!(!is_unsafe(line), "{line}");
    }
}

/// A thread that nothing guards hangs what waits for it when it panics. (The scoped threads of
/// ferry-migration are joined where they are started, and a panic goes on from there.)
#[test]
fn threads_start_in_one_place() {
    const EXEMPT: [&str; 3] = [
        // The one place.
        "devices/src/thread.rs",
        // Its thread returns a value, and is joined in the function that starts it, which reports a
        // panic as the failure of the run.
        "lab/src/bench/cloud.rs",
        // A scoped thread: the function that starts it joins it, and its panic goes on there.
        "vmm/src/snapshot/cancel.rs",
    ];
    const ROOMS: [&str; 5] = ["devices/", "vmm/", "cli/", "agent/", "lab/"];
    let guarded = |path: &String| {
        ROOMS
            .iter()
            .any(|room| path.starts_with(&format!("{room}src/")))
            && !EXEMPT.contains(&path.as_str())
            && !path.ends_with("tests.rs")
            && !path.contains("/tests/")
    };
    let mut read = 0;
    for path in sources().iter().filter(|path| guarded(path)) {
        let text = fs::read_to_string(root().join(path)).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        for way in ["std::thread::spawn", "thread::Builder"] {
            assert!(!code.contains(way), "{path}: {way} beside thread::spawn");
        }
        read += code.lines().count();
    }
    assert!(read > 10_000, "{read} lines");
}

/// Without its features `net` and `testing`, ferry-migration sees time by the clock that it is
/// given.
#[test]
fn the_engines_read_no_clock() {
    let mut read = 0;
    for path in sources() {
        let Some(inside) = path.strip_prefix("migration/src/") else {
            continue;
        };
        let first = inside.split(['/', '.']).next().unwrap();
        if ["net", "testing"].contains(&first) || inside.ends_with("tests.rs") {
            continue;
        }
        let text = fs::read_to_string(root().join(&path)).unwrap();
        let code = text.split("#[cfg(test)]\nmod ").next().unwrap();
        for clock in ["Instant", "SystemTime"] {
            assert!(!code.contains(clock), "{path} names {clock}");
        }
        read += code.lines().count();
    }
    assert!(read > 10_000, "{read} lines");
}

/// Two files say what a panic of a lock's holder means; all others take locks and wait by those.
#[test]
fn poison_is_dealt_with_in_two_places() {
    const ROOMS: [&str; 6] = ["migration/", "devices/", "vmm/", "cli/", "agent/", "lab/"];
    const PLACES: [&str; 2] = ["migration/src/sync.rs", "devices/src/sync.rs"];
    for path in sources() {
        let text = fs::read_to_string(root().join(&path)).unwrap();
        let named = text.contains("PoisonError");
        if PLACES.contains(&path.as_str()) {
            assert!(named, "{path} is no longer one of the places");
        } else if ROOMS
            .iter()
            .any(|room| path.starts_with(&format!("{room}src/")))
        {
            assert!(!named, "{path} names PoisonError beside `sync`");
        }
    }
}

#[test]
fn unsafe_stands_only_where_the_design_has_it() {
    const ROOMS: [&str; 7] = [
        "vmm/src/kvm/",
        "vmm/src/memory.rs",
        "vmm/src/memory/",
        "vmm/src/sandbox",
        "vmm/src/tap/ioctl.rs",
        // The guests' own code: no library lies below it.
        "guest-images/bare/",
        "guest-images/linux/src/sys.rs",
    ];
    for path in sources() {
        if path == file!() || ROOMS.iter().any(|room| path.starts_with(room)) {
            continue;
        }
        let text = fs::read_to_string(root().join(&path)).unwrap();
        for (at, line) in text.lines().enumerate() {
            assert!(!is_unsafe(line), "{path}:{}: {line}", at + 1);
        }
    }
}

/// The laboratory reaches a VMM through its control socket, reads what `ferry doctor` finds, and
/// makes files, takes locks and starts threads as a VMM
/// does.
#[test]
fn the_laboratory_uses_nothing_of_the_vmm_but_a_few_doors() {
    const DOORS: [&str; 6] = [
        "api::client::",
        "api::types::",
        "doctor",
        "new_file::",
        "sync::",
        "thread",
    ];
    // It takes memory as a guest's RAM does, to have the host's 2 MiB pages at hand.
    const WARM: (&str, &str) = ("lab/src/bench/warm.rs", "memory::");
    for path in sources().iter().filter(|path| path.starts_with("lab/src/")) {
        let text = fs::read_to_string(root().join(path)).unwrap();
        for (_, rest) in text.split("ferry_vmm").skip(1).map(|rest| rest.split_at(2)) {
            let door = DOORS.iter().any(|door| rest.starts_with(door))
                || (path == WARM.0 && rest.starts_with(WARM.1));
            assert!(door, "{path}: ferry_vmm::{}", rest.lines().next().unwrap());
        }
    }
}

/// Comments, messages and documents name who does something: the source, the destination, KVM, a
/// thread, an operator.
#[test]
fn sentences_name_their_actor() {
    let nameless = ["whoever", "somebody", "nobody", "anybody", "greeting"];
    let mut paths = sources();
    paths.extend(documents());
    for path in paths.iter().filter(|path| *path != file!()) {
        let text = fs::read_to_string(root().join(path)).unwrap();
        for (at, line) in text.lines().enumerate() {
            let lower = line.to_lowercase();
            let mut words = lower.split(|c: char| !c.is_alphanumeric());
            let found = words.find(|word| nameless.contains(word));
            assert_eq!(found, None, "{path}:{}: {line}", at + 1);
        }
    }
}

/// Options get more fields. They have a default, for `X { …, ..X::default() }`, or only the crate
/// itself can list their fields.
#[test]
fn options_can_grow() {
    let mut read = 0;
    for path in sources() {
        let library = ["migration/src/", "vmm/src/", "devices/src/"];
        if !library.iter().any(|room| path.starts_with(room)) {
            continue;
        }
        let text = fs::read_to_string(root().join(&path)).unwrap();
        for (at, _) in text.match_indices("\npub struct ") {
            let rest = &text[at + "\npub struct ".len()..];
            let name = rest.split(|c: char| !c.is_alphanumeric()).next().unwrap();
            let fields = rest.split("\n}").next().unwrap();
            if !name.ends_with("Options") || !fields.contains("    pub ") {
                continue;
            }
            read += 1;
            let attributes = text[..at].rsplit("\n\n").next().unwrap();
            let can_grow = attributes.contains("non_exhaustive")
                || attributes.contains("Default")
                || text.contains(&format!("impl Default for {name} "));
            assert!(can_grow, "{path}: {name}");
        }
    }
    assert!(read >= 5, "{read} structs");
}

/// A file is one idea, and a function fits a screen. Tests are exempt: they are read one by one.
#[test]
fn files_and_functions_stay_short() {
    const LINES_OF_A_FILE: usize = 500;
    const LINES_OF_A_FUNCTION: usize = 80;
    const ROOMS: [&str; 6] = ["migration/", "devices/", "vmm/", "cli/", "agent/", "lab/"];
    // A paper's experiment from begin to end, or its claims one after the other.
    const LISTS: [(&str, &str); 7] = [
        ("lab/src/bench/paper/mplm.rs", "experiment"),
        ("lab/src/bench/paper/postcopy.rs", "judge"),
        ("lab/src/sim/mplm.rs", "findings"),
        ("lab/src/sim/mplm.rs", "run"),
        ("lab/src/sim/postcopy/claims.rs", "findings"),
        ("lab/src/sim/stord.rs", "findings"),
        ("lab/src/sim/postcopy.rs", "run"),
    ];
    let mut read = 0;
    for path in sources() {
        let product = ROOMS.iter().any(|room| path.starts_with(room)) && path.contains("/src/");
        if !product || path.contains("/tests/") || path.ends_with("tests.rs") {
            continue;
        }
        let text = fs::read_to_string(root().join(&path)).unwrap();
        let lines = text.lines().count();
        assert!(lines <= LINES_OF_A_FILE, "{path}: {lines} lines");
        let code = text.split("#[cfg(test)]\nmod ").next().unwrap();
        for (name, lines) in functions(code) {
            let is_list = LISTS.contains(&(path.as_str(), name.as_str()));
            assert!(
                lines <= LINES_OF_A_FUNCTION || is_list,
                "{path}: {name} has {lines} lines"
            );
            read += 1;
        }
    }
    assert!(read > 3000, "{read} functions");
}

/// The functions of code that rustfmt has formatted, by name, and how many lines each has.
fn functions(code: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = code.lines().collect();
    let mut found = Vec::new();
    for (first, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        let words: Vec<&str> = line.trim_start().split(' ').collect();
        let Some(at) = words.iter().take(5).position(|word| *word == "fn") else {
            continue;
        };
        let modifiers = [
            "pub",
            "pub(crate)",
            "pub(super)",
            "const",
            "unsafe",
            "async",
        ];
        if !words[..at].iter().all(|word| modifiers.contains(word)) {
            continue;
        }
        let name = words.get(at + 1).unwrap_or(&"");
        let name = name.split(['(', '<']).next().unwrap_or_default().to_owned();
        let close = format!("{}}}", &line[..indent]);
        let ends = |line: &&&str| **line == close;
        let one_line = line.ends_with('}') || line.ends_with(';');
        let rest = lines[first..].iter();
        let length = rest.take_while(|line| !ends(line)).count() + 1;
        found.push((name, if one_line { 1 } else { length }));
    }
    found
}

#[test]
fn functions_are_counted() {
    let code = "impl X {\n    pub const fn a(&self) -> u8 {\n        1\n    }\n\n    fn b() {}\n}\n\n\
                fn c<T>(\n    t: T,\n) {\n    drop(t);\n}\n// a fn of none\n";
    let found = [("a", 3), ("b", 1), ("c", 5)];
    let found: Vec<_> = found.map(|(name, n)| (name.to_owned(), n)).into();
    assert_eq!(functions(code), found);
}
