"""Holds the PyTorch twin against what is not itself: sums written as loops, finite differences, transformers.

    python dev/reference/validate.py
"""
import cmath
import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call

from attention import (ATTENTIONS, attention_matrix, fade_by_distance, fade_by_gates, power_of, rms_norm,
                       rotate)
from gpt import GPT, GPTConfig, ShortConv

SCALES = ["row", "context", "mean", "sum", "0.35"]


def attention_row(x: list[float], fade: list[float], D: int, attention: str, scale: str,
                  context: int) -> list:
    """Row i of A, from the x_ij of its i + 1 keys and what their weights fade by."""
    i = len(x) - 1
    if attention == "softmax":
        row = [math.exp(x[j]) * fade[j] for j in range(i + 1)]
        return [value / sum(row) for value in row]
    if attention == "sigmoid":
        return [fade[j] / (1 + (i + 1) * math.exp(-x[j])) for j in range(i + 1)]
    p = int(attention[-1])
    a, b, c = 1 + 2 / D, 1 + 4 / D, 1 + 6 / D
    m = [1, 3 * a, 15 * a * b, 105 * a * b * c][p - 1]
    if scale == "row":
        c = 1 / math.sqrt(m * sum(fade[j] ** 2 for j in range(i + 1)))
    elif scale == "context":
        c = 1 / math.sqrt(context)
    elif scale == "mean":
        c = 1 / (math.sqrt(m) * (i + 1))
    elif scale == "sum":
        c = 1 / (1e-6 + sum(fade[j] * abs(x[j]) ** p for j in range(i + 1)))
    else:
        c = float(scale)
    return [c * x[j] ** p * fade[j] for j in range(i + 1)]


def attention_loops(q: Tensor, k: Tensor, f: Tensor, *kind: str | int) -> Tensor:
    """What attention_matrix computes, one element after the other, from the gates f (B,H,T)."""
    B, H, T, D = q.shape
    A = torch.zeros(B, H, T, T, dtype=q.dtype)
    for b, h, i in product(range(B), range(H), range(T)):
        x = [sum((q[b, h, i] * k[b, h, j]).tolist()) / math.sqrt(D) for j in range(i + 1)]
        fade = [math.prod(f[b, h, j + 1:i + 1].tolist()) for j in range(i + 1)]
        A[b, h, i, :i + 1] = torch.tensor(attention_row(x, fade, D, *kind), dtype=q.dtype)
    return A


def check_formulas() -> None:
    worst = 0.0
    delta, logits = torch.tensor([-0.5, 1.0, 3.0]).double(), torch.randn(2, 3, 7).double()
    decays = [(None, torch.ones(2, 3, 7)),
              (fade_by_distance(delta, 7), torch.sigmoid(delta)[:, None].expand(2, 3, 7)),
              (fade_by_gates(F.logsigmoid(logits)), torch.sigmoid(logits))]
    for attention, scale, (log_fade, f) in product(ATTENTIONS, SCALES, decays):
        q, k = torch.randn(2, 2, 3, 7, 4, dtype=torch.float64)
        kind = attention, scale, 9
        difference = attention_matrix(q, k, log_fade, *kind) - attention_loops(q, k, f, *kind)
        worst = max(worst, difference.abs().max().item())

    x = torch.randn(7, 6, dtype=torch.float64)
    for t, i in product(range(7), range(3)):
        turned = complex(x[t, i], x[t, i + 3]) * cmath.exp(1j * t * 10000 ** (-2 * i / 6))
        found = rotate(x)[t]
        worst = max(worst, abs(turned - complex(found[i], found[i + 3])))

    worst = max(worst, (rms_norm(x) - F.rms_norm(x, x.shape[1:], eps=1e-6)).abs().max().item())

    conv = ShortConv(3, 6).double()
    torch.nn.init.normal_(conv.weight)
    for t, i in product(range(7), range(6)):
        expected = sum(conv.weight[s, i] * x[t - s, i] for s in range(3) if t >= s)
        worst = max(worst, (expected - conv(x[None])[0, t, i]).abs().item())
    assert worst < 1e-12, worst
    print(f"attention, RMS norm, RoPE and convolution as loops: largest difference {worst:.1e}")


def check_gradients() -> None:
    tokens = torch.tensor([[0, 3, 1, 4]])
    for attention, decay in product(ATTENTIONS, ["none", "learned", "gate"]):
        for scale in SCALES if power_of(attention) else ["row"]:
            config = GPTConfig(1, 2, 4, 4, 5, attention, scale, "rope", True, decay=decay, short_conv=2,
                               output_gate=True)
            model = GPT(config).double()
            names, values = zip(*model.named_parameters())
            values = [(v + 0.4 * torch.randn_like(v)).detach().requires_grad_() for v in values]

            def loss(*values: Tensor) -> Tensor:
                return functional_call(model, dict(zip(names, values)), (tokens[:, :-1], tokens[:, 1:]))[1]

            assert gradcheck(loss, values), (attention, decay, scale)
    print("gradients: as finite differences of the loss have them")


def check_transformers() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel
    config = GPTConfig(n_layer=3, n_head=4, n_embd=32, n_positions=24, vocab_size=101)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=4, n_embd=32, n_positions=24, vocab_size=101,
                                        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(101, (2, 25))
    for fused in [False, True]:
        ours = GPT(config, fused).double()
        ours.load_state_dict(theirs.transformer.state_dict())
        logits, loss = ours(tokens[:, :-1], tokens[:, 1:])
        expected = theirs(tokens[:, :-1], labels=tokens[:, :-1])
        difference = (logits - expected.logits).abs().max().item()
        assert difference < 1e-10, difference
        print(f"transformers' GPT-2{', fused' * fused}: largest difference of the logits {difference:.1e}")


if __name__ == "__main__":
    torch.manual_seed(1)
    torch.set_num_threads(1)  # the models are tiny
    check_formulas()
    check_gradients()
    check_transformers()
