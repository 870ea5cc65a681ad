"""Two ranks with one thread each against one rank with two threads: the same model, data and tokens a step.

Both train with the same program, by turns. OpenMPI's monitoring counts the bytes that rank 0 sends in a step,
which are compared with the fewest that are needed, as train_gpt prints them.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from cases import CHARACTERS

NAME = "2 ranks against 2 threads"  # its name for --only
RANKS, BATCH, SEQ = 2, 16, 256
WARMUP, STEPS = 3, 8
ENVIRONMENT = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


class Absent(Exception):
    pass


def train(train_gpt: str, data: Path, out: Path, ranks: int, zero: int, steps: int, batch: int,
          mpirun: tuple[str, ...] = ()) -> str:
    """Returns what the program prints."""
    command = [train_gpt, "train", *CHARACTERS.flags(), "--data", str(data), "--out", str(out), "--seq", str(SEQ),
               "--batch", str(batch // ranks), "--total-batch", str(batch * SEQ), "--steps", str(steps),
               "--threads", str(RANKS // ranks), "--zero", str(zero), "--val-every", "0", "--sample-every", "0",
               "--checkpoint-every", "0"]
    if ranks > 1:
        command = ["mpirun", "--oversubscribe", "-n", str(ranks), *mpirun, *command]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout


def bytes_a_step(train_gpt: str, data: Path, folder: Path, zero: int) -> float:
    """The bytes that rank 0 sends: those of a longer run minus those of a shorter one."""
    sent = {}
    for steps in (2, 6):
        log = folder / f"sent_{zero}_{steps}"
        train(train_gpt, data, folder / f"run_{zero}_{steps}", RANKS, zero, steps, RANKS,
              ("--mca", "pml_monitoring_enable", "1", "--mca", "pml_monitoring_enable_output", "3",
               "--mca", "pml_monitoring_filename", str(log)))
        # "E  0  1  5266854 bytes  162 msgs sent": from, to, bytes
        lines = re.findall(r"^[EI]\t\d+\t\d+\t(\d+) bytes", Path(f"{log}.0.prof").read_text(), re.M)
        sent[steps] = sum(map(int, lines))
    return (sent[6] - sent[2]) / 4


def measure(train_gpt: str, rounds: int) -> list[dict]:
    """A row for each --zero."""
    if not shutil.which("mpirun") or "no MPI" in subprocess.run([train_gpt, "--version"], capture_output=True,
                                                                text=True, check=True).stdout:
        raise Absent("there is no mpirun, or train_gpt was built without MPI")
    import numpy as np
    from shards import write_shard
    layouts = [(1, 0), (RANKS, 0), (RANKS, 1), (RANKS, 2)]
    ms: dict[tuple[int, int], list[float]] = {layout: [] for layout in layouts}
    printed = {}
    with tempfile.TemporaryDirectory(prefix="bench-ranks-") as name:
        folder = Path(name)
        data = folder / "data"
        data.mkdir()
        tokens = np.random.default_rng(1).integers(CHARACTERS.vocab_size, size=100_001)
        write_shard(data / "train_000000.bin", tokens)
        (data / "meta.json").write_text(json.dumps({"vocab_size": CHARACTERS.vocab_size}) + "\n")
        for round in range(rounds):
            first = round % len(layouts)
            for layout in layouts[first:] + layouts[:first]:
                ranks, zero = layout
                print(f"{NAME}: round {round + 1} of {rounds}: {ranks} ranks, --zero {zero}", file=sys.stderr)
                out = folder / f"{ranks}_{zero}_{round}"
                printed[layout] = train(train_gpt, data, out, ranks, zero, WARMUP + STEPS, BATCH)
                lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                ms[layout] += [line["ms"] for line in lines][WARMUP:]
        rows = []
        for ranks, zero in layouts[1:]:
            text = printed[ranks, zero]
            alone, exposed, hidden = re.search(
                r"communication  ([\d.]+) ms a step on its own, ([\d.]+) ms in the training: (\d+)% hidden",
                text).groups()
            counted = float(re.search(r"([\d.]+) MB sent a step", text)[1])
            rows.append({"zero": zero, "ms": median(ms[ranks, zero]), "one_rank_ms": median(ms[1, 0]),
                         "ratio": median(ms[ranks, zero]) / median(ms[1, 0]), "alone_ms": float(alone),
                         "exposed_ms": float(exposed), "hidden": int(hidden) / 100, "counted_mb": counted,
                         "sent_mb": bytes_a_step(train_gpt, data, folder, zero) / 1e6})
    return rows


def markdown(rows: list[dict]) -> list[str]:
    lines = [f"## {NAME}", "",
             "| --zero | 1 rank, 2 threads: ms | 2 ranks, 1 thread each: ms | ratio | communication alone: ms "
             "| waiting for it: ms | hidden | fewest MB sent | MB sent |",
             "|---" + "|--:" * 8 + "|"]
    lines += [f"| {r['zero']} | {r['one_rank_ms']:.4g} | {r['ms']:.4g} | {r['ratio']:.3f} | {r['alone_ms']:.1f} | "
              f"{r['exposed_ms']:.1f} | {100 * r['hidden']:.0f}% | {r['counted_mb']:.1f} | {r['sent_mb']:.1f} |"
              for r in rows]
    m = CHARACTERS
    return lines + ["", f"{m.name}, fp32, {BATCH} x {SEQ} tokens a step; medians of all steps after the warm-up. "
                    "The bytes are those that a rank sends in a step.", ""]
