"""Finds local text files and reads the documents in them."""
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from common import END_OF_TEXT, Failure, open_text, row_text

# The files that prepare.py writes into --out.
OUR_FILES = re.compile(r"((?:train|val)_\d{6}\.bin|tokenizer\.json|meta\.json|input_\d{6})(\.tmp)?")


class Spooled(os.PathLike):
    """The temporary copy of a pipe, which can be read only once. In messages it has the name of the pipe."""

    def __init__(self, name: str, copy: Path):
        self.name, self.copy = name, copy

    def __fspath__(self) -> str:
        return str(self.copy)

    def __str__(self) -> str:
        return self.name


def text_files(paths: Iterable, args) -> list:
    """Returns the given files. Each folder is replaced by the files in it and below it, in the order of their
    names."""
    files = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            inside = list(files_below(path, args))
            if not inside:
                raise Failure(f"{path}: no files in this folder")
            files += inside
        elif path.exists():
            files.append(given)
        else:
            raise Failure(f"{path}: no such file or folder")
    return files


def files_below(folder: Path, args) -> Iterator[Path]:
    """Follows links. A folder is read once even if several links lead to it, so no loop is endless."""
    out = identity(os.stat(args.out))
    seen = set()
    left = [folder]
    while left:
        path = left.pop()
        try:
            status = os.stat(path)
        except FileNotFoundError as error:
            raise Failure(f"{path}: a link to {os.readlink(path)}, which does not exist") from error
        if stat.S_ISREG(status.st_mode):
            yield path
        elif not stat.S_ISDIR(status.st_mode):
            args.skipped.add("pipes, sockets and devices", path)
        elif identity(status) in seen:
            args.skipped.add("other links to the same folder", path)
        else:
            seen.add(identity(status))
            for name in sorted(os.listdir(path), reverse=True):
                ours = OUR_FILES.fullmatch(name) if identity(status) == out else None
                if name.startswith("."):
                    args.skipped.add("hidden", path / name)
                elif ours is None:
                    left.append(path / name)
                elif ours[2] is None:
                    args.skipped.add("files of the dataset in --out", path / name)


def identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def read_documents(path, errors: str) -> Iterator[str]:
    """Yields the documents of a text file, which <|endoftext|> separates. Only one is in memory at a time."""
    with open_text(path, errors) as file:
        rest, separated = "", False
        while block := file.read(max(1 << 18, len(rest))):  # grows, so that a long document takes linear time
            *whole, rest = (rest + block).split(END_OF_TEXT)
            for document in whole:
                if separated or document.strip():  # the part before the first separator may be empty
                    yield document
                separated = True
        if not separated or rest.strip():  # and so may the part after the last one
            yield rest


def read_jsonl(path, field: str, errors: str) -> Iterator[str]:
    """Yields the documents of a file that has a JSON object in each line. One field of it is the text."""
    with open_text(path, errors) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                place = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                raise Failure(f"{where}: not JSON{place}") from error
            yield row_text(row, field, where, errors)
