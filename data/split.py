"""Chooses the text for validation: a share of the bytes, in whole documents if these are small enough.

The stream is read in groups of consecutive documents, of such a size that on average one document of a group
is for validation. The first documents of a group are for validation: as many as bring the share so far
nearest to the wanted one. If the share is still wrong, because there are few documents or their sizes differ
much, the end of a document makes it exact. So the share is right after each group, whatever the sizes are,
and only one group is in memory.
"""
import itertools
import math
from collections.abc import Iterable, Iterator

GROUP_CHARACTERS = 1 << 22  # A group of this size ends even if it has fewer documents.
# How much the share may be wrong, as a part of it, after a group and after the last group.
TOLERANCE, LAST_TOLERANCE = 1 / 3, 1 / 8


# A share that fits a whole dataset leaves almost nothing if only a small part of it is used. So if the user
# has not set the share, validation gets at least LEAST_SHARE of the first bytes, up to LEAST_BYTES.
LEAST_SHARE, LEAST_BYTES = 0.05, 50_000


def rule(share: float, asked: bool) -> str:
    """The text of the rule for meta.json. --help has it in fewer words."""
    wanted = f"{share:g}"
    if not asked and share < LEAST_SHARE:
        wanted += f" (at first {LEAST_SHARE:g}, until val has {LEAST_BYTES} bytes)"
    return (f"by bytes: in each group of {documents_of_group(share)} documents (or {GROUP_CHARACTERS} "
            f"characters) the first ones are val, as many as come nearest to {wanted} of the text so far; if "
            "that is wrong by more than a third, or by more than an eighth at the end of the text, the end "
            "of the longest document after them corrects it")


def split(documents: Iterable[str], share: float, asked: bool = True) -> Iterator[tuple[str, str]]:
    """Yields (split, document) pairs in the order of the documents. A document that is cut becomes two, first
    train and then val."""
    total = val = 0  # bytes so far
    for group, last in groups(documents, documents_of_group(share)):
        sizes = [len(document.encode()) for document in group]
        total += sum(sizes)
        target = share * total if asked else max(share * total, min(LEAST_SHARE * total, LEAST_BYTES))
        tolerance = (LAST_TOLERANCE if last else TOLERANCE) * target
        whole, end = choose(sizes, math.ceil(target) - val, tolerance)
        longest = max(range(whole, len(group)), key=sizes.__getitem__, default=None)
        for i, document in enumerate(group):
            parts = [("val" if i < whole else "train", document)]
            if end and i == longest:
                at = place_of_cut(document, end)
                parts = [("train", document[:at]), ("val", document[at:])]
            for name, part in parts:
                if part.strip():
                    val += len(part.encode()) if name == "val" else 0
                    yield name, part


def documents_of_group(share: float) -> int:
    return math.ceil(1 / share)


def groups(documents: Iterable[str], size: int) -> Iterator[tuple[list[str], bool]]:
    """Yields the groups, each with whether it is the last one."""
    group: list[str] = []
    characters = 0
    for document in documents:
        if len(group) == size or characters >= GROUP_CHARACTERS:
            yield group, False
            group, characters = [], 0
        group.append(document)
        characters += len(document)
    if group:
        yield group, True


def choose(sizes: list[int], wanted: int, tolerance: float) -> tuple[int, int]:
    """Returns how many documents are val, counted from the first, and how many bytes of another one."""
    sums = list(itertools.accumulate(sizes, initial=0))
    nearest = min(range(len(sums)), key=lambda count: abs(sums[count] - wanted))
    if abs(sums[nearest] - wanted) <= tolerance or wanted <= 0:
        return nearest, 0
    fit = max(count for count in range(len(sums)) if sums[count] <= wanted)
    return fit, wanted - sums[fit]


def place_of_cut(document: str, end: int) -> int:
    """The place to cut, about `end` bytes before the end: the start of a line or a word if one is near."""
    content = document.encode()
    at = len(content[:-end].decode(errors="ignore"))
    near = at + (len(document) - at) // 10
    for mark in "\n", " ":
        found = document.find(mark, at, near) + 1
        if found:
            return found
    return at
