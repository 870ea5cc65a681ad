"""Writes tests/golden/run: a short training run of the PyTorch twin, to compare the trainer with.

    python dev/reference/golden_run.py

- initial/: the first model of the run, with names as GPT2LMHeadModel writes them; data/: token shards.
- flags.txt: the flags of `train_gpt train` besides --init-from, --data and --out.
- metrics.jsonl: the lines that it must log, without times and with only some of the attention's norms.
- last.safetensors: the weights after the last step and, as m.<name> and v.<name>, AdamW's moments.

No flag has its default, and each one changes the result: some gradients are clipped and others are not, eps
is large, and the steps end in the second epoch. The twin uses nothing from the trainer except the order of
the data, which is implemented here again. Everything is computed in float64 from the float32 weights.
"""
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from attention import attention_matrix
from golden import GOLDEN, random_tensor
from gpt import GPT, GPTConfig, load, save
from shards import windows, write_shard
from training import adamw

RUN = GOLDEN / "run"
# It has every kind of parameter: those with weight decay, and each kind without it.
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=8, n_positions=12, vocab_size=29, qk_norm=True,
                   decay="learned", short_conv=2, output_gate=True)
FLAGS = {"seed": 12345678901234567890, "batch": 2, "seq": 9, "total-batch": 36, "steps": 8, "warmup": 3,
         "schedule": "linear", "lr": 0.03, "attention-lr": 0.3, "final-lr-fraction": 0.25,
         "weight-decay": 0.4, "beta1": 0.8, "beta2": 0.93, "eps": 1e-3, "grad-clip": 0.5,
         "val-every": 3, "val-batches": 1, "norms-every": 4}
U64 = 2**64 - 1


def mix(x: int) -> int:
    """The output function of SplitMix64."""
    x = (x + 0x9e3779b97f4a7c15) & U64
    x = ((x ^ (x >> 30)) * 0xbf58476d1ce4e5b9) & U64
    x = ((x ^ (x >> 27)) * 0x94d049bb133111eb) & U64
    return x ^ (x >> 31)


def shuffled(index: int, count: int, seed: int, epoch: int) -> int:
    """Returns which of `count` sequences is at place `index` of an epoch, by the swap-or-not shuffle (Hoang,
    Morris and Rogaway 2012) in 128 rounds. Each round pairs x with key - x and swaps the two if a bit of the
    larger one's hash is 1."""
    key = mix((mix(seed) + epoch) & U64)
    x = index
    for round_ in range(128):
        round_key = mix((key + round_) & U64)
        partner = (round_key - x) % count
        if mix(round_key ^ mix(max(x, partner))) >> 63:
            x = partner
    return x


def learning_rate(step: int) -> float:
    peak, steps, warmup, final = (FLAGS[key] for key in ("lr", "steps", "warmup", "final-lr-fraction"))
    if step <= warmup:
        return peak * step / warmup
    return peak * (1 - (1 - final) * (step - warmup) / (steps - warmup))


def write_inputs() -> None:
    """Writes the model from which the run starts, with gradients of every size, and the shards."""
    rng = np.random.default_rng(5)
    model = GPT(CONFIG)
    for name, parameter in model.named_parameters():
        mean = 1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight", "q_gain", "decay")) else 0.0
        parameter.data = random_tensor(5, name, parameter.shape, mean, 0.2)
    save(model, RUN / "initial")
    save_file({f"transformer.{name}": tensor for name, tensor in model.state_dict().items()},
              RUN / "initial" / "model.safetensors", metadata={"format": "pt"})
    (RUN / "data").mkdir(exist_ok=True)
    for name, count in {"train_000000": 100, "train_000001": 73, "val_000000": 84}.items():
        write_shard(RUN / "data" / f"{name}.bin", rng.integers(CONFIG.vocab_size, size=count))
    (RUN / "data" / "meta.json").write_text(json.dumps({"vocab_size": CONFIG.vocab_size}) + "\n")


