//! Reports as text: names with their values, tables, and long lists of rounds.

use std::fmt::{Display, Write};

/// Lines of a name and a value, one value below the other.
#[derive(Debug, Default)]
pub struct Rows(String);

impl Rows {
    /// One line.
    pub fn add(&mut self, name: &str, value: impl Display) {
        // Writing into a string cannot fail.
        let _ = writeln!(self.0, "{name:<10} {value}");
    }

    /// All of them.
    #[must_use]
    pub fn text(self) -> String {
        self.0
    }
}

/// Columns of text, the first to the left and the others to the right.
#[must_use]
pub fn aligned(lines: &[Vec<String>]) -> String {
    let count = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..count).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let mut shown = String::new();
        for (column, cell) in line.iter().enumerate() {
            if column == 0 {
                let _ = write!(shown, "{cell:<0$}", widths[0]);
            } else {
                let _ = write!(shown, "  {cell:>0$}", widths[column]);
            }
        }
        text.push_str(shown.trim_end());
        text.push('\n');
    }
    text
}

/// Columns of text, each as wide as its widest cell, and all to the left.
#[must_use]
pub fn columns<const N: usize>(lines: &[[String; N]]) -> String {
    let widths: [usize; N] = std::array::from_fn(|at| {
        let cells = lines.iter().map(|line| line[at].chars().count());
        cells.max().unwrap_or(0)
    });
    let mut text = String::new();
    for line in lines {
        let mut shown = String::new();
        for (cell, width) in line.iter().zip(widths) {
            let _ = write!(shown, "{cell:<width$}  ");
        }
        text.push_str(shown.trim_end());
        text.push('\n');
    }
    text
}

/// Columns of text: each cell is wrapped into its column's width.
#[must_use]
pub fn wrapped(head: &[&str], widths: &[usize], rows: &[Vec<String>]) -> String {
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

/// One round of a migration: its number, and the cells of its line.
#[derive(Clone, Debug)]
pub struct RoundRow {
    /// Counts from 1.
    pub n: u32,
    /// The cells.
    pub cells: Vec<String>,
}

/// Rounds that are shown at the beginning and at the end when there are too many for a screen.
const FIRST: usize = 4;
const LAST: usize = 8;

/// A table of rounds; of a long one the middle is left out, and counted.
#[must_use]
pub fn rounds(head: &[&str], rows: &[RoundRow]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::new();
        for (at, cell) in cells.enumerate() {
            let _ = match at {
                0 => write!(line, "{cell:>5}"),
                _ => write!(line, " {cell:>12}"),
            };
        }
        line + "\n"
    };
    let mut text = line(&mut head.iter().copied());
    let hidden = if rows.len() > FIRST + LAST + 1 {
        FIRST..rows.len() - LAST
    } else {
        0..0
    };
    let mut missing = 0;
    for (at, row) in rows.iter().enumerate() {
        // A report leaves rounds out itself when there were very many; their numbers tell.
        let next = rows.get(at + 1).map_or(0, |next| u64::from(next.n));
        let gap = next.saturating_sub(u64::from(row.n) + 1);
        if hidden.contains(&at) {
            missing += 1 + gap;
            continue;
        }
        if missing > 0 {
            let label = format!(
                "… {} more …",
                crate::units::grouped(std::mem::take(&mut missing))
            );
            let _ = writeln!(text, "{label:>18}");
        }
        text += &line(&mut row.cells.iter().map(String::as_str));
        missing = gap;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stand_below_each_other() {
        let mut rows = Rows::default();
        rows.add("a", 1);
        rows.add("downtime", "12 ms");
        assert_eq!(rows.text(), "a          1\ndowntime   12 ms\n");
    }

    #[test]
    fn cells_are_wrapped_into_their_columns() {
        let text = wrapped(
            &["a", "b"],
            &[5, 8],
            &[vec!["one".into(), "two three four".into()]],
        );
        assert_eq!(
            text,
            "a      b\n─────  ────────\none    two\n       three\n       four\n"
        );
    }

    #[test]
    fn numbers_are_aligned_to_the_right() {
        let cells = |cells: &[&str]| cells.iter().map(|c| (*c).to_owned()).collect();
        let text = aligned(&[cells(&["", "ms"]), cells(&["precopy", "1"]), cells(&["x"])]);
        assert_eq!(text, "         ms\nprecopy   1\nx\n");
    }

    #[test]
    fn a_thousand_rounds_fit_a_screen() {
        let row = |n: u32| RoundRow {
            n,
            cells: vec![n.to_string(), "1".into()],
        };
        let table = |numbers: &[u32]| {
            let rows: Vec<_> = numbers.iter().copied().map(row).collect();
            rounds(&["round", "pages"], &rows)
        };
        let text = table(&(1..=1000).collect::<Vec<_>>());
        assert_eq!(text.lines().count(), 1 + FIRST + 1 + LAST, "{text}");
        assert!(text.contains("… 988 more …"), "{text}");
        let text = table(&[1, 2, 3, 2000, 2001]);
        assert!(text.contains("… 1,996 more …"), "{text}");
        assert!(!table(&(1..=13).collect::<Vec<_>>()).contains("more"));
        assert_eq!(table(&[]), "");
    }
}
