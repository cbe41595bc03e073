//! `ferry sim`: policies on a simulated or recorded guest, and the papers.

mod guest;
mod mplm;
mod postcopy;
mod regret;
mod single;
mod stord;

use super::findings;
use super::plot;
use ferry_terminal::output::{Failure, put, put_json};
use findings::{Finding, table};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;

/// Model a migration without a guest: any policy over a synthetic writer or a recorded trace, or a
/// paper's figures.
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  ferry sim --writer uniform --wss 256M --rate 20000 --memory 1G --policy stord
  ferry sim --trace guest.trace --policy mplm --bandwidth 1Gbit
  ferry sim regret --offsets 1
  ferry sim paper stord"
)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    single: single::Args,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Reproduce the figures of a paper, as a table and plots.
    #[command(subcommand, after_help = "Example:\n  ferry sim paper stord")]
    Paper(PaperName),
    Regret(regret::Args),
}

#[derive(Debug, clap::Subcommand)]
enum PaperName {
    Stord(stord::Args),
    Mplm(mplm::Args),
    Postcopy(postcopy::Args),
}

/// Where a reproduction's plots go, and in what form its table.
#[derive(Debug, clap::Args)]
struct Output {
    /// Directory for the plots; it is made.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print one JSON object instead.
    #[arg(long)]
    json: bool,
}

impl Output {
    fn directory(&self, paper: &str) -> Result<Directory, Failure> {
        let path = self
            .out
            .clone()
            .unwrap_or_else(|| PathBuf::from(format!("ferry-paper-{paper}")));
        std::fs::create_dir_all(&path).map_err(|e| {
            Failure(format!(
                "cannot make the directory {} for the plots ({e}); give another with --out",
                path.display()
            ))
        })?;
        Ok(Directory(path))
    }
}

/// A directory that exists.
struct Directory(PathBuf);

impl Directory {
    /// Has a file drawn in it.
    fn file(
        &self,
        name: &str,
        draw: impl FnOnce(&Path) -> Result<(), Failure>,
    ) -> Result<PathBuf, Failure> {
        let path = self.0.join(name);
        draw(&path)?;
        Ok(path)
    }
}

/// A reproduced paper.
struct Paper {
    name: &'static str,
    /// What was modelled, in a sentence or two.
    setup: String,
    findings: Vec<Finding>,
    /// Further tables, as text.
    tables: Vec<String>,
    data: serde_json::Value,
    plots: Vec<PathBuf>,
}

/// Simulates a migration, or reproduces a paper.
///
/// # Errors
/// The guest cannot be simulated, or plots cannot be written.
pub fn run(args: &Args) -> Result<ExitCode, Failure> {
    match &args.what {
        None => single::run(&args.single),
        Some(What::Regret(args)) => regret::run(args),
        Some(What::Paper(PaperName::Stord(args))) => show(stord::run(args)?, args.json()),
        Some(What::Paper(PaperName::Mplm(args))) => show(mplm::run(args)?, args.json()),
        Some(What::Paper(PaperName::Postcopy(args))) => show(postcopy::run(args)?, args.json()),
    }
}

fn show(paper: Paper, as_json: bool) -> Result<ExitCode, Failure> {
    if as_json {
        put_json(&json!({
            "schema": 1,
            "paper": paper.name,
            "setup": paper.setup,
            "findings": paper.findings,
            "data": paper.data,
            "plots": paper.plots,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = format!("{}\n\n{}", paper.setup, table(&paper.findings));
    for table in &paper.tables {
        text += &format!("\n{table}");
    }
    text.push('\n');
    for plot in &paper.plots {
        text += &format!("plot: {}\n", plot.display());
    }
    put(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// A share in per cent.
fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// Applies `f` to all items, on all processors; the results in the items' order.
fn each<T: Send, R: Send>(items: Vec<T>, f: impl Fn(T) -> R + Sync) -> Vec<R> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let work = Mutex::new(items.into_iter().enumerate());
    let next = || work.lock().map_or(None, |mut work| work.next());
    let mut results: Vec<(usize, R)> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..workers)
            .map(|_| {
                scope.spawn(|| {
                    let mut done = Vec::new();
                    while let Some((at, item)) = next() {
                        done.push((at, f(item)));
                    }
                    done
                })
            })
            .collect();
        handles
            .into_iter()
            .flat_map(|handle| {
                handle
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    });
    results.sort_by_key(|(at, _)| *at);
    results.into_iter().map(|(_, result)| result).collect()
}
