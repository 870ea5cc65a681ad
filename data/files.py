"""The documents of local text files: which files are read, and what a document is in them."""
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from common import END_OF_TEXT, Failure, open_text, row_text

# What prepare.py writes into --out.
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
    """The files, and in the place of each folder the files in and below it by name."""
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
    """Follows links. A folder to which several lead is read once, so a link to one above leads nowhere."""
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
    """The documents of a text file, which <|endoftext|> separates. Memory holds one of them, not the file."""
    with open_text(path, errors) as file:
        rest, separated = "", False
        while block := file.read(max(1 << 18, len(rest))):  # doubling: linear also where a document is long
            *whole, rest = (rest + block).split(END_OF_TEXT)
            for document in whole:
                if separated or document.strip():  # before the first separator there need not be anything
                    yield document
                separated = True
        if not separated or rest.strip():  # nor after the last
            yield rest


def read_jsonl(path, field: str, errors: str) -> Iterator[str]:
    """The documents of a file with a JSON object in each line, of which a field is the text."""
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
