//! What is to be measured, as a TOML file says it.
//!
//! ```toml
//! runs = 5
//!
//! [[guest]]
//! name = "writer"
//! work = "dirty:wss=16M,rate=5000,pattern=sequential,fill=random"
//! memory = "1G"
//!
//! [[link]]
//! name = "loopback"
//!
//! [[link]]
//! name = "1 Gbit/s"
//! rate = "1Gbit"
//!
//! [[policy]]
//! name = "ferry precopy"
//! ferry = { policy = "precopy", downtime_ms = 20 }
//!
//! [[policy]]
//! name = "qemu multifd×4"
//! qemu = { mode = "multifd", channels = 4, downtime_ms = 20 }
//!
//! [[policy]]
//! name = "cloud-hypervisor ×4"
//! cloud-hypervisor = { mode = "precopy", connections = 4, downtime_ms = 20 }
//!
//! # Without a matrix, every guest meets every policy on every link.
//! [[matrix]]
//! guests = ["writer"]
//! links = ["loopback"]
//! policies = ["ferry precopy", "qemu multifd×4"]
//!
//! [[goal]]
//! metric = "total_ms"
//! guest = "writer"
//! link = "loopback"
//! policy = "ferry precopy"
//! at_most = 1200.0
//! ```

use super::cell::{Cell, Guest, Link, Policy};
use super::goals::Goal;
use super::journal::Run;
use ferry_terminal::output::Failure;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::Path;
use toml::Spanned;

/// The most runs of a cell, and the most cells: more is a slip of the pen.
const MAX_RUNS: u32 = 1000;
const MAX_CELLS: usize = 10_000;

/// A bench file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    title: Option<String>,
    #[serde(default)]
    runs: Option<Spanned<u32>>,
    guest: Vec<Spanned<Guest>>,
    #[serde(default)]
    link: Vec<Spanned<Link>>,
    policy: Vec<Spanned<Policy>>,
    #[serde(default)]
    matrix: Vec<Matrix>,
    #[serde(default)]
    goal: Vec<Spanned<Goal>>,
}

/// Which of them meet; all, where nothing is said.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Matrix {
    guests: Option<Vec<Spanned<String>>>,
    links: Option<Vec<Spanned<String>>>,
    policies: Option<Vec<Spanned<String>>>,
}

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct Spec {
    /// For people.
    pub title: String,
    /// How often each cell.
    pub runs: u32,
    /// The cells, each once.
    pub cells: Vec<Cell>,
    /// What is to be reached.
    pub goals: Vec<Goal>,
}

/// A place in a text, as people count.
fn place(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at.min(text.len())).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before
        .rsplit('\n')
        .next()
        .map_or(0, |rest| rest.chars().count())
        + 1;
    (line, column)
}

struct Reader<'a> {
    name: &'a str,
    text: &'a str,
}

impl Reader<'_> {
    fn at(&self, at: usize, sentence: &str) -> Failure {
        let (line, column) = place(self.text, at);
        // toml's messages may have several lines, and hints.
        let sentence = sentence.split_whitespace().collect::<Vec<_>>().join(" ");
        Failure(format!(
            "{}, line {line}, column {column}: {sentence}",
            self.name
        ))
    }

    /// Those of a list that were named; all of them where no names were given.
    fn named<'t, T>(
        &self,
        what: &str,
        all: &'t [T],
        name: impl Fn(&T) -> &str,
        wanted: Option<&[Spanned<String>]>,
    ) -> Result<Vec<&'t T>, Failure> {
        let Some(wanted) = wanted else {
            return Ok(all.iter().collect());
        };
        let find = |wish: &Spanned<String>| {
            all.iter()
                .find(|item| name(item) == wish.get_ref())
                .ok_or_else(|| {
                    let known: Vec<String> = all.iter().map(|i| format!("`{}`", name(i))).collect();
                    self.at(
                        wish.span().start,
                        &format!(
                            "there is no {what} `{}`; this file has {}",
                            wish.get_ref(),
                            known.join(", ")
                        ),
                    )
                })
        };
        wanted.iter().map(find).collect()
    }

    /// Checks each and its name, which must be its own.
    fn checked<T>(
        &self,
        what: &str,
        list: Vec<Spanned<T>>,
        name: impl Fn(&T) -> &str,
        check: impl Fn(&T) -> Result<(), String>,
    ) -> Result<Vec<T>, Failure> {
        let mut names = BTreeSet::new();
        let mut good = Vec::with_capacity(list.len());
        for item in list {
            let at = item.span().start;
            let item = item.into_inner();
            check(&item).map_err(|sentence| self.at(at, &sentence))?;
            if !names.insert(name(&item).to_owned()) {
                let sentence = format!("there are two {what} `{}`; rename one", name(&item));
                return Err(self.at(at, &sentence));
            }
            good.push(item);
        }
        Ok(good)
    }
}

