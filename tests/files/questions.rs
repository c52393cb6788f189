//! GSM8K files: as published, as verl writes them, and broken.

use std::path::Path;

use temper::data::{self, Question};

use crate::{golden, shared};

fn error_of(path: &Path) -> String {
    let error = data::load(path, None).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    let text = error.to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

#[test]
fn the_published_files_load() {
    for (name, rows) in [("gsm8k_train.jsonl", 7473), ("gsm8k_test.jsonl", 1319)] {
        let Some(path) = shared(&format!("data/{name}")) else {
            return;
        };
        let questions = data::load(&path, None).unwrap();
        assert_eq!(questions.len(), rows);
        assert_eq!(data::count(&path, Some(96)).unwrap(), 96);
        assert_eq!(data::load(&path, Some(96)).unwrap(), questions[..96]);
        for (row, question) in questions.iter().enumerate() {
            assert_eq!(question.index as usize, row);
            assert!(question.ground_truth.chars().all(|c| c.is_ascii_digit() || c == '-' || c == '.'), "{question:?}");
            // The published solution earns its own reward.
            let score = temper::rl::reward::RewardScore::new(&question.answer, &question.ground_truth);
            assert_eq!((score.strict, score.numeric), (1.0, 1.0), "{question:?}");
        }
    }
}

#[test]
fn verl_parquet_is_the_raw_question_and_the_plain_truth() {
    let questions = data::load(&golden("verl.parquet"), None).unwrap();
    assert_eq!(questions.len(), 3);
    assert_eq!(
        questions[1],
        Question {
            index: 1,
            question: "Ben buys 2 pens at $600 each. What does he pay?".into(),
            answer: "2*600=1200\n#### 1,200".into(),
            ground_truth: "1200".into(),
        }
    );
    assert_eq!(questions[2].ground_truth, "-2");
    assert_eq!(data::load(&golden("verl.parquet"), Some(2)).unwrap(), questions[..2]);
}

#[test]
fn verl_parquet_without_extra_info_takes_the_user_turn() {
    let questions = data::load(&golden("verl_plain.parquet"), None).unwrap();
    assert!(questions[0].question.ends_with("How many are left? Write the answer after ####."));
    assert_eq!((questions[0].answer.as_str(), questions[0].ground_truth.as_str()), ("", "999"));
}

/// Other sets: the final answer as it stands, text or number, whatever the worked answer says.
#[test]
fn a_ground_truth_of_its_own_is_the_final_answer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q.jsonl");
    let lines = [
        "{\"question\": \"a?\", \"ground_truth\": \"\\\\frac{1}{2}\", \"level\": 5}",
        "{\"question\": \"b?\", \"ground_truth\": -1.5, \"answer\": \"so #### 2\"}",
        "{\"question\": \"c?\", \"ground_truth\": \" 1,234 \", \"answer\": \"no marker\"}",
    ];
    std::fs::write(&path, lines.join("\n")).unwrap();
    let questions = data::load(&path, None).unwrap();
    let truths: Vec<&str> = questions.iter().map(|q| q.ground_truth.as_str()).collect();
    assert_eq!(truths, ["\\frac{1}{2}", "-1.5", "1234"]);
    assert_eq!(questions[1].answer, "so #### 2");
}

#[test]
fn a_broken_line_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q.jsonl");
    let good = r##"{"question": "a?", "answer": "1+1=2\n#### 1,002 "}"##;
    for (bad, expected) in [
        ("{\"question\": \"a?\"", "q.jsonl:3: EOF while parsing an object"),
        ("{\"question\": \"a?\"}", "q.jsonl:3: missing field `answer`"),
        ("{\"question\": 3, \"answer\": \"#### 1\"}", "q.jsonl:3: invalid type: integer `3`"),
        ("[1]", "q.jsonl:3: "),
        ("{\"question\": \"a?\", \"answer\": \"2\"}", "q.jsonl:3: answer: found no final answer"),
        ("{\"question\": \"a?\", \"answer\": \"2 ####  \"}", "q.jsonl:3: answer: found no final answer"),
        ("{\"question\": \"a?\", \"ground_truth\": \" \"}", "q.jsonl:3: ground_truth: found an empty text"),
        ("{\"question\": \"a?\", \"ground_truth\": [1]}", "q.jsonl:3: data did not match"),
    ] {
        std::fs::write(&path, format!("{good}\r\n\n{bad}\n{good}\n")).unwrap();
        let error = error_of(&path);
        assert!(error.contains(expected), "{error:?}, expected {expected:?}");
        assert_eq!(data::load(&path, Some(1)).unwrap()[0].ground_truth, "1002");
    }
    std::fs::write(&path, [b"{\"question\": \"", &[0xFF, 0xFE][..], b"\"}"].concat()).unwrap();
    assert!(error_of(&path).contains("q.jsonl:1: "));
}

#[test]
fn files_that_are_no_questions_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    assert!(error_of(&path("absent.jsonl")).ends_with("absent.jsonl: no such file or directory"));
    std::fs::write(path("empty.jsonl"), "\n \n").unwrap();
    assert!(error_of(&path("empty.jsonl")).ends_with("found no questions, expected at least one"));
    std::fs::write(path("q.csv"), "a,b").unwrap();
    assert!(error_of(&path("q.csv")).ends_with("found \"csv\", expected .jsonl or .parquet"));
}

#[test]
fn a_damaged_parquet_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q.parquet");
    let sound = std::fs::read(golden("verl.parquet")).unwrap();
    for length in [0, 3, 8, 100, sound.len() / 2, sound.len() - 1] {
        std::fs::write(&path, &sound[..length]).unwrap();
        assert!(error_of(&path).contains("q.parquet: "), "{}", error_of(&path));
    }
    for at in (0..sound.len()).step_by(3) {
        for value in [0, 0x7F, 0xFF] {
            let mut changed = sound.clone();
            changed[at] = value;
            std::fs::write(&path, changed).unwrap();
            if data::load(&path, None).is_err() {
                error_of(&path);
            }
        }
    }
}
