"""Runs the trainer and its PyTorch twin from the same weights on the same batch, with the same settings and
number of threads. Each run is a process of its own. The programs log the milliseconds of their steps."""
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import llmc
from cases import GPT2, GPT2_VOCABULARY, Case

REFERENCE = Path(__file__).parents[1] / "reference"
sys.path.insert(0, str(REFERENCE))
TRAINER, EAGER, COMPILED, LLMC = "train_gpt", "PyTorch", "PyTorch compiled", "llm.c"
LEARNING_RATE = "3e-4"
COMPARED_STEPS = 20  # losses of later steps are not compared, because rounding errors have grown too much
SETTINGS = ["--weight-decay", "0.1", "--grad-clip", "1.0"]


@dataclass
class Run:
    program: str
    round: int
    ms: list[float]  # milliseconds of each step after the warm-up
    loss: list[float]  # loss of each step
    peak_mib: float


class Failure(Exception):
    def __init__(self, command: list[str], reason: str):
        super().__init__(f"{' '.join(command)}: {reason}")
        self.reason = reason


def execute(command: list[str], log: Path, threads: int) -> float:
    """Runs a program to its end and returns its peak memory in MiB. Its output goes to `log`."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(log.parent / "inductor")}
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} | caches
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _, status, usage = os.wait4(process.pid, 0)  # wait() does not return the child's memory
        except BaseException:  # Ctrl-C
            process.kill()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = log.read_text(errors="replace").splitlines() or ["no output"]
        line = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])
        raise Failure(command, f"exit status {process.returncode}: {line.strip()}")
    return usage.ru_maxrss / 1024


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Bench:
    """One case, which has a folder of its own."""

    def __init__(self, case: Case, folder: Path, trainer: str, threads: int, llmc_program: Path | None = None,
                 device: str = "cpu"):
        self.case, self.folder, self.train_gpt, self.threads = case, folder, trainer, threads
        self.device = device  # device of PyTorch
        it_can = (case.model, case.dtype, case.batch, case.seq) == (GPT2, "fp32", llmc.BATCH, llmc.SEQ)
        self.llmc_program = llmc_program if it_can else None
        self.data, self.start = folder / "data", folder / "start" / "step_00000001"
        self.steps = case.warmup + case.steps
        self.prepare()

    def prepare(self) -> None:
        """Writes one batch of random tokens; with only one, shuffling makes no difference. Writes also the
        weights from which the trainer starts, by a step with learning rate 0."""
        import numpy as np
        from shards import write_shard
        vocab_size = self.case.model.vocab_size
        self.data.mkdir(parents=True)
        tokens = np.random.default_rng(1).integers(vocab_size, size=self.case.batch * self.case.seq + 1)
        write_shard(self.data / "train_000000.bin", tokens)
        if vocab_size != GPT2_VOCABULARY:
            (self.data / "meta.json").write_text(json.dumps({"vocab_size": vocab_size}) + "\n")
        command = self.trainer(self.folder / "start", 1, "0", "--checkpoint-every", "1")
        execute(command, self.folder / "start.log", self.threads)
        (self.start / "optimizer.safetensors").unlink()
        if self.llmc_program:
            llmc.prepare(self.folder / "llm.c", self.start, self.data / "train_000000.bin")

    def common(self, steps: int, lr: str) -> list[str]:
        return ["--data", str(self.data), "--batch", str(self.case.batch), "--seq", str(self.case.seq),
                "--steps", str(steps), "--lr", lr, "--dtype", self.case.dtype,
                "--threads", str(self.threads), *SETTINGS]

    def trainer(self, out: Path, steps: int, lr: str, *more: str) -> list[str]:
        return [self.train_gpt, "train", *self.case.flags(), "--out", str(out), *self.common(steps, lr),
                "--total-batch", str(self.case.batch * self.case.seq), "--seed", "1",
                "--schedule", "constant", "--warmup", "0", "--val-every", "0", "--sample-every", "0", *more]

    def command(self, program: str, metrics: Path) -> list[str]:
        if program == TRAINER:
            return self.trainer(metrics.parent, self.steps, LEARNING_RATE, "--checkpoint-every", "0")
        command = [sys.executable, str(REFERENCE / "training.py"), "--model", str(self.start),
                   "--out", str(metrics), "--device", self.device,
                   *self.common(self.steps, LEARNING_RATE)]
        return command + ["--compile"] * (program == COMPILED)

    def run(self, program: str, round: int) -> Run:
        if program == LLMC:
            log = self.folder / f"llm.c_{round}.log"
            numbers = llmc.run(self.llmc_program, self.folder / "llm.c", log, self.threads)
            return Run(program, round, *numbers)
        folder = self.folder / f"{program.replace(' ', '_')}_{round}"
        folder.mkdir()
        metrics = folder / "metrics.jsonl"
        command = self.command(program, metrics)
        peak = execute(command, self.folder / f"{folder.name}.log", self.threads)
        lines = json_lines(metrics)
        if [line["step"] for line in lines] != list(range(1, self.steps + 1)):
            raise Failure(command, f"{metrics} does not have a line for each of {self.steps} steps")
        return Run(program, round, [line["ms"] for line in lines][self.case.warmup:],
                   [line["loss"] for line in lines], peak)

    def measure(self, rounds: int) -> tuple[list[Run], str]:
        """Does all runs, in a new order in each round. Returns them, and why PyTorch compiled is absent."""
        programs = [TRAINER, EAGER] + [COMPILED] * self.case.compiled + [LLMC] * bool(self.llmc_program)
        runs, absent = [], ""
        for round in range(1, rounds + 1):
            first = round % len(programs)
            for program in programs[first:] + programs[:first]:
                print(f"{self.case.name}: round {round} of {rounds}: {program}", file=sys.stderr)
                try:
                    runs.append(self.run(program, round))
                except Failure as error:
                    if program != COMPILED:
                        raise
                    absent = error.reason
            if absent and COMPILED in programs:
                programs.remove(COMPILED)
                runs = [run for run in runs if run.program != COMPILED]
        return runs, absent


def largest_loss_difference(runs: list[Run]) -> float:
    """The difference is relative to the first run of eager PyTorch, and infinite if a loss is NaN. llm.c has
    settings of its own, so only its first loss, before any update, is compared."""
    reference = next(run.loss for run in runs if run.program == EAGER)
    differences = []
    for run in runs:
        compared = 1 if run.program == LLMC else COMPARED_STEPS
        differences += [abs(loss - expected) / abs(expected)
                        for loss, expected in zip(run.loss[:compared], reference)]
    return math.inf if any(map(math.isnan, differences)) else max(differences)
