"""Reads metrics.jsonl for the programs that draw pictures of it."""
import json
from collections.abc import Iterator
from pathlib import Path


def read_metrics(path: Path) -> Iterator[tuple[int, dict]]:
    """Yields line numbers and lines. Leaves out an incomplete last line of a program that runs or was killed,
    as `train --resume` does. Raises a ValueError with the file's name if it is not a metrics.jsonl."""
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
        elif number < len(lines):  # the last one is the text after the last line end, which is usually empty
            raise ValueError(f"{path}:{number}: expected a JSON object")