impl Spec {
    /// The cells of runs that were made, when nothing else is known of them.
    pub fn of(runs: &[Run]) -> Self {
        let mut cells: Vec<Cell> = Vec::new();
        for run in runs {
            if !cells.contains(&run.cell) {
                cells.push(run.cell.clone());
            }
        }
        Self {
            title: "Migrations side by side".into(),
            runs: 1,
            cells,
            goals: Vec::new(),
        }
    }

    /// Keeps the cells in whose name all of the words are, and the goals about them.
    pub fn keep(&mut self, words: &[String]) -> Result<(), Failure> {
        let named = |cell: &Cell| {
            let name = cell.to_string();
            words.iter().all(|word| name.contains(word.as_str()))
        };
        self.cells.retain(named);
        if self.cells.is_empty() {
            return Err(Failure(format!(
                "no cell has {} in its name; give words of a guest, a link or a policy",
                words.join(" and ")
            )));
        }
        self.goals.retain(|goal| goal.check(&self.cells).is_ok());
        Ok(())
    }

    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path)
            .map_err(|e| Failure(format!("{name} cannot be read ({e}); give a bench file")))?;
        Self::parse(&name, &text)
    }

    /// Reads a file's text; `name` is for messages.
    pub fn parse(name: &str, text: &str) -> Result<Self, Failure> {
        let reader = Reader { name, text };
        let file: File = toml::from_str(text)
            .map_err(|e| reader.at(e.span().map_or(0, |span| span.start), e.message()))?;
        let runs = match file.runs {
            None => 5,
            Some(runs) if (1..=MAX_RUNS).contains(runs.get_ref()) => runs.into_inner(),
            Some(runs) => {
                let sentence = format!(
                    "{} runs are not meant; give 1 to {MAX_RUNS}",
                    runs.get_ref()
                );
                return Err(reader.at(runs.span().start, &sentence));
            }
        };
        let guests = reader.checked("guests", file.guest, |g| &g.name, Guest::check)?;
        let mut links = reader.checked("links", file.link, |l| &l.name, |_| Ok(()))?;
        if links.is_empty() {
            links.push(Link {
                name: "loopback".into(),
                rate: None,
            });
        }
        let policies = reader.checked("policies", file.policy, |p| &p.name, Policy::check)?;
        let mut matrices = file.matrix;
        if matrices.is_empty() {
            matrices.push(Matrix::default());
        }
        let mut cells: Vec<Cell> = Vec::new();
        for matrix in &matrices {
            let some_guests =
                reader.named("guest", &guests, |g| &g.name, matrix.guests.as_deref())?;
            let some_links = reader.named("link", &links, |l| &l.name, matrix.links.as_deref())?;
            let some_policies =
                reader.named("policy", &policies, |p| &p.name, matrix.policies.as_deref())?;
            if some_guests.len() * some_links.len() * some_policies.len() > MAX_CELLS {
                return Err(Failure(format!(
                    "{name} has more than {MAX_CELLS} cells; measure less at once"
                )));
            }
            for cell in product(&some_guests, &some_links, &some_policies) {
                if !cells.contains(&cell) {
                    cells.push(cell);
                }
            }
        }
        if cells.is_empty() {
            return Err(Failure(format!(
                "{name} has nothing to measure; give at least one [[guest]] and one [[policy]]"
            )));
        }
        let mut goals = Vec::with_capacity(file.goal.len());
        for goal in file.goal {
            goal.get_ref()
                .check(&cells)
                .map_err(|sentence| reader.at(goal.span().start, &sentence))?;
            goals.push(goal.into_inner());
        }
        Ok(Self {
            title: file.title.unwrap_or_else(|| name.to_owned()),
            runs,
            cells,
            goals,
        })
    }
}

