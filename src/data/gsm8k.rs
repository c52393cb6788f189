//! Files of questions: GSM8K's published jsonl (`question`, `answer` ending in `#### N`) and verl's parquet.
//!
//! A jsonl line may have `ground_truth` (text or a number) beside or in place of `answer`: it is the final answer then, so
//! that other sets fit, with `reward.kind: numeric` or a command to score them.
//!
//! verl's columns: `data_source`, `prompt` (list of {role, content}), `ability`, `reward_model`
//! {style, ground_truth}, `extra_info` {split, index, question, answer}. The question is the raw one of
//! `extra_info`, so that `data.prompt_suffix` decides the instruction; without it, the last user turn of
//! `prompt` as it stands.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde::Deserialize;

use super::Question;
use crate::error::one_line;
use crate::{Error, Result, bail_input, input_error};

#[derive(Deserialize)]
struct Line {
    question: String,
    answer: Option<String>,
    ground_truth: Option<Truth>,
}

/// Some writers store a number.
#[derive(Deserialize)]
#[serde(untagged)]
enum Truth {
    Text(String),
    Number(serde_json::Number),
}

/// Reads the published form; blank lines are skipped.
pub fn load_jsonl(path: &Path, limit: Option<usize>) -> Result<Vec<Question>> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut questions = Vec::new();
    let mut lines = BufReader::new(file).split(b'\n').enumerate();
    while limit.is_none_or(|limit| questions.len() < limit) {
        let Some((number, bytes)) = lines.next() else {
            break;
        };
        let bytes = bytes.map_err(|e| Error::io(path, e))?;
        if bytes.trim_ascii().is_empty() {
            continue;
        }
        let place = || format!("{}:{}", path.display(), number + 1);
        let line: Line = serde_json::from_slice(&bytes)
            .map_err(|e| input_error!("{}: {}, expected {{\"question\", \"answer\"}}", place(), json_problem(&e)))?;
        let given = line.ground_truth.map(|truth| match truth {
            Truth::Text(text) => text.trim().replace(',', ""),
            Truth::Number(number) => number.to_string(),
        });
        let ground_truth = match (given, &line.answer) {
            (Some(truth), _) if truth.is_empty() => bail_input!("{}: ground_truth: found an empty text", place()),
            (Some(truth), _) => truth,
            (None, Some(answer)) => final_answer(answer).map_err(|e| e.at(place()))?,
            (None, None) => {
                bail_input!("{}: missing field `answer`, expected {{\"question\", \"answer\"}}", place())
            }
        };
        let (index, answer) = (questions.len() as u32, line.answer.unwrap_or_default());
        questions.push(Question { index, question: line.question, answer, ground_truth });
    }
    Ok(questions)
}

/// Reads verl's form.
pub fn load_parquet(path: &Path, limit: Option<usize>) -> Result<Vec<Question>> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    caught(|| read_parquet(path, file, limit)).unwrap_or_else(|| {
        let place = path.display();
        bail_input!("{place}: not a readable parquet file: its pages are damaged")
    })
}

fn read_parquet(path: &Path, file: File, limit: Option<usize>) -> Result<Vec<Question>> {
    let broken = |e: parquet::errors::ParquetError| {
        let problem = one_line(e);
        input_error!("{}: not a readable parquet file: {problem}", path.display())
    };
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let rows = reader.get_row_iter(None).map_err(broken)?;
    rows.take(limit.unwrap_or(usize::MAX))
        .enumerate()
        .map(|(number, row)| {
            let place = format!("{}: row {number}", path.display());
            question_of_row(number as u32, &row.map_err(broken)?).map_err(|e| e.at(place))
        })
        .collect()
}

/// `None` where `work` panics, silently: the parquet crate asserts on some damaged pages (about 1 in 300
/// single-byte changes of a small file) instead of returning an error.
fn caught<T>(work: impl FnOnce() -> T) -> Option<T> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    // Nothing that `work` touches outlives a panic: it owns the file and builds its result.
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    std::panic::set_hook(hook);
    result.ok()
}

fn question_of_row(index: u32, row: &Row) -> Result<Question> {
    let extra = column(row, "extra_info").and_then(group);
    let text = |key| extra.and_then(|row| column(row, key)).and_then(string);
    let question = match text("question").or_else(|| last_user_turn(row)) {
        Some(question) => question,
        None => {
            bail_input!("found no question, expected extra_info.question or a user turn in prompt")
        }
    };
    let truth = column(row, "reward_model").and_then(group).and_then(|row| column(row, "ground_truth"));
    let ground_truth = match truth.and_then(string) {
        Some(truth) => truth.trim().replace(',', ""),
        None => bail_input!("reward_model.ground_truth: missing, expected the final answer"),
    };
    Ok(Question { index, question, answer: text("answer").unwrap_or_default(), ground_truth })
}

fn last_user_turn(row: &Row) -> Option<String> {
    let Some(Field::ListInternal(turns)) = column(row, "prompt") else {
        return None;
    };
    let turns = turns.elements().iter().filter_map(group);
    let user = turns.filter(|turn| column(turn, "role").and_then(string).is_some_and(|r| r == "user"));
    user.last().and_then(|turn| column(turn, "content")).and_then(string)
}

fn column<'a>(row: &'a Row, name: &str) -> Option<&'a Field> {
    row.get_column_iter().find(|(key, _)| *key == name).map(|(_, field)| field)
}

fn group(field: &Field) -> Option<&Row> {
    match field {
        Field::Group(row) => Some(row),
        _ => None,
    }
}

/// Text, or a whole number as text (some writers store the ground truth as one).
fn string(field: &Field) -> Option<String> {
    match field {
        Field::Str(text) => Some(text.clone()),
        Field::Int(number) => Some(number.to_string()),
        Field::Long(number) => Some(number.to_string()),
        _ => None,
    }
}

/// The text after the last `####`, without commas.
fn final_answer(answer: &str) -> Result<String> {
    let last = answer.rsplit_once("####").map(|(_, last)| last.trim().replace(',', ""));
    match last.filter(|text| !text.is_empty()) {
        Some(text) => Ok(text),
        None => bail_input!("answer: found no final answer, expected one after \"####\""),
    }
}

/// serde_json's message without its own line number: the file has one already.
fn json_problem(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" at line ").map_or(text.clone(), |(problem, _)| problem.to_string())
}
