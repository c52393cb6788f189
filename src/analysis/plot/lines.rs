//! Lines, such as a metric over steps or layers: with bands, whiskers and dashed references.

use std::ops::Range;

use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::prelude::*;

use super::{Area, Drawn, Figure, Frame, Surface, extent, style, text, ticks};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stroke {
    /// One seed of several.
    Thin,
    Solid,
    /// What was planned, in ink and on top; its band is what a check lets pass.
    Dashed,
    /// Few values, each worth seeing.
    Dotted,
}

/// One line and what belongs to it. What is not finite is left out, and the line broken there.
#[derive(Clone, Debug)]
pub struct Series {
    /// In the legend; None: not there.
    pub name: Option<String>,
    /// Place in the palette.
    pub colour: usize,
    pub stroke: Stroke,
    pub points: Vec<(f64, f64)>,
    /// (x, low, high), filled.
    pub band: Vec<(f64, f64, f64)>,
    /// (x, low, high), one stroke each.
    pub whiskers: Vec<(f64, f64, f64)>,
}

impl Series {
    pub fn new(name: Option<String>, colour: usize, stroke: Stroke, points: Vec<(f64, f64)>) -> Series {
        Series { name, colour, stroke, points, band: Vec::new(), whiskers: Vec::new() }
    }
}

#[derive(Clone, Debug)]
pub struct LineChart {
    pub title: String,
    pub x_label: String,
    pub y_label: String,
    /// Labelled at whole numbers alone, such as steps.
    pub whole_x: bool,
    /// Values of 0 or below have no place on it and are left out.
    pub log_y: bool,
    pub series: Vec<Series>,
}

const SIZE: (u32, u32) = (900, 480);
const LEGEND_ROW: i32 = 36;

impl LineChart {
    /// One dotted line per name, in the order of the palette.
    pub fn of_lines(title: String, x_label: &str, y_label: &str, lines: Vec<(String, Vec<(f64, f64)>)>) -> LineChart {
        let whole_x = lines.iter().flat_map(|(_, points)| points).all(|(x, _)| x.fract() == 0.0);
        let series = lines.into_iter().enumerate();
        let series = series.map(|(place, (name, points))| Series::new(Some(name), place, Stroke::Dotted, points));
        let (x_label, y_label) = (x_label.into(), y_label.into());
        LineChart { title, x_label, y_label, whole_x, log_y: false, series: series.collect() }
    }

    /// As it is drawn: the logarithm on a logarithmic axis.
    fn y(&self, value: f64) -> f64 {
        match (self.log_y, value > 0.0) {
            (true, true) => value.log10(),
            (true, false) => f64::NAN,
            (false, _) => value,
        }
    }

    fn points(&self, series: &Series) -> Vec<(f64, f64)> {
        series.points.iter().map(|(x, y)| (*x, self.y(*y))).collect()
    }

    /// Bands and whiskers, as drawn.
    fn spans(&self, spans: &[(f64, f64, f64)]) -> Vec<(f64, f64, f64)> {
        let spans = spans.iter().map(|(x, low, high)| (*x, self.y(*low), self.y(*high)));
        spans.filter(|(_, low, high)| low.is_finite() && high.is_finite()).collect()
    }

    /// Every x and every drawn y.
    fn extents(&self) -> Option<((f64, f64), (f64, f64))> {
        let points = || self.series.iter().flat_map(|s| self.points(s));
        let spans = || self.series.iter().flat_map(|s| [self.spans(&s.band), self.spans(&s.whiskers)].concat());
        let x = extent(points().map(|p| p.0).chain(spans().map(|s| s.0)))?;
        let y = extent(points().map(|p| p.1).chain(spans().flat_map(|s| [s.1, s.2])))?;
        Some((x, y))
    }

    fn line<B: DrawingBackend>(&self, area: &Plane<B>, series: &Series) -> Drawn<()> {
        let (points, colour) = (self.points(series), style::line(series.colour));
        let stroke = match series.stroke {
            Stroke::Thin => colour.mix(0.4).stroke_width(2),
            Stroke::Dashed => style::ink().stroke_width(2),
            Stroke::Solid | Stroke::Dotted => colour.stroke_width(4),
        };
        // A line ends where a value is missing.
        for part in points.split(|(x, y)| !x.is_finite() || !y.is_finite()).filter(|part| !part.is_empty()) {
            if series.stroke == Stroke::Dashed {
                let dashes = DashedLineSeries::new(part.to_vec(), 9, 9, stroke);
                dashes.into_iter().try_for_each(|dash| area.draw(&dash)).map_err(text)?;
            } else {
                area.draw(&PathElement::new(part.to_vec(), stroke)).map_err(text)?;
            }
            let alone = part.len() == 1 && series.stroke != Stroke::Dashed;
            for point in part.iter().filter(|_| alone || series.stroke == Stroke::Dotted) {
                let radius = if series.stroke == Stroke::Dotted { 6 } else { 3 };
                area.draw(&Circle::new(*point, radius, colour.filled())).map_err(text)?;
            }
        }
        Ok(())
    }
}

