#!/usr/bin/env python3
"""Measures the registers, spills and shared memory of every kernel by ptxas, for sm_80 and sm_90.

    dev/ptxsim/resources.py tests/ptxsim/samples.cu             # measures sources, or objects with PTX in them
    dev/ptxsim/resources.py --figures figures.json FILE.cu...   # adds the results to figures of PTXSIM=figures=...
    dev/ptxsim/resources.py --renew TABLE build/ptx/*.o         # measures kernels whose PTX differs from the table's
    dev/ptxsim/resources.py --check TABLE build/ptx/*.o         # fails if such a kernel takes more registers than before

A table has one line per kernel: registers for sm_80 and for sm_90, bytes of static shared memory, a hash of the PTX
that was measured, and the kernel. --renew and --check also fail if a kernel spills. If the table was measured by
another version of ptxas, --check does not compare registers. Dynamic shared memory is set at the launch and is not
seen here.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_90")
Resources = dict[str, dict[str, dict[str, int]]]  # by kernel (mangled) and architecture


def find_tool(name: str) -> str:
    root = Path(__file__).resolve().parents[2]
    for tool in (shutil.which(name), f"/usr/local/cuda/bin/{name}", root / ".venv/cuda/bin" / name):
        if tool and Path(tool).exists():
            return str(tool)
    sys.exit(f"resources: {name} not found: expected it on the PATH, in /usr/local/cuda/bin or in .venv/cuda/bin")


def version_of(ptxas: str) -> str:
    text = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


def demangle(names: list[str]) -> list[str]:
    """Demangles names and removes their parameters and result types, as the figures do."""
    text = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void ", "", line) for line in text.splitlines()]


def kernels_of(path: str) -> dict[str, str]:
    """The PTX of each kernel in a source or an object, with the declarations of its module, without line numbers."""
    if path.endswith(".cu"):
        command = [find_tool("nvcc"), "-std=c++20", "-O3", "-I.", "-ptx", "-arch=compute_80", path, "-o", "-"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            sys.exit(f"resources: nvcc could not compile {path}:\n{result.stderr}")
        text = result.stdout
    else:
        found = re.search(rb"\.version \d+\.\d+\n\.target[^\0]*", Path(path).read_bytes())
        if not found:
            sys.exit(f"resources: {path}: no PTX in it: expected an object built with -Xfatbin -compress=false")
        text = found[0].decode()
    shared, kernels, kernel, depth = [], {}, None, 0
    for line in text.splitlines():
        if not line or re.match(r"\s*(\.loc\s|\.file\s|//)|\$L__(tmp|func)", line):
            continue
        if ".section" in line:
            break
        if kernel is None and (entry := re.search(r"\.entry (\w+)\(", line)):
            kernel, opened = kernels.setdefault(entry[1], []), False
        # The numbers of labels depend on the kernels before, so they are removed.
        (shared if kernel is None else kernel).append(re.sub(r"(\$L__BB|__local_depot)\d+", r"\1", line))
        if kernel is not None:
            depth += line.count("{") - line.count("}")
            opened |= "{" in line
            if opened and depth == 0:
                kernel = None
    return {name: "\n".join(shared + lines) + "\n" for name, lines in kernels.items()}


def measure(ptxas: str, kernels: dict[str, str]) -> Resources:
    def run(name: str, architecture: str) -> tuple[str, str, dict[str, int]]:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.ptx"
            source.write_text(kernels[name])
            command = [ptxas, "-v", f"-arch={architecture}", str(source), "-o", "/dev/null"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            sys.exit(f"resources: ptxas could not compile {name} for {architecture}:\n{result.stderr}")
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
        shared = re.search(r"(\d+) bytes smem", result.stderr)
        registers = re.search(r"Used (\d+) registers", result.stderr)
        entry = dict(zip(("stack", "spill_stores", "spill_loads"), map(int, stack.groups())))
        return name, architecture, entry | {"registers": int(registers[1]), "shared": int(shared[1]) if shared else 0}

    found: Resources = {name: {} for name in kernels}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(run, name, architecture) for name in kernels for architecture in ARCHITECTURES]
        for job in jobs:
            name, architecture, entry = job.result()
            found[name][architecture] = entry
    return found


def hash_of(ptx: str) -> str:
    return hashlib.sha256(ptx.encode()).hexdigest()[:12]


class Table:
    """The results of earlier measurements."""

    def __init__(self, path: str):
        self.path, self.version, self.rows = path, "", {}  # kernel: registers for each architecture, shared, hash
        if not Path(path).exists():
            return
        for line in Path(path).read_text().splitlines():
            if line.startswith("#"):
                self.version = match[1] if (match := re.search(r"ptxas ([\d.]+)", line)) else self.version
            elif line:
                *numbers, ptx, name = line.split(maxsplit=4)
                self.rows[name] = ([int(n) for n in numbers[:2]], int(numbers[2]), ptx)

    def write(self) -> None:
        lines = [f"# ptxas {self.version}: registers for {', '.join(ARCHITECTURES)}; static shared memory; hash; kernel",
                 "# Renewed by `make resources`. No kernel spills."]
        for name, (registers, shared, ptx) in sorted(self.rows.items()):
            lines.append(f"{registers[0]:3} {registers[1]:3} {shared:5} {ptx} {name}")
        Path(self.path).write_text("\n".join(lines) + "\n")


def compare(table: Table, kernels: dict[str, str], ptxas: str, renew: bool) -> int:
    """Measures the kernels that the table does not have yet. Returns the exit status."""
    version = version_of(ptxas)
    other_version = version != table.version
    names = dict(zip(kernels, demangle(list(kernels))))
    unknown = {k: ptx for k, ptx in kernels.items()
               if (renew and other_version) or table.rows.get(names[k], (0, 0, ""))[2] != hash_of(ptx)}
    errors, rows = [], {}
    for kernel, by_architecture in measure(ptxas, unknown).items():
        name = names[kernel]
        registers = [by_architecture[a]["registers"] for a in ARCHITECTURES]
        rows[name] = (registers, by_architecture[ARCHITECTURES[0]]["shared"], hash_of(kernels[kernel]))
        for a, r in by_architecture.items():
            if r["spill_stores"] or r["spill_loads"]:
                errors.append(f"{name} spills for {a}: {r['spill_stores']} bytes stored, {r['spill_loads']} loaded")
        if renew or other_version:
            continue
        if name not in table.rows:
            print(f"{name} is not in the table: {registers[0]} and {registers[1]} registers")
            continue
        for a, now, before in zip(ARCHITECTURES, registers, table.rows[name][0]):
            if now > before:
                errors.append(f"{name} takes {now} registers for {a}, but {before} in the table")
    for error in errors:
        print(f"resources: {error}", file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(unknown)} of them measured by ptxas {version}")
    if renew and not errors:
        table.rows = {name: row for name, row in (table.rows | rows).items() if name in names.values()}
        table.version = version
        table.write()
    elif other_version:
        print(f"registers are not compared, because the table was measured by ptxas {table.version}")
    return 1 if errors else 0


def show(kernels: Resources, figures: str) -> None:
    print(f"{'kernel':60} {'':6} registers  stack  spill stores/loads  shared")
    for name, by_architecture in sorted(kernels.items()):
        for architecture, r in by_architecture.items():
            spills = f"{r['spill_stores']}/{r['spill_loads']}"
            print(f"{name:60.60} {architecture:6} {r['registers']:9} {r['stack']:6} {spills:>19} {r['shared']:7}")
    if figures:
        path = Path(figures)
        try:
            measured = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            sys.exit(f"resources: {path}: {error}: expected a file that PTXSIM=figures={path} writes")
        for kernel in measured["kernels"]:
            if kernel["name"] in kernels:
                kernel["resources"] = kernels[kernel["name"]]
        path.write_text(json.dumps(measured, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="a .cu, or an object with uncompressed PTX")
    parser.add_argument("--figures", metavar="FILE.json", help="written by PTXSIM=figures=FILE.json; resources are added")
    parser.add_argument("--renew", metavar="TABLE")
    parser.add_argument("--check", metavar="TABLE")
    options = parser.parse_args()
    ptxas = find_tool("ptxas")
    kernels: dict[str, str] = {}
    for file in options.files:
        kernels |= kernels_of(file)
    if options.renew or options.check:
        sys.exit(compare(Table(options.renew or options.check), kernels, ptxas, bool(options.renew)))
    measured = measure(ptxas, kernels)
    show(dict(zip(demangle(list(measured)), measured.values())), options.figures)


if __name__ == "__main__":
    main()
