"""Measures attention alone, forward and backward, at several sequence lengths. Compares our kernels (the
program built from dev/bench/attention.cpp) with PyTorch's scaled_dot_product_attention."""
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

PYTORCH = Path(__file__).parent / "pytorch.py"
DTYPE = "bf16"
QUICK_T = [512, 1024, 2048]
ALL_T = [512 << i for i in range(6)]  # to 16,384


@dataclass(frozen=True)
class Series:
    name: str
    attention: str
    kernel: str
    heads: int = 6
    head_size: int = 64

    @property
    def shape(self) -> list[str]:
        return ["--heads", str(self.heads), "--head-size", str(self.head_size)]


SDPA = Series("PyTorch SDPA", "softmax", "torch")
SERIES = [
    SDPA,
    Series("softmax tiled", "softmax", "tiled"),
    Series("poly3 tiled", "poly3", "tiled"),
    Series("poly1 tiled", "poly1", "tiled"),
    Series("poly1 linear", "poly1", "linear"),
    Series("poly2 tiled", "poly2", "tiled"),
    Series("poly2 linear", "poly2", "linear"),
    Series("poly2 tiled, 12 heads of 32", "poly2", "tiled", 12, 32),
    Series("poly2 linear, 12 heads of 32", "poly2", "linear", 12, 32),
]
CROSSINGS = [("poly1", 64, "poly1 tiled", "poly1 linear"), ("poly2", 64, "poly2 tiled", "poly2 linear"),
             ("poly2", 32, "poly2 tiled, 12 heads of 32", "poly2 linear, 12 heads of 32")]


def time_of(series: Series, T: int, repeat: int, program: str, threads: int) -> float:
    """Milliseconds of a call, forward and backward: the median of `repeat` calls after one for warm-up."""
    common = ["--dtype", DTYPE, *series.shape, "--seq", str(T), "--repeat", str(repeat),
              "--threads", str(threads)]
    if series is SDPA:
        command = [sys.executable, str(PYTORCH), "attention", *common]
    else:
        command = [program, "--attention", series.attention, "--kernel", series.kernel, *common]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    line = json.loads(output)
    return line["ms"] if series is SDPA else line["forward_ms"] + line["backward_ms"]


def measure(program: str, lengths: list[int], rounds: int, threads: int) -> dict[str, dict[int, float]]:
    """Milliseconds by series and T. In every round each series runs once. The longest T has one round."""
    times = {series.name: {} for series in SERIES}
    for T in lengths:
        print(f"attention against T: {T}", file=sys.stderr)
        repeat = min(8, max(1, 16384 // T))
        turns = [{series.name: time_of(series, T, repeat, program, threads) for series in SERIES}
                 for _ in range(rounds if T < ALL_T[-1] else 1)]
        for name in times:
            times[name][T] = mean(turn[name] for turn in turns)
    return times


def crossing(tiled: dict[int, float], linear: dict[int, float]) -> str:
    """The T from which on linear takes less time, interpolated on straight lines in log-log scale."""
    lengths = sorted(tiled)
    gain = [math.log(tiled[T] / linear[T]) for T in lengths]
    if gain[-1] <= 0:
        return f"above {lengths[-1]}"
    last = max((i for i, value in enumerate(gain) if value <= 0), default=-1)
    if last < 0:
        return f"below {lengths[0]}"
    part = gain[last] / (gain[last] - gain[last + 1])
    return f"{lengths[last] * (lengths[last + 1] / lengths[last]) ** part:.0f}"


def crossings(times: dict[str, dict[int, float]]) -> list[dict]:
    return [{"attention": attention, "head_size": D, "T": crossing(times[tiled], times[linear])}
            for attention, D, tiled, linear in CROSSINGS]


def plot(times: dict[str, dict[int, float]], file: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    colours = {"torch": "black", "softmax": "tab:blue", "poly3": "tab:purple", "poly1": "tab:green",
               "poly2": "tab:red"}
    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    for series in SERIES:
        lengths = sorted(times[series.name])
        axes.plot(lengths, [times[series.name][T] for T in lengths], label=series.name, linewidth=1.8,
                  color=colours["torch" if series is SDPA else series.attention],
                  linestyle="-" if series.kernel == "linear" or series is SDPA else "--",
                  marker="s" if series.head_size != 64 else "o", markersize=4,
                  alpha=0.5 if series.head_size != 64 else 1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{T:,}" for T in lengths])
    axes.set_xlabel("T, tokens in the sequence")
    axes.set_ylabel("ms, forward and backward")
    axes.set_title(f"Causal attention, {DTYPE}, 1 sequence, 6 heads of 64 (if not named otherwise)")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
