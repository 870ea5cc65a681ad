"""Trains GPT-2 124M in bf16 on one GPU for a few steps, with the CUDA trainer and with PyTorch compiled.

    python dev/bench/gpu_training.py --trainer ./train_gptcu --json FILE [--batch B]

Both start from the same weights and train on the same batch of random tokens, with softmax and with poly3
(programs.py). Their losses show that they did the same work. The PyTorch program is the twin in
dev/reference/, written for speed: autocast, scaled_dot_product_attention, fused AdamW. The vocabulary is
padded to 50,304, because PyTorch is faster with that.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from cases import Case, Model
from programs import COMPARED_STEPS, COMPILED, TRAINER, Bench, Failure, Run, json_lines

GPT2 = Model("GPT-2 124M", 12, 12, 768, 50304, 1024)
TINY = Model("tiny", 1, 2, 64, 304, 64)
# The most important runs come first.
RUNS = [(TRAINER, "softmax"), (TRAINER, "poly3"), (COMPILED, "softmax"), (COMPILED, "poly3")]


def largest_batch() -> int:
    """The number of sequences of 1024 tokens for which both programs have enough memory."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    mib = int(subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0])
    return next(batch for batch, needed in ((32, 70_000), (16, 36_000), (8, 18_000), (4, 0)) if mib >= needed)


def gpu_mib(program: str, bench: Bench) -> float | None:
    """The GPU memory that the program reports."""
    folder = bench.folder / f"{program.replace(' ', '_')}_1"
    if program == COMPILED:
        return json_lines(folder / "metrics.jsonl")[-1].get("peak_mib")
    found = re.search(r"^memory +(\d+) MiB", (bench.folder / f"{folder.name}.log").read_text(), re.MULTILINE)
    return float(found[1]) if found else None


def row(run: Run, bench: Bench) -> dict:
    case, ms = bench.case, median(run.ms)
    return {"ms": ms, "tokens_per_second": 1e3 * case.batch * case.seq / ms,
            "tflop_s": case.operations() / ms / 1e9, "gpu_mib": gpu_mib(run.program, bench), "loss": run.loss}


def compare(rows: list[dict], rtol: float) -> None:
    """Adds the comparison with the trainer's losses and speed to the rows of PyTorch."""
    trainer = {row["attention"]: row for row in rows if row["program"] != COMPILED and "ms" in row}
    for theirs in (row for row in rows if row["program"] == COMPILED and "ms" in row):
        if ours := trainer.get(theirs["attention"]):
            pairs = list(zip(ours["loss"], theirs["loss"]))[:COMPARED_STEPS]
            theirs["loss_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)
            theirs["losses_agree"] = theirs["loss_difference"] <= rtol
            theirs["ratio"] = theirs["ms"] / ours["ms"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares the CUDA trainer and compiled PyTorch on one GPU.")
    parser.add_argument("--trainer", type=Path, required=True, metavar="FILE", help="train_gptcu")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="file for the results")
    parser.add_argument("--batch", type=int,
                        help="number of sequences (default: depends on the GPU's memory, at most 32)")
    parser.add_argument("--steps", type=int, default=20,
                        help="number of measured steps, after 5 for warm-up")
    parser.add_argument("--quick", action="store_true", help="a tiny model, for the simulator")
    parser.add_argument("--device", default="cuda", help="device of PyTorch")
    parser.add_argument("--no-pytorch", action="store_true", help="measure only the trainer")
    args = parser.parse_args()
    model, batch = (TINY, 2) if args.quick else (GPT2, args.batch or largest_batch())
    results = {"model": model.name, "batch": batch, "seq": model.context, "dtype": "bf16", "rows": []}
    benches: dict[str, Bench] = {}
    failed = False
    with tempfile.TemporaryDirectory(prefix="gpu-training-") as folder:
        for program, attention in RUNS:
            if program == COMPILED and args.no_pytorch:
                continue
            case = Case(model, batch, model.context, "bf16", attention, rounds=1, steps=args.steps, warmup=5)
            line = {"program": args.trainer.name if program == TRAINER else program, "attention": attention}
            print(f"{case.name}: {line['program']}", flush=True)
            try:
                if attention not in benches:
                    if program == COMPILED:
                        raise Failure([], "the trainer has left no weights to start from")
                    benches[attention] = Bench(case, Path(folder) / attention, str(args.trainer.resolve()),
                                               len(os.sched_getaffinity(0)), device=args.device)
                line |= row(benches[attention].run(program, 1), benches[attention])
            except Failure as error:
                line["error"] = error.reason
                failed = True
            results["rows"].append(line)
            compare(results["rows"], case.loss_rtol)
            args.json.write_text(json.dumps(results, indent=1) + "\n")
            print(json.dumps({key: value for key, value in line.items() if key != "loss"}), flush=True)
    return 1 if failed or not all(row.get("losses_agree", True) for row in results["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
