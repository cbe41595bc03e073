//! The results, run by run: a file of JSON lines that survives whatever ends the benchmark.
//!
//! The first line describes the machine; every other is a run. A benchmark that finds its file goes
//! on where it ended: runs that succeeded are not repeated, those that failed are.

use super::cell::Cell;
use super::measure::Figures;
use super::net::Shaping;
use ferry_terminal::output::Failure;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The version of the lines.
const SCHEMA: u32 = 1;

/// The machine that was measured on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Host {
    /// Seconds since 1970.
    pub time: u64,
    /// The processor's name.
    pub processor: String,
    /// How many of them.
    pub cpus: usize,
    /// Its memory in MiB.
    pub memory_mib: u64,
    /// The kernel's release.
    pub kernel: String,
    /// Which kind of KVM it has.
    pub kvm: String,
    /// The rate of the time-stamp counter.
    pub tsc_khz: u64,
    /// This program.
    pub ferry: String,
    /// QEMU, if it is there.
    pub qemu: Option<String>,
    /// Cloud Hypervisor, if it is there.
    pub cloud: Option<String>,
}

/// A run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Which cell.
    pub cell: Cell,
    /// Which run of it, from 1.
    pub number: u32,
    /// How the link was shaped.
    pub shaping: Shaping,
    /// The machine's load before it.
    pub load: String,
    /// How long all of it took, in seconds: booting, moving and verifying the guest.
    #[serde(default)]
    pub took_s: f64,
    /// What it came to; nothing if it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub figures: Option<Figures>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A line of the file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "kebab-case")]
enum Line {
    Host {
        schema: u32,
        #[serde(flatten)]
        host: Box<Host>,
    },
    Run(Box<Run>),
}

/// The file.
pub struct Journal {
    path: PathBuf,
    file: File,
    /// The machine of the last part of it.
    pub host: Host,
    /// The runs so far; of those that were repeated the last.
    pub runs: Vec<Run>,
}

/// Reads a file without the part of a last line that a crash left. Returns how many bytes are whole
/// lines.
fn read(path: &Path) -> Result<(Option<Host>, Vec<Run>, usize), Failure> {
    let text = match fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => {
            let path = path.display();
            return Err(Failure(format!("{path} cannot be read ({e})")));
        }
    };
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    let (mut host, mut runs) = (None, Vec::new());
    for (number, line) in text[..whole].lines().enumerate() {
        match serde_json::from_str(line) {
            Ok(Line::Host {
                schema: SCHEMA,
                host: found,
            }) => host = Some(*found),
            Ok(Line::Host { schema, .. }) => {
                return Err(Failure(format!(
                    "{}, line {}: the results are of version {schema} and this ferry writes version {SCHEMA}; \
                     write into another directory",
                    path.display(),
                    number + 1
                )));
            }
            Ok(Line::Run(run)) => keep(&mut runs, *run),
            Err(e) => {
                return Err(Failure(format!(
                    "{}, line {} is no result of a benchmark ({e}); mend or remove it, or write into another directory",
                    path.display(),
                    number + 1
                )));
            }
        }
    }
    Ok((host, runs, whole))
}

/// Adds a run, or puts it in the place of one that it repeats.
fn keep(runs: &mut Vec<Run>, run: Run) {
    let same =
        |r: &&mut Run| r.number == run.number && r.shaping == run.shaping && r.cell == run.cell;
    match runs.iter_mut().find(same) {
        Some(old) => *old = run,
        None => runs.push(run),
    }
}

impl Journal {
    /// Opens a file, or begins it.
    pub fn open(path: &Path, host: Host) -> Result<Self, Failure> {
        let (_, runs, whole) = read(path)?;
        let opened = || -> std::io::Result<File> {
            let file = OpenOptions::new().create(true).append(true).open(path)?;
            file.set_len(whole as u64)?;
            Ok(file)
        };
        let file =
            opened().map_err(|e| Failure(format!("{} cannot be written ({e})", path.display())))?;
        let mut journal = Self {
            path: path.to_owned(),
            file,
            host: host.clone(),
            runs,
        };
        journal.write(&Line::Host {
            schema: SCHEMA,
            host: Box::new(host),
        })?;
        Ok(journal)
    }

    /// Reads a file to show it.
    pub fn show(path: &Path) -> Result<(Host, Vec<Run>), Failure> {
        let (host, runs, _) = read(path)?;
        let host = host.ok_or_else(|| {
            let path = path.display();
            Failure(format!("{path} has no results; `ferry bench` writes them"))
        })?;
        Ok((host, runs))
    }

    fn write(&mut self, line: &Line) -> Result<(), Failure> {
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        self.file
            .write_all(text.as_bytes())
            .and_then(|()| self.file.sync_data())
            .map_err(|e| Failure(format!("{} cannot be written ({e})", self.path.display())))
    }

    /// Adds a run.
    pub fn add(&mut self, run: Run) -> Result<(), Failure> {
        self.write(&Line::Run(Box::new(run.clone())))?;
        keep(&mut self.runs, run);
        Ok(())
    }

