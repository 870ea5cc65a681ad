"""Draws the norms of attention during training, and numbers that explain them. Each run has a column.

    python dev/plot_norms.py out/softmax out/poly3 --out norms.png

Reads RUN/metrics.jsonl of runs with --norms-every. The config.json of the newest checkpoint gives the label
of the run and the prediction. llmc/norms.h explains the numbers. Exit status: 0 drawn, 2 bad usage or a bad
file.
"""
import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from metrics import read_metrics

Series = dict[tuple[int, ...], list[tuple[int, dict]]]  # (layer, head) or (layer,) -> steps and their lines
DRAWN = {"attention_norm", "jacobian_norm", "effective_keys", "entropy", "moment_excess", "score_std",
         "gradient_norm"}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


@dataclass
class Run:
    label: str
    scores: str  # the key that describes the scores: entropy, moment_excess or score_std
    power: int  # p of poly<p>; 0: no polynomial, or not known
    predicted: list[tuple[float, float]]  # norm and jacobian_norm, for each head or one for all; empty: none
    heads: Series = field(default_factory=dict)
    layers: Series = field(default_factory=dict)


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def read_norms(path: Path) -> tuple[Series, Series]:
    """Returns the lines with norms by (layer, head), and those with gradients by (layer,)."""
    heads, layers = {}, {}
    for number, entry in read_metrics(path):
        for series, keys, mark in [(heads, ("layer", "head"), "attention_norm"),
                                   (layers, ("layer",), "gradient_norm")]:
            if mark not in entry:
                continue
            for key in ("step", *keys):
                if type(entry.get(key)) is not int:
                    raise ValueError(f'{path}:{number}: "{key}" is no integer in a line with "{mark}"')
            for key in DRAWN & entry.keys():
                if entry[key] is not None and type(entry[key]) not in (int, float):
                    raise ValueError(f'{path}:{number}: "{key}" is no number')
            series.setdefault(tuple(entry[key] for key in keys), []).append((entry["step"], entry))
    if not heads:
        raise ValueError(f"{path}: no attention norms in it (train with --norms-every N)")
    return heads, layers


def gaussian_moment(p: int, D: int) -> float:
    """E[x^(2p)] for x = q.k / sqrt(D) with q, k ~ N(0, I_D)."""
    return math.prod((2 * s + 1) * (1 + 2 * s / D) for s in range(p))


def gaussian_norms(p: int, scale: str, context: int, D: int, T: int, gamma: float) -> tuple[float, float]:
    """norm and jacobian_norm of poly<p> for q, k ~ N(0, I_D), as in gaussian_norms of llmc/norms.h."""
    m = gaussian_moment(p, D)
    mean = n = 0.0  # mean of c_i^2 n_i, where n_i = sum over j <= i of gamma^(2(i-j))
    for i in range(T):
        n = 1 + gamma * gamma * n
        c2 = {"row": 1 / (m * n), "context": 1 / context, "mean": 1 / (m * (i + 1) ** 2)}.get(scale)
        mean += (float(scale) ** 2 if c2 is None else c2) * n / T
    return math.sqrt(mean * m), p * math.sqrt(mean * gaussian_moment(p - 1, D))


def power_of(attention: str) -> int:
    """p of poly<p>; 0 for the kinds that are not polynomials."""
    return 0 if attention in ("softmax", "sigmoid") else int(attention.removeprefix("poly"))


