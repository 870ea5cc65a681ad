"""Any local text: one document a file, or several where <|endoftext|> separates them."""
from collections.abc import Iterator

from common import UsageError, read_documents, text_files

DESCRIPTION = "your own UTF-8 files and folders; one document a file, or several with <|endoftext|> between"
SOURCE = "local files"
VAL_FRACTION = 0.05


def size(args) -> int:
    return sum(file.stat().st_size for file in text_files(args.paths))


def documents(args) -> Iterator[str]:
    if not args.paths:
        raise UsageError("text: expected at least one PATH after it")
    for file in text_files(args.paths):
        yield from read_documents(file)
