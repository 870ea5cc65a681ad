"""Predicts the time of a training step on many GPUs, and the memory that weights and optimizer take on each.

dev/launch/README.md explains the formula and holds it against published runs."""
import argparse
import math
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    layers: int
    channels: int
    context: int = 1024
    vocabulary: int = 50257

    @property
    def block_parameters(self) -> int:
        """Weights and biases of all blocks, and the last LayerNorm."""
        C = self.channels
        return self.layers * (12 * C * C + 13 * C) + 2 * C

    @property
    def embedding_parameters(self) -> int:
        return (self.vocabulary + self.context) * self.channels

    @property
    def parameters(self) -> int:
        return self.block_parameters + self.embedding_parameters

    @property
    def operations_per_token(self) -> float:
        """Forward and backward, as llmc/trainer.h counts them."""
        L, C = self.layers, self.channels
        return 3 * (2 * (12 * L * C * C + self.vocabulary * C) + 2 * L * C * self.context)

    @property
    def bytes_per_token(self) -> float:
        """What the layers read and write in bf16, forward and backward: 108 C numbers in a block, 5 V for the logits.

        Forward, in units of C: the two LayerNorms with their residuals 8, attention 4, GELU 8, inputs and outputs of
        the four products 16. The backward pass moves twice as much."""
        return 2 * (3 * 36 * self.channels * self.layers + 5 * self.vocabulary)


@dataclass(frozen=True)
class Gpu:
    peak: float        # bf16 operations a second of the tensor cores
    efficiency: float  # the share of the peak that large products reach; fitted to the published runs
    memory: float      # bytes a second
    nvlink: float      # bytes a second that a collective of NCCL moves between the GPUs of a machine


GPUS = {"a100": Gpu(312e12, 0.80, 2.04e12, 235e9), "h100": Gpu(989e12, 0.65, 3.35e12, 370e9)}
MODELS = {"124M": Model(12, 768), "355M": Model(24, 1024), "774M": Model(36, 1280), "1558M": Model(48, 1600)}
GPUS_PER_NODE = 8
NIC = 47e9             # bytes a second of a 400 Gbit/s InfiniBand card, of which each GPU has one
HOP = 3e-6             # seconds that a message takes to the next GPU of a ring
TREE_HOP = 15e-6       # seconds that it takes to the next machine of a tree, and back
LAUNCHES = 35          # kernels of a block, forward and backward
LAUNCH = 2.5e-6        # seconds between the starts of two kernels


@dataclass(frozen=True)
class Step:
    compute: float     # products
    memory: float      # passes over activations
    optimizer: float
    exposed: float     # communication during which nothing is computed
    hidden: float      # communication while something is computed
    state: float       # bytes on a GPU: weights, gradients, master weights and moments

    @property
    def seconds(self) -> float:
        return self.compute + self.memory + self.optimizer + self.exposed


def step_time(model: Model, gpu: Gpu, gpus: int, total_batch: int, batch: int, zero: int,
              gradient_bytes: int = 4) -> Step:
    """total_batch is in tokens, batch in sequences of the context."""
    micro_steps, rest = divmod(total_batch, gpus * batch * model.context)
    if rest or not micro_steps:
        raise ValueError(f"a total batch of {total_batch} tokens: expected a multiple of {gpus} GPUs x {batch} x "
                         f"{model.context} = {gpus * batch * model.context}")
    tokens = total_batch / gpus
    compute = tokens * model.operations_per_token / (gpu.peak * gpu.efficiency)
    memory = tokens * model.bytes_per_token / gpu.memory
    # A small micro-batch cannot be faster than the launches of its kernels.
    memory += max(0.0, micro_steps * model.layers * LAUNCHES * LAUNCH - compute - memory)

    nodes = -(-gpus // GPUS_PER_NODE)
    bandwidth = gpu.nvlink if nodes == 1 else min(gpu.nvlink, GPUS_PER_NODE * NIC)
    share = (gpus - 1) / gpus
    ring = (gpus - 1) * HOP

    def reduced(parameters: float) -> float:
        size = gradient_bytes * parameters / bandwidth * share
        if zero:  # reduce-scatter
            return size + ring
        return 2 * size + (min(ring * 2, 2 * GPUS_PER_NODE * HOP + math.log2(nodes) * TREE_HOP) if gpus > 1 else 0)

    # A block's gradients are reduced while the blocks below it are computed, those of the embedding after all others.
    blocks = model.layers * reduced(model.block_parameters / model.layers)
    embedding = reduced(model.embedding_parameters)
    backward = (compute + memory) / micro_steps * 2 / 3
    hidden = min(blocks, backward)
    reductions = micro_steps if zero == 2 else 1  # with 2, no rank keeps whole gradients between micro-steps
    exposed = reductions * (blocks - hidden + embedding)
    hidden *= reductions
    if zero:  # the new weights of a block are gathered while the blocks before it do their forward pass
        blocks = 2 * model.block_parameters / bandwidth * share + model.layers * ring
        forward = min(blocks, (compute + memory) / micro_steps / 3)
        exposed += blocks - forward + 2 * model.embedding_parameters / bandwidth * share + ring
        hidden += forward

    sharded = model.parameters / (gpus if zero else 1)
    optimizer = sharded * (gradient_bytes + 26) / gpu.memory
    state = 2 * model.parameters + 12 * sharded
    state += gradient_bytes * model.parameters / (gpus if zero == 2 else 1)
    if zero == 2:  # the buffers of two blocks and of the embedding
        state += gradient_bytes * (2 * model.block_parameters / model.layers + model.embedding_parameters)
    return Step(compute, memory, optimizer, exposed, hidden, state)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="124M")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 256, 1024])
    parser.add_argument("--total-batch", type=int, default=1 << 20, help="tokens in a step (default: 1048576)")
    parser.add_argument("--batch", type=int, help="sequences in a micro-batch (default: the most that divide, up to 64)")
    parser.add_argument("--gradient-bytes", type=int, choices=[2, 4], default=4, help="4: float32, 2: bf16")
    o = parser.parse_args(arguments)
    model = MODELS[o.model]
    if min([*o.gpus, o.total_batch, o.batch or 1]) < 1:
        parser.error("--gpus, --total-batch and --batch: expected positive numbers")
    print(f"{o.model} on {o.gpu}, {o.total_batch} tokens a step")
    print("  GPUs zero batch   step ms  products  passes  optimizer  exposed  hidden  tokens/s  of peak  state GB")
    for gpus in o.gpus:
        batch = o.batch or math.gcd(max(1, o.total_batch // (gpus * model.context)), 64)
        for zero in 0, 1, 2:
            try:
                step = step_time(model, GPUS[o.gpu], gpus, o.total_batch, batch, zero, o.gradient_bytes)
            except ValueError as error:
                sys.exit(f"step_time.py: error: {error}")
            of_peak = o.total_batch * model.operations_per_token / (gpus * GPUS[o.gpu].peak * step.seconds)
            times = [step.seconds, step.compute, step.memory, step.optimizer, step.exposed, step.hidden]
            ms = [f"{1000 * t:.1f}" for t in times]
            print(f"{gpus:6} {zero:4} {batch:5} {ms[0]:>9} {ms[1]:>9} {ms[2]:>7} {ms[3]:>10} {ms[4]:>8} {ms[5]:>7} "
                  f"{o.total_batch / step.seconds:9.3g} {of_peak:8.0%} {step.state / 1e9:9.2f}")


if __name__ == "__main__":
    main()