def micro_batches(split: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields inputs and targets (B,T): shuffled epochs of train, or the split val once, in its order."""
    B, sequences = FLAGS["batch"], list(windows(RUN / "data", FLAGS["seq"], split))
    N = len(sequences)
    validated = FLAGS["val-batches"] * FLAGS["total-batch"] // FLAGS["seq"]  # sequences, a multiple of B
    places = range(0, validated if split == "val" else 10**6, B)
    for first in places:
        rows = range(first, first + B)
        if split == "train":
            rows = [shuffled(n % N, N, FLAGS["seed"], n // N) for n in rows]
        batch = torch.from_numpy(np.stack([sequences[row] for row in rows]).astype(np.int64))
        yield batch[:, :-1], batch[:, 1:]


def recording(matrices: list[Tensor]) -> Callable[..., Tensor]:
    """Returns a version of attention_matrix that also appends its result to `matrices`."""
    def recorded(*args) -> Tensor:
        matrices.append(attention_matrix(*args))
        return matrices[-1]

    return recorded


def attention_norms(A: Tensor) -> Iterator[dict]:
    """Yields one line per head from a layer's A (B,H,T,T) of softmax."""
    for head in range(A.shape[1]):
        rows = A[:, head].flatten(0, 1)  # (B T,T)
        yield {"head": head, "attention_norm": rows.square().sum(-1).mean().sqrt().item(),
               "max_weight": rows.max().item(), "effective_keys": (1 / rows.square().sum(-1)).mean().item(),
               "entropy": -torch.xlogy(rows, rows).sum(-1).mean().item()}


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float((tensor**2).sum()) for tensor in tensors))


def train(model: GPT, optimizer: torch.optim.Optimizer) -> Iterator[dict]:
    """Yields the lines of metrics.jsonl."""
    def validation() -> dict:
        with torch.no_grad():
            losses = [model(*batch)[1].item() for batch in micro_batches("val")]
        return {"val_loss": sum(losses) / len(losses)}

    count = FLAGS["total-batch"] // (FLAGS["batch"] * FLAGS["seq"])
    batches = micro_batches("train")
    yield {"step": 0, **validation()}
    for step in range(1, FLAGS["steps"] + 1):
        optimizer.zero_grad()
        losses, matrices = [], []  # matrices: A of every layer of the first micro-batch, then of the next one
        for _ in range(count):
            with mock.patch("gpt.attention_matrix", recording(matrices)):
                _, loss = model(*next(batches))
            (loss / count).backward()
            losses.append(loss.item())
        layer_norms = [norm([p.grad for p in block.parameters()]) for block in model.h]
        whole_norm = nn.utils.clip_grad_norm_(model.parameters(), FLAGS["grad-clip"]).item()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step) * group["lr_factor"]
        optimizer.step()
        yield {"step": step, "loss": sum(losses) / count, "lr": learning_rate(step), "grad_norm": whole_norm,
               "tokens": step * FLAGS["total-batch"]}
        if step == 1 or step % FLAGS["norms-every"] == 0:
            for layer in range(CONFIG.n_layer):
                for line in attention_norms(matrices[layer].detach()):  # A of the first micro-batch
                    yield {"step": step, "layer": layer, **line}
                yield {"step": step, "layer": layer, "gradient_norm": layer_norms[layer]}
        if step % FLAGS["val-every"] == 0 or step == FLAGS["steps"]:
            yield {"step": step, **validation()}


def main() -> None:
    write_inputs()
    model = load(RUN / "initial", torch.float64)
    optimizer = adamw(model, 0.0, FLAGS["weight-decay"], (FLAGS["beta1"], FLAGS["beta2"]), FLAGS["eps"],
                      FLAGS["attention-lr"])
    lines = list(train(model, optimizer))
    (RUN / "flags.txt").write_text("".join(f"--{flag} {value}\n" for flag, value in FLAGS.items()))
    (RUN / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for prefix, key in (("m", "exp_avg"), ("v", "exp_avg_sq")):
        tensors |= {f"{prefix}.{name}": optimizer.state[parameter][key]
                    for name, parameter in model.named_parameters()}
    save_file({name: tensor.float() for name, tensor in tensors.items()}, RUN / "last.safetensors")
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
    if not min(norms) < FLAGS["grad-clip"] < max(norms):
        raise SystemExit(f"golden_run.py: --grad-clip {FLAGS['grad-clip']} is not among the norms {norms}")
    print(f"{sum(file.stat().st_size for file in RUN.rglob('*') if file.is_file())} bytes in {RUN}")


if __name__ == "__main__":
    main()
