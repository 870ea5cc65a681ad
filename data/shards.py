"""Writes the files of a dataset under temporary names. They get their final names when all are complete."""
import os
from io import FileIO
from pathlib import Path

import numpy as np
from files import OUR_FILES


def token_type(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


class ShardWriter:
    """Writes a stream of tokens as the shards of one split, `NAME.bin.tmp`. Call close() at the end."""

    def __init__(self, folder: Path, split: str, shard_tokens: int, dtype: str):
        self.folder, self.split, self.shard_tokens, self.dtype = folder, split, shard_tokens, dtype
        self.paths: list[Path] = []
        self.tokens = self.in_shard = 0
        self.file = None

    def write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if self.file is None:
                self.paths.append(self.folder / f"{self.split}_{len(self.paths):06d}.bin.tmp")
                self.file = open(self.paths[-1], "wb", buffering=0)
                write_all(self.file, bytes(1024))
            part = tokens[:self.shard_tokens - self.in_shard]
            write_all(self.file, part.astype(self.dtype).tobytes())
            self.in_shard += len(part)
            tokens = tokens[len(part):]
            if self.in_shard == self.shard_tokens:
                self.close()

    def close(self) -> None:
        """Ends the current shard, if there is one."""
        if self.file is None:
            return
        header = np.zeros(256, dtype="<i4")
        header[:3] = (20240520, 1, self.in_shard) if self.dtype == "<u2" else (20240801, 7, self.in_shard)
        self.file.seek(0)
        write_all(self.file, header.tobytes())
        os.fsync(self.file.fileno())
        self.file.close()
        self.tokens += self.in_shard
        self.file, self.in_shard = None, 0


def write_all(file: FileIO, content: bytes) -> None:
    """Writes to a file without a buffer. A buffer would try again after a failure, such as a full disk, and
    print a second error."""
    while content:
        content = content[file.write(content):]


def write_synced(path: Path, content: str) -> None:
    with open(path, "wb", buffering=0) as file:
        write_all(file, content.encode())
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def our_files(folder: Path, temporary: bool) -> list[Path]:
    named = [(path, OUR_FILES.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    return [path for path, match in named if match and bool(match[2]) == temporary]


def put_in_place(folder: Path, paths: list[Path]) -> None:
    """Gives the files their final names. The last one, meta.json, gets its name last, so that it never exists
    without the shards."""
    *others, meta = paths
    (folder / "meta.json").unlink(missing_ok=True)
    try:
        sync_folder(folder)
        for old in our_files(folder, temporary=False):
            old.unlink()
        for path in others:
            path.rename(path.with_suffix(""))
        sync_folder(folder)
        meta.rename(meta.with_suffix(""))
    except OSError:
        for part in our_files(folder, temporary=False):  # the old or the new dataset is not whole
            part.unlink()
        raise
    sync_folder(folder)
