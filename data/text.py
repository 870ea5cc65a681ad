"""Any local text. A file is a document, or several that <|endoftext|> separates, or one in each JSON line."""
import copy
import os
from collections.abc import Iterator

from common import Skipped
from files import Spooled, read_documents, read_jsonl, text_files

DESCRIPTION = ("your own UTF-8 files and folders, or -; each file is a document, or several that "
               "<|endoftext|> separates; each line of a .jsonl file is a document")
SOURCE = "local files"
VAL_FRACTION = 0.05


def size(args) -> int:
    uncounted = copy.copy(args)
    uncounted.skipped = Skipped()  # because documents() counts the same files
    return sum(os.stat(file).st_size for file in text_files(args.paths, uncounted))


def documents(args) -> Iterator[str]:
    for file in text_files(args.paths, args):
        if is_jsonl(file, args):
            yield from read_jsonl(file, args.jsonl_field or "text", args.errors)
        else:
            yield from read_documents(file, args.errors)


def is_jsonl(file, args) -> bool:
    """Decides by the file's name, and for a pipe, which has no such name, by the flag."""
    if isinstance(file, Spooled):
        return args.jsonl_field is not None
    return os.fspath(file).lower().endswith((".jsonl", ".ndjson"))
