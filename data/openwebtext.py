"""OpenWebText, the open copy of GPT-2's training set. Each web page is a document."""
from collections.abc import Iterator

from rows import parquet_rows, stream_rows

DESCRIPTION = "OpenWebText: 8 million web pages, 40 GB"
SOURCE = "Skylion007/openwebtext"
VAL_FRACTION = 0.0005
LOCAL = "a folder of its parquet files"


def size(args) -> int:
    return 39_700_000_000


def documents(args) -> Iterator[str]:
    return stream_rows(SOURCE, None, "train", args) if args.local is None else parquet_rows(args)
