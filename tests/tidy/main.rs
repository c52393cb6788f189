//! Holds what ARCHITECTURE.md promises: the dependency direction, where unsafe and tch may appear, file length, files
//! that say what they are, and a README whose first screen has the two commands. Each rule is a pure function from
//! text to complaints, tested below on planted violations: a rule that cannot fail holds nothing.
#![allow(clippy::unwrap_used)]

mod rules;
mod source_text;

use std::fs;
use std::path::{Path, PathBuf};

use rules::*;
use source_text::{code_of, identifier, words};

/// The repository: what cargo says at run time, so that the built test can be pointed at another tree.
fn root() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

/// All files below `dir` with one of the extensions, as (path relative to the repository, text).
fn files(dir: &str, extensions: &[&str]) -> Vec<(String, String)> {
    let root = root();
    let (mut found, mut open) = (Vec::new(), vec![root.join(dir)]);
    while let Some(next) = open.pop() {
        let Ok(entries) = fs::read_dir(&next) else {
            continue;
        };
        for path in entries.map(|entry| entry.unwrap().path()) {
            let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
            if path.is_dir() {
                open.push(path);
            } else if extensions.contains(&extension) {
                found.push((relative(&root, &path), fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

fn relative(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).unwrap().to_string_lossy().into_owned()
}

fn assert_none(complaints: Vec<String>) {
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

fn rust_code(rule: impl Fn(&str, &str) -> Vec<String>) {
    let sources = files("src", &["rs"]);
    assert!(sources.len() > 50, "only {} source files found: the check looks in the wrong place", sources.len());
    assert_none(sources.iter().flat_map(|(path, text)| rule(path, &code_of(text))).collect());
}

#[test]
fn modules_depend_downwards_only() {
    rust_code(check_direction);
}

#[test]
fn every_top_level_module_has_a_place_in_the_order() {
    let (_, lib) = files("src", &["rs"]).into_iter().find(|(path, _)| path == "src/lib.rs").unwrap();
    let code = code_of(&lib);
    for at in words(&code, "mod") {
        let name = identifier(&code[at + 3..]);
        assert!(ORDER.contains(&name.as_str()), "src/lib.rs: module {name} has no place in tests/tidy/rules.rs");
    }
}

#[test]
fn unsafe_stays_in_its_few_files() {
    rust_code(|path, code| {
        let mut complaints = check_place(path, code, "unsafe", &UNSAFE_ALLOWED);
        complaints.extend(check_place(path, code, "unsafe_code", &UNSAFE_ALLOWED));
        complaints
    });
}

#[test]
fn tch_is_named_only_where_tensors_live() {
    rust_code(|path, code| check_place(path, code, "tch", &TCH_ALLOWED));
}

#[test]
fn no_file_grows_past_its_idea() {
    let all =
        [files("src", &["rs", "cpp", "h"]), files("kernels", &["cu", "cuh", "h", "cpp"]), files("tests", &["rs"])];
    assert_none(all.concat().iter().flat_map(|(path, text)| check_length(path, text)).collect());
}

#[test]
fn kernels_configs_and_modules_say_what_they_are() {
    let openings =
        [(files("kernels", &["cu", "cuh", "h", "cpp"]), vec!["//", "/*"]), (files("configs", &["yaml"]), vec!["#"])];
    for (found, comment) in openings {
        assert_none(found.iter().flat_map(|(path, text)| check_opening(path, text, &comment)).collect());
    }
    let modules = files("src", &["rs"]).into_iter().filter(|(path, _)| path != "src/main.rs");
    assert_none(modules.flat_map(|(path, text)| check_opening(&path, &text, &["//!"])).collect());
}

#[test]
fn every_test_binary_runs() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let mains = files("tests", &["rs"]).into_iter().map(|(path, _)| path).filter(|path| path.ends_with("/main.rs"));
    assert_none(mains.flat_map(|path| check_test_entry(&path, &manifest)).collect());
}

#[test]
fn the_readme_begins_with_the_two_commands() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    assert_none(check_readme(&readme));
}
