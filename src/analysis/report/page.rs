//! The data through the template: one HTML text that needs nothing beside it.

use minijinja::value::Serde;
use minijinja::{Environment, context};
use serde::Serialize;
use serde_json::{Value, json};

use super::{Figure, Group, Report, accuracies, configuration, samples, trust};
use crate::analysis::plot::style;
use crate::error::one_line;
use crate::{Error, Result};

/// Values that the template must not escape are named in it by `safe`: our own SVG, CSS, JavaScript and JSON.
const TEMPLATE: &str = include_str!("page.html");
const CSS: &str = include_str!("page.css");
const JS: &str = include_str!("page.js");

#[derive(Serialize)]
struct Legend {
    label: String,
    colour: usize,
    seeds: usize,
}

#[derive(Serialize)]
struct ShownGroup<'a> {
    id: &'a str,
    title: &'a str,
    note: &'a str,
    figures: Vec<ShownFigure<'a>>,
}

#[derive(Serialize)]
struct ShownFigure<'a> {
    id: &'a str,
    title: &'a str,
    unit: &'a str,
    note: &'a str,
    last: &'a [(usize, String, String)],
    arm: Option<usize>,
    svg: String,
    /// JSON, safe inside a script element.
    data: String,
}

pub(super) fn render(report: &Report) -> Result<String> {
    let arms = &report.arms;
    let groups = report.groups.iter().map(shown).collect::<Result<Vec<_>>>()?;
    let legend = arms.iter().enumerate();
    let legend: Vec<Legend> = legend
        .map(|(place, arm)| Legend {
            label: arm.label.clone(),
            colour: place % style::line_colours(),
            seeds: arm.runs.len(),
        })
        .collect();
    let resolved: Vec<_> =
        arms.iter().map(|arm| (&arm.label, arm.runs[0].files.seed, &arm.runs[0].files.config_text)).collect();
    let mut environment = Environment::new();
    // By the name: .html escapes.
    environment.add_template("page.html", TEMPLATE).map_err(failed)?;
    environment.add_filter("colour", |place: usize| place % style::line_colours());
    let template = environment.get_template("page.html").map_err(failed)?;
    template
        .render(context! {
            title => title(report),
            css => format!("{}{}", style::light_css(), CSS),
            dark_css => style::dark_css(),
            js => JS,
            palette => json!(style::drawn_lines()).to_string(),
            written => crate::run::machine::utc_now(),
            version => env!("CARGO_PKG_VERSION"),
            facts => Serde(trust::facts(arms)),
            checks => Serde(trust::checks(arms, &report.warnings)),
            runs => Serde(trust::runs(arms)),
            legend => Serde(legend),
            accuracies => Serde(accuracies::accuracies(arms)),
            comparison => Serde(&report.comparison),
            groups => Serde(groups),
            samples => Serde(samples::samples(arms)),
            differences => Serde(configuration::differences(arms)),
            resolved => Serde(resolved),
        })
        .map_err(failed)
}

/// The names of the runs, or what they share.
fn title(report: &Report) -> String {
    let first = &report.arms[0];
    let name = &first.runs[0].files.name;
    match name.strip_suffix(first.label.as_str()).map(|shared| shared.trim_end_matches('-')) {
        Some(shared) if !shared.is_empty() => shared.to_string(),
        _ if report.arms.len() == 1 => name.clone(),
        _ => report.arms.iter().map(|arm| arm.label.as_str()).collect::<Vec<_>>().join(", "),
    }
}

fn shown(group: &Group) -> Result<ShownGroup<'_>> {
    let figures = group.figures.iter().map(shown_figure).collect::<Result<_>>()?;
    Ok(ShownGroup { id: group.id, title: group.title, note: &group.note, figures })
}

fn shown_figure(figure: &Figure) -> Result<ShownFigure<'_>> {
    let (svg, frame) = figure.plot.svg()?;
    let data = json!({"frame": frame, "values": figure.values});
    Ok(ShownFigure {
        id: &figure.id,
        title: &figure.title,
        unit: &figure.unit,
        note: &figure.note,
        last: &figure.last,
        arm: figure.arm,
        svg,
        data: for_script(&data),
    })
}

/// No `<` can end the element that it stands in.
fn for_script(value: &Value) -> String {
    value.to_string().replace('<', "\\u003c")
}

fn failed(e: minijinja::Error) -> Error {
    Error::Runtime(one_line(format!("report page: {e:#}")))
}
