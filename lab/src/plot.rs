//! Plots as SVG: readable in print, by the colour-blind, and without a font of the system.
//!
//! Series differ in colour (the palette of Okabe and Ito), in marker and in dash.

use ferry_terminal::output::Failure;
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::path::Path;

const SIZE: (u32, u32) = (1000, 520);
/// Where the chart ends and the legend begins.
const CHART: i32 = 770;
const FONT: &str = "sans-serif";
/// Blue, vermilion, green, reddish purple, orange, sky blue, black: black last, yellow never (it
/// fades in print).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];
const GREY: RGBColor = RGBColor(120, 120, 120);

/// The most markers on a line.
const MARKS: usize = 24;

/// A line through points.
pub struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// What a chart of lines shows.
pub struct Lines<'a> {
    pub title: &'a str,
    pub x: &'a str,
    pub y: &'a str,
    /// Whether the axes count in powers of ten.
    pub log: (bool, bool),
    pub series: Vec<Series>,
    /// Horizontal lines with what they say: the paper's numbers.
    pub levels: Vec<(f64, String)>,
}

/// What a chart of grouped bars shows.
pub struct Bars<'a> {
    pub title: &'a str,
    pub y: &'a str,
    /// The bars' names within a group, and the groups with a value (or none) for each.
    pub names: Vec<String>,
    pub groups: Vec<(String, Vec<Option<f64>>)>,
    /// Written above a bar that has no value.
    pub missing: &'a str,
}

fn failed(title: &str, error: &str) -> Failure {
    Failure(format!("the chart \"{title}\" cannot be drawn ({error})"))
}

fn write(path: &Path, svg: &str) -> Result<(), Failure> {
    Ok(ferry_vmm::new_file::write(path, svg.as_bytes())?)
}

/// The smallest range around the values; a bit of room at its upper end.
fn range(values: impl Iterator<Item = f64>, log: bool) -> (f64, f64) {
    let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
    for value in values.filter(|v| v.is_finite() && (!log || *v > 0.0)) {
        (low, high) = (low.min(value), high.max(value));
    }
    if low > high {
        (low, high) = (1.0, 10.0);
    }
    if log {
        (low * 0.8, (high * 1.3).max(low * 2.0))
    } else {
        (low.min(0.0), (high * 1.08).max(low.min(0.0) + 1e-9))
    }
}

/// A number on an axis: no more digits than it needs.
fn tick(value: &f64) -> String {
    let text = match value.abs() {
        v if v >= 1e6 => format!("{:.1} M", value / 1e6),
        v if v >= 1e4 => format!("{:.0} k", value / 1e3),
        v if v >= 100.0 || v == 0.0 => format!("{value:.0}"),
        v if v >= 1.0 => format!("{value:.1}"),
        v if v >= 0.01 => format!("{value:.2}"),
        _ => format!("{value:.0e}"),
    };
    match text.strip_suffix(".0") {
        Some(whole) => whole.to_owned(),
        None => text,
    }
}

/// Draws lines.
///
/// # Errors
/// The file cannot be written.
pub fn lines(path: &Path, chart: &Lines<'_>) -> Result<(), Failure> {
    write(path, &lines_svg(chart)?)
}

/// Lines as the text of an SVG.
///
/// # Errors
/// The chart cannot be drawn.
pub fn lines_svg(chart: &Lines<'_>) -> Result<String, Failure> {
    let points = || chart.series.iter().flat_map(|s| &s.points);
    let x = range(points().map(|p| p.0), chart.log.0);
    let levels = chart.levels.iter().map(|level| level.0);
    let y = range(points().map(|p| p.1).chain(levels), chart.log.1);
    let flat_x = if chart.log.0 {
        x
    } else {
        // Lines begin at the axis where they begin near it, and elsewhere where they begin.
        let low = points().map(|p| p.0).fold(f64::INFINITY, f64::min);
        let near = (0.0..x.1 / 4.0).contains(&low);
        (if near { 0.0 } else { low }, x.1)
    };
    let draw = match chart.log {
        (false, false) => on(chart, flat_x.0..flat_x.1, y.0..y.1),
        (true, false) => on(chart, (x.0..x.1).log_scale(), y.0..y.1),
        (false, true) => on(chart, flat_x.0..flat_x.1, (y.0..y.1).log_scale()),
        (true, true) => on(chart, (x.0..x.1).log_scale(), (y.0..y.1).log_scale()),
    };
    draw.map_err(|e| failed(chart.title, &e))
}

