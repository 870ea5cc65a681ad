"""The sources of the standard library of the Python that runs this program. Each file is a document.

They are those of the modules in sys.stdlib_module_names. That leaves out the tests of the interpreter and
what belongs to one installation (site-packages, sitecustomize). Also left out are
- what some distributions put into packages of their own, so that the same Python gives the same text with and
  without these,
- files that programs made (tables of characters, the help texts of pydoc), because they are not code that
  someone wrote,
- tests inside packages, because they are much longer than what they test, and repeat themselves.
"""
import platform
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from common import Failure, open_text

DESCRIPTION = "the sources of Python's standard library, 8 MB, from the running Python"
SOURCE = f"the standard library of Python {platform.python_version()}"
VAL_FRACTION = 0.05

SEPARATE = "distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo", "venv"
GENERATED = "encodings", "pydoc_data"
TESTS = "test", "tests"


def size(args) -> int:
    return sum(file.stat().st_size for file in files().values())


def documents(args) -> Iterator[str]:
    """Without --val-fraction, the files for training only."""
    whole = args.val_fraction is not None
    return texts((file for name, file in files().items() if whole or not for_validation(name)), args)


def validation(args) -> Iterator[str]:
    return texts((file for name, file in files().items() if for_validation(name)), args)


def for_validation(name: str) -> bool:
    """Chooses whole files, about VAL_FRACTION of them, and the same ones in every version of Python."""
    return zlib.crc32(name.encode()) < VAL_FRACTION * 2**32


def texts(paths: Iterable[Path], args) -> Iterator[str]:
    for path in paths:
        with open_text(path, args.errors) as file:
            yield file.read()


def files() -> dict[str, Path]:
    """The files by their names, in the order of these."""
    folder = Path(sysconfig.get_path("stdlib"))
    modules = sys.stdlib_module_names.difference(SEPARATE, GENERATED)
    found = {}
    for path in folder.rglob("*.py"):
        name = path.relative_to(folder).with_suffix("")
        if name.parts[0] in modules and not set(name.parts).intersection(TESTS):
            found[name.as_posix()] = path
    if not found:
        raise Failure(f"{folder}: no sources of Python's standard library in this folder; "
                      "the dataset stdlib needs a Python that has them there as .py files")
    return dict(sorted(found.items()))
