# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# What the scripts share; sourced, not run. Sets `root`, the folder of the checkout.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
  echo "error: $*" >&2
  exit 1
}

# Whether what a Debian package is wanted for is there, wherever it came from.
have() {
  case $1 in
    g++ | cmake | python3 | clang-format) command -v "$1" >/dev/null ;;
    ninja-build) command -v ninja >/dev/null ;;
    catch2) have_header catch2/catch.hpp || have_header catch2/catch_all.hpp ;;
    libcli11-dev) have_header CLI/CLI.hpp ;;
    nlohmann-json3-dev) have_header nlohmann/json.hpp ;;
    libopenmpi-dev) command -v mpicxx >/dev/null || have_header mpi.h ;;
    openmpi-bin) command -v mpiexec >/dev/null ;;
    *) die "have: no rule for package $1" ;;
  esac
}

have_header() {
  local prefixes prefix
  IFS=: read -ra prefixes <<<"${CMAKE_PREFIX_PATH:-}"
  for prefix in /usr /usr/local "${prefixes[@]}"; do
    [[ -e $prefix/include/$1 ]] && return
  done
  return 1
}

# Installs those of the named Debian packages that are missing. Without any missing it needs neither
# a network nor root.
need() {
  local package missing=() sudo=()
  for package in "$@"; do
    have "$package" || missing+=("$package")
  done
  ((${#missing[@]})) || return 0
  command -v apt-get >/dev/null ||
    die "missing: ${missing[*]} (names of Debian packages); install them and run this again"
  if ((EUID != 0)); then
    command -v sudo >/dev/null || die "missing: ${missing[*]}; installing them takes root or sudo"
    sudo=(sudo)
  fi
  echo "installing ${missing[*]}"
  "${sudo[@]}" apt-get -qq update
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get -qq -o Dpkg::Use-Pty=0 install --yes --no-install-recommends "${missing[@]}" >/dev/null
}

# Compute capabilities of the GPUs here as CMake wants them, as in "90a;100"; nothing without a GPU.
gpu_architectures() {
  command -v nvidia-smi >/dev/null || return 0
  # Hopper's own instructions need the suffix.
  { nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true; } |
    grep -E '^[0-9]+\.[0-9]+$' | tr -d . | sort -un | sed 's/^90$/90a/' | paste -sd ';' || true
}

# configure FOLDER OPTION...: configures an optimised build with Ninja.
configure() {
  local folder=$1
  shift
  cmake -S "$root" -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=Release "$@"
}
