//! The documents are true: their commands run, their links lead somewhere, and their figures were
//! measured.
//!
//! `FERRY_UPDATE_DOCS=1 cargo test -p ferry-tests --test docs` writes docs/reference/cli.md anew.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_tests::book::{Block, Mark, Page, pages, root};
use ferry_tests::{TIMEOUT, ferry, guests_run, run, until};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

/// The ports that the pages use; a test replaces them, since they may be taken.
const PORTS: [&str; 2] = [":7000", ":9117"];

fn fails(found: &[String]) {
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn every_block_of_commands_has_a_mark() {
    let mut found = Vec::new();
    for page in pages() {
        for block in &page.blocks {
            if let Err(why) = block.mark() {
                found.push(format!("{}:{}: {why}", page.name, block.line));
            }
        }
    }
    fails(&found);
}

/// Whether a block of Rust stands word for word in the file that its info string names, which is
/// compiled and run as a test.
fn check_rust(block: &Block) -> Result<(), String> {
    let Some(("rust", file)) = block.info.split_once(' ') else {
        return Err("name the file behind `rust` that the block is from".into());
    };
    let text = fs::read_to_string(root().join(file)).map_err(|e| format!("{file}: {e}"))?;
    if text.contains(&block.text) {
        Ok(())
    } else {
        Err(format!("the block is not what {file} has"))
    }
}

#[test]
fn every_block_of_rust_is_part_of_an_example_that_runs() {
    let (mut checked, mut found) = (0, Vec::new());
    for page in pages() {
        for block in page.blocks.iter().filter(|b| b.info.starts_with("rust")) {
            checked += 1;
            if let Err(why) = check_rust(block) {
                found.push(format!("{}:{}: {why}", page.name, block.line));
            }
        }
    }
    fails(&found);
    assert!(checked > 0);
    let block = |info: &str, text: &str| Block {
        line: 1,
        info: info.into(),
        text: text.into(),
    };
    let file = "rust migration/examples/own_policy.rs";
    assert!(check_rust(&block(file, "struct Halving {\n")).is_ok());
    for (info, text) in [
        (file, "struct Thirds {\n"),
        ("rust,ignore", "struct Halving {\n"),
        ("rust no/such.rs", "struct Halving {\n"),
    ] {
        assert!(check_rust(&block(info, text)).is_err(), "{info}: {text}");
    }
}

#[test]
fn links_lead_somewhere() {
    let pages = pages();
    let mut found = Vec::new();
    for page in &pages {
        for (line, link) in page.links() {
            if link.contains("://") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = page.path.parent().unwrap().join(file);
            let target = if file.is_empty() {
                page.path.clone()
            } else {
                target
            };
            let Ok(target) = target.canonicalize() else {
                found.push(format!("{}:{line}: there is no {link}", page.name));
                continue;
            };
            let known = pages.iter().find(|p| p.path == target);
            if !anchor.is_empty() && !known.is_some_and(|p| p.anchors().contains(anchor)) {
                found.push(format!("{}:{line}: no heading for {link}", page.name));
            }
        }
    }
    fails(&found);
}

#[test]
fn every_page_of_the_book_is_in_its_summary() {
    let pages = pages();
    let summary = pages.iter().find(|p| p.name == "docs/SUMMARY.md").unwrap();
    let links: BTreeSet<String> = summary.links().into_iter().map(|(_, link)| link).collect();
    let missing = pages.iter().filter_map(|page| {
        let name = page.name.strip_prefix("docs/")?;
        let there = name == "SUMMARY.md" || links.contains(name);
        (!there).then(|| format!("docs/SUMMARY.md does not name {name}"))
    });
    fails(&missing.collect::<Vec<_>>());
}

#[test]
fn figures_are_those_that_were_measured() {
    let results = fs::read_to_string(root().join("tests/bench/results.md")).unwrap();
    let measured: BTreeSet<&str> = results
        .split(|c: char| !c.is_ascii_digit() && c != '.' && c != ',')
        .map(|word| word.trim_matches(['.', ',']))
        .collect();
    let mut found = Vec::new();
    for page in pages() {
        if !(page.name == "README.md" || page.name.starts_with("docs/")) {
            continue;
        }
        for (line, figure) in page.figures() {
            if !measured.contains(figure.as_str()) {
                found.push(format!(
                    "{}:{line}: {figure} is not in tests/bench/results.md",
                    page.name
                ));
            }
        }
    }
    fails(&found);
}

#[test]
fn the_readme_is_short() {
    let lines = fs::read_to_string(root().join("README.md"))
        .unwrap()
        .lines()
        .count();
    assert!(
        lines <= 100,
        "README.md has {lines} lines; move what is a page of its own to docs/"
    );
}

/// The help texts of all commands, by their names: "" is ferry's own, "sim paper" a subcommand's.
fn help() -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut names = vec![String::new()];
    while let Some(name) = names.pop() {
        let mut args: Vec<&str> = name.split_whitespace().collect();
        args.push("--help");
        let said = run(&args);
        assert_eq!(said.code, Some(0), "{name}: {}", said.stderr);
        let commands = said
            .stdout
            .lines()
            .skip_while(|l| *l != "Commands:")
            .skip(1);
        let indented = commands.take_while(|l| l.starts_with("  "));
        for line in indented.filter(|l| !l.starts_with("   ")) {
            let command = line.split_whitespace().next().unwrap();
            if command != "help" {
                names.push(format!("{name} {command}").trim().to_owned());
            }
        }
        all.insert(name, said.stdout);
    }
    all
}