type Plane<B> = DrawingArea<B, Cartesian2d<Axis, Axis>>;

/// From `low` to `high`, labelled at our own ticks.
#[derive(Clone)]
struct Axis {
    low: f64,
    high: f64,
    ticks: Vec<f64>,
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        from + ((value - self.low) / (self.high - self.low) * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.low..self.high
    }
}

impl Figure for LineChart {
    fn size(&self, _: Surface) -> (u32, u32) {
        SIZE
    }

    fn is_empty(&self) -> bool {
        self.extents().is_none()
    }

    fn draw<B: DrawingBackend>(&self, area: &Area<B>, surface: Surface) -> Drawn<Frame> {
        let Some((x, y)) = self.extents() else { return Err(format!("{}: nothing to draw", self.title)) };
        let x = if x.1 > x.0 { (x.0 - 0.01 * (x.1 - x.0), x.1 + 0.01 * (x.1 - x.0)) } else { (x.0 - 0.5, x.1 + 0.5) };
        let y = self.widened(y);
        let x_ticks = if self.whole_x { ticks::whole(x.0, x.1, 8) } else { ticks::linear(x.0, x.1, 8) };
        let y_ticks = self.y_ticks(y);
        let legend: Vec<&Series> =
            self.series.iter().filter(|s| surface == Surface::File && s.name.is_some()).collect();
        let area = match surface {
            Surface::File => {
                let area = area.titled(&self.title, style::label(style::TITLE_SIZE, style::ink())).map_err(text)?;
                let rows = legend_places(&legend, SIZE.0).last().map_or(0, |(_, y)| y + LEGEND_ROW);
                let (top, rest) = area.split_vertically(rows);
                draw_legend(&top, &legend)?;
                rest
            }
            Surface::Page => area.clone(),
        };
        // A page says it beside the title.
        let y_label = if surface == Surface::Page { "" } else { self.y_label.as_str() };
        let widest = y_ticks.iter().map(|t| self.y_text(*t).len()).max().unwrap_or(1) as u32;
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .margin_right(18)
            .x_label_area_size(74)
            .y_label_area_size(if y_label.is_empty() { 24 } else { 60 } + 14 * widest)
            .build_cartesian_2d(
                Axis { low: x.0, high: x.1, ticks: x_ticks },
                Axis { low: y.0, high: y.1, ticks: y_ticks },
            )
            .map_err(text)?;
        let place = |x: &f64| if self.whole_x { format!("{x:.0}") } else { ticks::number(*x) };
        let value = |y: &f64| self.y_text(*y);
        let mut mesh = chart.configure_mesh();
        mesh.disable_x_mesh().bold_line_style(style::grid().stroke_width(2)).light_line_style(TRANSPARENT);
        mesh.axis_style(style::grid().stroke_width(2)).x_label_formatter(&place).y_label_formatter(&value);
        mesh.label_style(style::label(style::LABEL_SIZE, style::muted()));
        mesh.axis_desc_style(style::label(style::LABEL_SIZE, style::muted())).x_desc(&self.x_label).y_desc(y_label);
        mesh.draw().map_err(text)?;

        let plane = chart.plotting_area();
        for series in &self.series {
            let band = self.spans(&series.band);
            let outline = band.iter().map(|(x, low, _)| (*x, *low)).chain(band.iter().rev().map(|(x, _, h)| (*x, *h)));
            if band.len() > 1 {
                let dashed = series.stroke == Stroke::Dashed;
                let colour = if dashed { style::muted() } else { style::line(series.colour) };
                let fill = colour.mix(if dashed { 0.08 } else { 0.13 }).filled();
                plane.draw(&Polygon::new(outline.collect::<Vec<_>>(), fill)).map_err(text)?;
            }
        }
        let mut ordered: Vec<&Series> = self.series.iter().collect();
        // Single seeds under their mean, and the plan over all.
        ordered.sort_by_key(|series| match series.stroke {
            Stroke::Thin => 0,
            Stroke::Dashed => 2,
            _ => 1,
        });
        for series in ordered {
            let stroke = style::line(series.colour).stroke_width(3);
            for (x, low, high) in self.spans(&series.whiskers) {
                plane.draw(&PathElement::new([(x, low), (x, high)], stroke)).map_err(text)?;
            }
            self.line(plane, series)?;
        }
        let (across, down) = plane.get_pixel_range();
        Ok(Frame { left: across.start, top: down.start, right: across.end, bottom: down.end, x })
    }
}

