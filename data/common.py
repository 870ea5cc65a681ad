"""The parts that prepare.py and the dataset modules share: errors, the list of what is left out, and
functions that read and show text.

A dataset module has
    DESCRIPTION   one line for --help
    SOURCE        where the text comes from, for meta.json
    VAL_FRACTION  the default of --val-fraction
    LOCAL         what --from reads instead of downloading; absent if there is nothing to download
    size(args)    about how many bytes of text there are, for the progress bar
    documents(args)   an iterator of str: the documents, always in the same order
    validation(args)  the same for the validation split; absent or None if the dataset has no such split
A dataset that makes tokens has other functions, see recall.py.

Here args is the command line of prepare.py, with `skipped`, which counts what documents(args) leaves out.
"""
import codecs
import io
import os
import re
import stat
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, TextIO

END_OF_TEXT = "<|endoftext|>"


class Failure(Exception):
    """Ends the program with this line on stderr and this exit status."""
    status = 1


class UsageError(Failure):
    status = 2


def one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or getattr(error, "reason", None) or error).split())


def shown(path) -> str:
    """A path as a text for meta.json. Bytes in it that are not UTF-8 become U+FFFD."""
    return os.fsencode(str(path)).decode(errors="replace")


class Skipped:
    """Counts what is left out, by kind, and remembers the first names of each kind."""
    NAMES = 10

    def __init__(self):
        self.kinds: dict[str, dict] = {}

    def add(self, kind: str, path: Path | None = None) -> None:
        entry = self.kinds.setdefault(kind, {"count": 0, "names": []})
        entry["count"] += 1
        if path is not None and len(entry["names"]) < self.NAMES:
            entry["names"].append(shown(path))

    def __str__(self) -> str:
        parts = []
        for kind, entry in self.kinds.items():
            names = entry["names"] + ["..."] * (0 < len(entry["names"]) < entry["count"])
            parts.append(f"{kind}: {entry['count']}" + f" ({', '.join(names)})" * bool(names))
        return "; ".join(parts)


# --- Text that is read --------------------------------------------------------------------------------------

FORMATS = [(re.compile(pattern, re.DOTALL), what) for pattern, what in [
    (rb"\x1f\x8b", "gzip file, not text; unpack it first"),
    (rb"\x28\xb5\x2f\xfd", "Zstandard file, not text; unpack it first"),
    (rb"\xfd7zXZ\0", "xz file, not text; unpack it first"),
    (rb"BZh[1-9]1AY&SY", "bzip2 file, not text; unpack it first"),
    (rb"PK\x03\x04", "zip file, not text; unpack it first"),
    (rb"7z\xbc\xaf\x27\x1c", "7z file, not text; unpack it first"),
    (rb"%PDF-", "PDF file, not text"),
    (rb"PAR1[\0-\x08\x0e-\x1f]", "parquet file, not text; --from of the dataset openwebtext reads it"),
    (rb"ARROW1\0\0", "Arrow file, not text"),
    (rb"\xff\xfe|\xfe\xff", "text file in UTF-16 or UTF-32; convert it to UTF-8 first")]]


def regular(path) -> None:
    """Fails if it is a pipe or a device, because reading from these could wait for ever."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a folder fails later with a good message
        raise Failure(f"{path}: not a regular file")


@contextmanager
def open_text(path, errors: str = "strict") -> Iterator[TextIO]:
    """Opens a file as UTF-8, without a byte order mark at its start and with its own line ends. `errors` is
    --errors. Every error becomes a Failure that names the file."""
    try:
        regular(path)
        with open(path, "rb") as file:
            start = file.read(16)
        for form, what in FORMATS:
            if form.match(start):
                raise Failure(f"{path}: a {what}")
        with open(path, encoding="utf-8-sig", errors=errors, newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        with open(path, "rb") as file:
            raise not_utf8(path, file) from error
    except OSError as error:
        raise Failure(f"{path}: {one_line(error)}") from error


def decode(content: bytes, name: str, errors: str) -> str:
    """The same for text that is not in a file."""
    try:
        return content.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise not_utf8(name, io.BytesIO(content)) from error


def not_utf8(path, file: BinaryIO) -> Failure:
    """Finds the place in the file, because a decoder knows only the place in its own block."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    before, block = 0, b"-"
    while block:
        kept = len(decoder.getstate()[0])  # bytes of an incomplete character at the end of the block before
        block = file.read(1 << 18)
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            return Failure(f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
                           f"{before - kept + error.start}, {error.reason}; "
                           "--errors replace reads it as U+FFFD")
        before += len(block)
    return Failure(f"{path}: the file changed while it was read")


def row_text(row, column: str, where: str, errors: str) -> str:
    """The text in a row of a table; "" if it is null."""
    if not isinstance(row, dict) or column not in row:
        keys = ", ".join(map(repr, row)) if isinstance(row, dict) else f"a value of type {type(row).__name__}"
        raise Failure(f"{where}: expected {column!r}, found {keys or 'nothing'}")
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise Failure(f"{where}: {column!r} holds a value of type {type(text).__name__}, expected text")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        if errors == "strict":
            raise Failure(f"{where}: {column!r} has half of a surrogate pair, which is not a character; "
                          "--errors replace reads it as U+FFFD")
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text


def download(url: str, instead: str) -> bytes:
    """Downloads the bytes of a URL. `instead` tells the user, in the error, what to do without a network."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read()
    except (OSError, HTTPException) as error:
        raise Failure(f"cannot download {url}: {one_line(error)}; {instead}") from error