#[test]
fn the_reference_of_the_command_line_is_what_ferry_says() {
    let mut text = String::from(
        "# Command line\n\n\
         Each command, as `ferry COMMAND --help` prints it. \
         This page is generated: see [CONTRIBUTING](../../CONTRIBUTING.md#documents).\n",
    );
    for (name, said) in help() {
        let lines: Vec<&str> = said.trim_end().lines().map(str::trim_end).collect();
        let title = format!("ferry {name}");
        write!(
            text,
            "\n## {}\n\n```text\n{}\n```\n",
            title.trim(),
            lines.join("\n")
        )
        .unwrap();
    }
    let path = root().join("docs/reference/cli.md");
    if std::env::var_os("FERRY_UPDATE_DOCS").is_some() {
        fs::write(&path, &text).unwrap();
    }
    let here = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        here == text,
        "docs/reference/cli.md is stale: FERRY_UPDATE_DOCS=1 cargo test -p ferry-tests --test docs writes it anew"
    );
}

/// What a line that calls ferry gets wrong: a command or a flag that there is not.
fn wrong(line: &str, help: &BTreeMap<String, String>) -> Option<String> {
    let line = line.split(['|', ';', '&', '>']).next().unwrap();
    let mut words = line.split_whitespace().peekable();
    while words
        .peek()
        .is_some_and(|w| *w == "sudo" || w.contains('='))
    {
        words.next();
    }
    if words.next() != Some("ferry") {
        return None;
    }
    let mut name = String::new();
    while let Some(word) = words.peek() {
        let longer = format!("{name} {word}").trim().to_owned();
        if !help.contains_key(&longer) {
            break;
        }
        name = longer;
        words.next();
    }
    let plain = |c: &str| c.chars().all(|c| c.is_ascii_lowercase() || c == '-');
    if name.is_empty() {
        let next = words.next()?;
        return (plain(next) && !next.starts_with('-')).then(|| format!("no command {next}"));
    }
    let known: BTreeSet<&str> = help[&name]
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '-')
        .filter(|word| word.starts_with("--"))
        .collect();
    let flags = words.filter(|w| w.starts_with("--")).map(|w| {
        w.split(['=', '|', '['])
            .next()
            .unwrap()
            .trim_end_matches([']', ')', ',', '.', '\''])
    });
    let unknown: Vec<&str> = flags.filter(|f| !known.contains(f)).collect();
    (!unknown.is_empty()).then(|| format!("ferry {name} has no {}", unknown.join(", ")))
}

#[test]
fn commands_and_flags_that_are_named_exist() {
    let help = help();
    assert!(wrong("ferry migrate --api s --no-such-flag", &help).is_some());
    assert!(wrong("sudo ferry no-such-command", &help).is_some());
    assert!(wrong("A=1 ferry run --nas mg.S | tee log --all", &help).is_none());
    let mut found = Vec::new();
    for page in pages() {
        if page.name == "docs/reference/cli.md" {
            continue;
        }
        let mut lines = page.inline_code();
        for block in page.blocks.iter().filter(|b| b.info.starts_with("sh")) {
            lines.extend(block.commands().into_iter().map(|line| (block.line, line)));
        }
        for (at, line) in lines {
            if let Some(why) = wrong(&line, &help) {
                found.push(format!("{}:{at}: {why}: {line}", page.name));
            }
            for (flag, folder) in [("--example", "examples"), ("--bench", "benches")] {
                let cargo = line
                    .contains("cargo ")
                    .then(|| line.split_once(flag))
                    .flatten();
                let Some(target) = cargo.and_then(|(_, rest)| rest.split_whitespace().next())
                else {
                    continue;
                };
                let there = ["migration", "vmm", "tests", "lab", "guest-images", "cli"].map(|c| {
                    root()
                        .join(c)
                        .join(folder)
                        .join(format!("{target}.rs"))
                        .exists()
                });
                if !there.contains(&true) {
                    found.push(format!("{}:{at}: no {folder} named {target}", page.name));
                }
            }
        }
    }
    fails(&found);
}

/// A page's commands in a folder of their own. Dropping it ends what still runs.
struct Session {
    folder: tempfile::TempDir,
    /// In place of [`PORTS`].
    ports: Vec<String>,
    terminals: Vec<Child>,
}

