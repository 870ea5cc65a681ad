"""The documents are right: options.md has the program's options, and the files that they name exist."""
import os
import re
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "dev"))
import options_doc  # noqa: E402

PROGRAM = ROOT / os.environ.get("LLMC_TRAIN_GPT", "train_gpt")
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("dev/*/*.md")]
# A name in `code` is a file of the project if it begins with one of these folders, or is in the root folder.
FOLDERS = "llmc/", "data/", "dev/", "docs/", "tests/", "llmc/cpu/", "llmc/cuda/"
MADE = re.compile(r"data/(shakespeare|plays|mine)|docs/options\.md")  # a command in the document makes these


def heading_anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes for the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


class DocumentsTest(unittest.TestCase):
    @unittest.skipUnless(PROGRAM.exists(), f"{PROGRAM} is not built")
    def test_options_are_those_of_the_program(self) -> None:
        expected, found = options_doc.document(str(PROGRAM)), (ROOT / "docs/options.md").read_text()
        self.assertEqual(found, expected, "docs/options.md differs from --help: make docs")

    def test_the_help_of_other_versions_of_cli11_reads_alike(self) -> None:
        below = ("train a model\nUsage: train_gpt train [OPTIONS]\n\nModel:\n  --decay TEXT:none|fixed=none\n"
                 "                              fade attention\n  --new Needs: --init-from    train it\n")
        beside = ("train a model \n\n\nUsage: train_gpt train [OPTIONS] \n\nMODEL:\n"
                  "          --decay TEXT:none|fixed [none] \n                      fade\n"
                  "                      attention\n          --new Needs: --init-from\n"
                  "                      train it\n")
        expected = {"Model": [("`--decay`", "`none`, `fixed`", "`none`", "fade attention"),
                              ("`--new`", "", "", "train it (only with `--init-from`)")]}
        for text in below, beside:
            self.assertEqual(options_doc.parse(text), ("train a model", expected))

    def test_links_lead_somewhere(self) -> None:
        for document in DOCUMENTS:
            for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", document.read_text()):
                path, _, anchor = "".join(target).partition("#")
                if "://" in path:
                    continue
                with self.subTest(document=document.name, target=target):
                    file = document.parent / path if path else document
                    self.assertTrue(file.exists())
                    if anchor:
                        self.assertIn(anchor, heading_anchors(file))

    def test_files_that_are_named_exist(self) -> None:
        for document in DOCUMENTS:
            if document.name == "CHANGELOG.md":  # it also names files that no longer exist
                continue
            for name in re.findall(r"`([\w./*-]+/[\w./*-]*|[\w-]+\.(?:cpp|cu|h|py|sh))`", document.read_text()):
                if name.startswith(FOLDERS) and not MADE.match(name) or re.fullmatch(r"train_gpt\.\w+", name):
                    with self.subTest(document=document.name, name=name):
                        self.assertTrue(list(ROOT.glob(name.replace("NAME", "*"))), "no such file")

    def test_the_version_is_the_same_everywhere(self) -> None:
        version = re.search(r'kVersion = "(.*)"', (ROOT / "llmc/version.h").read_text())[1]
        self.assertIn(f"\nversion: {version}\n", (ROOT / "CITATION.cff").read_text())
        self.assertEqual(re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1], version)


if __name__ == "__main__":
    unittest.main()
