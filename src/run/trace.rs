//! A recording of spans as a Chrome trace: JSON that Perfetto (ui.perfetto.dev) and chrome://tracing load.
//!
//! One complete event ("ph": "X") a span, microseconds since the recording began, sorted by begin; `args.number` is the
//! step or micro-batch. `otherData` says what was traced, where NVTX ranges went and how many spans were left out.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Value, json};

use crate::ops::cuda::nvtx;
use crate::ops::profile::{Recorded, Recording};
use crate::{Error, Result, bail_input};

/// Makes the file, so that a wrong path is known before the work and not after it.
pub fn check(path: &Path) -> Result<()> {
    match File::create(path) {
        Ok(_) => Ok(()),
        Err(e) => bail_input!("--profile: {}: {e}; expected a file that can be written", path.display()),
    }
}

/// Writes `recording` to `path`. `what`: the command, for people who find the file.
pub fn write(path: &Path, what: &str, recording: Recording) -> Result<()> {
    let io = |e| Error::io(path, e);
    let mut file = BufWriter::new(File::create(path).map_err(io)?);
    write_to(&mut file, what, recording).and_then(|()| file.flush()).map_err(io)
}

fn write_to(out: &mut impl Write, what: &str, recording: Recording) -> std::io::Result<()> {
    let mut spans = recording.spans;
    // A span that holds another begins no later and is longer.
    spans.sort_by(|a, b| a.begin_us.total_cmp(&b.begin_us).then(b.duration_us.total_cmp(&a.duration_us)));
    let about = json!({
        "command": what,
        "temper": env!("CARGO_PKG_VERSION"),
        "nvtx": nvtx::library(),
        "spans_left_out": recording.left_out,
    });
    write!(out, "{{\"displayTimeUnit\":\"ms\",\"otherData\":{about},\"traceEvents\":[")?;
    // One at a time: a long run has millions.
    for (i, span) in spans.iter().enumerate() {
        write!(out, "{}\n{}", if i > 0 { "," } else { "" }, event(span))?;
    }
    writeln!(out, "\n]}}")
}

fn event(span: &Recorded) -> Value {
    let args = span.number.map_or(json!({}), |number| json!({"number": number}));
    json!({
        "name": span.name,
        "ph": "X",
        "ts": span.begin_us,
        "dur": span.duration_us,
        "pid": std::process::id(),
        "tid": span.thread,
        "args": args,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_json_in_the_order_of_their_begins() {
        let span = |name, number, begin_us, duration_us| Recorded { name, number, begin_us, duration_us, thread: 5 };
        let spans =
            vec![span("decode", None, 12.5, 2.0), span("rollout", None, 10.0, 5.0), span("step", Some(3), 10.0, 20.0)];
        let mut text = Vec::new();
        write_to(&mut text, "train \"x\"", Recording { spans, left_out: 2 }).unwrap_or_default();
        let trace: Value = serde_json::from_slice(&text).unwrap_or_default();
        let events = trace["traceEvents"].as_array().cloned().unwrap_or_default();
        let names: Vec<&str> = events.iter().filter_map(|e| e["name"].as_str()).collect();
        assert_eq!(names, ["step", "rollout", "decode"]);
        assert_eq!(
            (&events[0]["args"]["number"], &events[0]["ts"], &events[0]["dur"]),
            (&3.into(), &10.0.into(), &20.0.into())
        );
        assert!(events.iter().all(|e| e["ph"] == "X" && e["tid"] == 5 && e["pid"].is_u64()));
        assert_eq!(
            (&trace["otherData"]["command"], &trace["otherData"]["spans_left_out"]),
            (&"train \"x\"".into(), &2.into())
        );
        let mut empty = Vec::new();
        write_to(&mut empty, "", Recording::default()).unwrap_or_default();
        assert_eq!(serde_json::from_slice::<Value>(&empty).unwrap_or_default()["traceEvents"], json!([]));
    }
}
