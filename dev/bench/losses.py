"""Compares the losses of two runs, step by step.

    python dev/bench/losses.py A/metrics.jsonl B/metrics.jsonl [--rtol 1e-3] [--json FILE]

The exit status is 1 if the relative difference at any step is more than --rtol.
"""
import argparse
import json
import math
import sys
from pathlib import Path


def losses(path: Path) -> dict[int, float]:
    lines = map(json.loads, path.read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def difference(a: dict[int, float], b: dict[int, float]) -> float:
    """The largest relative difference. It is infinite if the steps are not the same or a loss is NaN."""
    if a.keys() != b.keys() or not a:
        return math.inf
    differences = [abs(b[step] - a[step]) / abs(a[step]) for step in a]
    return math.inf if any(map(math.isnan, differences)) else max(differences)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares the losses of two runs, step by step.")
    parser.add_argument("files", nargs=2, type=Path, metavar="metrics.jsonl")
    parser.add_argument("--rtol", type=float, default=1e-3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    runs = [losses(path) for path in args.files]
    result = {"steps": len(runs[0]), "largest_difference": difference(*runs), "rtol": args.rtol,
              "last_losses": [list(run.values())[-1] if run else None for run in runs]}
    agree = result["largest_difference"] <= args.rtol
    if args.json:
        args.json.write_text(json.dumps(result) + "\n")
    print(f"{result['steps']} steps: largest relative difference of the losses "
          f"{result['largest_difference']:.1e}, {'within' if agree else 'NOT within'} {args.rtol:g}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
