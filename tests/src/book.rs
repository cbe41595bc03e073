//! The documents as data: README.md, the other pages of the root, and `docs/**/*.md`, for
//! `tests/docs.rs` to check.
//!
//! A fenced `sh` block says in its info string what a test does with it: see [`Mark`].

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What a test does with a block of commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Runs it to its end, on any machine.
    Run,
    /// Runs it to its end where guests run.
    Kvm,
    /// Starts it where guests run, as in a terminal of its own, and ends it with its page.
    Terminal,
    /// Only looks whether its commands exist: the word says what running it takes.
    NotRun(&'static str),
}

/// The words of [`Mark::NotRun`].
const NOT_RUN: [&str; 5] = ["two-hosts", "root", "linux", "long", "checkout"];

/// A fenced block.
#[derive(Clone, Debug)]
pub struct Block {
    /// Line of its opening fence, from 1.
    pub line: usize,
    /// The words behind the fence, `sh kvm terminal` for example.
    pub info: String,
    /// What is in it.
    pub text: String,
}

impl Block {
    /// The mark of a block of commands; `None` where it is not one.
    ///
    /// # Errors
    /// What is wrong with its info string.
    pub fn mark(&self) -> Result<Option<Mark>, String> {
        let mut words = self.info.split_whitespace();
        match words.next() {
            Some("sh") => {}
            Some("bash" | "shell" | "console") => return Err("write `sh` and a mark".into()),
            None => {
                return Err("a fence without a language; write `sh` and a mark, or `text`".into());
            }
            Some(_) => return Ok(None),
        }
        let words: Vec<&str> = words.collect();
        let mark = match words.as_slice() {
            ["run"] => Mark::Run,
            ["kvm"] => Mark::Kvm,
            ["kvm", "terminal"] => Mark::Terminal,
            [word] => match NOT_RUN.iter().find(|known| *known == word) {
                Some(known) => Mark::NotRun(known),
                None => return Err(format!("no such mark as {word:?}")),
            },
            _ => return Err(format!("{:?} is no mark", self.info)),
        };
        Ok(Some(mark))
    }

    /// Its commands, one each, without comments, continued lines joined.
    #[must_use]
    pub fn commands(&self) -> Vec<String> {
        let joined = self.text.replace("\\\n", " ");
        let lines = joined.lines().map(|line| match line.find(" #") {
            Some(at) => &line[..at],
            None => line,
        });
        lines
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(str::to_owned)
            .collect()
    }
}

/// A page.
#[derive(Clone, Debug)]
pub struct Page {
    /// Its file.
    pub path: PathBuf,
    /// Its path from the root of the repository.
    pub name: String,
    /// The fenced blocks.
    pub blocks: Vec<Block>,
    /// Everything else, line by line, with `None` where a block is.
    pub lines: Vec<Option<String>>,
}

impl Page {
    fn parse(root: &Path, path: PathBuf) -> Self {
        let text = fs::read_to_string(&path).unwrap();
        let name = path.strip_prefix(root).unwrap().display().to_string();
        let (mut blocks, mut lines) = (Vec::<Block>::new(), Vec::new());
        let mut open = false;
        for (at, line) in text.lines().enumerate() {
            if let Some(info) = line.trim_start().strip_prefix("```") {
                lines.push(None);
                if !open {
                    blocks.push(Block {
                        line: at + 1,
                        info: info.trim().to_owned(),
                        text: String::new(),
                    });
                }
                open = !open;
            } else if open {
                lines.push(None);
                let block = blocks.last_mut().unwrap();
                block.text.push_str(line);
                block.text.push('\n');
            } else {
                lines.push(Some(line.to_owned()));
            }
        }
        assert!(!open, "{name}: a fence is not closed");
        Self {
            path,
            name,
            blocks,
            lines,
        }
    }

    /// The lines that are not in a block, with their numbers from 1.
    pub fn prose(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.lines.iter().enumerate();
        lines.filter_map(|(at, line)| Some((at + 1, line.as_deref()?)))
    }

    /// What stands between single backticks in the prose, with the line.
    pub fn inline_code(&self) -> Vec<(usize, String)> {
        let spans = |(at, line): (usize, &str)| {
            let odd = line.split('`').enumerate().filter(|(i, _)| i % 2 == 1);
            odd.map(|(_, code)| (at, code.to_owned()))
                .collect::<Vec<_>>()
        };
        self.prose().flat_map(spans).collect()
    }

    /// The anchors that its headings make.
    #[must_use]
    pub fn anchors(&self) -> BTreeSet<String> {
        let headings = self.prose().filter(|(_, line)| line.starts_with('#'));
        headings
            .map(|(_, line)| slug(line.trim_start_matches('#')))
            .collect()
    }

    /// Where its links lead, with the line.
    pub fn links(&self) -> Vec<(usize, String)> {
        let mut links = Vec::new();
        for (at, line) in self.prose() {
            let mut rest = line;
            while let Some(start) = rest.find("](") {
                rest = &rest[start + 2..];
                let end = rest.find(')').unwrap_or(rest.len());
                links.push((at, rest[..end].to_owned()));
            }
        }
        links
    }

    /// Every number with a unit of time, of rate or of ratio in the prose, code aside: what a
    /// reader takes for a measurement.
    pub fn figures(&self) -> Vec<(usize, String)> {
        let mut found = Vec::new();
        for (at, line) in self.prose() {
            let code_aside: String = line.split('`').step_by(2).collect::<Vec<_>>().join(" … ");
            let words: Vec<&str> = code_aside
                .split_whitespace()
                .map(|w| {
                    w.trim_matches(|c: char| "()[],;:|*".contains(c))
                        .trim_end_matches('.')
                })
                .collect();
            for (i, word) in words.iter().enumerate() {
                let digits = word.trim_end_matches(|c: char| !c.is_ascii_digit());
                if digits.is_empty()
                    || !digits
                        .chars()
                        .all(|c| c.is_ascii_digit() || ".,".contains(c))
                {
                    continue;
                }
                let unit = match &word[digits.len()..] {
                    "" => words.get(i + 1).copied().unwrap_or_default(),
                    unit => unit,
                };
                if ["ms", "µs", "s", "MB/s", "GB/s", "GiB/s", "Mop/s", "%", "×"].contains(&unit) {
                    found.push((at, digits.to_owned()));
                }
            }
        }
        found
    }
}

/// The anchor that a heading gets, on forges and in mdBook alike.
fn slug(heading: &str) -> String {
    let kept = heading.trim().chars().filter_map(|c| match c {
        ' ' => Some('-'),
        c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c.to_ascii_lowercase()),
        _ => None,
    });
    kept.collect()
}

/// The root of the repository.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()
        .unwrap()
}

/// All pages: those in the root, the guests', the benchmarks', and the book.
///
/// # Panics
/// When one cannot be read, or a fence in it is left open.
#[must_use]
pub fn pages() -> Vec<Page> {
    let root = root();
    let mut files = vec![
        root.join("guest-images/README.md"),
        root.join("tests/bench/README.md"),
    ];
    let here = fs::read_dir(&root)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    files.extend(here.filter(|path| path.extension().is_some_and(|e| e == "md")));
    let mut folders = vec![root.join("docs")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "md") {
                files.push(path);
            }
        }
    }
    files.sort();
    files
        .into_iter()
        .map(|path| Page::parse(&root, path))
        .collect()
}