def predictions(config: dict, T: int) -> list[tuple[float, float]]:
    """Returns a prediction for each head, one for all heads if they are alike, or none."""
    attention, scale = config["attention"], str(config["attention_scale"])
    power = power_of(attention)
    if power == 0 or scale == "sum" or config.get("softmax_every") == 1:
        return []
    H = config["n_head"]
    gammas = [1.0]
    # A learned decay and gates change during training, so there is a prediction only for `row`, which does not
    # depend on them.
    if config["decay"] in ("learned", "gate") and scale != "row":
        return []
    if config["decay"] in ("fixed", "learned"):
        gammas = [1 / (1 + math.exp(-(1 + 4.5 * h / max(H - 1, 1)))) for h in range(H)]
    return [gaussian_norms(power, scale, config["n_positions"], config["n_embd"] // H, T, gamma)
            for gamma in gammas]


def read_run(folder: str) -> Run:
    heads, layers = read_norms(Path(folder) / "metrics.jsonl")
    name = Path(folder).resolve().name
    checkpoints = sorted(Path(folder).glob("step_*/config.json"))
    first = next(iter(heads.values()))[0][1]
    scores = next((key for key in ("entropy", "moment_excess") if key in first), "score_std")
    if not checkpoints:  # none is written yet, so the lines are all there is
        return Run(name, scores, 0, [], heads, layers)
    config = {"attention": "softmax", "attention_scale": "row", "decay": "none"} | read_json(checkpoints[-1])
    trainer = checkpoints[-1].with_name("trainer.json")
    options = read_json(trainer).get("options", {}) if trainer.exists() else {}
    try:
        T = options.get("--seq") or config["n_positions"]
        predicted = predictions(config, T)
        power = power_of(config["attention"])
    except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{checkpoints[-1]}: not a config.json of train_gpt: {error!r}") from None
    label = f"{name}: {config['attention']}"
    if power:
        label += f", scale {config['attention_scale']}"
    if config.get("softmax_every"):
        label += f", softmax every {config['softmax_every']} blocks"
    if config["decay"] != "none":
        label += f", {config['decay']} decay"
    return Run(label, scores, power, predicted, heads, layers)


def panel(run: Run, row: str) -> tuple[str, str, float]:
    """Returns the key that a row of the picture shows, its label, and what is added to the key's values."""
    if row == "scores" and run.scores != "moment_excess":
        return run.scores, {"entropy": "entropy (nats)", "score_std": "spread of the scores"}[run.scores], 0
    if row == "scores":  # excess + 1, because a logarithmic axis can show it
        power = 2 * run.power if run.power else "2p"
        return "moment_excess", f"$E[x^{{{power}}}]$ over the Gaussian's", 1
    return row, {"attention_norm": r"$\|A\|_F\,/\sqrt{N}$",
                 "jacobian_norm": r"$\|\partial A/\partial x\|_F\,/\sqrt{N}$",
                 "effective_keys": "effective number of keys",
                 "gradient_norm": "norm of a layer's gradient"}[row], 0


def levels(run: Run, row: str, key: str) -> tuple[list[float], list[float]]:
    """The heights of softmax's bound and of the prediction, which is a line or the range over the heads."""
    bounds = {"attention_norm": [1.0], "jacobian_norm": [2.0]}.get(row, [])
    if key == "moment_excess":
        return bounds, [1.0]
    if not bounds or not run.predicted:
        return bounds, []
    per_head = [norm if row == "attention_norm" else jacobian for norm, jacobian in run.predicted]
    return bounds, sorted({min(per_head), max(per_head)})


def scale_together(panels: list, values: list[float]) -> None:
    """Gives these panels the same y axis, which begins at 0 or, if the values differ much, is logarithmic."""
    for axes in panels[1:]:
        axes.sharey(panels[0])
    if min(values, default=0) > 0 and max(values) > 20 * min(values):
        panels[0].set_yscale("log")
        for axis in [axes.yaxis for axes in panels]:
            axis.set_major_formatter("{x:g}")
            if max(values) < 100 * min(values):  # few powers of ten are visible, so label more values
                axis.get_minor_locator().set_params(subs=[2, 5])
                axis.set_minor_formatter("{x:g}")
    else:
        panels[0].set_ylim(bottom=min([0.0, *values]))


def draw(runs: list[Run], out: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    layers = sorted({key[0] for run in runs for key in [*run.heads, *run.layers]})
    # The end of the colour map is left out, because its yellow is too pale for thin lines.
    colours = {layer: plt.get_cmap("viridis")(0.92 * i / max(len(layers) - 1, 1))
               for i, layer in enumerate(layers)}
    bound, prediction = {"color": "crimson", "linestyle": "--"}, {"color": "black", "linestyle": ":"}
    rows = ["attention_norm", "jacobian_norm", "effective_keys", "scores"]
    if any(run.layers for run in runs):
        rows.append("gradient_norm")
    figure, grid = plt.subplots(len(rows), len(runs), squeeze=False, sharex="col", layout="constrained",
                                figsize=(max(7.0, 1 + 4.6 * len(runs)), 0.9 + 2.3 * len(rows)))
    for r, row in enumerate(rows):
        shared = {}  # label -> the panels with this label, and their values
        for run, axes in zip(runs, grid[r]):
            key, label, add = panel(run, row)
            panels, values = shared.setdefault(label, ([], []))
            if not panels:
                axes.set_ylabel(label)
            panels.append(axes)
            for ids, lines in sorted((run.layers if row == "gradient_norm" else run.heads).items()):
                steps = [step for step, _ in lines]
                # NaN makes a gap if a line has null or nothing.
                y = [math.nan if line.get(key) is None else line[key] + add for _, line in lines]
                axes.plot(steps, y, color=colours[ids[0]], linewidth=0.8, alpha=0.85,
                          marker="." if len(steps) == 1 else None)
                values.extend(value for value in y if math.isfinite(value))
            for heights, style in zip(levels(run, row, key), [bound, prediction]):
                for height in heights:
                    axes.axhline(height, linewidth=1.3, **style)
                values.extend(heights)
            axes.grid(alpha=0.25)
        for panels, values in shared.values():
            scale_together(panels, values)
    for run, top, bottom in zip(runs, grid[0], grid[-1]):
        top.set_title(run.label.replace("$", r"\$"), fontsize=11)
        bottom.set_xlabel("step")
    figure.align_ylabels(grid[:, 0])

    few = layers if len(layers) <= 8 else [layers[i * (len(layers) - 1) // 5] for i in range(6)]
    handles = [Line2D([], [], color=colours[layer], label=f"layer {layer}") for layer in few]
    handles.append(Line2D([], [], label=r"softmax's bounds, $\sqrt{N}$ and $2\sqrt{N}$", **bound))
    if any(run.scores == "moment_excess" for run in runs):
        handles.append(Line2D([], [], label="polynomials, for Gaussian q and k", **prediction))
    figure.legend(handles=handles, loc="outside lower center", ncols=4 if len(runs) < 3 else 8)
    figure.suptitle("Attention during training: one line per head, coloured by layer", fontsize=13)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="plot_norms.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", help="--out folders of train_gpt train")
    parser.add_argument("--out", default="norms.png", help="picture to write (default: norms.png)")
    args = parser.parse_args(argv)
    try:
        runs = [read_run(run) for run in args.runs]
    except ValueError as error:
        parser.error(str(error))
    try:
        draw(runs, args.out)
    except (OSError, ValueError) as error:
        parser.error(f"{args.out}: {error}")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
