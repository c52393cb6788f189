//! A smaller SVG of the same picture: neighbouring rectangles of one colour become one path. A heat map has thousands.

use std::fmt::Write as _;

/// Rectangles without a border that follow each other with the same paint; all else stays as it is, on one line less.
pub fn compact(svg: &str) -> String {
    let mut out = String::with_capacity(svg.len() / 2);
    let mut open: Option<(&str, &str)> = None; // opacity and fill of the path that is being written
    for line in svg.lines() {
        match rectangle(line) {
            Some(([x, y, width, height], paint)) => {
                if open != Some(paint) {
                    close(&mut out, &mut open);
                    let (opacity, fill) = paint;
                    let _ = write!(out, "<path opacity=\"{opacity}\" fill=\"{fill}\" d=\"");
                    open = Some(paint);
                }
                let _ = write!(out, "M{x} {y}h{width}v{height}h-{width}z");
            }
            None => {
                close(&mut out, &mut open);
                out.push_str(line);
                out.push('\n');
            }
        }
    }
    close(&mut out, &mut open);
    out
}

fn close(out: &mut String, open: &mut Option<(&str, &str)>) {
    if open.take().is_some() {
        out.push_str("\"/>\n");
    }
}

/// x, y, width, height and (opacity, fill) of a line that is a filled rectangle, in the order that plotters writes.
fn rectangle(line: &str) -> Option<([&str; 4], (&str, &str))> {
    let mut parts = line.strip_prefix("<rect ")?.strip_suffix(" stroke=\"none\"/>")?.split('"');
    let mut value = |name: &str| {
        let found = parts.next()?.trim();
        if found == name { parts.next() } else { None }
    };
    let place = [value("x=")?, value("y=")?, value("width=")?, value("height=")?];
    Some((place, (value("opacity=")?, value("fill=")?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rectangles_of_one_colour_become_one_path() {
        let rect = |x: u32, fill: &str| {
            format!(
                "<rect x=\"{x}\" y=\"2\" width=\"3\" height=\"4\" opacity=\"1\" fill=\"{fill}\" stroke=\"none\"/>\n"
            )
        };
        let svg =
            format!("<svg>\n{}{}{}<text>a</text>\n</svg>", rect(0, "#111111"), rect(3, "#111111"), rect(6, "#222222"));
        assert_eq!(
            compact(&svg),
            "<svg>\n<path opacity=\"1\" fill=\"#111111\" d=\"M0 2h3v4h-3zM3 2h3v4h-3z\"/>\n\
             <path opacity=\"1\" fill=\"#222222\" d=\"M6 2h3v4h-3z\"/>\n<text>a</text>\n</svg>\n"
        );
        let outlined =
            "<rect x=\"0\" y=\"0\" width=\"1\" height=\"1\" opacity=\"1\" fill=\"none\" stroke=\"#111111\"/>\n";
        assert_eq!(compact(outlined), outlined);
    }
}
