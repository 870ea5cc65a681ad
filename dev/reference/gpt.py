"""The PyTorch twin of the trainer: the same model, straight from its formulas, with gradients by autograd.

It is the oracle that the hand-written passes are held against, so it shares nothing with them but the files:
checkpoint folders (config.json, model.safetensors), token shards and dumps.

    python dev/reference/gpt.py dump --model DIR --data DIR --batch B --seq T --file F.safetensors [--double]

writes one forward and backward pass on the first batch of the train split, unshuffled; dev/compare.py holds
it against the file that `train_gpt dump` writes for the same arguments.

Shapes: B batch, T sequence length, C channels, H heads, D = C/H head size, V vocabulary.
"""
import argparse
import functools
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attention import (ATTENTIONS, attention_matrix, fade_by_distance, fade_by_gates, power_of, rms_norm,
                       rotate)
from shards import batches

# The values that config.json may have where a typing error, or another GPT-2, would pass for this model.
ALLOWED = {"model_type": ["gpt2"], "layer_norm_epsilon": [1e-5], "activation_function": ["gelu_new"],
           "attention": ATTENTIONS, "positions": ["learned", "rope"],
           "decay": ["none", "fixed", "learned", "gate"], "qk_norm": [False, True],
           "output_gate": [False, True]}


@dataclass
class GPTConfig:
    """The keys of config.json: Hugging Face's GPT-2, then ours."""
    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int
    vocab_size: int
    attention: str = "softmax"  # one of ATTENTIONS
    attention_scale: str = "row"  # context, mean, sum or a number; for polynomials only
    positions: str = "learned"  # or rope
    qk_norm: bool = False
    q_gain: float = 1.0  # what the gains of qk-norm start at
    decay: str = "none"  # fixed, learned, gate
    short_conv: int = 0  # its width; 0: none
    output_gate: bool = False
    n_inner: int | None = None  # width of the MLP's hidden layer; None: 4 n_embd
    softmax_every: int = 0  # N: blocks N, 2N, ..., counted from 1, have softmax instead; 0: none

    def of_block(self, layer: int) -> "GPTConfig":
        """The same for a model in which all blocks are like this one."""
        if self.softmax_every == 0 or (layer + 1) % self.softmax_every != 0:
            return self
        return replace(self, attention="softmax", attention_scale="row", softmax_every=0, q_gain=1.0)

    @classmethod
    def from_json(cls, config: dict) -> "GPTConfig":
        for key, allowed in ALLOWED.items():
            if key in config and config[key] not in allowed:
                raise ValueError(f"config.json: {key} is {config[key]!r}, expected one of {allowed}")
        return cls(**{key: config[key] for key in cls.__dataclass_fields__ if key in config})

    def to_json(self) -> dict:
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "layer_norm_epsilon": 1e-5,
                "activation_function": "gelu_new", "n_ctx": self.n_positions, **asdict(self)}