    /// The runs that are still to be made: [`missing`].
    pub fn missing(&self, cells: &[Cell], runs: u32) -> Vec<(Cell, u32)> {
        missing(&self.runs, cells, runs)
    }

    /// The runs of a file that another time is to be added to; none if there is no file yet.
    pub fn look(path: &Path) -> Result<Vec<Run>, Failure> {
        read(path).map(|(_, runs, _)| runs)
    }
}

/// The runs still to be made, in rounds: the first run of every cell, then the second. A benchmark
/// that ends early has then as many runs of one cell as of another. In a round the cells of a group
/// take turns in a rotating order, so that other load on the machine hits all alike.
pub fn missing(made: &[Run], cells: &[Cell], runs: u32) -> Vec<(Cell, u32)> {
    let done: BTreeSet<(String, u32)> = made
        .iter()
        .filter(|run| run.figures.is_some() && run.shaping == Shaping::of(&run.cell.link))
        .map(|run| (run.cell.key(), run.number))
        .collect();
    let mut list = Vec::new();
    for number in 1..=runs {
        for group in cells.chunk_by(|a, b| a.group() == b.group()) {
            let shift = usize::try_from(number - 1).unwrap_or(0) % group.len();
            for cell in group[shift..].iter().chain(&group[..shift]) {
                if !done.contains(&(cell.key(), number)) {
                    list.push((cell.clone(), number));
                }
            }
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::super::spec::Spec;
    use super::*;

    fn cells() -> Vec<Cell> {
        let text = "[[guest]]\nname='g'\nwork='idle:fill=none'\nmemory='32M'\n[[policy]]\nname='a'\nferry={}\n\
                    [[policy]]\nname='b'\nqemu={mode='precopy'}\n";
        Spec::parse("x", text).unwrap().cells
    }

    fn run(cell: &Cell, number: u32, good: bool) -> Run {
        Run {
            cell: cell.clone(),
            number,
            shaping: Shaping::Loopback,
            load: String::new(),
            took_s: 0.0,
            figures: good.then(Figures::default),
            error: (!good).then(|| "killed".to_owned()),
        }
    }

    #[test]
    fn it_goes_on_where_it_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.jsonl");
        let cells = cells();
        let mut journal = Journal::open(&path, Host::default()).unwrap();
        let names = |list: Vec<(Cell, u32)>| -> Vec<String> {
            list.iter()
                .map(|(c, n)| format!("{}{n}", c.policy.name))
                .collect()
        };
        assert_eq!(names(journal.missing(&cells, 2)), ["a1", "b1", "b2", "a2"]);
        journal.add(run(&cells[0], 1, true)).unwrap();
        journal.add(run(&cells[1], 1, false)).unwrap();
        drop(journal);
        // A crash in the middle of a line.
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"line\":\"run\",\"cell\":{\"gue")
            .unwrap();
        let mut journal = Journal::open(&path, Host::default()).unwrap();
        assert_eq!(journal.runs.len(), 2);
        assert_eq!(names(journal.missing(&cells, 2)), ["b1", "b2", "a2"]);
        journal.add(run(&cells[1], 1, true)).unwrap();
        drop(journal);
        let (_, runs) = Journal::show(&path).unwrap();
        assert_eq!(runs.len(), 2);
        assert!(runs.iter().all(|run| run.figures.is_some()));
    }

    #[test]
    fn every_cell_has_its_first_run_before_any_has_its_second() {
        let dir = tempfile::tempdir().unwrap();
        let mut cells = cells();
        let mut other = cells.clone();
        other
            .iter_mut()
            .for_each(|cell| cell.guest.name = "h".to_owned());
        cells.extend(other);
        let journal = Journal::open(&dir.path().join("r"), Host::default()).unwrap();
        let list = journal.missing(&cells, 2);
        let numbers: Vec<u32> = list.iter().map(|(_, number)| *number).collect();
        assert_eq!(numbers, [1, 1, 1, 1, 2, 2, 2, 2]);
    }

    #[test]
    fn a_cell_that_was_changed_is_measured_anew() {
        let dir = tempfile::tempdir().unwrap();
        let cells = cells();
        let mut journal = Journal::open(&dir.path().join("r"), Host::default()).unwrap();
        journal.add(run(&cells[0], 1, true)).unwrap();
        let mut other = cells.clone();
        other[0].guest.memory <<= 1;
        assert_eq!(journal.missing(&other[..1], 1).len(), 1);
        assert_eq!(journal.missing(&cells[..1], 1).len(), 0);
    }

    #[test]
    fn what_is_no_result_is_refused_with_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r");
        fs::write(&path, "{\"line\":\"host\",\"schema\":9}\n").unwrap();
        let error = Journal::show(&path).unwrap_err().0;
        assert!(error.contains("version 9"), "{error}");
        fs::write(&path, "\nhello\n").unwrap();
        let error = Journal::show(&path).unwrap_err().0;
        assert!(error.contains("line 1 is no result"), "{error}");
        fs::write(&path, "").unwrap();
        assert!(Journal::show(&path).unwrap_err().0.contains("no results"));
    }
}
