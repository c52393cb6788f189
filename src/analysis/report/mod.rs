//! One self-contained HTML page about runs: what they did, and whether to trust it.
//!
//! | file | what of the page |
//! |---|---|
//! | `arms` | which runs there are, and all of them that is shown |
//! | `trust` | the head: what was run, and what speaks against believing it |
//! | `accuracies` | accuracy before and after, by arm and condition |
//! | `comparison` | tests between the arms |
//! | `curves`, `shown` | everything that has a value per step; which of it is shown, and how |
//! | `layers` | measured noise by layer and step |
//! | `samples` | some completions |
//! | `configuration` | how the arms' configurations differ |
//! | `page` | all of it through the template |

pub mod arms;

mod accuracies;
mod comparison;
mod configuration;
mod curves;
mod layers;
mod page;
mod samples;
mod shown;
mod trust;

use std::path::Path;

use serde::Serialize;

use self::arms::Arm;
use super::plot::{self, Figure as _, Frame, HeatMap, LineChart};
use super::warnings::{self, Warning};
use crate::{Error, Result};

/// A table whose cells are text.
#[derive(Serialize)]
struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

/// A figure of the page.
struct Figure {
    /// Of the file and of the place in the page.
    id: String,
    title: String,
    /// Of the values; empty for plain numbers.
    unit: String,
    note: String,
    plot: Plot,
    /// The one whose values it shows, where it is one of several.
    arm: Option<usize>,
    /// (place in the palette, arm, value): each arm's last value, beside the title.
    last: Vec<(usize, String, String)>,
    /// What a tooltip shows, besides the frame.
    values: serde_json::Value,
}

enum Plot {
    Lines(LineChart),
    Map(HeatMap),
}

impl Plot {
    fn is_empty(&self) -> bool {
        match self {
            Plot::Lines(chart) => chart.is_empty(),
            Plot::Map(map) => map.is_empty(),
        }
    }

    fn svg(&self) -> Result<(String, Frame)> {
        match self {
            Plot::Lines(chart) => plot::svg(chart),
            Plot::Map(map) => plot::svg(map),
        }
    }

    fn write(&self, stem: &Path) -> Result<()> {
        match self {
            Plot::Lines(chart) => plot::write(chart, stem),
            Plot::Map(map) => plot::write(map, stem),
        }
    }
}

/// Figures under one heading.
struct Group {
    id: &'static str,
    title: &'static str,
    note: String,
    figures: Vec<Figure>,
}

pub struct Report {
    arms: Vec<Arm>,
    groups: Vec<Group>,
    comparison: Option<comparison::Tests>,
    /// Each is said once: in the head, or above the comparison's table.
    warnings: Vec<Warning>,
}

impl Report {
    /// # Errors
    /// `Input`: validations whose marks contradict the counts beside them.
    pub fn new(arms: Vec<Arm>) -> Result<Report> {
        let mut groups = vec![
            curves::accuracy(&arms),
            curves::group(&arms, &shown::LEARNING),
            curves::group(&arms, &shown::INJECTION),
            layers::group(&arms),
            curves::machine(&arms),
        ];
        groups.retain(|group| !group.figures.is_empty());
        let warnings = warnings::of(&arms.iter().map(Arm::files).collect::<Vec<_>>());
        Ok(Report { comparison: comparison::tests_between(&arms, &warnings)?, arms, groups, warnings })
    }

    pub fn arms(&self) -> &[Arm] {
        &self.arms
    }

    /// Names of the figures, in the page's order.
    pub fn figures(&self) -> Vec<&str> {
        self.groups.iter().flat_map(|group| &group.figures).map(|figure| figure.id.as_str()).collect()
    }

    /// The page.
    pub fn html(&self) -> Result<String> {
        page::render(self)
    }

    /// Every figure as `directory`/ID.svg and ID.png.
    pub fn write_plots(&self, directory: &Path) -> Result<()> {
        std::fs::create_dir_all(directory).map_err(|e| Error::io(directory, e))?;
        let mut figures = self.groups.iter().flat_map(|group| &group.figures);
        figures.try_for_each(|figure| figure.plot.write(&directory.join(&figure.id)))
    }
}

/// The page, complete or not at all.
pub fn write(html: &str, path: &Path) -> Result<()> {
    crate::run::atomic_file::write(path, html.as_bytes())
}