class Linear(nn.Module):
    """y = x W + b with W of shape (in, out), as Hugging Face's GPT-2 stores it."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


class ShortConv(nn.Module):
    """z_t = sum_s w_s x_{t-s}, channel by channel, zero before the first token; starts as the identity."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, channels))
        nn.init.ones_(self.weight[0])

    def forward(self, x: Tensor) -> Tensor:  # (B,T,channels)
        return sum(w * F.pad(x, (0, 0, s, 0))[:, :x.shape[1]] for s, w in enumerate(self.weight))


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        C, H = config.n_embd, config.n_head
        self.c_attn = Linear(C, 3 * C)
        self.out_gate = Linear(C, C, bias=False) if config.output_gate else None
        self.c_proj = Linear(C, C)
        self.conv = ShortConv(config.short_conv, 3 * C) if config.short_conv else None
        self.q_gain = nn.Parameter(torch.full((H,), float(config.q_gain))) if config.qk_norm else None
        delta = torch.linspace(1.0, 5.5, H)
        self.decay = nn.Parameter(delta) if config.decay == "learned" else None
        self.decay_gate = Linear(C, H) if config.decay == "gate" else None
        if self.decay_gate is not None:
            self.decay_gate.bias.data.copy_(delta)

    def forward(self, x: Tensor) -> Tensor:  # (B,T,C)
        (B, T, C), H = x.shape, self.config.n_head
        qkv = self.c_attn(x)
        if self.conv is not None:
            qkv = self.conv(qkv)
        q, k, v = (y.view(B, T, H, C // H).transpose(1, 2) for y in qkv.split(C, dim=-1))  # (B,H,T,D) each
        y = self.attend(q, k, v, self.log_fade(x)).transpose(1, 2).reshape(B, T, C)
        if self.out_gate is not None:
            y = y * torch.sigmoid(self.out_gate(x))
        return self.c_proj(y)

    def log_fade(self, x: Tensor) -> Tensor | None:  # (B,T,C)
        """What attention_matrix takes."""
        match self.config.decay:
            case "fixed":
                delta = torch.linspace(1.0, 5.5, self.config.n_head, dtype=x.dtype, device=x.device)
                return fade_by_distance(delta, x.shape[1])
            case "learned":
                return fade_by_distance(self.decay, x.shape[1])
            case "gate":
                return fade_by_gates(F.logsigmoid(self.decay_gate(x)).transpose(1, 2))
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor,  # (B,H,T,D) all
               log_fade: Tensor | None) -> Tensor:
        config = self.config
        if self.q_gain is not None:
            q, k = rms_norm(q) * self.q_gain[:, None, None], rms_norm(k)
        if config.positions == "rope":
            q, k = rotate(q), rotate(k)
        A = attention_matrix(q, k, log_fade, config.attention, config.attention_scale, config.n_positions)
        return A @ v


@functools.cache
def causal_mask(T: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(T,T): 1 where query i sees key j."""
    return torch.ones(T, T, dtype=dtype, device=device).tril()


class FusedAttention(Attention):
    """The same as one writes it for speed, for the benchmark: softmax in PyTorch's own kernel, poly1 as
    linear attention in chunks, tables made once, and everything in the dtype that autocast gives q. What is
    not covered (fixed and learned decay, scales other than `row`) is as above."""
    CHUNK = 256

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        T, D = config.n_positions, config.n_embd // config.n_head
        self.power = power_of(config.attention)
        self.covered = config.decay in ("none", "gate") and config.attention_scale == "row" and \
            config.attention != "sigmoid"
        tables = {}
        if config.positions == "rope":
            unit = torch.cat([torch.ones(T, D // 2), torch.zeros(T, D // 2)], dim=-1).double()
            tables["cos"], tables["sin"] = rotate(unit).float().chunk(2, dim=-1)  # (T,D/2) each
        if self.covered and self.power:
            self.moment = math.prod((2 * s + 1) * (1 + 2 * s / D) for s in range(self.power))
            tables["row_scale"] = (self.moment * torch.arange(1, T + 1)).rsqrt()[:, None]
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def log_fade(self, x: Tensor) -> Tensor | None:
        if not self.covered or self.config.decay == "none":
            return super().log_fade(x)
        total = F.logsigmoid(self.decay_gate(x).float()).transpose(1, 2).cumsum(-1)
        hidden = causal_mask(x.shape[1], torch.bool, x.device).logical_not()
        return (total[..., :, None] - total[..., None, :]).masked_fill(hidden, -math.inf)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, log_fade: Tensor | None) -> Tensor:
        if not self.covered:
            return super().attend(q, k, v, log_fade)
        T, D = q.shape[-2:]
        if self.q_gain is not None:
            q, k = F.rms_norm(q, (D,), eps=1e-6), F.rms_norm(k, (D,), eps=1e-6)
            q = q * self.q_gain[:, None, None].to(q.dtype)
        if self.config.positions == "rope":
            q, k = self.rotate(q), self.rotate(k)
        if self.power == 0:
            mask = None if log_fade is None else log_fade.to(q.dtype)
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        q = q / math.sqrt(D)
        if log_fade is not None:
            fade = log_fade.exp()
            scale = (self.moment * fade.square().sum(-1, keepdim=True)).rsqrt()
            x = q @ k.mT
            return (x ** self.power * (fade * scale).to(x.dtype)) @ v
        y = self.linear(q, k, v) if self.power == 1 and T % self.CHUNK == 0 else self.quadratic(q, k, v)
        return y * self.row_scale[:T]

    def rotate(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[:x.shape[-2]].to(x.dtype), self.sin[:x.shape[-2]].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def quadratic(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = q @ k.mT
        power = x if self.power == 1 else x ** self.power
        return (power * causal_mask(x.shape[-1], x.dtype, x.device)) @ v

    def linear(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-2, (-1, self.CHUNK)) for x in (q, k, v))  # (B,H,chunks,CHUNK,D)
        kv = (k.mT @ v).float()
        before = kv.cumsum(2) - kv  # of the chunks before: (B,H,chunks,D,D)
        return (self.quadratic(q, k, v) + q @ before.to(v.dtype)).flatten(2, 3)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.n_inner or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, width)
        self.c_proj = Linear(width, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, fused: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = FusedAttention(config) if fused else Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """`fused`: with FusedAttention."""

    def __init__(self, config: GPTConfig, fused: bool = False):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd) if config.positions == "learned" else None
        self.h = nn.ModuleList(Block(config.of_block(layer), fused) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif decays(name, parameter):
                nn.init.normal_(parameter, std=0.02)

    def forward(self, input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # (B,T) both
        """The logits (B,T,V) and their mean cross-entropy with the targets."""
        T = input_ids.shape[1]
        if T > self.config.n_positions:
            raise ValueError(f"{T} tokens do not fit the model's context of {self.config.n_positions}")
        x = self.wte(input_ids)
        if self.wpe is not None:
            x = x + self.wpe.weight[:T]
        for block in self.h:
            x = block(x)
        logits = self.ln_f(x) @ self.wte.weight.t()
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def decays(name: str, parameter: Tensor) -> bool:
    """Weight decay, like the N(0, 0.02) of the start, is for matrices and embeddings."""
    return parameter.dim() == 2 and not name.endswith("conv.weight")


def is_attention(name: str) -> bool:
    """Whether --attention-lr is for this parameter."""
    return any(f".attn.{part}" in name for part in ("c_attn.", "q_gain", "out_gate.", "decay_gate."))


def load(folder: Path, dtype: torch.dtype = torch.float32, fused: bool = False) -> GPT:
    model = GPT(GPTConfig.from_json(json.loads((folder / "config.json").read_text())), fused).to(dtype)
    tensors = {name.removeprefix("transformer."): tensor
               for name, tensor in load_file(folder / "model.safetensors").items()
               if name != "lm_head.weight" and not name.endswith((".attn.bias", ".attn.masked_bias"))}
    model.load_state_dict(tensors)  # names and shapes must match; values are cast to dtype
    return model


def save(model: GPT, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_json(), indent=2) + "\n")
    tensors = {name: tensor.float().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def forward_backward(model: GPT, input_ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The tensors of a dump: float32, whatever the model computes in."""
    model.zero_grad()
    logits, loss = model(input_ids, targets)
    loss.backward()
    tensors = {"input_ids": input_ids.int(), "targets": targets.int(), "logits": logits.detach().float(),
               "loss": loss.detach().float()}
    for name, parameter in model.named_parameters():
        tensors[f"param.{name}"] = parameter.detach().float()
        tensors[f"grad.{name}"] = parameter.grad.float()
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description="The PyTorch twin of the trainer.")
    dump = parser.add_subparsers(dest="command", required=True).add_parser(
        "dump", help="one forward and backward pass on the first batch of the train split, unshuffled")
    dump.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder")
    dump.add_argument("--data", type=Path, required=True, metavar="DIR", help="dataset folder")
    dump.add_argument("--batch", type=int, required=True, metavar="B")
    dump.add_argument("--seq", type=int, required=True, metavar="T")
    dump.add_argument("--file", type=Path, required=True, metavar="F.safetensors")
    dump.add_argument("--double", action="store_true", help="compute in float64 (the file stays float32)")
    args = parser.parse_args()
    if min(args.batch, args.seq) < 1:
        parser.error("--batch and --seq: expected 1 or more")
    try:
        model = load(args.model, torch.float64 if args.double else torch.float32)
        input_ids, targets = map(torch.from_numpy, next(batches(args.data, args.batch, args.seq)))
        tensors = forward_backward(model, input_ids, targets)
        save_file(tensors, args.file)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise SystemExit(f"gpt.py: {' '.join(str(error).split())}") from None
    print(f"loss {tensors['loss'].item():.6f}, written to {args.file}")


if __name__ == "__main__":
    main()
