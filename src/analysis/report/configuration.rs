//! How the arms' configurations differ: keys written as `--set` takes them, without those that only name a run.

use serde_json::Value;

use super::Table;
use super::arms::Arm;
use crate::analysis::arms::{config_differences, plain};

/// None where there is one arm.
pub(super) fn differences(arms: &[Arm]) -> Option<Table> {
    let files: Vec<_> = arms.iter().map(Arm::files).collect();
    let rows = config_differences(&files).into_iter();
    let rows = rows.map(|found| std::iter::once(found.key).chain(found.values.values().map(text)).collect()).collect();
    let header = ["key"].into_iter().chain(arms.iter().map(|arm| arm.label.as_str())).map(str::to_string).collect();
    (arms.len() > 1).then_some(Table { header, rows })
}

fn text(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            map.iter().map(|(key, value)| format!("{key}: {}", plain(value))).collect::<Vec<_>>().join(", ")
        }
        Value::Array(list) => list.iter().map(plain).collect::<Vec<_>>().join(", "),
        value => plain(value),
    }
}
