//! The embedded image under QEMU with KVM, where both are there.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_guest_images::{BARE, Kernel, Line, Manner, STOP, Work, Workload};
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

const QEMU: &str = "qemu-system-x86_64";
/// A guest that says nothing for so long hangs.
const SILENCE: Duration = Duration::from_secs(60);
/// Good enough for a test: nothing here depends on the true rate.
const TSC_KHZ: u64 = 2_500_000;

/// Whether the test can run; says loudly if not.
fn possible(test: &str) -> bool {
    let why = if Command::new(QEMU).arg("--version").output().is_err() {
        format!("{QEMU} is not installed")
    } else if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        format!("/dev/kvm cannot be opened ({error})")
    } else {
        return true;
    };
    // Past the test harness's capture: a test that did not run must be seen.
    let _ = writeln!(std::io::stderr(), "NOT RUN: {test}: {why}");
    false
}

struct Guest {
    qemu: Child,
    lines: Receiver<String>,
    directory: tempfile::TempDir,
}

impl Guest {
    /// Boots the image; the guest's memory is the file `memory` in the directory.
    fn boot(memory: &str, cpus: usize, command_line: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("memory");
        let object = format!(
            "memory-backend-file,id=ram,size={memory},share=on,mem-path={}",
            file.display()
        );
        let image = directory.path().join("bare.elf");
        std::fs::write(&image, BARE).unwrap();
        // Without arch-capabilities: software KVM offers the MSR and then refuses to set it.
        let mut qemu = Command::new(QEMU)
            .args([
                "-M",
                "microvm,acpi=off,memory-backend=ram",
                "-enable-kvm",
                "-cpu",
                "host,arch-capabilities=off",
                "-m",
                memory,
            ])
            .args([
                "-smp",
                &cpus.to_string(),
                "-append",
                command_line,
                "-nodefaults",
                "-no-user-config",
            ])
            .args([
                "-display",
                "none",
                "-serial",
                "stdio",
                "-no-reboot",
                "-kernel",
            ])
            .arg(&image)
            .args(["-object", &object])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let output = BufReader::new(qemu.stdout.take().unwrap());
        std::thread::spawn(move || {
            output
                .lines()
                .map_while(Result::ok)
                .try_for_each(|line| sender.send(line))
        });
        Self {
            qemu,
            lines,
            directory,
        }
    }

    fn run(memory: &str, cpus: usize, workload: &str) -> Self {
        let workload = Workload::parse(workload).unwrap();
        Self::boot(memory, cpus, &workload.command_line(cpus, Some(TSC_KHZ)))
    }

