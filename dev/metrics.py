"""Reads metrics.jsonl, for the programs that draw it."""
import json
from collections.abc import Iterator
from pathlib import Path


def read_metrics(path: Path) -> Iterator[tuple[int, dict]]:
    """Line numbers and lines. A half-written last line, of a run that goes on or was killed, is left out, as
    `train --resume` does. Raises ValueError, which names the file, for what is no metrics.jsonl."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            yield number, entry
        elif number < len(lines):  # the last one is what comes after the last line end, so most often empty
            raise ValueError(f"{path}:{number}: expected a JSON object")
