//! The rules: pure functions from a path and a text to complaints; at the end, planted violations that they must find.

use crate::source_text::{code_of, line_of, modules_named, words};

/// Lowest first; a module may use itself and those before it. `error` lies below all.
pub const ORDER: [&str; 15] = [
    "error", "numerics", "device", "ops", "inject", "model", "data", "run", "rl", "srdd", "analysis", "remote",
    "bench", "config", "cli",
];
pub const UNSAFE_ALLOWED: [&str; 4] = ["src/ops/cuda/", "src/ops/cpu/", "src/ops/autograd/", "src/model/checkpoint.rs"];
pub const TCH_ALLOWED: [&str; 7] =
    ["src/error.rs", "src/device/", "src/ops/", "src/model/", "src/rl/", "src/srdd/", "src/bench/"];
pub const LONGEST_FILE_LINES: usize = 400;
pub const FIRST_SCREEN_LINES: usize = 24;
pub const COMMANDS: [&str; 2] = ["./scripts/quickstart.sh", "./scripts/test.sh"];

/// `src/rl/loss.rs` -> `rl`, `src/error.rs` -> `error`. lib.rs and main.rs stand above all.
pub fn module_of(path: &str) -> Option<&str> {
    let head = path.strip_prefix("src/")?.split('/').next()?;
    let head = head.strip_suffix(".rs").unwrap_or(head);
    ORDER.contains(&head).then_some(head)
}

pub fn rank(module: &str) -> usize {
    ORDER.iter().position(|m| *m == module).unwrap()
}

pub fn check_direction(path: &str, code: &str) -> Vec<String> {
    let Some(own) = module_of(path) else {
        return Vec::new();
    };
    modules_named(code)
        .into_iter()
        .filter(|(_, named)| ORDER.contains(&named.as_str()) && rank(named) > rank(own))
        .map(|(line, named)| format!("{path}:{line}: {own} may not use {named}, which lies above it"))
        .collect()
}

pub fn check_place(path: &str, code: &str, word: &str, allowed: &[&str]) -> Vec<String> {
    if allowed.iter().any(|place| path.starts_with(place)) {
        return Vec::new();
    }
    words(code, word).map(|at| format!("{path}:{}: {word} is not allowed here", line_of(code, at))).collect()
}

pub fn check_length(path: &str, text: &str) -> Vec<String> {
    let lines = text.lines().count();
    let complaint = format!("{path}: {lines} lines, more than {LONGEST_FILE_LINES}: take a second idea out of it");
    (lines > LONGEST_FILE_LINES).then_some(complaint).into_iter().collect()
}

pub fn check_opening(path: &str, text: &str, comment: &[&str]) -> Vec<String> {
    let opens = comment.iter().any(|c| text.starts_with(c));
    (!opens).then(|| format!("{path}: does not open with a comment that says what it is")).into_iter().collect()
}

/// The first screen shows exactly the two commands: the lines of its shell blocks.
pub fn check_readme(text: &str) -> Vec<String> {
    let (mut shown, mut inside) = (Vec::new(), false);
    for line in text.lines().take(FIRST_SCREEN_LINES) {
        if line.starts_with("```") {
            inside = !inside;
        } else if inside && !line.trim().is_empty() {
            shown.push(line.split('#').next().unwrap_or("").trim());
        }
    }
    let complaint = format!("README.md: the first screen shows the commands {shown:?}, expected {COMMANDS:?}");
    (shown != COMMANDS).then_some(complaint).into_iter().collect()
}

/// Every directory of tests/ that has a main.rs is a `[[test]]` of Cargo.toml; cargo finds none by itself.
pub fn check_test_entry(main_file: &str, manifest: &str) -> Vec<String> {
    let entry = manifest.lines().any(|line| line.trim() == format!("path = \"{main_file}\""));
    (!entry).then(|| format!("{main_file}: no [[test]] in Cargo.toml names it, so it never runs")).into_iter().collect()
}

mod planted_violations {
    use super::*;

    #[test]
    fn an_upward_use_is_found_in_every_spelling() {
        for (path, text, line) in [
            ("src/ops/norm.rs", "use crate::numerics::x;\nuse crate::rl::loss;", 2),
            ("src/run/mod.rs", "use crate::{Error, data::Question,\n rl::{self, loss}};", 1),
            ("src/numerics/mod.rs", "fn f() { crate :: cli ::main() }", 1),
            ("src/error.rs", "use crate::device::D;", 1),
            ("src/data/mod.rs", "/* a\n */ pub(in crate::rl) fn f() {}", 2),
        ] {
            let complaints = check_direction(path, &code_of(text));
            assert_eq!(complaints.len(), 1, "{text}: {complaints:?}");
            assert!(complaints[0].starts_with(&format!("{path}:{line}:")), "{complaints:?}");
        }
    }

    #[test]
    fn downward_uses_comments_and_strings_are_fine() {
        let text = "//! not crate::cli\nuse crate::{Error, data::{x, rl}};\nlet s = \"crate::cli\\\"\"; let r = r#\"crate::rl \"quoted\"\"#;\n\
                let q = '\"'; let n = '\\''; fn f<'a>(x: &'a str) {} /* crate::cli */ crate::bail_input!(\"x\")";
        assert_eq!(check_direction("src/run/x.rs", &code_of(text)), Vec::<String>::new());
        assert!(code_of("let q = '\"'; unsafe {}").contains("unsafe"), "a quote character does not open a string");
        assert_eq!(code_of("a \"x\ny\" b").matches('\n').count(), 1);
        assert_eq!(check_direction("src/main.rs", "crate::cli::main()"), Vec::<String>::new());
    }

    #[test]
    fn misplaced_words_are_found_as_words() {
        assert_eq!(check_place("src/rl/x.rs", "unsafe { f() }", "unsafe", &UNSAFE_ALLOWED).len(), 1);
        assert_eq!(check_place("src/ops/cpu/x.rs", "unsafe { f() }", "unsafe", &UNSAFE_ALLOWED).len(), 0);
        assert_eq!(check_place("src/data/x.rs", "use tch::Tensor; batch(); tch_kind()", "tch", &TCH_ALLOWED).len(), 1);
    }

    #[test]
    fn long_silent_and_misleading_files_are_found() {
        assert_eq!(check_length("x.rs", &"x\n".repeat(401)).len(), 1);
        assert_eq!(check_length("x.rs", &"x\n".repeat(400)).len(), 0);
        assert_eq!(check_opening("k.cu", "#include <x>", &["//", "/*"]).len(), 1);
        assert_eq!(check_opening("c.yaml", "# what it is\nname: x", &["#"]).len(), 0);
        assert_eq!(check_test_entry("tests/a/main.rs", "[[test]]\npath = \"tests/b/main.rs\"").len(), 1);
        assert_eq!(check_test_entry("tests/b/main.rs", "[[test]]\npath = \"tests/b/main.rs\"").len(), 0);
        let good = "# t\n```\n./scripts/quickstart.sh   # trains\n./scripts/test.sh\n```\n";
        assert_eq!(check_readme(good).len(), 0);
        assert_eq!(check_readme(&good.replace("```\n./", "```\ngit clone x\n./")).len(), 1);
        assert_eq!(check_readme(&format!("{}{good}", "\n".repeat(FIRST_SCREEN_LINES))).len(), 1);
    }
}