/// Every guest on every link by every policy, the policies side by side.
pub fn product(guests: &[&Guest], links: &[&Link], policies: &[&Policy]) -> Vec<Cell> {
    let mut cells = Vec::new();
    for guest in guests {
        for link in links {
            for policy in policies {
                cells.push(Cell {
                    guest: (*guest).clone(),
                    link: (*link).clone(),
                    policy: (*policy).clone(),
                });
            }
        }
    }
    cells
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
runs = 2

[[guest]]
name = "writer"
work = "dirty:wss=16M,rate=5000"
memory = "64M"

[[guest]]
name = "idle"
work = "idle:fill=none"
memory = "32M"
cpus = 2

[[link]]
name = "loopback"

[[link]]
name = "slow"
rate = "1Gbit"

[[policy]]
name = "ours"
ferry = { policy = "postcopy", order = "bubble" }

[[policy]]
name = "theirs"
qemu = { mode = "auto-converge", downtime_ms = 20 }
"#;

    fn error(text: &str) -> String {
        Spec::parse("x.toml", text).unwrap_err().0
    }

    #[test]
    fn without_a_matrix_everything_meets() {
        let spec = Spec::parse("x", FILE).unwrap();
        assert_eq!((spec.runs, spec.cells.len()), (2, 8));
        assert_eq!(spec.cells[0].to_string(), "writer / loopback / ours");
        assert_eq!(spec.cells[7].to_string(), "idle / slow / theirs");
        assert_eq!(spec.cells[2].link.rate, Some(125_000_000));
        let keys: BTreeSet<String> = spec.cells.iter().map(Cell::key).collect();
        assert_eq!(keys.len(), 8);
    }

    #[test]
    fn a_cell_survives_the_journal() {
        for cell in Spec::parse("x", FILE).unwrap().cells {
            let back: Cell = serde_json::from_str(&cell.key()).unwrap();
            assert_eq!(back, cell);
        }
    }

    #[test]
    fn a_matrix_names_what_meets_and_nothing_meets_twice() {
        let text = format!(
            "{FILE}\n[[matrix]]\nguests = [\"idle\"]\npolicies = [\"theirs\"]\n[[matrix]]\nguests = [\"idle\"]\nlinks = [\"slow\"]\n"
        );
        let cells = Spec::parse("x", &text).unwrap().cells;
        let names: Vec<String> = cells.iter().map(ToString::to_string).collect();
        assert_eq!(
            names,
            [
                "idle / loopback / theirs",
                "idle / slow / theirs",
                "idle / slow / ours"
            ]
        );
    }

    #[test]
    fn errors_have_line_and_column() {
        let bad = |from: &str, to: &str| error(&FILE.replacen(from, to, 1));
        let typo = bad("memory = \"64M\"", "memroy = \"64M\"");
        assert!(
            typo.starts_with("x.toml, line 7, column 1: unknown field `memroy`"),
            "{typo}"
        );
        let kernel = bad("dirty:wss=16M,rate=5000", "lu.A");
        assert!(
            kernel.starts_with("x.toml, line 6, column 8: `lu` is no known kernel"),
            "{kernel}"
        );
        let class = bad("dirty:wss=16M,rate=5000", "mg.Q");
        assert!(class.contains("line 6") && class.contains("`Q`"), "{class}");
        let large = bad("dirty:wss=16M,rate=5000", "mg.A");
        assert!(
            large.contains("line 4") && large.contains("64 MiB"),
            "{large}"
        );
        let rate = bad("1Gbit", "1Gb");
        assert!(
            rate.contains("line 20, column 8") && rate.contains("2.5Gbit"),
            "{rate}"
        );
        let policy = bad("\"postcopy\"", "\"magic\"");
        assert!(
            policy.contains("line 24") && policy.contains("magic"),
            "{policy}"
        );
        let mode = bad("auto-converge", "teleport");
        assert!(
            mode.contains("line 28") && mode.contains("teleport"),
            "{mode}"
        );
        let runs = bad("runs = 2", "runs = 0");
        assert!(
            runs.starts_with("x.toml, line 2, column 8: 0 runs"),
            "{runs}"
        );
        let twice = bad("name = \"idle\"", "name = \"writer\"");
        assert!(twice.contains("two guests `writer`"), "{twice}");
        let unclosed = bad("name = \"slow\"", "name = \"slow");
        assert!(unclosed.starts_with("x.toml, line 19, "), "{unclosed}");
        let neither = bad("ferry = { policy = \"postcopy\", order = \"bubble\" }", "");
        assert!(neither.contains("either `ferry"), "{neither}");
    }

    #[test]
    fn a_matrix_of_unknown_names_is_refused() {
        let text = format!("{FILE}\n[[matrix]]\nguests = [\"idle\", \"wirter\"]\n");
        let sentence = error(&text);
        assert!(
            sentence.contains("line 31, column 19")
                && sentence.contains("no guest `wirter`")
                && sentence.contains("`writer`, `idle`"),
            "{sentence}"
        );
    }

    #[test]
    fn places_are_counted_as_people_do() {
        assert_eq!(place("", 0), (1, 1));
        assert_eq!(place("a\nbc", 3), (2, 2));
        assert_eq!(place("ä\nb", 99), (2, 2));
        assert_eq!(place("é=1", 2), (1, 2));
    }
}