fn on<X, Y>(chart: &Lines<'_>, x: X, y: Y) -> Result<String, String>
where
    X: AsRangedCoord<Value = f64>,
    Y: AsRangedCoord<Value = f64>,
    X::CoordDescType: ValueFormatter<f64> + Ranged<ValueType = f64>,
    Y::CoordDescType: ValueFormatter<f64> + Ranged<ValueType = f64>,
{
    let points = || chart.series.iter().flat_map(|s| &s.points);
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    let draw = || -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
        root.fill(&WHITE)?;
        let (main, side) = root.split_horizontally(CHART);
        let mut area = ChartBuilder::on(&main)
            .caption(chart.title, (FONT, 20))
            .margin(14)
            .x_label_area_size(46)
            .y_label_area_size(64)
            .build_cartesian_2d(x, y)?;
        area.configure_mesh()
            .x_desc(chart.x)
            .y_desc(chart.y)
            .x_label_formatter(&tick)
            .y_label_formatter(&tick)
            .light_line_style(TRANSPARENT)
            .bold_line_style(RGBColor(225, 225, 225))
            .label_style((FONT, 14))
            .axis_desc_style((FONT, 15))
            .draw()?;
        let xs = || points().map(|p| p.0);
        let ends = (
            xs().fold(f64::INFINITY, f64::min),
            xs().fold(f64::NEG_INFINITY, f64::max),
        );
        for (level, text) in &chart.levels {
            let line = [(ends.0, *level), (ends.1, *level)];
            area.draw_series(DashedLineSeries::new(line, 2, 4, GREY.stroke_width(1)))?;
            let style = (FONT, 13).into_font().color(&GREY);
            let style = style.pos(Pos::new(HPos::Left, VPos::Bottom));
            area.draw_series([Text::new(text.clone(), (ends.0, *level), style)])?;
        }
        for (index, series) in chart.series.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let line = colour.stroke_width(2);
            let points = series.points.iter().copied();
            // Dashes are the third sign after colour and marker, from the fourth series on.
            if index < 3 {
                area.draw_series(LineSeries::new(points, line))?;
            } else {
                area.draw_series(DashedLineSeries::new(points, 8, 4, line))?;
            }
            let y = legend_row(index);
            side.draw(&PathElement::new(vec![(0, y), (26, y)], line))?;
            side.draw(&Mark::of(index).at((13, y), colour))?;
            side.draw(&legend_text(&series.name, y))?;
            // Every point of a long curve would be a caterpillar.
            let marks = series
                .points
                .iter()
                .step_by(series.points.len() / MARKS + 1);
            area.draw_series(
                marks.map(|&at| EmptyElement::at(at) + Mark::of(index).at((0, 0), colour)),
            )?;
        }
        root.present()
    };
    draw().map_err(|e| e.to_string())?;
    drop(root);
    Ok(svg)
}

/// Where a series stands in the legend.
fn legend_row(index: usize) -> i32 {
    i32::try_from(index).unwrap_or(0) * 26 + 70
}

fn legend_text(name: &str, y: i32) -> Text<'_, (i32, i32), &str> {
    let style = (FONT, 14).into_font().color(&BLACK);
    Text::new(name, (34, y), style.pos(Pos::new(HPos::Left, VPos::Center)))
}

/// A marker's outline around the origin, in pixels.
#[derive(Clone, Copy)]
enum Mark {
    Disc,
    Square,
    Triangle,
    Diamond,
}

