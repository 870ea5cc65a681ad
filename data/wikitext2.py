"""WikiText-2: 720 good and featured articles of Wikipedia. Each article is a document."""
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from common import Failure, open_text
from rows import stream_rows

DESCRIPTION = "WikiText-2, raw: 720 articles of Wikipedia, 13 MB"
SOURCE = "Salesforce/wikitext, wikitext-2-raw-v1"
VAL_FRACTION = 0.05
LOCAL = "a folder with train.txt and valid.txt (without train.txt, valid.txt and test.txt make both splits)"

TITLE = re.compile(r" ?= [^=].* = ?$")  # a section's title has two or more = on each side


def size(args) -> int:
    return 12_200_000


def documents(args) -> Iterator[str]:
    if args.local is None:
        return articles(hub_lines(args, "train"))
    if has_train(args):
        return articles(file_lines(args, "train.txt"))
    names = [name for name in ("valid.txt", "test.txt") if (Path(args.local) / name).exists()]
    if not names:
        raise Failure(f"{args.local}: has none of train.txt, valid.txt and test.txt")
    return articles(line for name in names for line in file_lines(args, name))


def validation(args) -> Iterator[str] | None:
    if args.local is None:
        return articles(hub_lines(args, "validation"))
    return articles(file_lines(args, "valid.txt")) if has_train(args) else None


def has_train(args) -> bool:
    return (Path(args.local) / "train.txt").exists()


def hub_lines(args, split: str) -> Iterator[str]:
    # The hub has an empty row for each empty line of the files.
    return (row or " \n" for row in stream_rows("Salesforce/wikitext", "wikitext-2-raw-v1", split, args))


def file_lines(args, name: str) -> Iterator[str]:
    with open_text(Path(args.local) / name, args.errors) as file:
        yield from file


def articles(lines: Iterable[str]) -> Iterator[str]:
    article: list[str] = []
    for line in lines:
        if TITLE.match(line.rstrip("\r\n")):
            if article:
                yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)
