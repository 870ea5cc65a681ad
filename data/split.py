"""Which text is for validation: a share of the bytes, taken in whole documents where these are small enough.

The stream is read in groups of consecutive documents, as many as hold one for validation on average. The
first documents of a group are for validation, as many as bring the share so far nearest to what was asked.
Where the share would still be off, because there are few documents or very unequal ones, it is made exact by
the end of a document. So the share is right after each group, whatever the sizes, and memory holds one group.
"""
import itertools
import math
from collections.abc import Iterable, Iterator

GROUP_CHARACTERS = 1 << 22  # A group ends here also where it has fewer documents.
# By how much of it the share may be off after a group, and after the last.
TOLERANCE, LAST_TOLERANCE = 1 / 3, 1 / 8


# A share that suits a whole dataset leaves nearly nothing of a small part of it. Where nobody has asked for
# the share, validation gets at least LEAST_SHARE of the first bytes, up to LEAST_BYTES.
LEAST_SHARE, LEAST_BYTES = 0.05, 50_000


def rule(share: float, asked: bool) -> str:
    """The rule for meta.json; --help has it in fewer words."""
    wanted = f"{share:g}"
    if not asked and share < LEAST_SHARE:
        wanted += f" (at first {LEAST_SHARE:g}, until val has {LEAST_BYTES} bytes)"
    return (f"by bytes: of each {documents_of_group(share)} documents (or {GROUP_CHARACTERS} characters) the "
            f"first, as many as come nearest to {wanted} of the text so far, are val; where that is more "
            "than a third off, at the end of the text an eighth, the end of the longest document after them "
            "makes up for it")


def split(documents: Iterable[str], share: float, asked: bool = True) -> Iterator[tuple[str, str]]:
    """(split, document) pairs in the order of the documents. One that is cut becomes two, train and val."""
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
    """The groups, and of each whether it is the last."""
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
    """How many documents are val, from the first on, and how many bytes of another."""
    sums = list(itertools.accumulate(sizes, initial=0))
    nearest = min(range(len(sums)), key=lambda count: abs(sums[count] - wanted))
    if abs(sums[nearest] - wanted) <= tolerance or wanted <= 0:
        return nearest, 0
    fit = max(count for count in range(len(sums)) if sums[count] <= wanted)
    return fit, wanted - sums[fit]


def place_of_cut(document: str, end: int) -> int:
    """About `end` bytes before its end: at the start of a line or of a word where one is near."""
    content = document.encode()
    at = len(content[:-end].decode(errors="ignore"))
    near = at + (len(document) - at) // 10
    for mark in "\n", " ":
        found = document.find(mark, at, near) + 1
        if found:
            return found
    return at
