//! The results as one page that needs nothing else.

use super::charts;
use super::goals::Reached;
use super::journal::{Host, Run};
use super::spec::Spec;
use super::statistics::{METRICS, Metric, groups};
use super::table;
use ferry_terminal::output::Failure;
use std::fmt::Write;

const STYLE: &str = "body{font:15px/1.45 sans-serif;max-width:1060px;margin:2em auto;padding:0 1em;color:#111;background:#fff}\
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2.2em;border-top:1px solid #999;padding-top:.8em}\
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.82em;font-variant-numeric:tabular-nums}\
td,th{padding:.2em .55em;text-align:right;white-space:nowrap;border-bottom:1px solid #ddd}\
pre{white-space:pre-wrap;font-size:.85em}\
td:first-child,th:first-child,td.text{text-align:left}td.text{white-space:normal}.max{color:#555}\
.met{font-weight:normal}.missed{font-weight:bold;text-decoration:underline}svg{max-width:100%;height:auto;display:block;margin:.6em 0}\
.remark{font-size:.9em;margin:.2em 0}\
@media print{body{max-width:none;margin:0}h2{break-before:page}svg,table{break-inside:avoid}}";

/// Text that cannot be markup.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

/// A row of a table.
fn line(text: &mut String, class: &str, tag: &str, cells: &[String]) {
    let _ = write!(text, "<tr class=\"{class}\">");
    for cell in cells {
        let _ = write!(text, "<{tag}>{}</{tag}>", escaped(cell));
    }
    text.push_str("</tr>\n");
}

/// The whole page.
///
/// `verdict` says what the results mean, as text in columns.
pub fn page(host: &Host, spec: &Spec, runs: &[Run], verdict: &str) -> Result<String, Failure> {
    let title = escaped(&spec.title);
    let mut text = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/><title>{title}</title>\
         <style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n<p>{}</p>\n",
        escaped(&table::machine(host))
    );
    if !verdict.is_empty() {
        let _ = writeln!(text, "<pre>{}</pre>", escaped(verdict.trim()));
    }
    goals(&mut text, spec, runs);
    for rows in groups(&spec.cells, runs) {
        let _ = write!(
            text,
            "<h2>{}</h2>\n<div class=\"wide\"><table>\n",
            escaped(&table::heading(&rows))
        );
        let columns = table::columns(&rows, false);
        let mut head = vec![String::new(), "runs".into(), String::new()];
        head.extend(columns.iter().map(|metric| metric.head.to_owned()));
        line(&mut text, "", "th", &head);
        for row in &rows {
            let values = |of: fn(&super::statistics::Spread) -> f64| {
                let show = |metric: &&&Metric| metric.show(row.spread(metric).map(|s| of(&s)));
                columns
                    .iter()
                    .map(|metric| show(&metric))
                    .collect::<Vec<_>>()
            };
            let mut median = vec![
                row.cell.policy.name.clone(),
                table::health(row),
                "median".into(),
            ];
            median.extend(values(|s| s.median));
            line(&mut text, "", "td", &median);
            if row.good.len() > 1 {
                let mut most = vec![String::new(), String::new(), "max".into()];
                most.extend(values(|s| s.max));
                line(&mut text, "max", "td", &most);
            }
        }
        text.push_str("</table></div>\n");
        if let Some(best) = table::best(&rows) {
            let _ = writeln!(text, "<p>Best by medians: {}</p>", escaped(&best));
        }
        for remark in table::remarks(&rows) {
            let _ = writeln!(text, "<p class=\"remark\">{}</p>", escaped(&remark));
        }
        for svg in charts::group(&rows)? {
            text.push_str(&svg);
        }
    }
    text.push_str("<h2>What is measured</h2>\n<table>\n");
    for metric in &METRICS {
        let _ = writeln!(
            text,
            "<tr><td>{}</td><td class=\"text\"><code>{}</code></td><td class=\"text\">{}</td></tr>",
            escaped(metric.head),
            metric.name,
            escaped(metric.meaning)
        );
    }
    text.push_str("</table>\n</body></html>\n");
    Ok(text)
}

