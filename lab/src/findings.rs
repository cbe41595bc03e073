//! A reproduction's result: for each claim of a paper its number, ours, and why they differ.

use serde::Serialize;
use std::fmt::Write;

/// One claim.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What is compared.
    pub what: String,
    /// The paper's number.
    pub paper: String,
    /// Ours.
    pub ours: String,
    /// The difference and its reason.
    pub why: String,
}

impl Finding {
    /// A claim.
    pub fn new(
        what: impl Into<String>,
        paper: impl Into<String>,
        ours: impl Into<String>,
        why: impl Into<String>,
    ) -> Self {
        Self {
            what: what.into(),
            paper: paper.into(),
            ours: ours.into(),
            why: why.into(),
        }
    }
}

/// Columns of text: each cell is wrapped into its column's width.
pub fn columns(head: &[&str], widths: &[usize], rows: &[Vec<String>]) -> String {
    let mut text = String::new();
    let first = head.iter().map(|cell| (*cell).to_owned()).collect();
    let line = widths.iter().map(|width| "─".repeat(*width)).collect();
    for row in [first, line].iter().chain(rows) {
        let cells: Vec<Vec<String>> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| wrap(cell, *width))
            .collect();
        let height = cells.iter().map(Vec::len).max().unwrap_or(0);
        for at in 0..height {
            let mut line = String::new();
            for (cell, width) in cells.iter().zip(widths) {
                let part = cell.get(at).map_or("", String::as_str);
                let _ = write!(line, "{part:width$}  ");
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
    }
    text
}

/// The table of findings.
pub fn table(findings: &[Finding]) -> String {
    let row = |f: &Finding| {
        vec![
            f.what.clone(),
            f.paper.clone(),
            f.ours.clone(),
            f.why.clone(),
        ]
    };
    let rows: Vec<_> = findings.iter().map(row).collect();
    columns(
        &["what", "paper", "ours", "difference, and why"],
        &[30, 16, 16, 52],
        &rows,
    )
}

/// Lines of at most `width` characters, broken at spaces.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last().map_or(0, |line| line.chars().count());
        if line > 0 && line + 1 + word.chars().count() > width {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_wrapped_into_their_columns() {
        let text = columns(
            &["a", "b"],
            &[5, 8],
            &[vec!["one".into(), "two three four".into()]],
        );
        assert_eq!(
            text,
            "a      b\n─────  ────────\none    two\n       three\n       four\n"
        );
    }
}
