//! Rewards of commands and sums: what is asked, and what becomes of a command that is slow, wrong or gone.

use temper::rl::recipe::PreparedQuestion;
use temper::rl::reward::scorer::{Item, Scored, Scorer, overlong_penalty};
use temper::rl::section::{Overlong, RewardKind, RewardMode, RewardPart, RewardSection};

/// A Python program that has `json`, `sys` and a function `answer(id, reward)`.
fn python(program: &str) -> Option<Vec<String>> {
    let head = "import json, sys, time\ndef answer(id, reward):\n    print(json.dumps({'id': id, 'reward': reward}), flush=True)\n";
    Some(vec!["python3".to_string(), "-c".to_string(), format!("{head}{program}")])
}

/// Answers each line with the length of its response.
const LENGTHS: &str = "for line in sys.stdin:\n    r = json.loads(line)\n    answer(r['id'], len(r['response']))";

fn command(program: &str) -> RewardSection {
    RewardSection { kind: RewardKind::Command, command: python(program), timeout_s: 20.0, ..RewardSection::default() }
}

fn question() -> PreparedQuestion {
    PreparedQuestion { index: 5, question: "7+5?".into(), prompt_ids: vec![], ground_truth: "12".into() }
}

fn items<'a>(question: &'a PreparedQuestion, texts: &[&'a str]) -> Vec<Item<'a>> {
    (0..).zip(texts).map(|(member, text)| Item { question, text, member, validation: false }).collect()
}

fn rewards(scorer: &Scorer, texts: &[&str]) -> Vec<Option<f64>> {
    let question = question();
    scorer.score(&items(&question, texts)).unwrap().into_iter().map(|scored| scored.reward).collect()
}

#[test]
fn one_process_answers_all_batches_in_any_order() {
    let backwards = "
seen = 0
while True:
    batch = [json.loads(sys.stdin.readline()) for _ in range(3)]
    for r in reversed(batch):
        seen += 1
        assert (r['question'], r['ground_truth'], r['dataset_index'], r['phase']) == ('7+5?', '12', 5, 'rollout')
        answer(r['id'], None if r['response'] == 'odd' else seen + r['member'] / 10)";
    let scorer = Scorer::new(&command(backwards)).unwrap();
    assert_eq!(rewards(&scorer, &["a", "b", "c"]), [Some(3.0), Some(2.1), Some(1.2)]);
    assert_eq!(rewards(&scorer, &["a", "odd", "c"]), [Some(6.0), None, Some(4.2)], "the same process");
    assert!(scorer.take_warnings().is_empty());
}

/// Far more than a pipe holds, both ways, to a command that reads nothing before it has written.
#[test]
fn full_pipes_block_nobody() {
    let program = "
for i in range(4000):
    answer(i, i)
    print(' ' * 100)
for line in sys.stdin: pass";
    let scorer = Scorer::new(&command(program)).unwrap();
    let text = "long ".repeat(100);
    let found = rewards(&scorer, &vec![text.as_str(); 4000]);
    assert!(found.iter().enumerate().all(|(i, r)| *r == Some(i as f64)));
}

#[test]
fn what_a_command_does_not_answer_is_unscorable() {
    let question = question();
    for (program, timeout_s, says) in [
        ("answer(0, 1)\nsys.exit(3)", 20.0, "it ended (exit status: 3)"),
        ("answer(0, 1)\ntime.sleep(60)", 1.0, "no answer in 1 s (reward.timeout_s)"),
        ("answer(0, 1)\nprint('no idea', flush=True)\ntime.sleep(60)", 20.0, "it wrote `no idea`, expected {\"id\""),
        ("answer(0, 1)\nanswer(0, 1)\ntime.sleep(60)", 20.0, "expected the id of a request that is still open"),
        ("answer(0, 1)\nanswer(1, 'much')\ntime.sleep(60)", 20.0, "it wrote `{\"id\": 1"),
    ] {
        let scorer = Scorer::new(&RewardSection { timeout_s, max_restarts: 1, ..command(program) }).unwrap();
        let started = std::time::Instant::now();
        assert_eq!(rewards(&scorer, &["a", "b", "c"]), [Some(1.0), None, None], "{says}");
        assert!(started.elapsed().as_secs() < 10, "{says}");
        let warnings = scorer.take_warnings();
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains(says) && warnings[0].contains("restart 1 of 1"), "{warnings:?}");
        // Restarted once; ids go on, so that id 0 is wrong now, and the run is over.
        let error = scorer.score(&items(&question, &["a"])).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains("that was failure 2 (reward.max_restarts: 1)"), "{error}");
    }
}

/// A crash costs its batch what is open, and no more: the next one is scored.
#[test]
fn a_restart_scores_on() {
    let program = format!(
        "import os\n{}",
        LENGTHS.replace("answer(r['id']", "len(r['response']) == 5 and os.abort()\n    answer(r['id']")
    );
    let scorer = Scorer::new(&command(&program)).unwrap();
    assert_eq!(rewards(&scorer, &["a", "crash", "c"]), [Some(1.0), None, None]);
    assert!(scorer.take_warnings()[0].contains("signal: 6"));
    assert_eq!(rewards(&scorer, &["aa", "bbb"]), [Some(2.0), Some(3.0)]);
    assert!(scorer.take_warnings().is_empty());
}

#[test]
fn a_command_that_is_not_there_is_a_bad_input() {
    let section = RewardSection { command: Some(vec!["no-such-scorer".into()]), ..command("") };
    let error = Scorer::new(&section).err().unwrap();
    assert_eq!(error.exit_code(), 2);
    assert!(
        error.to_string().starts_with("reward.command: found [\"no-such-scorer\"], which cannot be started"),
        "{error}"
    );
}

/// 2 * (right by number) - .25 * characters; the first part says what is right.
#[test]
fn a_sum_weighs_its_parts() {
    let part = |kind, weight, command| RewardPart { kind, weight, command, mode: RewardMode::Strict };
    let none_of_empty = LENGTHS.replace("len(r['response'])", "len(r['response']) or None");
    let section = RewardSection {
        sum: vec![part(RewardKind::Numeric, 2.0, None), part(RewardKind::Command, -0.25, python(&none_of_empty))],
        ..RewardSection::default()
    };
    let scorer = Scorer::new(&section).unwrap();
    let question = question();
    let items = items(&question, &["so 12.0", "11", ""]);
    let scored = scorer.score(&items).unwrap();
    let expected = |reward, parts: [Option<f64>; 2]| Scored { reward, parts: parts.to_vec() };
    assert_eq!(scored[0], expected(Some(2.0 - 1.75), [Some(1.0), Some(7.0)]));
    assert_eq!(scored[1], expected(Some(-0.5), [Some(0.0), Some(2.0)]));
    assert_eq!(scored[2], expected(None, [Some(0.0), None]), "one part is unscorable, and so is the sum");
    assert_eq!(scorer.correct(&items).unwrap(), [true, false, false]);
}

/// Lmax 100, buffer 20: nothing up to 80, half at 90, all of it at 100 and beyond (DAPO's equation 13).
#[test]
fn the_penalty_for_length_by_hand() {
    let overlong = Overlong { buffer_tokens: 20, factor: 0.5 };
    for (tokens, penalty) in [(1, 0.0), (80, 0.0), (81, -0.025), (90, -0.25), (100, -0.5), (130, -0.5)] {
        assert!((overlong_penalty(&overlong, tokens, 100) - penalty).abs() < 1e-15, "{tokens}");
    }
}
