"""Reads and writes shards of llm.c: 256 int32 (magic, version, number of tokens, zeros), then tokens."""
import re
from collections.abc import Iterator
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np

FORMATS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # (magic, version): the type of a token


def read_shard(path: Path) -> np.ndarray:
    header = np.fromfile(path, dtype="<i4", count=256)
    dtype = FORMATS.get(tuple(header[:2].tolist()))
    if header.size != 256 or dtype is None:
        raise ValueError(f"{path}: not a token shard")
    tokens = np.fromfile(path, dtype=dtype, offset=1024)
    if len(tokens) != header[2]:
        raise ValueError(f"{path}: has {len(tokens)} tokens, but its header says {header[2]}")
    return tokens


def write_shard(path: Path, tokens: np.ndarray) -> None:
    (magic, version), dtype = list(FORMATS.items())[int(tokens.max() >= 65536)]
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype(dtype).tobytes())


def windows(data: Path, T: int, split: str = "train") -> Iterator[np.ndarray]:
    """Yields the sequences of one epoch, unshuffled, from the shards in the order of their names. A sequence
    has T + 1 tokens, because the token after the inputs is the last target, and the next one begins T tokens
    later. So a shard of n tokens has (n-1)/T sequences."""
    found = False
    for path in sorted(data.glob("*.bin")):
        if re.search(f"(?<![A-Za-z]){split}(?![A-Za-z])", path.stem):
            tokens = read_shard(path)
            for start in range(0, (len(tokens) - 1) // T * T, T):
                found = True
                yield tokens[start:start + T + 1]
    if not found:
        raise ValueError(f"{data}: no {split} shard with a sequence of {T} tokens")


def batches(data: Path, B: int, T: int, split: str = "train") -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields inputs and targets (B,T), epoch after epoch, without end."""
    sequences = chain.from_iterable(windows(data, T, split) for _ in repeat(None))
    while True:
        batch = np.stack(list(islice(sequences, B))).astype(np.int64)
        yield batch[:, :-1].copy(), batch[:, 1:].copy()