impl Mark {
    const fn of(index: usize) -> Self {
        match index % 4 {
            0 => Self::Disc,
            1 => Self::Square,
            2 => Self::Triangle,
            _ => Self::Diamond,
        }
    }

    fn at(self, (x, y): (i32, i32), colour: RGBColor) -> Polygon<(i32, i32)> {
        // A disc of twelve corners is round at this size.
        let round = |n: i32, radius: f64, turn: f64| {
            let corner = move |i: i32| {
                let angle = std::f64::consts::TAU * (f64::from(i) / f64::from(n) + turn);
                (
                    x + near(radius * angle.cos()),
                    y + near(radius * angle.sin()),
                )
            };
            (0..n).map(corner).collect::<Vec<_>>()
        };
        let corners = match self {
            Self::Disc => round(12, 4.0, 0.0),
            Self::Square => round(4, 5.2, 0.125),
            Self::Triangle => round(3, 5.5, -0.25),
            Self::Diamond => round(4, 5.5, 0.0),
        };
        Polygon::new(corners, colour.filled())
    }
}

/// The nearest pixel.
fn near(value: f64) -> i32 {
    // A few pixels around a marker's centre.
    #[allow(clippy::cast_possible_truncation)]
    let pixel = value.round() as i32;
    pixel
}

/// Draws groups of bars.
///
/// # Errors
/// The file cannot be written.
pub fn bars(path: &Path, chart: &Bars<'_>) -> Result<(), Failure> {
    write(path, &bars_svg(chart)?)
}

/// Groups of bars as the text of an SVG.
///
/// # Errors
/// The chart cannot be drawn.
pub fn bars_svg(chart: &Bars<'_>) -> Result<String, Failure> {
    let values = chart.groups.iter().flat_map(|group| &group.1).flatten();
    let (low, high) = range(values.copied(), false);
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    let draw = || -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
        root.fill(&WHITE)?;
        let count = f64::from(u32::try_from(chart.groups.len()).unwrap_or(1));
        let (main, side) = root.split_horizontally(CHART);
        let mut area = ChartBuilder::on(&main)
            .caption(chart.title, (FONT, 20))
            .margin(14)
            .x_label_area_size(46)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..count, low..high)?;
        area.configure_mesh()
            .disable_x_mesh()
            .x_labels(0)
            .y_desc(chart.y)
            .y_label_formatter(&tick)
            .light_line_style(TRANSPARENT)
            .bold_line_style(RGBColor(225, 225, 225))
            .label_style((FONT, 14))
            .axis_desc_style((FONT, 15))
            .draw()?;
        let width = 0.84 / f64::from(u32::try_from(chart.names.len().max(1)).unwrap_or(1));
        let middle_of = |anchor| {
            (FONT, 12)
                .into_font()
                .color(&BLACK)
                .pos(Pos::new(HPos::Center, anchor))
        };
        for (index, bar) in chart.names.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let offset = 0.08 + width * f64::from(u32::try_from(index).unwrap_or(0));
            let left = |group: usize| middle(group) - 0.5 + offset;
            let bars = chart.groups.iter().enumerate().filter_map(|(at, group)| {
                let value = group.1.get(index).copied().flatten()?;
                Some(Rectangle::new(
                    [(left(at), 0.0), (left(at) + width * 0.9, value)],
                    colour.filled(),
                ))
            });
            area.draw_series(bars)?;
            let y = legend_row(index);
            side.draw(&Rectangle::new([(6, y - 7), (20, y + 7)], colour.filled()))?;
            side.draw(&legend_text(bar, y))?;
            let texts = chart.groups.iter().enumerate().map(|(at, group)| {
                let value = group.1.get(index).copied().flatten();
                let text = value.map_or_else(|| chart.missing.to_owned(), |v| tick(&v));
                Text::new(
                    text,
                    (left(at) + width * 0.45, value.unwrap_or(0.0)),
                    middle_of(VPos::Bottom),
                )
            });
            area.draw_series(texts)?;
        }
        let names = chart.groups.iter().enumerate();
        let style = (FONT, 15)
            .into_font()
            .color(&BLACK)
            .pos(Pos::new(HPos::Center, VPos::Top));
        for (at, group) in names {
            let (x, y) = area.backend_coord(&(middle(at), low));
            root.draw(&Text::new(group.0.clone(), (x, y + 12), style.clone()))?;
        }
        root.present()
    };
    draw().map_err(|e| failed(chart.title, &e.to_string()))?;
    drop(root);
    Ok(svg)
}

