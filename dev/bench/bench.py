"""Measures the trainer against its PyTorch twin, on this machine.

    python dev/bench/bench.py --train-gpt ./train_gpt [--rounds N] [--steps K] [--quick]

All programs start from the same weights, train on the same batch with the same settings, and use the same
number of threads. In every round each of them runs once, in a process of its own; a step's milliseconds are
what the program logs, without the first steps. That they did the same work shows in their losses, which must
agree. Prints Markdown, and writes every number to a JSON file.
"""
import argparse
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

REFERENCE = Path(__file__).parents[1] / "reference"
TRAINER, EAGER, COMPILED = "train_gpt", "PyTorch", "PyTorch compiled"
VOCAB_SIZE = 50257  # the trainer's, where a dataset has no meta.json
LEARNING_RATE = "3e-4"
SETTINGS = ["--weight-decay", "0.1", "--grad-clip", "1.0"]


@dataclass
class Case:
    name: str
    model: list[str]  # flags of `train_gpt train`
    batch: int
    seq: int
    dtype: str = "fp32"
    loss_rtol: float = 1e-3  # of every step's loss: rounding differs, and the differences grow


CASES = [Case("GPT-2 124M, softmax", ["--preset", "gpt2"], batch=4, seq=64)]
QUICK = [Case("nano, softmax", ["--preset", "nano"], batch=4, seq=64)]


@dataclass
class Run:
    program: str
    round: int
    ms: list[float]  # of each step after the warm-up
    loss: list[float]  # of each step
    peak_mib: float


class Failure(Exception):
    def __init__(self, command: list[str], reason: str):
        super().__init__(f"{' '.join(command)}: {reason}")
        self.reason = reason


