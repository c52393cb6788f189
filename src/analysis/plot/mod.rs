//! Charts, drawn once for every use: as SVG and PNG files, and as SVG inside a page.
//!
//! | file | what it draws or decides |
//! |---|---|
//! | `lines` | lines over steps or layers, with bands and whiskers |
//! | `heat_map` | a matrix as coloured cells with a colour bar |
//! | `style` | colours, on light and on dark ground; fonts |
//! | `ticks` | where an axis is labelled, and how numbers are written |
//! | `compact` | an SVG with thousands of cells made small |

pub mod heat_map;
pub mod lines;
pub mod style;
pub mod ticks;

mod compact;

use std::path::{Path, PathBuf};
use std::sync::Once;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use serde::Serialize;

use crate::{Error, Result};

pub use heat_map::{HeatMap, Scale};
pub use lines::{LineChart, Series, Stroke};

/// Where a drawing goes. A page has its own title, legend and ground.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Surface {
    File,
    Page,
}

/// Where in the picture the data lie: pixels of the edges, and the values at the left and right one.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Frame {
    pub left: i32,
    pub top: i32,
    pub right: i32,
    pub bottom: i32,
    pub x: (f64, f64),
}

pub type Area<B> = DrawingArea<B, Shift>;
/// Errors of a backend, as text: each backend has a type of its own.
pub type Drawn<T> = std::result::Result<T, String>;

/// What can be drawn on any backend.
pub trait Figure {
    /// Width and height in pixels.
    fn size(&self, surface: Surface) -> (u32, u32);
    /// Whether there is no finite value to draw.
    fn is_empty(&self) -> bool;
    fn draw<B: DrawingBackend>(&self, area: &Area<B>, surface: Surface) -> Drawn<Frame>;
}

/// Writes `stem`.svg and `stem`.png; nothing where there is no finite value.
///
/// # Errors
/// `Runtime` for what cannot be written.
pub fn write(figure: &impl Figure, stem: &Path) -> Result<()> {
    if figure.is_empty() {
        return Ok(());
    }
    // Added, not replaced: what follows a dot in a name, as in lr-0.01, belongs to it.
    let added = |extension: &str| {
        let mut name = stem.as_os_str().to_os_string();
        name.push(extension);
        PathBuf::from(name)
    };
    let (svg, png) = (added(".svg"), added(".png"));
    let text = svg_text(figure, Surface::File)?.0;
    std::fs::write(&svg, text).map_err(|e| Error::io(&svg, e))?;
    let area = BitMapBackend::new(&png, figure.size(Surface::File)).into_drawing_area();
    on(figure, &area, Surface::File).map_err(|e| Error::Runtime(format!("{}: {e}", png.display())))?;
    Ok(())
}

/// The figure as an SVG element, and where its data lie in it.
pub fn svg(figure: &impl Figure) -> Result<(String, Frame)> {
    svg_text(figure, Surface::Page)
}

fn svg_text(figure: &impl Figure, surface: Surface) -> Result<(String, Frame)> {
    let mut text = String::new();
    let frame = {
        let area = SVGBackend::with_string(&mut text, figure.size(surface)).into_drawing_area();
        on(figure, &area, surface).map_err(Error::Runtime)?
    };
    Ok((compact::compact(&text), frame))
}

fn on<B: DrawingBackend>(figure: &impl Figure, area: &Area<B>, surface: Surface) -> Drawn<Frame> {
    static REGISTERED: Once = Once::new();
    // The machine may have no font; this one is in the binary. It can be registered once.
    REGISTERED.call_once(|| drop(register_font(style::FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT)));
    if surface == Surface::File {
        area.fill(&WHITE).map_err(text)?;
    }
    let frame = figure.draw(area, surface)?;
    area.present().map_err(text)?;
    Ok(frame)
}

fn text<E: std::error::Error + Send + Sync>(e: DrawingAreaErrorKind<E>) -> String {
    e.to_string()
}

/// Lowest and highest finite value; None where there is none.
fn extent(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.filter(|v| v.is_finite()).fold(None, |found, v| match found {
        None => Some((v, v)),
        Some((low, high)) => Some((low.min(v), high.max(v))),
    })
}
