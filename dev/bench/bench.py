"""Compares the speed of the trainer and its PyTorch twin on this machine.

    python dev/bench/bench.py --train-gpt ./train_gpt --attention build/attention [--quick] [--only TEXT]

Every row of the table is a model (cases.py). All programs start from the same weights and train on the same
batch with the same settings. They take turns, each time in a new process (programs.py). Their losses must
agree, which shows that they did the same work. After that, attention alone is measured at several sequence
lengths (curve.py), and two ranks are compared with two threads (ranks.py). Writes bench.md, bench.json with
every number, and attention.png.
"""
import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import curve
import ranks
import report
from cases import CASES, QUICK
from programs import LEARNING_RATE, Bench, Failure

PYTORCH = Path(__file__).parent / "pytorch.py"
CURVE = "attention against T"  # its name for --only


def pytorch(*arguments: str) -> dict:
    return json.loads(subprocess.run([sys.executable, str(PYTORCH), *arguments], check=True,
                                     stdout=subprocess.PIPE, text=True).stdout)


def describe_machine(train_gpt: Path, threads: int) -> dict[str, str | int | float]:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    compiler = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", train_gpt.read_bytes())
    linked = subprocess.run(["ldd", train_gpt], capture_output=True, text=True).stdout
    libraries = [Path(path).resolve().name
                 for path in re.findall(r"=> (\S*lib(?:dnnl|gomp|omp|iomp5)\.so\S*)", linked)]
    flags = train_gpt.parent / "build" / "flags"  # the Makefile writes it
    return {"processor": cpu[1] if cpu else platform.machine(), "cores": len(os.sched_getaffinity(0)),
            "threads": threads, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
            "load before": round(os.getloadavg()[0], 2), "system": platform.platform(),
            "train_gpt's compiler": compiler[0].decode() if compiler else "unknown",
            "train_gpt's flags": flags.read_text().strip() if flags.exists() else "unknown",
            "train_gpt's libraries": ", ".join(libraries) or "none", "Python": platform.python_version(),
            **pytorch("versions")}


def program(text: str) -> Path:
    path = Path(text).resolve()
    if not path.is_file() or not os.access(path, os.X_OK):
        raise argparse.ArgumentTypeError(f"{text}: not a program")
    return path


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compares the speed of the trainer and its PyTorch twin.")
    parser.add_argument("--train-gpt", type=program, required=True, metavar="FILE", help="the trainer")
    parser.add_argument("--attention", type=program, required=True, metavar="FILE",
                        help="the program built from dev/bench/attention.cpp")
    parser.add_argument("--llmc", metavar="DIR", help="measure llm.c, too; its CPU trainer is DIR/train_gpt2")
    parser.add_argument("--quick", action="store_true",
                        help="a small model and T up to 2048: less than 2 minutes")
    parser.add_argument("--only", metavar="TEXT", help="measure only rows with TEXT in their name")
    parser.add_argument("--rounds", type=positive,
                        help="number of runs of each program (default: set for each row)")
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)),
                        help="number of threads of every program (default: all cores)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), metavar="DIR",
                        help="folder for bench.md, bench.json and attention.png (default: out/bench)")
    args = parser.parse_args()
    try:
        args.llmc = program(str(Path(args.llmc) / "train_gpt2")) if args.llmc else None
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --llmc: {error}")
    needed = ("torch", "numpy", "safetensors", "matplotlib")
    if missing := [module for module in needed if importlib.util.find_spec(module) is None]:
        parser.error(f"{sys.executable} has no {', '.join(missing)}: run dev/setup.sh torch, then this with "
                     ".venv/bin/python")
    return args


