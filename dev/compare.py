"""Compares two dumps of a forward and backward pass, tensor by tensor.

    python dev/compare.py A.safetensors B.safetensors [--rtol X] [--loss-rtol X] [--atol X] [--floor X]

B is the reference. The relative difference is |A - B| / |B| in the Euclidean norm. A tensor agrees if this is
at most --rtol (--loss-rtol for `loss`), or if no element differs by more than --atol. A gradient also agrees
if |A - B| is at most --floor times the norm of all gradients of B together, because a gradient that is zero
in exact arithmetic is only rounding noise in both files. Integers must be equal. It is a difference if only
one file has a tensor, if the shapes differ, or if there is NaN or Inf in either file.

Exit status: 0 they agree, 1 they differ, 2 bad usage or a file that cannot be read.
"""
import argparse
import math
import sys
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
from safetensors import SafetensorError, safe_open


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def open_dump(path: str) -> safe_open:
    try:
        file = safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not file.keys():
        raise ValueError(f"{path}: holds no tensors")
    return file


def norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.astype(np.float64).ravel()))


def compare(a: np.ndarray, b: np.ndarray, rtol: float, atol: float, noise: float) -> tuple[float, float, str]:
    """Returns the largest absolute difference, the relative one, and what is wrong ("" if a and b agree)."""
    if a.shape != b.shape:
        return math.nan, math.nan, f"shapes {list(a.shape)} and {list(b.shape)}"
    if a.dtype.kind != b.dtype.kind:
        return math.nan, math.nan, f"types {a.dtype} and {b.dtype}"
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan, math.nan, "NaN or Inf"
    difference = a.astype(np.float64) - b.astype(np.float64)
    largest, absolute, reference = float(np.abs(difference).max(initial=0)), norm(difference), norm(b)
    relative = absolute / reference if reference else math.inf if absolute else 0.0
    if a.dtype.kind != "f":
        return largest, relative, "not equal" if largest else ""
    agrees = relative <= rtol or largest <= atol or absolute <= noise
    return largest, relative, "" if agrees else "differs"


def run(path_a: str, path_b: str, rtol: float, loss_rtol: float, atol: float, floor: float) -> list[str]:
    """Prints the table; returns the names of the tensors that differ."""
    a, b = open_dump(path_a), open_dump(path_b)
    names = set(a.keys()) | set(b.keys())
    total = math.hypot(*(norm(b.get_tensor(name)) for name in b.keys() if name.startswith("grad.")))
    noise = floor * total if math.isfinite(total) else 0.0
    # The most important tensors come first: loss, logits, gradients, and then the inputs.
    order = {"loss": 0, "logits": 1, "grad": 2, "param": 3}
    width = max(map(len, names))
    wrong = []
    print(f"{'tensor':{width}}  {'largest':>9}  {'relative':>9}")
    for name in sorted(names, key=lambda name: (order.get(name.split(".")[0], 4), name)):
        largest = relative = math.nan
        if name not in a.keys():
            problem = f"not in {path_a}"
        elif name not in b.keys():
            problem = f"not in {path_b}"
        else:
            largest, relative, problem = compare(
                a.get_tensor(name), b.get_tensor(name), rtol=loss_rtol if name == "loss" else rtol, atol=atol,
                noise=noise if name.startswith("grad.") else 0.0)
        print(f"{name:{width}}  {largest:9.2e}  {relative:9.2e}  {problem}".rstrip())
        if problem:
            wrong.append(name)
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="compare.py", description="Compares two dumps, tensor by tensor.")
    parser.add_argument("a", metavar="A.safetensors")
    parser.add_argument("b", metavar="B.safetensors", help="the reference")
    parser.add_argument("--rtol", type=tolerance, default=1e-4,
                        help="largest relative difference of a tensor (default: 1e-4)")
    parser.add_argument("--loss-rtol", type=tolerance, default=1e-5,
                        help="largest relative difference of the loss (default: 1e-5)")
    parser.add_argument("--atol", type=tolerance, default=0.0,
                        help="an absolute difference of each element that is always allowed (default: 0)")
    parser.add_argument("--floor", type=tolerance, default=1e-7,
                        help="a difference of a gradient that is always allowed, relative to the norm of all "
                             "gradients together (default: 1e-7)")
    args = parser.parse_args(argv)
    try:
        wrong = run(args.a, args.b, args.rtol, args.loss_rtol, args.atol, args.floor)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        parser.error(str(error))
    print(f"{len(wrong)} differ: {', '.join(wrong)}" if wrong else "all agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
