//! Prometheus' text format, version 0.0.4.
//!
//! Written here because the client crates of the ecosystem write OpenMetrics, whose names of
//! counters and whose end are others, and because the figures are counted elsewhere already.
//!
//! <https://prometheus.io/docs/instrumenting/exposition_formats/>

use std::fmt::{self, Write};

/// The media type.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a family's samples are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Grows until the process ends. Its name ends with `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// See [`Histogram`].
    Histogram,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// A sample's value: whole numbers are written as such, beyond 2⁵³ too.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    /// A count.
    Whole(u64),
    /// A measure.
    Real(f64),
}

impl From<u64> for Value {
    fn from(n: u64) -> Self {
        Self::Whole(n)
    }
}

impl From<f64> for Value {
    fn from(x: f64) -> Self {
        Self::Real(x)
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Whole(n) => n.fmt(f),
            Self::Real(x) if x.is_nan() => f.write_str("NaN"),
            Self::Real(x) if x == f64::INFINITY => f.write_str("+Inf"),
            Self::Real(x) if x == f64::NEG_INFINITY => f.write_str("-Inf"),
            Self::Real(x) => x.fmt(f),
        }
    }
}

/// A page of samples, family by family.
#[derive(Debug, Default)]
pub struct Page {
    text: String,
    family: &'static str,
}

impl Page {
    /// Begins a family; its samples follow.
    pub fn family(&mut self, name: &'static str, kind: Kind, help: &str) -> &mut Self {
        self.family = name;
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        let kind = kind.name();
        // Writing to a string does not fail.
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        self
    }

    /// A family of one sample that goes up and down.
    pub fn gauge(&mut self, name: &'static str, help: &str, value: impl Into<Value>) {
        self.family(name, Kind::Gauge, help).sample(&[], value);
    }

    /// A family of one sample that only grows.
    pub fn counter(&mut self, name: &'static str, help: &str, value: impl Into<Value>) {
        self.family(name, Kind::Counter, help).sample(&[], value);
    }

    /// A sample of the family.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: impl Into<Value>) -> &mut Self {
        self.line("", labels, None, value.into());
        self
    }

    /// A histogram of the family.
    pub fn histogram(&mut self, labels: &[(&str, &str)], histogram: &Histogram) -> &mut Self {
        let mut below = 0;
        for (bound, count) in histogram.bounds.iter().zip(&histogram.counts) {
            below += count;
            self.line("_bucket", labels, Some((*bound).into()), below.into());
        }
        let all = histogram.count;
        let end = Some(f64::INFINITY.into());
        self.line("_bucket", labels, end, all.into());
        self.line("_sum", labels, None, histogram.sum.into());
        self.line("_count", labels, None, all.into());
        self
    }

    fn line(&mut self, suffix: &str, labels: &[(&str, &str)], le: Option<Value>, value: Value) {
        let text = &mut self.text;
        text.push_str(self.family);
        text.push_str(suffix);
        let mut open = '{';
        for (name, value) in labels {
            let _ = write!(text, "{open}{name}=\"");
            escape(text, value);
            text.push('"');
            open = ',';
        }
        if let Some(le) = le {
            let _ = write!(text, "{open}le=\"{le}\"");
            open = ',';
        }
        if open == ',' {
            text.push('}');
        }
        let _ = writeln!(text, " {value}");
    }

    /// The text.
    #[must_use]
    pub fn into_text(self) -> String {
        self.text
    }
}

fn escape(text: &mut String, value: &str) {
    for c in value.chars() {
        match c {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            c => text.push(c),
        }
    }
}

/// How many observations were at most so large.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    bounds: &'static [f64],
    counts: Vec<u64>,
    count: u64,
    sum: f64,
}

impl Histogram {
    /// With buckets up to these bounds, which grow, and one without a bound.
    #[must_use]
    pub fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            counts: vec![0; bounds.len()],
            count: 0,
            sum: 0.0,
        }
    }

    /// Counts one.
    pub fn observe(&mut self, value: f64) {
        self.add(value, 1, value);
    }

    /// Counts `count` observations of at most `upto`, which sum up to `sum`.
    pub fn add(&mut self, upto: f64, count: u64, sum: f64) {
        if upto.is_nan() {
            return;
        }
        let bucket = self.bounds.iter().position(|bound| upto <= *bound);
        if let Some(counts) = bucket.and_then(|at| self.counts.get_mut(at)) {
            *counts += count;
        }
        self.count += count;
        self.sum += sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn families_samples_and_escapes() {
        let mut page = Page::default();
        page.family(
            "ferry_a_total",
            Kind::Counter,
            "A \\ of\ntwo lines \"here\".",
        )
        .sample(&[], 1_u64)
        .sample(&[("x", "a\"b\\c\nd"), ("y", "é")], u64::MAX);
        page.family("ferry_b", Kind::Gauge, "B.")
            .sample(&[], 0.1)
            .sample(&[("x", "1")], f64::INFINITY)
            .sample(&[("x", "2")], f64::NAN)
            .sample(&[("x", "3")], -2e-7);
        let expected = "\
# HELP ferry_a_total A \\\\ of\\ntwo lines \"here\".
# TYPE ferry_a_total counter
ferry_a_total 1
ferry_a_total{x=\"a\\\"b\\\\c\\nd\",y=\"é\"} 18446744073709551615
# HELP ferry_b B.
# TYPE ferry_b gauge
ferry_b 0.1
ferry_b{x=\"1\"} +Inf
ferry_b{x=\"2\"} NaN
ferry_b{x=\"3\"} -0.0000002
";
        assert_eq!(page.into_text(), expected);
    }

    #[test]
    fn a_histogram_is_cumulative_and_ends_with_all() {
        let mut histogram = Histogram::new(&[0.1, 1.0]);
        for value in [0.05, 0.1, 0.5, 7.0, f64::NAN] {
            histogram.observe(value);
        }
        histogram.add(1.0, 3, 2.25);
        let mut page = Page::default();
        page.family("ferry_s_seconds", Kind::Histogram, "S.")
            .histogram(&[("d", "in")], &histogram);
        let expected = "\
# HELP ferry_s_seconds S.
# TYPE ferry_s_seconds histogram
ferry_s_seconds_bucket{d=\"in\",le=\"0.1\"} 2
ferry_s_seconds_bucket{d=\"in\",le=\"1\"} 6
ferry_s_seconds_bucket{d=\"in\",le=\"+Inf\"} 7
ferry_s_seconds_sum{d=\"in\"} 9.9
ferry_s_seconds_count{d=\"in\"} 7
";
        assert_eq!(page.into_text(), expected);
    }

    proptest! {
        /// Whatever a label holds, a sample is one line that can be split in one way.
        #[test]
        fn any_label_stays_on_its_line(value in ".*") {
            let mut page = Page::default();
            page.family("m", Kind::Gauge, "h").sample(&[("l", &value)], 1_u64);
            let text = page.into_text();
            let sample = text.split('\n').nth(2).unwrap();
            let inner = sample.strip_prefix("m{l=\"").unwrap().strip_suffix("\"} 1").unwrap();
            let (mut plain, mut chars) = (String::new(), inner.chars());
            while let Some(c) = chars.next() {
                prop_assert!(c != '"');
                plain.push(match c {
                    '\\' => match chars.next() {
                        Some('n') => '\n',
                        other => other.unwrap(),
                    },
                    c => c,
                });
            }
            prop_assert_eq!(plain, value);
            prop_assert_eq!(text.split('\n').count(), 4);
        }
    }
}
