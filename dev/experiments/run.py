"""Trains what is missing in results.jsonl of some studies of this folder.

    python dev/experiments/run.py                      all studies
    python dev/experiments/run.py ladder scale         these
    python dev/experiments/run.py --list               says how many runs each study still needs, as far as is known

There are as many runs at once as cores, with one thread each. Each run that has ended is a line of results.jsonl,
so this program can be stopped at any time, and started again. Exit status: 0 all is there, 1 a run has failed,
2 bad usage, 130 stopped.
"""
import argparse
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from study import (HERE, NORMS, RESULTS, Results, Study, StudyError, exit_status, key_of, read_study, read_yaml,
                   study_names)

sys.path.insert(0, str(HERE.parent))
from metrics import read_metrics  # noqa: E402

ROOT = HERE.parent.parent
DIVERGED = 3  # exit status of train_gpt
stopped = False  # by a signal


def prepare(name: str, folder: Path) -> Path:
    """Makes the dataset with this name in datasets.yaml, if it is not there. Returns its folder."""
    made = folder / name
    if not (made / "meta.json").exists():
        datasets = read_yaml(HERE / "datasets.yaml")
        if name not in datasets:
            raise StudyError(f"{HERE / 'datasets.yaml'}: no dataset {name!r} in it")
        command = [sys.executable, str(ROOT / "data/prepare.py"), *shlex.split(datasets[name]), "--out",
                   str(made)]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise StudyError(f"dataset {name}: this failed: {shlex.join(command)}")
    return made


def text_of(value: object) -> str:
    """As train_gpt takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass
class Training:
    """A run in progress."""
    run: dict
    data: Path
    program: str
    folder: tempfile.TemporaryDirectory
    process: subprocess.Popen
    started: float

    @classmethod
    def start(cls, run: dict, data: Path, program: str) -> "Training":
        folder = tempfile.TemporaryDirectory(prefix="experiment-")
        command = [program, "train", "--data", str(data), "--out", f"{folder.name}/run"]
        for flag, value in ({"threads": 1} | run["flags"]).items():
            command += [f"--{flag}"] if value is None else [f"--{flag}", text_of(value)]
        log = open(f"{folder.name}/log", "w")
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                   env=os.environ | {"OMP_WAIT_POLICY": "passive"})
        log.close()
        return cls(run, data, program, folder, process, time.monotonic())

    def log(self) -> str:
        return Path(self.folder.name, "log").read_text(errors="replace")

    def result(self) -> dict:
        """The line of results.jsonl, when the process has ended. Raises a StudyError if it has failed."""
        status = self.process.returncode
        if status not in (0, DIVERGED):
            last = (self.log().strip().splitlines() or ["no message"])[-1]
            raise StudyError(f"{shlex.join(self.process.args)}\nended with status {status}: {last}")
        curve, milliseconds, passed, norms = [], [], 0.0, {}
        for _, entry in read_metrics(Path(self.folder.name, "run/metrics.jsonl")):
            if "val_loss" in entry:
                curve.append([entry["step"], round(passed, 3), round(entry["val_loss"], 4)])
            if "ms" in entry:
                milliseconds.append(entry["ms"])
                passed += entry["ms"] / 1000
            if "attention_norm" in entry:
                norms.setdefault(entry["step"], []).append(entry)
        measured = {}
        for when, step in (("first", min(norms, default=0)), ("last", max(norms, default=0))):
            for name in NORMS if norms else ():
                values = [head[name] for head in norms[step] if head.get(name) is not None]
                measured.setdefault(when, {})[name] = round(statistics.fmean(values), 4) if values else None
        parameters = re.search(r"(\d+) parameters", self.log())
        meta = json.loads((self.data / "meta.json").read_text())
        return self.run | {"loss": None if status == DIVERGED else curve[-1][2], "curve": curve, "norms": measured,
                           "accuracy": self.accuracy() if "recall" in meta and status == 0 else None,
                           "ms": round(statistics.median(milliseconds), 2) if milliseconds else None,
                           "parameters": int(parameters[1]) if parameters else None,
                           "source": meta["source"], "seconds": round(time.monotonic() - self.started, 1)}

    def accuracy(self) -> float:
        """The share of right answers in a dataset that has questions. The run must have written a checkpoint."""
        command = [self.program, "eval", "--model", f"{self.folder.name}/run", "--data", str(self.data),
                   "--threads", "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        found = re.search(r"accuracy ([0-9.]+)", done.stdout)
        if done.returncode or not found:
            raise StudyError(f"{shlex.join(command)}\nended with status {done.returncode}: {done.stderr.strip()}")
        return float(found[1])


def stop(*_: object) -> None:
    global stopped
    stopped = True


def next_run(studies: list[Study], results: Results, running: list[Training]) -> dict | None:
    started = {key_of(training.run) for training in running}
    for study in studies:
        for run in study.missing(results):
            if key_of(run) not in started:
                return run
    return None


def train(studies: list[Study], results: Results, program: str, data: Path, jobs: int) -> None:
    """Runs until nothing is missing, or until a signal stops it: then no training goes on alone."""
    running = []
    try:
        while not stopped:
            while len(running) < jobs and (run := next_run(studies, results, running)):
                running.append(Training.start(run, prepare(run["data"], data), program))
            if not running:
                return
            time.sleep(0.05)
            for training in [t for t in running if t.process.poll() is not None]:
                result = training.result()
                results.add(result)
                training.folder.cleanup()
                running.remove(training)
                loss = "diverged" if result["loss"] is None else f"{result['loss']:.4f}"
                flags = " ".join(f"{flag}={text_of(value)}" for flag, value in result["flags"].items())
                print(f"{loss:>8} {result['seconds']:7.1f} s  {result['data']} {flags}", flush=True)
    finally:
        for training in running:
            training.process.kill()
            training.process.wait()
            training.folder.cleanup()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="default: all studies of this folder")
    parser.add_argument("--list", action="store_true", help="only say what is missing")
    parser.add_argument("--train-gpt", default=str(ROOT / "train_gpt"), metavar="PROGRAM",
                        help="default: ./train_gpt")
    parser.add_argument("--data", type=Path, default=ROOT / "data/experiments", metavar="DIR",
                        help="folder for the datasets (default: data/experiments)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE",
                        help="default: results.jsonl of this folder")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                        help="runs at once (default: one for each core)")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}, expected at least 1")
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, stop)

    def work() -> int:
        studies = [read_study(HERE / f"{name}.yaml") for name in args.studies or study_names()]
        results = Results(args.results)
        if args.list:
            for study in studies:
                print(f"{study.name}: {len(list(study.missing(results)))} runs to start")
            return 0
        # Studies about time come last and have the machine for themselves.
        train([study for study in studies if not study.jobs], results, args.train_gpt, args.data, args.jobs)
        for study in studies:
            if study.jobs:
                train([study], results, args.train_gpt, args.data, study.jobs)
        return 130 if stopped else 0

    return exit_status("run.py", work)


if __name__ == "__main__":
    sys.exit(main())
