//! Colours and fonts. A figure is drawn in the colours of a light ground; `dark_css` gives a page the rules that turn
//! them into those of a dark one, so that one SVG serves both.

use std::fmt::Write as _;

use plotters::style::{FontTransform, IntoFont, RGBColor, TextStyle};

pub const FONT: &str = "sans-serif";
/// In pixels of the drawing, which a page shows at about half its size.
pub const LABEL_SIZE: u32 = 28;
pub const TITLE_SIZE: u32 = 30;

/// A colour on light and on dark ground.
type Pair = (u32, u32);
const INK: Pair = (0x1f2933, 0xe6eaee);
const MUTED: Pair = (0x5f6c7b, 0xa3afbb);
const GRID: Pair = (0xe1e6ec, 0x313a45);

/// Told apart also by those who see no red or no green; the first is the arm that others are compared with.
const PALETTE: [Pair; 8] = [
    (0x4a5568, 0xb3bdc9),
    (0x2563eb, 0x7ba7ff),
    (0xd9480f, 0xff9b61),
    (0x0f8a5f, 0x4fd3a4),
    (0x9c27b0, 0xe391f2),
    (0xb08900, 0xe9c84b),
    (0x0e7490, 0x5cd2e8),
    (0xbe123c, 0xff8da4),
];

/// Ends and middle of the diverging map, on either ground: below, as planned, above.
const BELOW: Pair = (0x1f5fbf, 0x5b9bff);
const MIDDLE: Pair = (0xeef0f2, 0x262e38);
const ABOVE: Pair = (0xc2410c, 0xff8a4c);
/// Steps of the diverging map; odd, so that one of them is "as planned".
pub const DIVERGING: usize = 21;

/// Low to high, dark to bright; readable on both grounds.
const SEQUENTIAL_STOPS: [u32; 6] = [0x2d1e5c, 0x3c4f8a, 0x2f7f8e, 0x37a97a, 0x9bcf4f, 0xf7e225];
pub const SEQUENTIAL: usize = 24;

pub fn ink() -> RGBColor {
    rgb(INK.0)
}

pub fn muted() -> RGBColor {
    rgb(MUTED.0)
}

pub fn grid() -> RGBColor {
    rgb(GRID.0)
}

/// The colour of the `place`-th line; after the last one they repeat.
pub fn line(place: usize) -> RGBColor {
    rgb(PALETTE[place % PALETTE.len()].0)
}

/// How many different colours lines have.
pub fn line_colours() -> usize {
    PALETTE.len()
}

/// As a drawing has them, by place.
pub fn drawn_lines() -> Vec<String> {
    PALETTE.iter().map(|pair| format!("#{:06X}", pair.0)).collect()
}

pub fn diverging(level: usize) -> RGBColor {
    rgb(diverging_pair(level).0)
}

pub fn sequential(level: usize) -> RGBColor {
    let at = level as f64 / (SEQUENTIAL - 1) as f64 * (SEQUENTIAL_STOPS.len() - 1) as f64;
    let stop = (at as usize).min(SEQUENTIAL_STOPS.len() - 2);
    rgb(mixed(SEQUENTIAL_STOPS[stop], SEQUENTIAL_STOPS[stop + 1], at - stop as f64))
}

/// Labels of axes.
pub fn label<'a>(size: u32, colour: RGBColor) -> TextStyle<'a> {
    (FONT, size).into_font().color(&colour)
}

/// The same, read from below.
pub fn upright<'a>(size: u32, colour: RGBColor) -> TextStyle<'a> {
    (FONT, size).into_font().transform(FontTransform::Rotate270).color(&colour)
}

/// The colour of every line by its place, as a custom property `--line-N`, and on dark ground the rules for what is
/// inside an `svg`.
pub fn light_css() -> String {
    let lines = PALETTE.iter().enumerate();
    lines.fold(":root{".to_string(), |css, (n, pair)| format!("{css}--line-{n}:#{:06x};", pair.0)) + "}\n"
}

pub fn dark_css() -> String {
    let lines = PALETTE.iter().enumerate();
    let mut css =
        lines.fold(":root{".to_string(), |css, (n, pair)| format!("{css}--line-{n}:#{:06x};", pair.1)) + "}\n";
    let levels: Vec<Pair> = (0..DIVERGING).map(diverging_pair).collect();
    for (light, dark) in [INK, MUTED, GRID].iter().chain(&PALETTE).chain(&levels) {
        for attribute in ["fill", "stroke"] {
            let _ = writeln!(css, "svg [{attribute}=\"#{light:06X}\"]{{{attribute}:#{dark:06x}}}");
        }
    }
    css
}

fn diverging_pair(level: usize) -> Pair {
    let at = 2.0 * level as f64 / (DIVERGING - 1) as f64 - 1.0;
    let end = if at < 0.0 { BELOW } else { ABOVE };
    (mixed(MIDDLE.0, end.0, at.abs()), mixed(MIDDLE.1, end.1, at.abs()))
}

/// `share` of the way from one colour to another.
fn mixed(from: u32, to: u32, share: f64) -> u32 {
    let channel = |shift: u32| {
        let (a, b) = (f64::from(from >> shift & 255), f64::from(to >> shift & 255));
        ((a + (b - a) * share).round() as u32) << shift
    };
    channel(16) | channel(8) | channel(0)
}

fn rgb(hex: u32) -> RGBColor {
    RGBColor((hex >> 16) as u8, (hex >> 8) as u8, hex as u8)
}
