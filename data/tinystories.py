"""TinyStories (arXiv 2305.07759): stories in words that small children know, written by GPT-3.5 and GPT-4."""
from collections.abc import Iterator

from files import read_documents, text_files
from rows import stream_rows

DESCRIPTION = "TinyStories: 2.1 million short stories, 1.9 GB"
SOURCE = "roneneldan/TinyStories"
VAL_FRACTION = 0.01
LOCAL = "a text file such as TinyStoriesV2-GPT4-train.txt, or a folder of them"


def size(args) -> int:
    return 1_920_000_000


def documents(args) -> Iterator[str]:
    if args.local is None:
        return stream_rows(SOURCE, None, "train", args)
    return (story.strip() for file in text_files([args.local], args)
            for story in read_documents(file, args.errors))


def validation(args) -> Iterator[str] | None:
    return stream_rows(SOURCE, None, "validation", args) if args.local is None else None