def execute(command: list[str], log: Path, threads: int) -> float:
    """Runs a program to its end; returns its peak memory in MiB."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(log.parent / "inductor")}
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} | caches
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)  # and not wait(): for this child's own memory
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = log.read_text(errors="replace").splitlines() or ["no output"]
        line = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])
        raise Failure(command, f"exit status {process.returncode}: {line.strip()}")
    return usage.ru_maxrss / 1024


class Bench:
    """One case, in a folder of its own."""

    def __init__(self, case: Case, folder: Path, args: argparse.Namespace):
        self.case, self.folder, self.args = case, folder, args
        self.data, self.start = folder / "data", folder / "start" / "step_00000001"
        self.prepare()

    def prepare(self) -> None:
        """Writes one batch of random tokens, so that a shuffled loader and an unshuffled one hand out the
        same, and the weights that the trainer starts from, by a step of learning rate 0."""
        import numpy as np
        sys.path.insert(0, str(REFERENCE))
        from shards import write_shard
        self.data.mkdir(parents=True)
        tokens = np.random.default_rng(1).integers(VOCAB_SIZE, size=self.case.batch * self.case.seq + 1)
        write_shard(self.data / "train_000000.bin", tokens)
        command = self.trainer(self.folder / "start", 1, "0", "--checkpoint-every", "1")
        execute(command, self.folder / "start.log", self.args.threads)
        (self.start / "optimizer.safetensors").unlink()

    def common(self, steps: int, lr: str) -> list[str]:
        return ["--data", str(self.data), "--batch", str(self.case.batch), "--seq", str(self.case.seq),
                "--steps", str(steps), "--lr", lr, "--dtype", self.case.dtype,
                "--threads", str(self.args.threads), *SETTINGS]

    def trainer(self, out: Path, steps: int, lr: str, *more: str) -> list[str]:
        return [self.args.train_gpt, "train", *self.case.model, "--out", str(out), *self.common(steps, lr),
                "--total-batch", str(self.case.batch * self.case.seq), "--seed", "1",
                "--schedule", "constant", "--warmup", "0", "--val-every", "0", "--sample-every", "0", *more]

    def run(self, program: str, round: int) -> Run:
        steps = self.args.warmup + self.args.steps
        name = f"{program.replace(' ', '_')}_{round}"
        if program == TRAINER:
            metrics = self.folder / name / "metrics.jsonl"
            command = self.trainer(metrics.parent, steps, LEARNING_RATE, "--checkpoint-every", "0")
        else:
            metrics = self.folder / f"{name}.jsonl"
            command = [sys.executable, str(REFERENCE / "training.py"), "--model", str(self.start),
                       "--out", str(metrics), *self.common(steps, LEARNING_RATE)]
            command += ["--compile"] if program == COMPILED else []
        peak = execute(command, self.folder / f"{name}.log", self.args.threads)
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        if [line["step"] for line in lines] != list(range(1, steps + 1)):
            raise Failure(command, f"{metrics} has not a line for each of {steps} steps")
        return Run(program, round, [line["ms"] for line in lines][self.args.warmup:],
                   [line["loss"] for line in lines], peak)

    def measure(self) -> tuple[list[Run], str]:
        """All runs, each program first in some round; and why one is not there."""
        programs, runs, absent = [TRAINER, EAGER, COMPILED], [], ""
        for round in range(1, self.args.rounds + 1):
            for program in programs[round % len(programs):] + programs[:round % len(programs)]:
                print(f"{self.case.name}: round {round} of {self.args.rounds}: {program}", file=sys.stderr)
                try:
                    runs.append(self.run(program, round))
                except Failure as error:
                    if program != COMPILED:
                        raise
                    absent = f"{COMPILED} does not work here: {error.reason}"
            if absent:
                programs = [TRAINER, EAGER]
                runs = [run for run in runs if run.program != COMPILED]
        return runs, absent


def largest_loss_difference(runs: list[Run]) -> float:
    """Over all steps and runs, relative to the first run of eager PyTorch; infinite where one is NaN."""
    reference = next(run.loss for run in runs if run.program == EAGER)
    differences = [abs(loss - expected) / abs(expected)
                   for run in runs for loss, expected in zip(run.loss, reference)]
    return math.inf if any(map(math.isnan, differences)) else max(differences)


def table(runs: list[Run]) -> str:
    present = {run.program for run in runs}
    programs = [program for program in (TRAINER, EAGER, COMPILED) if program in present]

    def row(name: str, values: dict[str, float], digits: int) -> str:
        numbers = [f"{values[program]:.{digits}f}" for program in programs]
        ratios = [f"{values[program] / values[TRAINER]:.2f}" for program in programs[1:]]
        return f"| {' | '.join([name, *numbers, *ratios])} |"

    def medians(chosen: list[Run]) -> dict[str, float]:
        return {program: median(ms for run in chosen if run.program == program for ms in run.ms)
                for program in programs}

    header = ["median ms a step", *programs, *(f"{program} / {TRAINER}" for program in programs[1:])]
    lines = [f"| {' | '.join(header)} |", "|---" + "|--:" * (len(header) - 1) + "|"]
    for round in sorted({run.round for run in runs}):
        lines.append(row(f"round {round}", medians([run for run in runs if run.round == round]), 1))
    lines.append(row("**all rounds**", medians(runs), 1))
    peaks = {program: median(run.peak_mib for run in runs if run.program == program) for program in programs}
    return "\n".join([*lines, row("peak memory, MiB", peaks, 0)])


def describe_machine(args: argparse.Namespace) -> dict[str, str | int | float]:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    compiler = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", Path(args.train_gpt).read_bytes())
    linked = subprocess.run(["ldd", args.train_gpt], capture_output=True, text=True).stdout
    libraries = re.findall(r"lib(?:dnnl|gomp|omp|iomp5)\.so\S*(?= =>)", linked)
    return {"processor": cpu[1] if cpu else platform.machine(), "cores": len(os.sched_getaffinity(0)),
            "threads": args.threads, "load before": round(os.getloadavg()[0], 2),
            "system": platform.platform(), "python": platform.python_version(), "torch": version("torch"),
            "train_gpt compiler": compiler[0].decode() if compiler else "unknown",
            "train_gpt libraries": ", ".join(libraries)}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures the trainer against its PyTorch twin.")
    parser.add_argument("--train-gpt", required=True, metavar="FILE", help="the trainer")
    parser.add_argument("--rounds", type=positive, help="runs of each program (default: 5; quick: 2)")
    parser.add_argument("--steps", type=positive, help="measured steps a run (default: 8; quick: 5)")
    parser.add_argument("--warmup", type=positive, default=2, help="steps before these (default: 2)")
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)),
                        help="of every program (default: all cores)")
    parser.add_argument("--quick", action="store_true", help="a small model, to see that everything runs")
    parser.add_argument("--json", type=Path, default=Path("out/bench.json"), help="(default: out/bench.json)")
    args = parser.parse_args()
    args.rounds = args.rounds or (2 if args.quick else 5)
    args.steps = args.steps or (5 if args.quick else 8)
    if any(importlib.util.find_spec(module) is None for module in ("torch", "numpy", "safetensors")):
        print(f"bench.py: {sys.executable} has no PyTorch: python3 -m venv .venv && .venv/bin/pip install "
              "torch numpy safetensors, then run this with .venv/bin/python", file=sys.stderr)
        return 2
    if not os.access(args.train_gpt, os.X_OK) or not Path(args.train_gpt).is_file():
        print(f"bench.py: --train-gpt {args.train_gpt}: not a program", file=sys.stderr)
        return 2
    args.train_gpt = str(Path(args.train_gpt).resolve())

    machine = describe_machine(args)
    print("\n".join(f"- {key}: {value}" for key, value in machine.items()), flush=True)
    results = []
    for case in QUICK if args.quick else CASES:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            try:
                bench = Bench(case, Path(folder), args)
                runs, absent = bench.measure()
            except (Failure, OSError) as error:
                print(f"bench.py: {error}", file=sys.stderr)
                return 1
        difference = largest_loss_difference(runs)
        print(f"\n### {case.name}: batch {case.batch} x {case.seq}, {case.dtype}\n\n{table(runs)}\n")
        print(f"Rounds: {args.rounds}. Steps a round: {args.steps}, after {args.warmup} of warm-up. "
              "Memory: of the whole process, libraries included. "
              f"All losses agree to {difference:.1e}. {absent}".rstrip(), flush=True)
        command = bench.trainer(Path("OUT"), args.warmup + args.steps, LEARNING_RATE)
        results.append({"case": asdict(case), "command": command, "loss_difference": difference,
                        "absent": absent, "runs": [asdict(run) for run in runs]})
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"machine": machine, "rounds": args.rounds, "steps": args.steps,
                                     "warmup": args.warmup, "results": results}, indent=1) + "\n")
    wrong = [r["case"]["name"] for r in results if not r["loss_difference"] <= r["case"]["loss_rtol"]]
    if wrong:
        print(f"bench.py: the losses differ, so the times mean nothing: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
