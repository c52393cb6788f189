//! A matrix as coloured cells with a colour bar: rows downwards (layers), columns to the right (steps).

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{Area, Drawn, Figure, Frame, Surface, style, text, ticks};

/// What colours mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    /// A ratio whose middle is 1, from 1/limit to limit by its logarithm; what lies beyond has the colour of the end.
    Ratio { limit: f64 },
    /// Positive values, by their logarithm.
    Logarithmic { low: f64, high: f64 },
}

#[derive(Clone, Debug)]
pub struct HeatMap {
    pub title: String,
    pub x_label: String,
    pub y_label: String,
    /// What a column stands for: its first step.
    pub columns: Vec<f64>,
    pub rows: Vec<String>,
    /// By row, then column; what has no colour (NaN) stays empty.
    pub values: Vec<Vec<f64>>,
    pub scale: Scale,
}

const WIDTH: i32 = 1000;
const LEFT: i32 = 110;
const RIGHT: i32 = 130;
const TOP: i32 = 14;
const BOTTOM: i32 = 72;
const TITLE: i32 = 40;

impl HeatMap {
    /// Least and greatest value of the colour bar.
    fn range(&self) -> (f64, f64) {
        match self.scale {
            Scale::Ratio { limit } => (1.0 / limit, limit),
            Scale::Logarithmic { low, high } => (low, high),
        }
    }

    fn levels(&self) -> usize {
        if matches!(self.scale, Scale::Ratio { .. }) { style::DIVERGING } else { style::SEQUENTIAL }
    }

    fn colour(&self, level: usize) -> RGBColor {
        if matches!(self.scale, Scale::Ratio { .. }) { style::diverging(level) } else { style::sequential(level) }
    }

    /// Its step on the colour bar. 0 is below everything; without a value there is none.
    fn level(&self, value: f64) -> Option<usize> {
        let (low, high) = self.range();
        if value.is_nan() || (value <= 0.0 && matches!(self.scale, Scale::Logarithmic { .. })) {
            return None;
        }
        let at = if high > low { (value.max(0.0) / low).ln() / (high / low).ln() } else { 0.5 };
        Some((at.clamp(0.0, 1.0) * (self.levels() - 1) as f64).round() as usize)
    }

    fn row_height(&self) -> i32 {
        (340 / self.rows.len().max(1) as i32).clamp(9, 26)
    }

    fn height(&self) -> i32 {
        self.row_height() * self.rows.len() as i32
    }

    fn colour_bar<B: DrawingBackend>(&self, area: &Area<B>, top: i32) -> Drawn<()> {
        let (low, high) = self.range();
        let (levels, height, left) = (self.levels() as i32, self.height(), WIDTH - RIGHT + 24);
        for level in 0..levels {
            let bottom = top + height - height * level / levels;
            let upper = top + height - height * (level + 1) / levels;
            let cell = Rectangle::new([(left, upper), (left + 20, bottom)], self.colour(level as usize).filled());
            area.draw(&cell).map_err(text)?;
        }
        let label = style::label(style::LABEL_SIZE - 4, style::muted()).pos(Pos::new(HPos::Left, VPos::Center));
        let middle = (low * high).sqrt();
        let marks = if high > low { vec![(high, 0.0), (middle, 0.5), (low, 1.0)] } else { vec![(low, 0.5)] };
        for (value, at) in marks {
            let y = top + 8 + ((height - 16) as f64 * at) as i32;
            area.draw(&Text::new(ticks::number(value), (left + 28, y), label.clone())).map_err(text)?;
        }
        Ok(())
    }

    fn labels<B: DrawingBackend>(&self, area: &Area<B>, columns: &[i32], top: i32) -> Drawn<()> {
        let style = style::label(style::LABEL_SIZE - 4, style::muted());
        let right = style.clone().pos(Pos::new(HPos::Right, VPos::Center));
        let every = (26 + self.row_height() - 1) / self.row_height();
        let last = self.rows.len().saturating_sub(1);
        for (row, name) in self.rows.iter().enumerate() {
            // The last row is named always, so those that would touch it are not.
            if row == last || (row as i32 % every == 0 && (last - row) as i32 >= every) {
                let y = top + self.row_height() * row as i32 + self.row_height() / 2;
                area.draw(&Text::new(name.as_str(), (LEFT - 10, y), right.clone())).map_err(text)?;
            }
        }
        let bottom = top + self.height();
        let centred = style.clone().pos(Pos::new(HPos::Center, VPos::Top));
        let mut free = i32::MIN; // where the next label may begin
        for (column, value) in self.columns.iter().enumerate() {
            let (x, name) = ((columns[column] + columns[column + 1]) / 2, format!("{value:.0}"));
            let half = 7 * name.len() as i32 + 2;
            let wanted =
                column == 0 || ticks::whole(self.columns[0], *self.columns.last().unwrap_or(&0.0), 10).contains(value);
            if wanted && x - half > free {
                area.draw(&Text::new(name, (x, bottom + 8), centred.clone())).map_err(text)?;
                free = x + half + 8;
            }
        }
        let middle = ((LEFT + WIDTH - RIGHT) / 2, bottom + 38);
        area.draw(&Text::new(self.x_label.as_str(), middle, centred)).map_err(text)?;
        let upright = style::upright(style::LABEL_SIZE - 4, style::muted()).pos(Pos::new(HPos::Center, VPos::Top));
        let middle = (6, top + self.height() / 2);
        area.draw(&Text::new(self.y_label.as_str(), middle, upright)).map_err(text)
    }
}

