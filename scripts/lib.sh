# Shared by the scripts: phases with seconds, one-line errors, the paths of the build. Sourced, never run.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A cargo that rustup installed but that no shell profile has put on PATH yet.
if ! command -v cargo >/dev/null && [ -x "$HOME/.cargo/bin/cargo" ]; then PATH="$HOME/.cargo/bin:$PATH"; fi

TEMPER="${TEMPER:-${CARGO_TARGET_DIR:-target}/release/temper}"
# Not exported: .cargo/config.toml gives cargo the same default, and a LIBTORCH of the user's own wins in both.
TORCH_DIR="${LIBTORCH:-$PWD/.venv/libtorch}"

# OpenMP threads that spin while they wait take the cores from whatever else runs, such as the next part of a step.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

say() { printf '%s\n' "$*" >&2; }

die() {
  say "error: $1"
  shift
  for line in "$@"; do say "  $line"; done
  exit 1
}

# phase LABEL COMMAND...: says what begins and how long it took. Fails as the command fails.
phase() {
  local label=$1 start=$SECONDS status=0
  shift
  say "==> $label"
  "$@" || status=$?
  if [ "$status" -ne 0 ]; then
    say "==> $label: FAILED after $((SECONDS - start)) s"
    return "$status"
  fi
  say "    $label: $((SECONDS - start)) s"
}

# Progress bars are for people; a log gets warnings and errors only.
cargo_quiet() { if [ -t 2 ]; then echo ""; else echo "--quiet"; fi; }
