"""Runs the CPU trainer of llm.c, if the user has it: `DIR/train_gpt2`, built by its own Makefile.

It takes no arguments: a step has 4 x 64 tokens, and its files have fixed names in the working directory. So
it gets a folder with the benchmark's weights and batch under these names, and it is killed after enough
steps. Its learning rate differs and it does not clip, so only the loss before the first update can be
compared.
"""
import json
import os
import pty
import re
import shutil
import subprocess
from pathlib import Path

BATCH, SEQ = 4, 64
STEPS, WARMUP = 5, 1  # it validates before steps 0 and 10, outside of the time it prints
STEP_LINE = re.compile(r"step (\d+): train loss (\S+) \(took (\S+) ms\)")
# The tensors of a layer in llm.c's order, and whether they are transposed from Hugging Face's (in, out).
LAYER_TENSORS = [("ln_1.weight", False), ("ln_1.bias", False), ("attn.c_attn.weight", True),
                 ("attn.c_attn.bias", False), ("attn.c_proj.weight", True), ("attn.c_proj.bias", False),
                 ("ln_2.weight", False), ("ln_2.bias", False), ("mlp.c_fc.weight", True),
                 ("mlp.c_fc.bias", False), ("mlp.c_proj.weight", True), ("mlp.c_proj.bias", False)]


def write_checkpoint(path: Path, checkpoint: Path) -> None:
    """Turns one of our checkpoints into a float32 checkpoint of llm.c (magic 20240326, version 3)."""
    import numpy as np
    from safetensors.numpy import load_file
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = {name.removeprefix("transformer."): tensor
               for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    layers, vocab_size, channels = config["n_layer"], config["vocab_size"], config["n_embd"]
    padded = (vocab_size + 127) // 128 * 128
    header = np.zeros(256, dtype="<i4")
    header[:8] = (20240326, 3, config["n_positions"], vocab_size, layers, config["n_head"], channels, padded)
    with open(path, "wb") as file:
        def write(tensor: np.ndarray) -> None:
            file.write(np.ascontiguousarray(tensor, dtype="<f4").tobytes())

        file.write(header.tobytes())
        write(tensors["wte.weight"])
        write(np.zeros((padded - vocab_size, channels)))
        write(tensors["wpe.weight"])
        for name, transposed in LAYER_TENSORS:
            for layer in range(layers):
                tensor = tensors[f"h.{layer}.{name}"]
                write(tensor.T if transposed else tensor)
        write(tensors["ln_f.weight"])
        write(tensors["ln_f.bias"])


def prepare(folder: Path, checkpoint: Path, shard: Path) -> None:
    """Makes the working directory that it needs. Our shards have its format."""
    data = folder / "dev" / "data" / "tinyshakespeare"
    data.mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copy(shard, data / f"tiny_shakespeare_{split}.bin")
    write_checkpoint(folder / "gpt2_124M.bin", checkpoint)


def run(program: Path, folder: Path, log: Path, threads: int) -> tuple[list[float], list[float], float]:
    """Returns milliseconds and losses of its first steps, and its peak memory in MiB."""
    # Its output goes to a terminal, because with a pipe it would lose lines in its buffer when it is killed.
    master, slave = pty.openpty()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen([str(program)], cwd=folder, stdin=subprocess.DEVNULL, stdout=slave,
                               stderr=slave, env=environment)
    os.close(slave)
    steps = []
    try:
        with open(master, errors="replace") as output, open(log, "w") as copy:
            for line in output:
                copy.write(line)
                if match := STEP_LINE.search(line):
                    steps.append((float(match[3]), float(match[2])))
                if len(steps) == STEPS:
                    break
    except OSError:  # this happens when the program ends
        pass
    finally:
        process.kill()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if len(steps) < STEPS:
        raise OSError(f"{program}: ended after {len(steps)} of {STEPS} steps: "
                      f"{(log.read_text().splitlines() or ['no output'])[-1]}")
    ms, losses = zip(*steps)
    return list(ms[WARMUP:]), list(losses), usage.ru_maxrss / 1024
