"""Draws the loss curves of one or more runs.

    python dev/plot_loss.py out/quickstart [out/other ...] --out loss.png
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from metrics import read_metrics


def read_losses(run: str) -> dict[str, list[tuple[int, float]]]:
    """For "loss" and for "val_loss", the steps that have one and the values."""
    path = Path(run) / "metrics.jsonl"
    losses = {"loss": [], "val_loss": []}
    try:
        for number, entry in read_metrics(path):
            for key in losses.keys() & entry.keys():
                if type(entry.get("step")) is not int or type(entry[key]) not in (int, float):
                    raise ValueError(f'{path}:{number}: "step" or "{key}" is no number')
                losses[key].append((entry["step"], entry[key]))
    except ValueError as error:
        sys.exit(f"plot_loss: {error}")
    return losses


def smoothed(values: list[float], keep: float = 0.95) -> list[float]:
    """An exponential moving average without the bias of its start."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="--out folders of train_gpt train")
    parser.add_argument("--out", default="loss.png", help="picture to write (default loss.png)")
    args = parser.parse_args(argv)

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for i, run in enumerate(args.runs):
        train, val = read_losses(run).values()
        name = Path(run).name
        if train:
            steps, losses = zip(*train)
            axes.plot(steps, losses, color=f"C{i}", alpha=0.2, linewidth=0.8)
            axes.plot(steps, smoothed(losses), color=f"C{i}", label=f"{name}: training, smoothed")
        if val:
            axes.plot(*zip(*val), "o--", color=f"C{i}", markersize=4, label=f"{name}: validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(args.out, dpi=130)
    except (OSError, ValueError) as error:
        sys.exit(f"plot_loss: {args.out}: {error}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