impl Session {
    fn new() -> Self {
        // Free now, and known only here.
        let free = PORTS.map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
        let port = |l: &TcpListener| format!(":{}", l.local_addr().unwrap().port());
        Self {
            folder: tempfile::tempdir().unwrap(),
            ports: free.iter().map(port).collect(),
            terminals: Vec::new(),
        }
    }

    fn shell(&self, block: &Block) -> Command {
        // The folder of the very program that is tested comes first.
        let bin = self.folder.path().join(".bin");
        if !bin.exists() {
            fs::create_dir(&bin).unwrap();
            std::os::unix::fs::symlink(ferry(), bin.join("ferry")).unwrap();
        }
        let path = std::env::var("PATH").unwrap_or_default();
        let replace = |text: String, (from, to): (&str, &String)| text.replace(from, to);
        let text = PORTS.into_iter().zip(&self.ports);
        let text = text.fold(block.text.clone(), replace);
        let mut shell = Command::new("bash");
        shell
            .args(["-euo", "pipefail", "-c", &text])
            .current_dir(self.folder.path())
            .env("PATH", format!("{}:{path}", bin.display()))
            .env("XDG_RUNTIME_DIR", self.folder.path())
            // root's names would be those of the host.
            .env("RUNTIME_DIRECTORY", self.folder.path().join("ferry"))
            .stdin(Stdio::null())
            // A group of its own, so that all of it can be ended.
            .process_group(0);
        shell
    }

    fn open(&mut self, block: &Block) {
        let log = fs::File::create(self.folder.path().join(format!(".log{}", block.line))).unwrap();
        let mut shell = self.shell(block);
        shell.stdout(log.try_clone().unwrap()).stderr(log);
        let child = shell.spawn().unwrap();
        let words: Vec<&str> = block.text.split_whitespace().collect();
        let after = |flag| {
            let at = words.iter().position(|w| *w == flag)?;
            words.get(at + 1).copied()
        };
        let guest = match (after("--api"), after("--name")) {
            (Some(api), _) => vec!["--api", api],
            (None, name) => name.into_iter().collect(),
        };
        self.terminals.push(child);
        // It is ready when its VMM answers.
        if !guest.is_empty() {
            let folder = self.folder.path();
            until(&format!("{guest:?} answers"), || {
                let mut status = Command::new(ferry());
                status
                    .arg("status")
                    .args(&guest)
                    .current_dir(folder)
                    .env("RUNTIME_DIRECTORY", folder.join("ferry"));
                status.output().unwrap().status.success()
            });
        }
    }

    fn run(&self, block: &Block) -> Result<(), String> {
        let mut child = self
            .shell(block)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while child.try_wait().unwrap().is_none() {
            if start.elapsed() > TIMEOUT {
                end(&mut child);
                return Err("did not end".into());
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let out = child.wait_with_output().unwrap();
        if out.status.success() {
            return Ok(());
        }
        let text = [out.stdout, out.stderr].concat();
        Err(format!(
            "{}: {}",
            out.status,
            String::from_utf8_lossy(&text)
        ))
    }

    fn logs(&self) -> String {
        let files = fs::read_dir(self.folder.path())
            .unwrap()
            .map(|e| e.unwrap().path());
        let logs = files.filter(|p| p.display().to_string().contains("/.log"));
        logs.map(|p| fs::read_to_string(p).unwrap()).collect()
    }
}

fn end(child: &mut Child) {
    let group = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
    let _ = child.wait();
}

impl Drop for Session {
    fn drop(&mut self) {
        for child in &mut self.terminals {
            end(child);
        }
    }
}

fn run_page(page: &Page, guests: bool) -> Result<usize, String> {
    let mut session = Session::new();
    let mut ran = 0;
    for block in &page.blocks {
        let at = format!("{}:{}", page.name, block.line);
        match block.mark().unwrap() {
            Some(Mark::Run) => session.run(block).map_err(|why| format!("{at}: {why}"))?,
            Some(Mark::Kvm) if guests => session
                .run(block)
                .map_err(|why| format!("{at}: {why}\n{}", session.logs()))?,
            Some(Mark::Terminal) if guests => session.open(block),
            _ => continue,
        }
        ran += 1;
    }
    Ok(ran)
}

#[test]
fn commands_run_as_they_are_written() {
    let guests = guests_run();
    let (mut found, mut ran) = (Vec::new(), 0);
    // FERRY_DOCS_PAGE=docs/start/demo.md runs one page.
    let only = std::env::var("FERRY_DOCS_PAGE").ok();
    for page in pages() {
        if only.as_ref().is_some_and(|only| *only != page.name) {
            continue;
        }
        match run_page(&page, guests) {
            Ok(blocks) => ran += blocks,
            Err(why) => found.push(why),
        }
    }
    eprintln!("{ran} blocks of commands ran");
    fails(&found);
    assert!(ran > 0);
}
