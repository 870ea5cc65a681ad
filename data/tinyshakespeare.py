"""Andrej Karpathy's tiny Shakespeare: parts of the plays in one file of 1 MB, which is one document."""
from collections.abc import Iterator

from common import decode, download, open_text

DESCRIPTION = "tiny Shakespeare: 40,000 lines of the plays, 1 MB, in one document"
SOURCE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
VAL_FRACTION = 0.1
LOCAL = "the text file"


def size(args) -> int:
    return 1_115_394


def documents(args) -> Iterator[str]:
    if args.local is None:
        yield decode(download(SOURCE, "--from FILE reads a local copy"), SOURCE, args.errors)
    else:
        with open_text(args.local, args.errors) as file:
            yield file.read()
