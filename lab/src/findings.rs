//! A reproduction's result: for each claim of a paper its number, ours, and why they differ.

use ferry_terminal::rows::wrapped;
use serde::Serialize;

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
    wrapped(
        &["what", "paper", "ours", "difference, and why"],
        &[30, 16, 16, 52],
        &rows,
    )
}
