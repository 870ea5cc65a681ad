"""Times PyTorch's causal scaled_dot_product_attention at the lengths of build/cuda_layers --attention-only.

    python dev/bench/sdpa.py [--lengths T,...] [--tokens N] [--json FILE]

A time is the median of a call between two CUDA events, with other data in the L2 cache. q, k, v and their
gradients are (B,H,T,D) views of (B,T,H,D), so that only attention is timed. Every backend that PyTorch has
on this machine is measured; `flash` is its FlashAttention.
"""
import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def call_ms(call: Callable[[], object], other: torch.Tensor) -> float:
    if other.device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    other.sum()  # takes so long that the call is in the stream before the sum ends
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def measure(backend: str, dtype: torch.dtype, B: int, H: int, D: int, T: int, repeat: int,
            other: torch.Tensor) -> dict:
    q, k, v, dout = (torch.randn(B, T, H, D, device=other.device, dtype=dtype).transpose(1, 2)
                     for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(*inputs, is_causal=True)

    with sdpa_kernel(BACKENDS[backend]):
        out = forward()

        def backward() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(out, inputs, dout, retain_graph=True)

        backward()
        times = {name: median(call_ms(call, other) for _ in range(repeat))
                 for name, call in (("forward_ms", forward), ("backward_ms", backward))}
    return {"backend": backend, "B": B, "T": T, "H": H, "D": D, **times}


def main() -> None:
    parser = argparse.ArgumentParser(description="Times PyTorch's attention at several sequence lengths.")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768", metavar="T[,T...]")
    parser.add_argument("--tokens", type=int, help="B times T (default: the longest T)")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    lengths = [int(T) for T in args.lengths.split(",")]
    tokens = args.tokens or max(lengths)
    other = torch.zeros((512 << 20) // 4 if args.device == "cuda" else 1, device=args.device)
    results = {"PyTorch": torch.__version__, "dtype": args.dtype, "rows": []}
    for T in lengths:
        for backend in BACKENDS:
            B = max(1, tokens // T)
            try:
                row = measure(backend, DTYPES[args.dtype], B, args.heads, args.head_size, T, args.repeat,
                              other)
            except RuntimeError as error:  # the backend does not support this GPU
                row = {"backend": backend, "B": B, "T": T, "error": " ".join(str(error).split())[:200]}
            results["rows"].append(row)
            print(json.dumps(row), flush=True)
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
