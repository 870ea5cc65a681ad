"""Does the benchmark's measurements of PyTorch alone, and prints each as a JSON line.

    python dev/bench/pytorch.py versions
    python dev/bench/pytorch.py attention --dtype fp32|bf16 --heads H --head-size D --seq T[,T...] --repeat N

`attention` is causal scaled_dot_product_attention, forward and backward, from and to the layout of a
transformer's qkv projection, (B,T,3C). The time is the median of a call.
"""
import argparse
import json
import re
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def times_ms(call: Callable[[], None], repeat: int) -> list[float]:
    """Times of calls after one call for warm-up."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times[1:]


def attention(dtype: torch.dtype, B: int, H: int, D: int, T: int, repeat: int) -> dict:
    qkv = torch.randn(B, T, 3 * H * D).to(dtype).requires_grad_()
    dout = torch.randn(B, T, H * D).to(dtype)

    def call() -> None:
        q, k, v = (x.transpose(1, 2) for x in qkv.view(B, T, 3, H, D).unbind(2))  # (B,H,T,D)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        qkv.grad = None
        out.transpose(1, 2).reshape(B, T, H * D).backward(dout)

    return {"T": T, "ms": median(times_ms(call, repeat))}


def versions() -> dict:
    libraries = {"PyTorch": torch.__version__}
    for name, pattern in (("oneDNN", r"MKL-DNN (v[\d.]+)"), ("MKL", r"Math Kernel Library Version (\S+)")):
        if match := re.search(pattern, torch.__config__.show()):
            libraries[f"PyTorch's {name}"] = match[1]
    return libraries


def main() -> None:
    parser = argparse.ArgumentParser(description="Does the benchmark's measurements of PyTorch alone.")
    parser.add_argument("what", choices=["versions", "attention"])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--seq", default="512", metavar="T[,T...]")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype]
    if args.what == "versions":
        print(json.dumps(versions()))
        return
    for T in map(int, args.seq.split(",")):
        line = attention(dtype, args.batch, args.heads, args.head_size, T, args.repeat)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
