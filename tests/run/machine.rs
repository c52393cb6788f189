//! What a binary says about itself.

use std::process::Command;

use temper::run::machine::SOURCES;

/// The command that ARCHITECTURE.md gives for it.
#[test]
fn the_stamp_is_the_hash_of_the_sources() {
    let command = "find Cargo.lock Cargo.toml build.rs configs/quickstart.yaml kernels src -type f | LC_ALL=C sort | \
                   xargs sha256sum | sha256sum";
    assert!(include_str!("../../ARCHITECTURE.md").replace("\\\n", "").contains(command), "ARCHITECTURE.md");
    let output = Command::new("sh").args(["-c", command]).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap().split_whitespace().next(), Some(SOURCES));
}
