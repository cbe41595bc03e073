//! The results as Markdown, for a page in a repository.

use super::journal::{Host, Run};
use super::spec::Spec;
use super::statistics::groups;
use super::table;
use std::fmt::Write;

/// Text that is no markup within a table.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if "\\`*_{}[]<>#|~".contains(c) {
            safe.push('\\');
        }
        safe.push(if c == '\n' { ' ' } else { c });
    }
    safe
}

/// A row of a table.
fn line(text: &mut String, cells: &[String]) {
    let cells: Vec<String> = cells.iter().map(|cell| escaped(cell)).collect();
    let _ = writeln!(text, "| {} |", cells.join(" | "));
}

/// The whole page: medians, and the largest value of total and gap.
///
/// `verdict` says what the results mean, as text in columns.
pub fn page(host: &Host, spec: &Spec, runs: &[Run], verdict: &str) -> String {
    let mut text = format!(
        "## {}\n\n{}\n",
        escaped(&spec.title),
        escaped(&table::machine(host))
    );
    for rows in groups(&spec.cells, runs) {
        let _ = write!(text, "\n### {}\n\n", escaped(&table::heading(&rows)));
        let columns = table::columns(&rows, true);
        let mut head = vec!["medians (max)".to_owned(), "runs".to_owned()];
        head.extend(columns.iter().map(|metric| metric.head.to_owned()));
        line(&mut text, &head);
        let _ = writeln!(text, "|---|---{}|", "|---:".repeat(columns.len()));
        for row in &rows {
            let mut cells = vec![row.cell.policy.name.clone(), table::health(row)];
            cells.extend(columns.iter().map(|metric| match row.spread(metric) {
                Some(s) if s.max > s.median && matches!(metric.name, "total_ms" | "gap_ms") => {
                    format!(
                        "{} ({})",
                        metric.show(Some(s.median)),
                        metric.show(Some(s.max))
                    )
                }
                found => metric.show(found.map(|s| s.median)),
            }));
            line(&mut text, &cells);
        }
        if let Some(best) = table::best(&rows) {
            let _ = write!(text, "\nBest by medians: {}\n", escaped(&best));
        }
        for remark in table::remarks(&rows) {
            let _ = write!(text, "\n- {}", escaped(&remark));
        }
        text.push('\n');
    }
    if !spec.goals.is_empty() {
        let goals = table::goal_lines(&spec.goals, &spec.cells, runs);
        let _ = write!(text, "\n### Goals, by medians\n\n```\n{goals}```\n");
    }
    if !verdict.is_empty() {
        let _ = write!(
            text,
            "\n### The paper's figures and ours\n\n```\n{}\n```\n",
            verdict.trim()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::measure::Figures;
    use super::super::net::Shaping;
    use super::*;

    #[test]
    fn tables_have_as_many_columns_as_heads() {
        let text = "title='A|B'\n[[guest]]\nname='g'\nwork='idle:fill=none'\nmemory='32M'\n\
                    [[policy]]\nname='a'\nferry={}\n[[policy]]\nname='b'\nqemu={mode='precopy'}\n";
        let spec = Spec::parse("x", text).unwrap();
        let runs: Vec<Run> = spec
            .cells
            .iter()
            .zip([(500.0, true), (700.0, false)])
            .map(|(cell, (total_ms, warm))| {
                let mut figures = Figures {
                    warm,
                    ..Figures::default()
                };
                figures.told.total_ms = total_ms;
                figures.told.downtime_ms = Some(0.0);
                Run {
                    cell: cell.clone(),
                    number: 1,
                    shaping: Shaping::Loopback,
                    load: String::new(),
                    took_s: 0.0,
                    figures: Some(figures),
                    error: None,
                }
            })
            .collect();
        let page = page(&Host::default(), &spec, &runs, "claim  ours");
        assert!(page.starts_with("## A\\|B\n"), "{page}");
        assert!(page.contains("shortest total, ms: a (500)"), "{page}");
        assert!(page.contains("Warm in 1 of 2 runs"), "{page}");
        let pipes: Vec<usize> = page
            .lines()
            .filter(|line| line.starts_with('|'))
            .map(|line| line.matches('|').count())
            .collect();
        assert_eq!(pipes.len(), 4);
        assert!(pipes.iter().all(|count| *count == pipes[0]), "{page}");
    }
}
