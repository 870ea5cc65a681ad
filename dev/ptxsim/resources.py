#!/usr/bin/env python3
"""Registers, stack, spills and shared memory of every kernel, by ptxas for sm_80 and sm_90.

    dev/ptxsim/resources.py tests/ptxsim_samples.cu
    dev/ptxsim/resources.py --figures figures.json FILE.cu...   # adds them to what PTXSIM=figures=figures.json wrote
"""
import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_90")


def find_nvcc() -> str:
    root = Path(__file__).resolve().parents[2]
    for nvcc in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc", root / ".venv/cuda/bin/nvcc"):
        if nvcc and Path(nvcc).exists():
            return str(nvcc)
    sys.exit("resources: nvcc not found: expected it on the PATH, in /usr/local/cuda/bin or in .venv/cuda/bin")


def demangle(names: list[str]) -> list[str]:
    """Without parameters and result types, as the figures have them."""
    text = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void ", "", line) for line in text.splitlines()]


def measure(nvcc: str, source: str) -> dict[str, dict[str, dict[str, int]]]:
    """By kernel and architecture."""
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++20", "-O3", "-I.", "-Xptxas", "-v", "-c", source, "-o", f"{folder}/a.o"]
        for architecture in ARCHITECTURES:
            command += ["-gencode", f"arch=compute_{architecture[3:]},code={architecture}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"resources: nvcc could not compile {source}:\n{result.stderr}")
    entry: dict[str, int] = {}
    for line in result.stderr.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            entry = kernels.setdefault(match[1], {}).setdefault(match[2], {})
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            entry.update(stack=int(match[1]), spill_stores=int(match[2]), spill_loads=int(match[3]))
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            entry.update(registers=int(match[1]), shared=int(shared[1]) if shared else 0)
    return dict(zip(demangle(list(kernels)), kernels.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="FILE.cu")
    parser.add_argument("--figures", metavar="FILE.json", help="written by PTXSIM=figures=FILE.json; resources are added")
    options = parser.parse_args()
    nvcc = find_nvcc()
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    for source in options.sources:
        kernels.update(measure(nvcc, source))
    print(f"{'kernel':60} {'':6} registers  stack  spill stores/loads  shared")
    for name, by_architecture in sorted(kernels.items()):
        for architecture, r in by_architecture.items():
            spills = f"{r['spill_stores']}/{r['spill_loads']}"
            print(f"{name:60.60} {architecture:6} {r['registers']:9} {r['stack']:6} {spills:>19} {r['shared']:7}")
    if options.figures:
        path = Path(options.figures)
        try:
            figures = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            sys.exit(f"resources: {path}: {error}: expected what PTXSIM=figures={path} writes")
        for kernel in figures["kernels"]:
            if kernel["name"] in kernels:
                kernel["resources"] = kernels[kernel["name"]]
        path.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