/// A bar with its name at its left, and the range of its value.
pub struct Bar {
    pub name: String,
    pub value: f64,
    /// The smallest and the largest.
    pub range: (f64, f64),
    /// Drawn in the first colour rather than in the second.
    pub first: bool,
}

/// Lying bars with their names, values and ranges as the text of an SVG: no colour has to be told
/// from another.
///
/// # Errors
/// The chart cannot be drawn.
pub fn lying_bars_svg(title: &str, unit: &str, bars: &[Bar]) -> Result<String, Failure> {
    const ROW: i32 = 30;
    const TOP: i32 = 44;
    const LEFT: i32 = 290;
    const RIGHT: i32 = 900;
    let rows = i32::try_from(bars.len()).unwrap_or(0);
    let height = u32::try_from(TOP + rows * ROW + 44).unwrap_or(SIZE.1);
    let (_, high) = range(bars.iter().map(|bar| bar.range.1), false);
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, (SIZE.0, height)).into_drawing_area();
    let at = |value: f64| LEFT + near(f64::from(RIGHT - LEFT) * (value / high).clamp(0.0, 1.0));
    let text = |size: i32, h, v| (FONT, size).into_font().color(&BLACK).pos(Pos::new(h, v));
    let draw = || -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
        root.fill(&WHITE)?;
        let middle = text(20, HPos::Left, VPos::Top);
        root.draw(&Text::new(title.to_owned(), (14, 10), middle))?;
        for (index, bar) in (0..).zip(bars) {
            let top = TOP + index * ROW;
            let centre = top + ROW / 2;
            let colour = COLOURS[usize::from(!bar.first)];
            root.draw(&Rectangle::new(
                [(LEFT, top + 5), (at(bar.value), top + ROW - 5)],
                colour.filled(),
            ))?;
            let whisker = vec![(at(bar.range.0), centre), (at(bar.range.1), centre)];
            root.draw(&PathElement::new(whisker, BLACK.stroke_width(1)))?;
            for end in [bar.range.0, bar.range.1] {
                let tick = vec![(at(end), centre - 4), (at(end), centre + 4)];
                root.draw(&PathElement::new(tick, BLACK.stroke_width(1)))?;
            }
            let name = text(14, HPos::Right, VPos::Center);
            root.draw(&Text::new(bar.name.clone(), (LEFT - 8, centre), name))?;
            let value = format!("{} {unit}", tick(&bar.value));
            let style = text(14, HPos::Left, VPos::Center);
            let beyond = at(bar.range.1.max(bar.value)) + 8;
            root.draw(&Text::new(value, (beyond, centre), style))?;
        }
        let foot = TOP + rows * ROW + 4;
        root.draw(&PathElement::new(
            vec![(LEFT, TOP), (LEFT, foot)],
            GREY.stroke_width(1),
        ))?;
        let told = "bars: medians; lines across them: from the smallest to the largest run";
        let style = (FONT, 13).into_font().color(&GREY);
        root.draw(&Text::new(told, (LEFT, foot + 12), style))?;
        root.present()
    };
    draw().map_err(|e| failed(title, &e.to_string()))?;
    drop(root);
    Ok(svg)
}

/// The middle of a group on its axis.
fn middle(group: usize) -> f64 {
    f64::from(u32::try_from(group).unwrap_or(0)) + 0.5
}
