#!/usr/bin/env bash
# Makes a fresh clone ready: a local .venv with the pinned libtorch and nvcc wheels, then the build.
# Everything lands in this directory; a second run finds its work done and takes less than a second.
#
#   scripts/bootstrap.sh [--runtime-only] [--with-test-tools]
#
#   --runtime-only     only what a ready-made binary needs to run: libtorch; no nvcc, no build
#   --with-test-tools  also what tests compare with or run against: Python packages (transformers, tensorboard, ...) and,
#                      where apt-get may be used (root), Debian's openssh-server and chromium; no service is started
#
# A LIBTORCH in the environment (a torch 2.11 package directory) is used in place of the torch wheel.
# PYTHON names the Python to use (3.10 or later; default python3).
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

TORCH_PINS="torch==2.11.0 numpy==2.4.6"
CUDA_PINS="nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85 nvidia-cuda-runtime==13.0.96"
TEST_PINS="transformers==5.23.0 tokenizers==0.23.3 safetensors==0.8.0 ml_dtypes==0.6.0 tensorboard==2.21.0 scipy==1.17.1 statsmodels==0.15.0"
TORCH_TEST_PINS="compressed-tensors==0.20.0 torchao==0.18.0 peft==0.21.2 accelerate==1.15.0" # they want torch in the same venv
NEEDS_DISK_GIB=9 # wheels unpacked 5, pip's temporary copies and the build the rest

runtime_only=false test_tools=false
for argument in "$@"; do
  case "$argument" in
    --runtime-only) runtime_only=true ;;
    --with-test-tools) test_tools=true ;;
    -h | --help) sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) say "error: unknown argument $argument (expected --runtime-only or --with-test-tools)"; exit 2 ;;
  esac
done

# ---- what the machine must have, asked before anything is downloaded
PYTHON="${PYTHON:-python3}"
$runtime_only || {
  command -v cargo >/dev/null || die "cargo was not found" "install Rust 1.90 or later: https://rustup.rs, or: apt-get install rustup"
  command -v "${CXX:-g++}" >/dev/null || die "${CXX:-g++} was not found" "apt-get install g++"
}

pins=""
if [ -z "${LIBTORCH:-}" ]; then pins="$TORCH_PINS"; fi
$runtime_only || pins="$pins $CUDA_PINS"
$test_tools && pins="$pins $TEST_PINS"
# Where LIBTORCH stands for the torch wheel they would pull in another one; their tests then skip, and say so.
if $test_tools && [ -z "${LIBTORCH:-}" ]; then pins="$pins $TORCH_TEST_PINS"; fi

# ---- the venv. The stamp lists what is installed; it is written last, so a broken-off install is done again.
stamp=.venv/.temper-pins
missing=""
for pin in $pins; do
  if ! grep -qxF -- "$pin" "$stamp" 2>/dev/null; then missing="$missing $pin"; fi
done

make_venv() {
  "$PYTHON" -m venv .venv || die "$PYTHON -m venv failed" "on Debian or Ubuntu: apt-get install python3-venv"
}

install_wheels() {
  local quiet=--quiet
  if [ -t 2 ]; then quiet=""; fi
  # shellcheck disable=SC2086 # lists of words
  .venv/bin/python -m pip install $quiet --disable-pip-version-check --no-input $missing ||
    die "pip could not install:$missing" "is the package registry reachable? the next run of this script continues here"
}

if [ -n "$missing" ]; then
  command -v "$PYTHON" >/dev/null || die "$PYTHON was not found" "apt-get install python3 python3-venv (or set PYTHON)"
  version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$PYTHON is $version, but torch 2.11 needs 3.10 or later" "set PYTHON to a newer one"
  "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
    die "$PYTHON $version has no venv module with pip" "on Debian or Ubuntu: apt-get install python3-venv"
  case "$missing" in
    *torch==*)
      free_gib=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1048576))
      if [ "$free_gib" -lt "$NEEDS_DISK_GIB" ]; then
        die "$free_gib GiB free here, $NEEDS_DISK_GIB are needed" "free some space, or set LIBTORCH to a torch 2.11 that is there"
      fi
      say "Downloading PyTorch 2.11 with CUDA 13.0 (about 2.5 GB; 4.7 GB in .venv; runs on CPU too)."
      ;;
  esac
  say "Python packages to install into .venv:$missing"
  if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    phase "venv" make_venv
  fi
  phase "wheels" install_wheels
  { cat "$stamp" 2>/dev/null || true; printf '%s\n' $missing; } | sort -u >"$stamp.next"
  # A pin that was replaced by another version must not stay in the stamp.
  for pin in $missing; do
    grep -v "^${pin%%==*}==" "$stamp.next" >"$stamp.kept" || true
    { cat "$stamp.kept"; echo "$pin"; } >"$stamp.next"
  done
  mv "$stamp.next" "$stamp"
  rm -f "$stamp.kept"
fi

# ---- stable names for what has the Python version in its path
link() { # link NAME TARGET: .venv/NAME -> TARGET (relative to .venv), if TARGET is there
  if [ -d ".venv/$2" ] && [ "$(readlink ".venv/$1" 2>/dev/null)" != "$2" ]; then ln -sfn "$2" ".venv/$1"; fi
}
for site in .venv/lib/python3.*/site-packages; do
  [ -d "$site" ] || continue
  link libtorch "${site#.venv/}/torch"
  link cuda "${site#.venv/}/nvidia/cu13"
done
if [ ! -e "$TORCH_DIR/lib/libtorch_cpu.so" ]; then
  die "$TORCH_DIR/lib/libtorch_cpu.so was not found" "LIBTORCH must be the directory of a torch 2.11 package (unset it to use the pinned wheel, or remove .venv to install that again)"
fi

# Tests run an sshd of their own and look at the report in a browser; without these two they skip, and say so.
debian_tools() {
  local wanted="" policy=/usr/sbin/policy-rc.d status=0
  [ -x /usr/sbin/sshd ] || wanted="$wanted openssh-server"
  command -v chromium >/dev/null || wanted="$wanted chromium"
  [ -n "$wanted" ] || return 0
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    say "not installed, so their tests will skip:$wanted (as root: apt-get install$wanted)"
    return 0
  fi
  say "Debian packages to install:$wanted (about 150 MB for a browser)"
  # Installing a server must not start it.
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy"
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  # shellcheck disable=SC2086 # a list of words
  { timeout 240 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 600 apt-get install -qq -y --no-install-recommends $wanted; } >/dev/null 2>&1 || status=$?
  [ "$status" -eq 0 ] || say "apt-get could not install them; their tests will skip"
}
if $test_tools; then phase "sshd and browser for tests" debian_tools; fi

if $runtime_only; then
  say "ready to run: LD_LIBRARY_PATH=$TORCH_DIR/lib temper doctor"
  exit 0
fi

# shellcheck disable=SC2046 # an empty word must vanish
build() { cargo build --release --locked $(cargo_quiet); }
if [ -x "$TEMPER" ]; then label="build (what changed)"; else label="build (the first one takes about 3 minutes on 2 cores)"; fi
phase "$label" build
say "ready: $TEMPER"
