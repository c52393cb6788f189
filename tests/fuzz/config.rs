//! Damaged YAML configurations and damaged `--set` overrides.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use proptest::prelude::*;

use super::assert_one_input_line;
use super::damage::{apply, damage};

const WORDS: &[&str] = &[
    "extends: e5c.yaml\n",
    "extends: .\n",
    "seed: -1\n",
    "seed: 18446744073709551616\n",
    "noise_injection: {sigma_end: 0}\n",
    "fake_quant: {weights: mxfp4:sr,2d}\n",
    "rollout: {group_size: 1}\n",
    "trainer: []\n",
    "<<: *a\n",
    "&a ",
    "*a",
    "!tag ",
    "? ",
    ": ",
    "- ",
    "{",
    "]",
    "|\n",
    "\t",
    "---\n",
    ".nan",
    "1e999",
    "null",
    "~",
    "\u{feff}",
    "\u{0}",
    "name: ../../x\n",
];

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("configs")
}

/// Several kinds: a whole registry entry that extends another, a small one, one with inline multipliers.
fn good(kind: usize) -> Vec<u8> {
    const FILES: [&str; 4] = ["e9b.yaml", "quickstart.yaml", "debug.yaml", "baseline.yaml"];
    fs::read(configs().join(FILES[kind])).unwrap()
}

/// A copy of configs/, so that `extends` finds its neighbours.
fn folder() -> &'static Path {
    static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
        let folder = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(configs()).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "yaml") {
                fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
            }
        }
        folder
    });
    FOLDER.path()
}

fn load(text: &[u8], overrides: &[String]) {
    let file = tempfile::Builder::new().suffix(".yaml").tempfile_in(folder()).unwrap();
    fs::write(file.path(), text).unwrap();
    if let Err(error) = temper::config::load(file.path(), overrides) {
        assert_one_input_line(&error, text);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_yaml(kind in 0..4usize, changes in damage(WORDS)) {
        load(&apply(good(kind), &changes), &[]);
    }

    #[test]
    fn any_override(key in "[a-z_.]{0,30}", value in "\\PC{0,30}", known in any::<bool>()) {
        let key = if known { "noise_injection.sigma_start".to_string() } else { key };
        load(&good(1), &[format!("{key}={value}")]);
    }
}
