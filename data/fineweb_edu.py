"""FineWeb-Edu's sample of 10 billion tokens: educational web pages. Each page is a document."""
from collections.abc import Iterator

from rows import parquet_rows, stream_rows

DESCRIPTION = "FineWeb-Edu, the sample of 10 billion tokens: 9.7 million web pages, 46 GB"
SOURCE = "HuggingFaceFW/fineweb-edu, sample-10BT"
VAL_FRACTION = 0.001
LOCAL = "a folder of its parquet files"


def size(args) -> int:
    return 46_000_000_000


def documents(args) -> Iterator[str]:
    if args.local is None:
        return stream_rows("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", args)
    return parquet_rows(args)
