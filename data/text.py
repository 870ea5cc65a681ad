"""Any local text: a document a file, or several where <|endoftext|> separates them, or one a line of JSON."""
import copy
import os
from collections.abc import Iterator

from common import Skipped
from files import Spooled, read_documents, read_jsonl, text_files

DESCRIPTION = ("your own UTF-8 files and folders, or -; a document a file, or several with <|endoftext|> "
               "between, or a line of .jsonl")
SOURCE = "local files"
VAL_FRACTION = 0.05


def size(args) -> int:
    uncounted = copy.copy(args)
    uncounted.skipped = Skipped()  # documents counts what both leave out
    return sum(os.stat(file).st_size for file in text_files(args.paths, uncounted))


def documents(args) -> Iterator[str]:
    for file in text_files(args.paths, args):
        if is_jsonl(file, args):
            yield from read_jsonl(file, args.jsonl_field or "text", args.errors)
        else:
            yield from read_documents(file, args.errors)


def is_jsonl(file, args) -> bool:
    """By its name; a pipe has none, so there the flag says it."""
    if isinstance(file, Spooled):
        return args.jsonl_field is not None
    return os.fspath(file).lower().endswith((".jsonl", ".ndjson"))
