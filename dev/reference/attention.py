"""The attentions of the PyTorch twin, as dense (T,T) matrices, and what is done to q and k before.

Shapes: B batch, H heads, T sequence length, D head size; i is a query's position, j a key's.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The kinds of attention, as config.json names them.
ATTENTIONS = ["softmax", "poly1", "poly2", "poly3", "poly4", "sigmoid"]


def power_of(attention: str) -> int:
    """p of poly<p>, 0 for every other kind."""
    return int(attention.removeprefix("poly")) if attention.startswith("poly") else 0


def rms_norm(x: Tensor) -> Tensor:  # (..., D)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def rotate(x: Tensor) -> Tensor:  # (B,H,T,D)
    """RoPE: turns the pair of channels (i, i + D/2) of position t by the angle t * 10000^(-2i/D)."""
    T, D = x.shape[-2:]
    frequency = 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64, device=x.device) / D)
    angle = torch.arange(T, dtype=torch.float64, device=x.device)[:, None] * frequency  # (T,D/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def fade_by_distance(delta: Tensor, T: int) -> Tensor:
    """log gamma^(i-j) (H,T,T) with gamma = sigmoid(delta) (H)."""
    i = torch.arange(T, dtype=delta.dtype, device=delta.device)
    return F.logsigmoid(delta)[:, None, None] * (i[:, None] - i[None, :])


def fade_by_gates(log_f: Tensor) -> Tensor:
    """The sum of log f_t over j < t <= i, (B,H,T,T), from log f (B,H,T)."""
    total = log_f.double().cumsum(-1)
    return (total[..., :, None] - total[..., None, :]).to(log_f.dtype)


def attention_matrix(q: Tensor, k: Tensor, log_fade: Tensor | None, attention: str, scale: str,
                     context: int) -> Tensor:
    """A (B,H,T,T) from q and k (B,H,T,D) and, where there is decay, what weights fade by (...,H,T,T)."""
    T, D = q.shape[-2:]
    x = q @ k.mT / math.sqrt(D)
    i = torch.arange(T, dtype=q.dtype, device=q.device)
    visible = i[:, None] >= i[None, :]
    log_fade = (q.new_zeros(1) if log_fade is None else log_fade).masked_fill(~visible, -math.inf)
    factor = 1.0 if scale in ("row", "context", "mean", "sum") else float(scale)
    if attention == "softmax":
        return factor * (x + log_fade).softmax(-1)

    fade = log_fade.exp()  # 0 for j > i
    if attention == "sigmoid":
        return factor * torch.sigmoid(x - (i[:, None] + 1).log()) * fade

    p = power_of(attention)
    power = x ** p
    moment = math.prod((2 * s + 1) * (1 + 2 * s / D) for s in range(p))  # E[x^(2p)] for q, k ~ N(0, I)
    match scale:
        case "row":  # n_i is the sum over the row of the squares of the fades: i + 1 without decay
            c = (moment * fade.square().sum(-1, keepdim=True)).rsqrt()
        case "context":
            c = context ** -0.5
        case "mean":
            c = 1 / (math.sqrt(moment) * (i[:, None] + 1))
        case "sum":
            c = 1 / (1e-6 + (power * fade).abs().sum(-1, keepdim=True))
        case _:
            c = factor
    return c * power * fade
