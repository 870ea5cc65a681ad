"""The rows of the benchmark's table: a model, its batch, its dtype and its attention."""
from dataclasses import dataclass

GPT2_VOCABULARY = 50257  # the trainer assumes it if a dataset has no meta.json


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    heads: int
    channels: int
    vocab_size: int
    context: int

    def flags(self) -> list[str]:
        """Flags for `train_gpt train`."""
        return ["--layers", str(self.layers), "--heads", str(self.heads), "--channels", str(self.channels),
                "--context", str(self.context)]


@dataclass(frozen=True)
class Case:
    model: Model
    batch: int
    seq: int
    dtype: str
    attention: str
    rounds: int
    steps: int  # measured steps in each run
    warmup: int  # steps before these
    compiled: bool = True  # also measure PyTorch compiled, which takes half a minute for each model
    gates: bool = False  # with a decay gate and an output gate

    @property
    def name(self) -> str:
        return f"{self.model.name} {self.dtype} {self.kind}"

    @property
    def kind(self) -> str:
        return self.attention + (", both gates" if self.gates else "")

    @property
    def shape(self) -> str:
        m = self.model
        sizes = f"L={m.layers} H={m.heads} C={m.channels} V={m.vocab_size}"
        return f"{m.name}: {sizes}, {self.batch} x {self.seq}"

    @property
    def loss_rtol(self) -> float:
        """Rounding differs between the programs, and the differences grow with each step."""
        return {"fp32": 1e-3, "bf16": 2e-2}[self.dtype]

    def flags(self) -> list[str]:
        return [*self.model.flags(), "--attention", self.attention, "--decay", "gate" if self.gates else "none",
                "--output-gate", str(self.gates).lower(), "--short-conv", "0"]

    def operations(self) -> float:
        """The operations of a step's matrix products, forward and backward. Attention counts in the form that
        needs fewest: a triangle of T by T scores or, for poly1 and poly2, a state of (features, D)."""
        m, tokens = self.model, self.batch * self.seq
        D = m.channels // m.heads
        features = {"poly1": D, "poly2": D * (D + 1) // 2}.get(self.attention, self.seq)
        attention = 6 * m.layers * m.channels * min(self.seq, 2 * features)
        matrices = 13 if self.gates else 12  # of a block, in channels^2
        return tokens * (6 * (matrices * m.layers * m.channels ** 2 + m.vocab_size * m.channels) + attention)


GPT2 = Model("GPT-2 124M", 12, 12, 768, GPT2_VOCABULARY, 1024)
CHARACTERS = Model("characters 10.7M", 6, 6, 384, 65, 256)
TINY = Model("characters 0.8M", 4, 4, 128, 65, 64)
LONG = Model("long context 3.6M", 2, 6, 384, 65, 4096)

CASES = [
    *(Case(GPT2, 4, 64, dtype, "softmax", rounds=3, steps=6, warmup=2) for dtype in ("fp32", "bf16")),
    *(Case(CHARACTERS, 8, 256, dtype, attention, rounds=3, steps=8, warmup=3)
      for dtype in ("fp32", "bf16") for attention in ("softmax", "poly3")),
    *(Case(CHARACTERS, 8, 256, dtype, "poly3", rounds=3, steps=8, warmup=3, gates=True)
      for dtype in ("fp32", "bf16")),
    *(Case(TINY, 12, 64, dtype, attention, rounds=3, steps=150, warmup=20)
      for dtype in ("fp32", "bf16") for attention in ("softmax", "poly3")),
    *(Case(LONG, 1, 4096, "bf16", attention, rounds=3, steps=6, warmup=2)
      for attention in ("softmax", "poly1", "poly2")),
]
QUICK = [
    Case(TINY, 12, 64, "fp32", "softmax", rounds=2, steps=50, warmup=10),
    Case(TINY, 12, 64, "bf16", "poly3", rounds=2, steps=50, warmup=10, compiled=False),
]
