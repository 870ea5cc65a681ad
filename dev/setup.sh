#!/usr/bin/env bash
# Installs what this machine lacks for building, testing and preparing data: system packages with apt (with sudo if the
# user is not root), and Python packages into .venv. `dev/setup.sh torch` adds PyTorch, for benchmarks and golden files.
# `dev/setup.sh cuda` adds nvcc, for the tests of CUDA code. If everything is there, it ends quickly and does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(libdnnl-dev doctest-dev libcli11-dev nlohmann-json3-dev zlib1g-dev)
# For several ranks (mpirun). dev/setup.sh cuda is what the tests call, and they test this, too.
[ "${1:-}" != cuda ] || packages+=(libopenmpi-dev openmpi-bin pkg-config)
command -v "${CXX:-g++}" >/dev/null || packages+=(g++)
case "${CXX:-}" in *clang*) packages+=(libomp-dev) ;; esac
command -v python3 >/dev/null || packages+=(python3)
python3 -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)

if command -v dpkg-query >/dev/null && command -v apt-get >/dev/null; then
    missing=()
    for package in "${packages[@]}"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        sudo=()
        [ "$(id -u)" -eq 0 ] || sudo=(sudo)
        echo "installing ${missing[*]}"
        log=$(mktemp)
        if ! { "${sudo[@]}" apt-get update && "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
            tail -n 20 "$log" >&2
            echo "setup: apt-get could not install ${missing[*]} (whole log: $log)" >&2
            exit 1
        fi
        rm -f "$log"
    fi
else
    for header in doctest/doctest.h CLI/CLI.hpp nlohmann/json.hpp zlib.h; do
        printf '#include <%s>\n' "$header" |
            "${CXX:-g++}" -x c++ -std=c++20 -E - >/dev/null 2>&1 || {
            echo "setup: <$header> not found. This system has no apt: please install a C++20 compiler, doctest, CLI11," >&2
            echo "nlohmann-json, zlib and, for speed, oneDNN with its package manager, then try again." >&2
            exit 1
        }
    done
fi

stamp=.venv/installed-requirements.txt
if ! cmp -s requirements.txt "$stamp"; then
    echo "installing Python packages into .venv"
    [ -x .venv/bin/python ] || python3 -m venv .venv
    # --no-compile, because Python compiles the few modules that are imported anyway.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
    cp requirements.txt "$stamp"
fi
if [ "${1:-}" = torch ] && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    echo "installing PyTorch into .venv (about 3 GB)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check torch
fi

# Puts nvcc into .venv/cuda, in the layout of a CUDA toolkit. pip itself would mix these packages with those of PyTorch. A
# failure here is not an error, because without nvcc the tests of CUDA code are skipped.
get_nvcc() {
    mkdir -p .venv/cuda-new/wheels &&
        TMPDIR=$PWD/.venv/cuda-new/wheels .venv/bin/python -m pip download --quiet --disable-pip-version-check \
            --no-cache-dir --retries 2 --only-binary :all: --no-deps -r requirements-cuda.txt -d .venv/cuda-new/wheels &&
        .venv/bin/python - .venv/cuda-new <<'EOF' &&
import pathlib, sys, zipfile

root = pathlib.Path(sys.argv[1])
for path in root.glob("wheels/*.whl"):
    wheel = zipfile.ZipFile(path)
    for name in wheel.namelist():
        parts = name.split("/")[2:]  # nvidia/cu13/bin/nvcc
        if not name.endswith("/") and parts and parts[0] in ("bin", "include", "nvvm"):
            file = root.joinpath(*parts)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(wheel.read(name))
            file.chmod(0o755 if "bin" in parts else 0o644)
EOF
        rm -rf .venv/cuda-new/wheels .venv/cuda &&
        cp requirements-cuda.txt .venv/cuda-new/installed-requirements.txt &&
        mv .venv/cuda-new .venv/cuda
}
# An nvcc older than CUDA 12 does not support C++20. This searches in the same places as the Makefile.
has_nvcc() {
    local nvcc
    for nvcc in nvcc /usr/local/cuda/bin/nvcc; do
        "$nvcc" -std=c++20 -x cu -E /dev/null >/dev/null 2>&1 && return
    done
    return 1
}
if [ "${1:-}" = cuda ] && [ -z "${NVCC:-}" ] && ! has_nvcc &&
    ! cmp -s requirements-cuda.txt .venv/cuda/installed-requirements.txt; then
    skipped="so the tests of CUDA code will be skipped"
    if [ "$(uname -sm)" != "Linux x86_64" ]; then
        echo "setup: this machine has no nvcc, and requirements-cuda.txt is for Linux on x86_64, $skipped"
    else
        echo "installing nvcc and CUDA headers into .venv/cuda (725 MB to download, 210 MB kept)"
        log=$(mktemp)
        if ! get_nvcc >"$log" 2>&1; then
            why=$(grep -om1 "\[Errno[^')]*" "$log" || tail -n 1 "$log")
            echo "setup: nvcc could not be installed (${why:-no reason given}), $skipped"
        fi
        rm -rf "$log" .venv/cuda-new
    fi
fi