impl LineChart {
    /// Room above and below; what is never negative keeps 0 as its ground.
    fn widened(&self, (low, high): (f64, f64)) -> (f64, f64) {
        let margin = match high > low {
            true => 0.06 * (high - low),
            false if self.log_y => 0.5,
            false if high == 0.0 => 1.0,
            false => 0.05 * high.abs(),
        };
        let below = low - margin;
        (if !self.log_y && low >= 0.0 { below.max(0.0) } else { below }, high + margin)
    }

    fn y_ticks(&self, (low, high): (f64, f64)) -> Vec<f64> {
        if self.log_y { ticks::logarithmic(low, high) } else { ticks::linear(low, high, 5) }
    }

    fn y_text(&self, y: f64) -> String {
        ticks::number(if self.log_y { 10f64.powf(y) } else { y })
    }
}

/// Where the entries of a legend stand: beside each other, and on a further row where the width is used up.
fn legend_places(series: &[&Series], width: u32) -> Vec<(i32, i32)> {
    let (mut x, mut y) = (24, 4);
    let mut places = Vec::new();
    for name in series.iter().filter_map(|s| s.name.as_ref()) {
        let wide = 64 + 15 * name.chars().count() as i32;
        if x + wide > width as i32 && x > 24 {
            (x, y) = (24, y + LEGEND_ROW);
        }
        places.push((x, y));
        x += wide;
    }
    places
}

fn draw_legend<B: DrawingBackend>(area: &Area<B>, series: &[&Series]) -> Drawn<()> {
    for ((x, y), series) in legend_places(series, SIZE.0).into_iter().zip(series) {
        let dashed = series.stroke == Stroke::Dashed;
        let colour = if dashed { style::ink() } else { style::line(series.colour) };
        let swatch = if dashed { vec![(x, x + 10), (x + 16, x + 26)] } else { vec![(x, x + 26)] };
        for (from, to) in swatch {
            area.draw(&PathElement::new([(from, y + 16), (to, y + 16)], colour.stroke_width(4))).map_err(text)?;
        }
        let name = series.name.as_deref().unwrap_or_default();
        area.draw(&Text::new(name, (x + 34, y + 2), style::label(style::LABEL_SIZE - 2, style::ink())))
            .map_err(text)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analysis::plot;

    fn chart(points: Vec<(f64, f64)>) -> LineChart {
        let mut chart = LineChart::of_lines("t".into(), "step", "y", vec![("a <b>".into(), points)]);
        chart.series[0].band = chart.series[0].points.iter().map(|(x, y)| (*x, y - 1.0, y + 1.0)).collect();
        chart
    }

    #[test]
    fn a_chart_lies_within_its_frame_and_escapes_names() -> Result<(), Box<dyn std::error::Error>> {
        let (svg, frame) = plot::svg(&chart(vec![(1.0, 2.0), (2.0, f64::NAN), (3.0, 4.0)]))?;
        assert!(svg.contains("<polygon") && svg.matches("<circle").count() == 2, "{svg}");
        assert!(frame.left > 0 && frame.right <= 900 && frame.bottom <= 480 && frame.x.0 < 1.0 && frame.x.1 > 3.0);
        let dir = tempfile::tempdir()?;
        plot::write(&chart(vec![(1.0, 2.0)]), &dir.path().join("c"))?;
        let file = std::fs::read_to_string(dir.path().join("c.svg"))?;
        assert!(file.contains("a &lt;b&gt;") && !file.contains("<b>"), "{file}");
        assert!(std::fs::metadata(dir.path().join("c.png"))?.len() > 1000);
        Ok(())
    }

    #[test]
    fn nothing_finite_is_nothing_to_draw() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        plot::write(&chart(vec![(1.0, f64::NAN)]), &dir.path().join("c"))?;
        assert!(std::fs::read_dir(dir.path())?.next().is_none());
        let mut log = chart(vec![(1.0, 0.0), (2.0, -1.0)]);
        log.series[0].band.clear();
        log.log_y = true;
        assert!(log.is_empty() && plot::svg(&log).is_err());
        Ok(())
    }
}
