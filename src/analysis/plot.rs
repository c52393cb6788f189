//! Line charts, as SVG and PNG.

use std::path::Path;
use std::sync::Once;

use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use crate::{Error, Result};

/// Values over an integer axis, such as a metric over layers.
pub struct Chart {
    pub title: String,
    pub x_label: String,
    pub y_label: String,
    /// (name, values (x, y)); what is not finite is left out.
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
}

const SIZE: (u32, u32) = (900, 480);
const FONT: &str = "sans-serif";

impl Chart {
    /// Writes `stem`.svg and `stem`.png; nothing where there is no finite value.
    ///
    /// # Errors
    /// `Io` for what cannot be written.
    pub fn write(&self, stem: &Path) -> Result<()> {
        static REGISTERED: Once = Once::new();
        // The machine may have no font; this one is in the binary. It can be registered once.
        REGISTERED.call_once(|| drop(register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT)));
        let (svg, png) = (stem.with_extension("svg"), stem.with_extension("png"));
        self.draw(SVGBackend::new(&svg, SIZE)).map_err(|e| Error::Runtime(format!("{}: {e}", svg.display())))?;
        self.draw(BitMapBackend::new(&png, SIZE)).map_err(|e| Error::Runtime(format!("{}: {e}", png.display())))
    }

    fn draw<B: DrawingBackend>(&self, backend: B) -> std::result::Result<(), String> {
        let text = |e: DrawingAreaErrorKind<B::ErrorType>| e.to_string();
        let points = || self.lines.iter().flat_map(|(_, values)| values).filter(|(_, y)| y.is_finite());
        let range = |of: fn(&(f64, f64)) -> f64| {
            let (low, high) =
                points().map(of).fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
            let margin = if high > low { 0.05 * (high - low) } else { 0.5 };
            low - margin..high + margin
        };
        if points().next().is_none() {
            return Ok(());
        }
        let area = backend.into_drawing_area();
        area.fill(&WHITE).map_err(text)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(&self.title, (FONT, 20))
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(72)
            .build_cartesian_2d(range(|p| p.0), range(|p| p.1))
            .map_err(text)?;
        let mut mesh = chart.configure_mesh();
        let number = |x: &f64| if x.fract() == 0.0 { format!("{x}") } else { String::new() };
        mesh.x_desc(&self.x_label).y_desc(&self.y_label).label_style((FONT, 14)).axis_desc_style((FONT, 15));
        mesh.x_label_formatter(&number).light_line_style(WHITE).draw().map_err(text)?;
        for (place, (name, values)) in self.lines.iter().enumerate() {
            let colour = Palette99::pick(place).mix(1.0);
            let finite: Vec<(f64, f64)> = values.iter().copied().filter(|(_, y)| y.is_finite()).collect();
            let line = LineSeries::new(finite.clone(), colour.stroke_width(2));
            let drawn = chart.draw_series(line).map_err(text)?;
            drawn.label(name).legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
            let dots = finite.iter().map(|point| Circle::new(*point, 3, colour.filled()));
            chart.draw_series(dots).map_err(text)?;
        }
        let mut legend = chart.configure_series_labels();
        legend.label_font((FONT, 14)).background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3));
        legend.draw().map_err(text)?;
        area.present().map_err(text)
    }
}
