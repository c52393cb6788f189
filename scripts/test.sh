#!/usr/bin/env bash
# Runs every check and ends with one line: `N passed, N failed`. Exit code 1 if any failed.
#
#   scripts/test.sh [--quick]
#
#   --quick   unit tests and the fast test binaries only; says what it leaves out
#
# Every [[test]] of Cargo.toml is run, one binary after the other, each with its own time.
# Tests that need ../shared (or TEMPER_SHARED), a GPU or a Python package print a line that begins with `skipped`
# where it is absent; those lines are listed.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

FAST_TESTS="tidy config files fuzz gpu losses run"
# Binaries whose tests each keep all cores busy: one test at a time.
HEAVY_TESTS="oracle end_to_end noise"

quick=false
for argument in "$@"; do
  case "$argument" in
    --quick) quick=true ;;
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) say "error: unknown argument $argument (expected --quick)"; exit 2 ;;
  esac
done

passed=0 failed=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

check() { # check LABEL COMMAND...: a phase that counts as one test
  if phase "$@"; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
}

# tests THREADS LABEL CARGO_ARGUMENTS...: runs a test binary and adds its own counts.
tests() {
  local threads=$1 label=$2 log="$work/tests.log" status=0 counts
  shift 2
  phase "$label" tests_to_log "$log" "$threads" "$@" || status=$?
  counts=$(sed -nE 's/^test result: [A-Za-z]+\. ([0-9]+) passed; ([0-9]+) failed;.*/\1 \2/p' "$log" |
    awk '{ p += $1; f += $2 } END { print p + 0, f + 0 }')
  passed=$((passed + ${counts% *}))
  failed=$((failed + ${counts#* }))
  if [ "$status" -ne 0 ]; then
    # A binary that crashed has no result line: it must not pass unnoticed.
    if [ "${counts#* }" -eq 0 ]; then failed=$((failed + 1)); fi
    sed -n '/^failures:/,/^test result:/p' "$log" >&2
    grep -E '^error|panicked at|signal:' "$log" | head -n 40 >&2 || true
  fi
  if grep -qE '^skipped' "$log"; then
    say "    skipped by the tests themselves:"
    grep -E '^skipped' "$log" | sort | uniq -c >&2
  fi
}

tests_to_log() { # LOG THREADS CARGO_ARGUMENTS...
  local log=$1 threads=$2
  shift 2
  cargo test --release --locked --no-fail-fast "$@" -- --show-output --test-threads="$threads" >"$log" 2>&1
}

# Every test in one build; what fails to compile is one failure.
build_tests() {
  # shellcheck disable=SC2046 # an empty word must vanish
  cargo test --release --locked --no-run $(cargo_quiet) "$@"
}

# The README's shell blocks that begin with ```sh ci: scripts, run in their order in one new directory that has
# configs/, with the built binary on PATH.
readme_examples() {
  awk -v dir="$work" '/^```sh ci$/ { n += 1; inside = 1; next } /^```/ { inside = 0 } inside { print > (dir "/example" n ".sh") }' README.md
  local example job status=0 bin place="$work/readme"
  bin=$(cd "$(dirname "$TEMPER")" && pwd)
  mkdir "$place" && ln -s "$PWD/configs" "$place/configs"
  for example in "$work"/example*.sh; do
    [ -e "$example" ] || continue
    if (cd "$place" && PATH="$bin:$PATH" bash -euo pipefail "$example") >"$work/example.log" 2>&1; then
      passed=$((passed + 1))
    else
      failed=$((failed + 1)) status=1
      say "README example failed:"
      cat "$example" >&2
      tail -n 20 "$work/example.log" >&2
    fi
  done
  # Jobs that the examples left end before their directory goes.
  for job in "$place"/jobs/jobs/*; do
    (cd "$place" && "$bin/temper" logs -f "$(basename "$job")" >/dev/null 2>&1) || true
  done
  return "$status"
}

format() { cargo fmt --check; }
# shellcheck disable=SC2046
lints() { cargo clippy --release --locked --all-targets $(cargo_quiet) -- -D warnings; }

# All [[test]] names of Cargo.toml, or for --quick the fast ones.
selected_tests() {
  if $quick; then printf '%s\n' $FAST_TESTS; else
    awk -F'"' '/^\[/ { test = /^\[\[test\]\]/ } test && /^name/ { print $2 }' Cargo.toml
  fi
}

selection=()
if $quick; then
  ./scripts/bootstrap.sh
  say "left out by --quick: format, clippy, README examples, doc tests, test binaries other than: $FAST_TESTS"
  selection=(--lib)
  for name in $FAST_TESTS; do selection+=(--test "$name"); done
else
  ./scripts/bootstrap.sh --with-test-tools
  check "format" format
  check "clippy" lints
fi
if phase "build of the tests" build_tests "${selection[@]}"; then
  tests 2 "tests: lib" --lib
  for name in $(selected_tests); do
    case " $HEAVY_TESTS " in *" $name "*) threads=1 ;; *) threads=2 ;; esac
    tests "$threads" "tests: $name" --test "$name"
  done
  if ! $quick; then tests 2 "tests: documentation" --doc; fi
else
  failed=$((failed + 1))
fi
if ! $quick; then phase "README examples" readme_examples || true; fi

say "total: $SECONDS s"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
