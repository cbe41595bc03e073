//! What is to be reached, and whether it was.

use super::cell::Cell;
use super::journal::Run;
use super::statistics::{METRICS, Metric, Row};
use serde::{Deserialize, Serialize};

/// A bound on a median.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Goal {
    /// Of which metric.
    pub metric: String,
    /// Of which cell.
    pub guest: String,
    pub link: String,
    pub policy: String,
    /// The median is divided by that of this policy, on the same guest and link.
    #[serde(default)]
    pub than: Option<String>,
    /// The bound.
    pub at_most: f64,
    /// Where it comes from, or what it means.
    #[serde(default)]
    pub note: Option<String>,
}

/// Whether a goal was reached.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reached {
    Met(f64),
    Missed(f64),
    /// There are no runs to tell.
    Unknown,
}

impl Goal {
    /// What is wrong with it, if anything.
    pub fn check(&self, cells: &[Cell]) -> Result<(), String> {
        if Metric::named(&self.metric).is_none() {
            let names: Vec<&str> = METRICS.iter().map(|metric| metric.name).collect();
            return Err(format!(
                "there is no metric `{}`; choose one of {}",
                self.metric,
                names.join(", ")
            ));
        }
        if !self.at_most.is_finite() {
            return Err("at_most is no number to reach".into());
        }
        for policy in std::iter::once(&self.policy).chain(&self.than) {
            if self.cell(cells, policy).is_none() {
                return Err(format!(
                    "no cell of the matrix is guest `{}`, link `{}`, policy `{policy}`",
                    self.guest, self.link
                ));
            }
        }
        Ok(())
    }

    fn cell<'a>(&self, cells: &'a [Cell], policy: &str) -> Option<&'a Cell> {
        cells
            .iter()
            .find(|c| c.group() == (&*self.guest, &*self.link) && c.policy.name == policy)
    }

    /// Whether it was reached.
    pub fn reached(&self, cells: &[Cell], runs: &[Run]) -> Reached {
        let median = |policy: &str| {
            let cell = self.cell(cells, policy)?;
            Row::of(cell, runs).median(Metric::named(&self.metric)?)
        };
        let value = match &self.than {
            None => median(&self.policy),
            // Nothing is to be had of nothing: equal, if both are zero.
            Some(other) => median(&self.policy)
                .zip(median(other))
                .map(|(ours, theirs)| {
                    if theirs > 0.0 {
                        ours / theirs
                    } else if ours > 0.0 {
                        f64::INFINITY
                    } else {
                        1.0
                    }
                }),
        };
        match value {
            Some(value) if value <= self.at_most => Reached::Met(value),
            Some(value) => Reached::Missed(value),
            None => Reached::Unknown,
        }
    }

    /// It and what came of it.
    pub fn sentence(&self, reached: Reached) -> String {
        let what = match &self.than {
            None => format!("{} of {}", self.metric, self.policy),
            Some(other) => format!("{} of {} ÷ {other}", self.metric, self.policy),
        };
        let (verdict, value) = match reached {
            Reached::Met(value) => ("met", shown(value)),
            Reached::Missed(value) => ("MISSED", shown(value)),
            Reached::Unknown => ("not run", "–".into()),
        };
        let note = self
            .note
            .as_ref()
            .map(|n| format!("  ({n})"))
            .unwrap_or_default();
        let at_most = shown(self.at_most);
        format!(
            "{verdict:<8} {value:>9} of at most {at_most:>8}  {what}, {}, {}{note}",
            self.guest, self.link
        )
    }
}

fn shown(value: f64) -> String {
    if value.abs() < 10.0 {
        format!("{value:.2}")
    } else {
        format!("{value:.0}")
    }
}

#[cfg(test)]
mod tests {
    use super::super::measure::Figures;
    use super::super::net::Shaping;
    use super::super::spec::Spec;
    use super::*;

    const FILE: &str = "[[guest]]\nname='g'\nwork='idle:fill=none'\nmemory='32M'\n\
        [[policy]]\nname='a'\nferry={}\n[[policy]]\nname='b'\nferry={policy='stord'}\n\
        [[goal]]\nmetric='total_ms'\nguest='g'\nlink='loopback'\npolicy='b'\nat_most=10\n\
        [[goal]]\nmetric='total_ms'\nguest='g'\nlink='loopback'\npolicy='b'\nthan='a'\nat_most=0.5\n";

    #[test]
    fn bounds_hold_for_medians_and_ratios() {
        let spec = Spec::parse("x", FILE).unwrap();
        let run = |cell: usize, number, total_ms| {
            let mut figures = Figures::default();
            figures.told.total_ms = total_ms;
            Run {
                cell: spec.cells[cell].clone(),
                number,
                shaping: Shaping::Loopback,
                load: String::new(),
                took_s: 0.0,
                figures: Some(figures),
                error: None,
            }
        };
        let mut runs = vec![run(1, 1, 9.0), run(1, 2, 9.5), run(1, 3, 99.0)];
        let reached = |runs: &[Run]| -> Vec<Reached> {
            spec.goals
                .iter()
                .map(|goal| goal.reached(&spec.cells, runs))
                .collect()
        };
        assert_eq!(reached(&runs), [Reached::Met(9.5), Reached::Unknown]);
        runs.push(run(0, 1, 10.0));
        assert_eq!(reached(&runs)[1], Reached::Missed(0.95));
        let text = spec.goals[1].sentence(reached(&runs)[1]);
        assert!(
            text.starts_with("MISSED") && text.contains("b ÷ a"),
            "{text}"
        );
    }

    #[test]
    fn a_goal_about_nothing_is_refused_with_its_place() {
        let error = Spec::parse("x", &FILE.replace("total_ms", "speed"))
            .unwrap_err()
            .0;
        assert!(
            error.contains("line 11") && error.contains("no metric `speed`"),
            "{error}"
        );
        let error = Spec::parse("x", &FILE.replace("than='a'", "than='c'"))
            .unwrap_err()
            .0;
        assert!(error.contains("policy `c`"), "{error}");
    }
}