class Results:
    """The results are written after every row, so that a run that is stopped keeps what it has measured."""

    def __init__(self, args: argparse.Namespace):
        self.folder, self.kernels = args.out, args.attention
        self.threads = args.threads
        self.machine = describe_machine(args.train_gpt, args.threads)
        self.gflops: dict[str, float] = {}  # dtype -> the rate of a large matrix product
        self.rows: list[dict] = []
        self.attention: dict[str, dict[int, float]] = {}
        self.ranks: list[dict] = []
        self.failures: list[str] = []

    def measure_rate(self, dtype: str) -> None:
        """Called before every row. The best rate counts, because other programs can only make it lower."""
        command = [str(self.kernels), "--matmul", "2048", "--dtype", dtype, "--repeat", "20", "--threads",
                   str(self.threads)]
        line = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        self.gflops[dtype] = max(line["gflops"], self.gflops.get(dtype, 0))

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"machine": self.machine, "matmul_gflops": self.gflops, "rows": self.rows,
                   "geometric_mean": report.mean_ratio(self.rows),
                   "attention_ms": self.attention, "ranks": self.ranks, "failures": self.failures,
                   "crossings": curve.crossings(self.attention) if self.attention else []}
        (self.folder / "bench.json").write_text(json.dumps(content, indent=1) + "\n")
        (self.folder / "bench.md").write_text(
            report.markdown(self.machine, self.gflops, self.rows, self.attention, self.ranks, self.failures))
        if self.attention:
            curve.plot(self.attention, self.folder / "attention.png")

    def failed(self, name: str, error: Exception) -> None:
        self.failures.append(f"{name}: {error}")
        print(f"bench.py: {self.failures[-1]}", file=sys.stderr)


def main() -> int:
    args = parse_arguments()
    cases, only = QUICK if args.quick else CASES, (args.only or "").lower()
    chosen = [case for case in cases if only in case.name.lower()]
    with_curve, with_ranks = only in CURVE.lower(), only in ranks.NAME.lower()
    if not chosen and not with_curve and not with_ranks:
        names = ", ".join([*(case.name for case in cases), CURVE, ranks.NAME])
        print(f"bench.py: --only {args.only}: no row has it in its name; expected a part of: {names}",
              file=sys.stderr)
        return 2

    results = Results(args)
    if (load := results.machine["load before"]) > 0.5:
        print(f"bench.py: other programs are running (load {load}), so threads wait for each other: times "
              "may be several times longer, and the ratios mean little", file=sys.stderr)
    for case in chosen:
        try:
            results.measure_rate(case.dtype)
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                bench = Bench(case, Path(folder), str(args.train_gpt), args.threads, args.llmc)
                runs, absent = bench.measure(args.rounds or case.rounds)
            summary = report.summarise(case, runs)
            command = bench.trainer(Path("OUT"), bench.steps, LEARNING_RATE)
            results.rows.append({"name": case.name, "shape": case.shape, "kind": case.kind,
                                 "case": asdict(case), "command": command, "absent": absent, "summary": summary,
                                 "runs": [asdict(run) for run in runs]})
            if not summary["losses_agree"]:
                difference = f"{summary['loss_difference']:.1e}, relative"
                raise ValueError(f"the losses differ by {difference}, so the times mean nothing")
        except (Failure, subprocess.CalledProcessError, OSError, ValueError) as error:
            results.failed(case.name, error)
        results.write()
    if with_curve:
        lengths, rounds = (curve.QUICK_T, 1) if args.quick else (curve.ALL_T, args.rounds or 2)
        try:
            results.attention = curve.measure(str(args.attention), lengths, rounds, args.threads)
        except (subprocess.CalledProcessError, OSError, ValueError) as error:
            results.failed(CURVE, error)
        results.write()
    if with_ranks and not args.quick:
        try:
            results.ranks = ranks.measure(str(args.train_gpt), args.rounds or 3)
        except ranks.Absent as reason:
            print(f"bench.py: {ranks.NAME}: skipped: {reason}", file=sys.stderr)
        except (subprocess.CalledProcessError, OSError, ValueError) as error:
            results.failed(ranks.NAME, error)
        results.write()
    print((args.out / "bench.md").read_text())
    return 1 if results.failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