impl Figure for HeatMap {
    fn size(&self, surface: Surface) -> (u32, u32) {
        let title = if surface == Surface::File { TITLE } else { 0 };
        (WIDTH as u32, (TOP + self.height() + BOTTOM + title) as u32)
    }

    fn is_empty(&self) -> bool {
        !self.values.iter().flatten().any(|value| self.level(*value).is_some())
    }

    fn draw<B: DrawingBackend>(&self, area: &Area<B>, surface: Surface) -> Drawn<Frame> {
        if self.is_empty() {
            return Err(format!("{}: nothing to draw", self.title));
        }
        let top = match surface {
            Surface::File => {
                let style = style::label(style::TITLE_SIZE, style::ink()).pos(Pos::new(HPos::Center, VPos::Top));
                area.draw(&Text::new(self.title.as_str(), (WIDTH / 2, 10), style)).map_err(text)?;
                TOP + TITLE
            }
            Surface::Page => TOP,
        };
        let (width, count) = (WIDTH - LEFT - RIGHT, self.columns.len().max(1) as i32);
        let edges: Vec<i32> = (0..=count).map(|column| LEFT + width * column / count).collect();
        // By colour, so that an SVG can join the cells of one.
        let mut cells: Vec<(usize, usize, usize)> = Vec::new();
        for (row, values) in self.values.iter().enumerate() {
            let level = |(column, value): (usize, &f64)| Some((self.level(*value)?, row, column));
            cells.extend(values.iter().enumerate().filter_map(level));
        }
        cells.sort_unstable();
        for (level, row, column) in cells {
            let y = top + self.row_height() * row as i32;
            let corners = [(edges[column], y), (edges[column + 1], y + self.row_height())];
            area.draw(&Rectangle::new(corners, self.colour(level).filled())).map_err(text)?;
        }
        let bottom = top + self.height();
        let outline = Rectangle::new([(LEFT, top), (WIDTH - RIGHT, bottom)], style::grid().stroke_width(2));
        area.draw(&outline).map_err(text)?;
        self.colour_bar(area, top)?;
        self.labels(area, &edges, top)?;
        Ok(Frame { left: LEFT, top, right: WIDTH - RIGHT, bottom, x: (0.0, f64::from(count)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analysis::plot;

    fn map(values: Vec<Vec<f64>>, scale: Scale) -> HeatMap {
        HeatMap {
            title: "t".into(),
            x_label: "step".into(),
            y_label: "layer".into(),
            columns: (1..=values[0].len()).map(|c| c as f64).collect(),
            rows: (0..values.len()).map(|r| r.to_string()).collect(),
            values,
            scale,
        }
    }

    #[test]
    fn one_is_the_middle_and_the_ends_hold_what_lies_beyond() {
        let ratios = map(vec![vec![1.0, 0.5, 2.0, 9.0, 0.0, f64::INFINITY, f64::NAN]], Scale::Ratio { limit: 2.0 });
        let levels: Vec<_> = ratios.values[0].iter().map(|v| ratios.level(*v)).collect();
        assert_eq!(levels, [Some(10), Some(0), Some(20), Some(20), Some(0), Some(20), None]);
    }

    #[test]
    fn every_value_is_a_cell_and_none_is_none() -> Result<(), Box<dyn std::error::Error>> {
        let drawn = map(vec![vec![1.0, 0.0], vec![f64::NAN, 10.0]], Scale::Logarithmic { low: 1.0, high: 10.0 });
        let (svg, frame) = plot::svg(&drawn)?;
        let cells = svg.matches(&format!("M{} ", frame.left)).count()
            + svg.matches(&format!("M{} ", (LEFT + WIDTH - RIGHT) / 2)).count();
        assert_eq!(cells, 2, "{svg}");
        assert!(map(vec![vec![f64::NAN, 0.0]], Scale::Logarithmic { low: 1.0, high: 1.0 }).is_empty());
        Ok(())
    }
}
