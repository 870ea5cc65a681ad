"""What the dataset modules share: errors; documents from files, URLs and the library `datasets`.

A dataset module has
    DESCRIPTION   one line for --help
    SOURCE        where the text comes from, for meta.json
    VAL_FRACTION  the default of --val-fraction
    LOCAL         what --from reads instead of downloading; absent where there is nothing to download
    size(args)    about how many bytes of text there are, for the progress bar
    documents(args)   an iterator of str: the documents, always in the same order
    validation(args)  the same for the validation split, where the dataset has its own; else absent or None
where args is prepare.py's command line.
"""
import logging
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import TextIO

END_OF_TEXT = "<|endoftext|>"


class Failure(Exception):
    """Ends the program with this line on stderr and this exit status."""
    status = 1


class UsageError(Failure):
    status = 2


def one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or getattr(error, "reason", None) or error).split())


@contextmanager
def open_text(path: str | Path) -> Iterator[TextIO]:
    """The file as UTF-8, line ends as they are; whatever goes wrong becomes a Failure that names it."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise Failure(f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x}, {error.reason}") from error
    except OSError as error:
        raise Failure(f"{path}: {one_line(error)}") from error


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a text file, which <|endoftext|> separates. Memory holds one of them, not the file."""
    with open_text(path) as file:
        rest = ""
        while block := file.read(max(1 << 18, len(rest))):  # doubling: linear also where a document is long
            *whole, rest = (rest + block).split(END_OF_TEXT)
            yield from whole
        yield rest


def text_files(paths: Iterable[str]) -> list[Path]:
    """The files, and in the place of each folder the files in and below it by name, hidden ones left out."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file()
                            and not any(part.startswith(".") for part in p.relative_to(path).parts))
            if not inside:
                raise Failure(f"{path}: no files in this folder")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise Failure(f"{path}: no such file or folder")
    return files


def download(url: str, instead: str) -> bytes:
    """The bytes behind a URL; `instead` says in the error what to do without a network."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read()
    except (OSError, HTTPException) as error:
        raise Failure(f"cannot download {url}: {one_line(error)}; {instead}") from error


def stream_rows(name: str, config: str | None, split: str, local: str | None = None) -> Iterator[str]:
    """The column `text` of a dataset of the Hugging Face hub, or of a folder of parquet files; streamed."""
    try:
        import datasets
    except ImportError as error:
        raise Failure(f"the dataset {name} needs the package datasets: pip install datasets") from error
    datasets.disable_progress_bars()
    for library in "datasets", "huggingface_hub":
        logging.getLogger(library).setLevel(logging.CRITICAL)  # the error says what they would log
    try:
        if local is None:
            rows = datasets.load_dataset(name, config, split=split, streaming=True)
        else:
            files = [str(file) for file in text_files([local])]
            rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        for row in rows:
            yield row["text"]
    except Failure:
        raise
    except Exception as error:  # the library raises dozens of types, its own and those of five others
        what = f"{type(error).__name__}: {one_line(error)[:300]}"
        raise Failure(f"cannot read {local or name}: {what}") from error