fn goals(text: &mut String, spec: &Spec, runs: &[Run]) {
    if spec.goals.is_empty() {
        return;
    }
    text.push_str("<h2>Goals, by medians</h2>\n<table>\n");
    for goal in &spec.goals {
        let reached = goal.reached(&spec.cells, runs);
        let class = match reached {
            Reached::Missed(_) => "missed",
            _ => "met",
        };
        let _ = writeln!(
            text,
            "<tr><td class=\"text {class}\">{}</td></tr>",
            escaped(&goal.sentence(reached))
        );
    }
    text.push_str("</table>\n");
}

#[cfg(test)]
mod tests {
    use super::super::measure::Figures;
    use super::super::net::Shaping;
    use super::*;
    use ferry_migration::report::{Bucket, Faults};

    const FILE: &str = "title='<b>Tom & Jerry</b>'\n[[guest]]\nname='g<script>'\nwork='idle:fill=none'\nmemory='32M'\n\
        [[policy]]\nname='a'\nferry={}\n[[policy]]\nname='b'\nqemu={mode='precopy'}\n\
        [[goal]]\nmetric='total_ms'\nguest='g<script>'\nlink='loopback'\npolicy='a'\nat_most=10\n";

    #[test]
    fn a_page_has_tables_plots_and_no_markup_of_others() {
        let spec = Spec::parse("x", FILE).unwrap();
        let mut figures = Figures::default();
        figures.told.total_ms = 500.0;
        figures.seen.series = vec![(-100.0, 5.0), (0.0, 6.0), (100.0, 2.0)];
        figures.told.faults = Some(Faults {
            histogram: vec![
                Bucket {
                    upto_us: 9.0,
                    count: 1,
                },
                Bucket {
                    upto_us: 99.0,
                    count: 3,
                },
            ],
            ..Faults::default()
        });
        let run = |number, good: bool| Run {
            cell: spec.cells[0].clone(),
            number,
            shaping: Shaping::Loopback,
            load: String::new(),
            took_s: 0.0,
            figures: good.then(|| figures.clone()),
            error: (!good).then(|| "it was <killed>".to_owned()),
        };
        let page = page(
            &Host::default(),
            &spec,
            &[run(1, true), run(2, false)],
            "a < b",
        )
        .unwrap();
        assert!(page.contains("&lt;b&gt;Tom &amp; Jerry") && !page.contains("<script>"));
        assert!(page.contains("1/2 verified") == figures.verified);
        assert!(page.contains("it was &lt;killed&gt;") && page.contains("MISSED"));
        // Bars of total, gap, stall and bytes; curves of throughput and latency.
        well_formed(&page, 6);
    }

    /// It is XML too, with so many plots, each with something in it.
    fn well_formed(page: &str, plots: usize) {
        let options = roxmltree::ParsingOptions {
            allow_dtd: true,
            ..Default::default()
        };
        let document = roxmltree::Document::parse_with_options(page, options).unwrap();
        let nodes = || document.descendants().filter(|node| node.is_element());
        let svgs: Vec<_> = nodes().filter(|n| n.has_tag_name(SVG)).collect();
        assert_eq!(svgs.len(), plots);
        for svg in svgs {
            assert!(svg.descendants().filter(|n| n.is_element()).count() > 5);
        }
        let rows = nodes().filter(|node| node.has_tag_name("table")).count();
        assert!(rows > 0);
    }

    const SVG: (&str, &str) = ("http://www.w3.org/2000/svg", "svg");

    #[test]
    fn without_runs_there_is_a_page_all_the_same() {
        let spec = Spec::parse("x", FILE).unwrap();
        let page = page(&Host::default(), &spec, &[], "").unwrap();
        assert!(page.contains("not run") && page.ends_with("</html>\n"));
        well_formed(&page, 0);
    }
}