    /// Reads lines until `wanted` finds what it looks for; every line must be one of the guest's.
    fn wait<T>(&self, mut wanted: impl FnMut(Line<'_>) -> Option<T>) -> T {
        loop {
            let text = self
                .lines
                .recv_timeout(SILENCE)
                .expect("the guest ended or hangs");
            println!("{text}");
            let line =
                Line::parse(&text).unwrap_or_else(|| panic!("not a line of the guest: {text}"));
            if let Line::Fault { .. } = line {
                panic!("{text}");
            }
            if let Some(found) = wanted(line) {
                return found;
            }
        }
    }

    /// Waits for the last line and for the machine to go down by itself.
    fn end(mut self) {
        self.wait(|line| (line == Line::End).then_some(()));
        assert!(self.qemu.wait().unwrap().success());
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Already gone if all went well.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Whether the writer has begun to write: a line before its memory is filled may come first on a
/// busy machine.
fn writes(line: Line<'_>) -> Option<()> {
    let begun = matches!(
        line,
        Line::Stat {
            work: Work::Writes { writes: 1.., .. },
            ..
        }
    );
    begun.then_some(())
}

#[test]
fn kernels_verify_on_one_and_two_processors() {
    if !possible("kernels_verify_on_one_and_two_processors") {
        return;
    }
    for cpus in [1, 2] {
        for kernel in Kernel::ALL {
            let kernel = format!("{}.S", kernel.name());
            let kernel = kernel.as_str();
            let guest = Guest::run("64M", cpus, kernel);
            let verified = guest.wait(|line| match line {
                Line::Result(result) => {
                    assert_eq!(result.kernel, kernel);
                    Some(result.verified)
                }
                _ => None,
            });
            assert!(verified, "{kernel} on {cpus}");
            guest.end();
        }
    }
}

#[test]
fn a_kernel_is_repeated_until_it_is_told_to_stop() {
    if !possible("a_kernel_is_repeated_until_it_is_told_to_stop") {
        return;
    }
    let workload = Workload::parse("is.S").unwrap();
    let mut guest = Guest::boot(
        "64M",
        1,
        &workload.command_line_with(
            1,
            Some(TSC_KHZ),
            Manner {
                repeat: Some(0),
                ..Manner::default()
            },
        ),
    );
    let third = |line: Line<'_>| {
        matches!(line, Line::Result(result) if result.run == 3 && result.verified).then_some(())
    };
    guest.wait(third);
    guest.qemu.stdin.take().unwrap().write_all(&[STOP]).unwrap();
    guest.end();
}

#[test]
fn the_writer_verifies_all_of_its_memory_when_told_to_stop() {
    if !possible("the_writer_verifies_all_of_its_memory_when_told_to_stop") {
        return;
    }
    for (cpus, workload) in [
        (1, "dirty:wss=2M,rate=0,pattern=sequential,fill=half"),
        (2, "dirty:wss=4M,rate=20000,pattern=zipf"),
    ] {
        let mut guest = Guest::run("48M", cpus, workload);
        guest.wait(writes);
        guest.qemu.stdin.take().unwrap().write_all(&[STOP]).unwrap();
        let verdict = guest.wait(|line| match line {
            Line::Verdict { verdict, .. } => Some(verdict),
            _ => None,
        });
        assert!(
            verdict.verified && verdict.corrupt == 0 && verdict.writes > 0,
            "{verdict:?}"
        );
        // All memory but the reserve at the bottom, the stacks and the rounding.
        assert!(verdict.pages > 42 << 8, "{verdict:?}");
        guest.end();
    }
}

#[test]
fn the_writer_finds_a_page_that_was_changed_behind_its_back() {
    if !possible("the_writer_finds_a_page_that_was_changed_behind_its_back") {
        return;
    }
    let mut guest = Guest::run("32M", 1, "dirty:wss=1M,rate=100");
    guest.wait(writes);
    // One word in the middle of a page far beyond the working set.
    let memory = OpenOptions::new()
        .write(true)
        .open(guest.directory.path().join("memory"))
        .unwrap();
    memory.write_all_at(&[0xff; 8], (24 << 20) + 2048).unwrap();
    guest.qemu.stdin.take().unwrap().write_all(&[STOP]).unwrap();
    let corruption = guest.wait(|line| match line {
        Line::Corrupt(corruption) => Some(corruption),
        _ => None,
    });
    assert_eq!((corruption.word, corruption.found), (256, u64::MAX));
    let verdict = guest.wait(|line| match line {
        Line::Verdict { verdict, .. } => Some(verdict),
        _ => None,
    });
    assert!(!verdict.verified && verdict.corrupt == 1, "{verdict:?}");
    guest.end();
}

#[test]
fn an_idle_guest_ends_by_itself() {
    if !possible("an_idle_guest_ends_by_itself") {
        return;
    }
    let guest = Guest::run("16M", 1, "idle:fill=random,seconds=1");
    let verdict = guest.wait(|line| match line {
        Line::Verdict { verdict, .. } => Some(verdict),
        _ => None,
    });
    assert!(verdict.verified && verdict.writes == 0, "{verdict:?}");
    guest.end();
}

#[test]
fn what_cannot_be_run_is_refused_with_one_sentence() {
    if !possible("what_cannot_be_run_is_refused_with_one_sentence") {
        return;
    }
    let tsc = format!(" ferry.tsc_khz={TSC_KHZ}");
    for (command_line, part) in [
        ("ferry.run=lu.A", "`lu`"),
        ("ferry.run=mg.Z", "`Z`"),
        ("ferry.run=mg.A", "mg.A needs a guest of"),
        ("ferry.run=ft.C", "ft.C needs a guest of 51"),
        ("ferry.run=dirty:wss=1G", "needs a guest of"),
        ("ferry.run=dirty:wss=x", "`wss=x`"),
        ("ferry.cpus=1", "ferry.run="),
        ("ferry.run=ep.S ferry.cpus=0", "`ferry.cpus=0`"),
        ("ferry.run=ep.S ferry.cpus=3", "ferry.cpus=3"),
        ("ferry.run=ep.S ferry.colour=red", "`ferry.colour=red`"),
    ] {
        let guest = Guest::boot("64M", 1, &(command_line.to_owned() + &tsc));
        let error = guest.wait(|line| match line {
            Line::Error(text) => Some(text.to_owned()),
            _ => None,
        });
        assert!(error.contains(part), "{command_line}: {error}");
        guest.end();
    }
}
