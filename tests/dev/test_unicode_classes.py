"""Compares llmc/unicode.h with the tokenizers library, for all code points."""
import importlib.util
import unittest
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "dev/unicode_classes.py"


@unittest.skipUnless(importlib.util.find_spec("tokenizers"), "needs the package tokenizers, which is not installed")
class UnicodeClasses(unittest.TestCase):
    def test_letters_numbers_and_white_space_are_those_of_the_library(self):
        spec = importlib.util.spec_from_file_location("unicode_classes", SCRIPT)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        self.assertTrue(script.header() == script.HEADER.read_text(),
                        f"llmc/unicode.h is not what tokenizers {script.tokenizers.__version__} says; "
                        "see dev/unicode_classes.py")


if __name__ == "__main__":
    unittest.main()
