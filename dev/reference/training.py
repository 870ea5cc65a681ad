"""Trains the PyTorch twin for a few steps as the trainer does: with clipped gradients and AdamW.

    python dev/reference/training.py --model DIR --data DIR --batch B --seq T --steps N --out metrics.jsonl

The loss, the gradient norm and the milliseconds of each step go to a file like the trainer's metrics.jsonl.
The benchmark measures this program. It reads the sequences in the order of the shards, unshuffled.
"""
import argparse
import json
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt import GPT, decays, is_attention, load
from shards import batches

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def adamw(model: GPT, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95),
          eps: float = 1e-8, attention_lr: float = 1.0) -> torch.optim.AdamW:
    """Who changes the learning rate later has to multiply that of a group by its lr_factor."""
    groups = []
    for decay, attention in product((True, False), repeat=2):
        factor = attention_lr if attention else 1.0
        groups.append({"params": [p for name, p in model.named_parameters()
                                  if (decays(name, p), is_attention(name)) == (decay, attention)],
                       "weight_decay": weight_decay if decay else 0.0, "lr": lr * factor, "lr_factor": factor})
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, input_ids: Tensor, targets: Tensor,
               grad_clip: float, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Returns the loss and the gradient's norm before the step. `dtype` is the type of matrix products."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(input_ids.device.type, dtype=dtype, enabled=dtype != torch.float32):
        _, loss = model(input_ids, targets)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    return loss.item(), norm.item()


def train(args: argparse.Namespace) -> Iterator[dict]:
    model = load(args.model, fused=True).to(args.device)
    optimizer = adamw(model, args.lr, args.weight_decay)
    step_model = torch.compile(model) if args.compile else model
    for step, (inputs, targets) in zip(range(1, args.steps + 1), batches(args.data, args.batch, args.seq)):
        start = time.perf_counter()
        input_ids, target_ids = (torch.from_numpy(x).to(args.device) for x in (inputs, targets))
        loss, norm = train_step(step_model, optimizer, input_ids, target_ids, args.grad_clip,
                                DTYPES[args.dtype])
        line = {"step": step, "loss": loss, "grad_norm": norm, "ms": 1e3 * (time.perf_counter() - start)}
        if args.device != "cpu":
            line["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        yield line


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the PyTorch twin for a few steps.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint to start from")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="dataset folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE",
                        help="file for the metrics, one line per step")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--seq", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--grad-clip", type=float, default=1.0)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="run the model through torch.compile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with open(args.out, "w") as file:
        for line in train(args):
            print(json.dumps(line), file=file, flush=True)


if __name__ == "__main__":
    main()
