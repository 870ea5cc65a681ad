"""Draws the loss curves of one or more runs.

    python dev/plot_loss.py out/quickstart [out/other ...] --out loss.png
"""

import argparse
import json
import sys
from pathlib import Path


def read_metrics(run: str) -> list[dict]:
    path = Path(run) / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as error:
        sys.exit(f"plot_loss: {path}: {error.strerror}")
    except json.JSONDecodeError as error:
        sys.exit(f"plot_loss: {path}: not JSON: {error}")


def smoothed(values: list[float], keep: float = 0.95) -> list[float]:
    """An exponential moving average without the bias of its start."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="--out folders of train_gpt train")
    parser.add_argument("--out", default="loss.png", help="picture to write (default loss.png)")
    args = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for i, run in enumerate(args.runs):
        metrics = read_metrics(run)
        train = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
        val = [(m["step"], m["val_loss"]) for m in metrics if "val_loss" in m]
        name = Path(run).name
        if train:
            steps, losses = zip(*train)
            axes.plot(steps, losses, color=f"C{i}", alpha=0.2, linewidth=0.8)
            axes.plot(steps, smoothed(losses), color=f"C{i}", label=f"{name}: training, smoothed")
        if val:
            axes.plot(*zip(*val), "o--", color=f"C{i}", markersize=4, label=f"{name}: validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(args.out, dpi=130)
    except (OSError, ValueError) as error:
        sys.exit(f"plot_loss: {args.out}: {error}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
