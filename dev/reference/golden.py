"""Writes tests/golden: what the tests hold the trainer's passes against, without Python or torch.

    python dev/reference/golden.py

- params.safetensors: one batch (input_ids and targets, (B,T)) and, under its name, every tensor that a case
  may need. A case's tensor is the start of the stored one, as many elements as its shape has: the first H of
  q_gain and decay, the first rows of conv.weight.
- cases.json: for each case its name, its config as in config.json, and its file.
- the file of a case: logits (B,T,V), loss, and grad.<name> for each of its parameters.

All is computed in float64 from the float32 parameters, and stored in float32. Under scale `sum` with qk-norm
the gradient of q_gain is zero except for what the 1e-6 in the scale gives. In float32 it is mostly rounding.
"""
import json
import random
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from attention import ATTENTIONS, power_of
from gpt import GPT, GPTConfig, forward_backward

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
SIZES = {"n_layer": 2, "n_embd": 12, "n_positions": 17, "vocab_size": 29}
BATCH, SEQ = 2, 13
SEED = 6
FACTORS = {
    "attention": ATTENTIONS,
    "attention_scale": ["row", "context", "mean", "sum", "0.35"],
    "positions": ["learned", "rope"],
    "qk_norm": [False, True],
    "decay": ["none", "fixed", "learned"],
    "short_conv": [0, 2, 4],
    "output_gate": [False, True],
    "n_head": [3, 2, 1],
}
# The two defaults come first: GPT-2, and a polynomial where nothing else was asked.
FIRST = [dict(zip(FACTORS, values)) for values in [("softmax", "row", "learned", False, "none", 0, False, 3),
                                                   ("poly3", "row", "rope", True, "none", 0, False, 3)]]


def covered(case: dict) -> set:
    """The combinations in a case: every two of its values and, of a polynomial, its scale with its decay and
    whether its power is odd, because these three meet in the gradients. Only polynomials have a scale."""
    power = power_of(case["attention"])
    if power == 0:
        return set(combinations({**case, "attention_scale": None}.items(), 2))
    return set(combinations(case.items(), 2)) | {(case["attention_scale"], case["decay"], power % 2)}


def choose_cases() -> list[dict]:
    """Cases that cover, between them, all that a model can have; greedily, and always the same ones. The first
    five kinds of attention share theirs; each later kind, the gate, and softmax in every second block add their
    own, so that the files of others stay."""
    cases, done = list(FIRST), set().union(*map(covered, FIRST))
    groups = [{"attention": ATTENTIONS[:5]}, *({"attention": [attention]} for attention in ATTENTIONS[5:]),
              {"decay": ["gate"]},
              {"attention": ["poly1", "poly3"], "attention_scale": ["row", "sum"],
               "decay": ["none", "learned", "gate"], "softmax_every": [2]}]
    for group in groups:
        factors = FACTORS | group
        candidates = [case for case in (dict(zip(factors, values)) for values in product(*factors.values()))
                      if power_of(case["attention"]) or case["attention_scale"] == "row"]
        random.Random(1).shuffle(candidates)
        missing = set().union(*map(covered, candidates)) - done
        while missing:
            cases.append(max(candidates, key=lambda case: len(covered(case) & missing)))
            missing -= covered(cases[-1])
        done |= set().union(*map(covered, candidates))
    return cases


def random_tensor(seed: int, name: str, shape: tuple[int, ...], mean: float, std: float) -> Tensor:
    """Normal numbers. Each name has its own, so those of the others stay when a tensor is added to the model."""
    return torch.from_numpy(np.random.default_rng([seed, *name.encode()]).normal(mean, std, shape)).float()


def make_parameters() -> dict[str, Tensor]:
    """A batch and the tensors of the largest case: random, far from a fresh model's, so that no gradient is
    tiny, and with a seed that has no row of near-zero scores, which float32 could not follow under `sum`."""
    rng = np.random.default_rng(SEED)
    tokens = torch.from_numpy(rng.integers(SIZES["vocab_size"], size=(BATCH, SEQ + 1), dtype=np.int32))
    tensors = {"input_ids": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
    largest = GPT(GPTConfig(**SIZES, n_head=3, qk_norm=True, decay="learned", short_conv=4, output_gate=True))
    gated = GPT(GPTConfig(**SIZES, n_head=3, decay="gate"))
    for name, parameter in [*largest.named_parameters(), *gated.named_parameters()]:
        if name in tensors:
            continue
        mean, std = 0.0, 0.3
        if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight", "q_gain")):
            mean = 1.0
        elif name.endswith(("attn.decay", "decay_gate.bias")):
            mean, std = 1.5, 1.0
        tensors[name] = random_tensor(SEED, name, parameter.shape, mean, std)
    return tensors


def make_model(config: GPTConfig, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> GPT:
    model = GPT(config).to(dtype)
    model.load_state_dict({name: tensors[name].flatten()[:value.numel()].view(value.shape)
                           for name, value in model.state_dict().items()})
    return model


def case_name(config: GPTConfig) -> str:
    words = [config.attention]
    words += [config.attention_scale] if power_of(config.attention) else []
    words += [f"softmax{config.softmax_every}"] if config.softmax_every else []
    words += [config.positions]
    words += ["qknorm"] if config.qk_norm else []
    words += [f"{config.decay}-decay"] if config.decay != "none" else []
    words += [f"conv{config.short_conv}"] if config.short_conv else []
    words += ["gated"] if config.output_gate else []
    return "-".join(words + [f"h{config.n_head}"])


def main() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for old in GOLDEN.glob("*.safetensors"):
        old.unlink()
    tensors = make_parameters()
    save_file(tensors, GOLDEN / "params.safetensors")
    cases = []
    for choice in choose_cases():
        config = GPTConfig(**SIZES, **choice)
        name, model = case_name(config), make_model(config, tensors)
        dump = forward_backward(model, tensors["input_ids"].long(), tensors["targets"].long())
        results = {key: dump[key] for key in dump if key in ("logits", "loss") or key.startswith("grad.")}
        save_file(results, GOLDEN / f"{name}.safetensors")
        cases.append({"name": name, "config": config.to_json(), "file": f"{name}.safetensors"})
    (GOLDEN / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")
    print(f"{len(cases)} cases, {sum(file.stat().st_size for file in GOLDEN.iterdir())} bytes, in {GOLDEN}")


if __name__ == "__main__":
    main()
