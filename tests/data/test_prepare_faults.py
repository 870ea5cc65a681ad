"""data/prepare.py on unusual folders, texts, pipes and tables, and on disks that fail."""
import contextlib
import importlib.util
import io
import json
import os
import pickle
import random
import re
import socket
import subprocess
import sys
import time
import unittest
from pathlib import Path
from unittest import mock

TESTS = Path(__file__).resolve().parent
DATA = TESTS.parents[1] / "data"
sys.path[:0] = [str(TESTS), str(DATA)]
from test_prepare import (DOCUMENTS, MISSING, PREPARE, PrepareTest, final_files, random_text,  # noqa: E402
                          read_documents, read_meta, read_split, setUpModule)  # noqa: F401

if not MISSING:
    import prepare
    import split
    from tokenizers import Tokenizer

LIBRARY = Path(os.environ.get("LLMC_FAULT_PRELOAD", "build/fault_preload.so")).resolve()


class NoWorkers(contextlib.nullcontext):
    """Takes the place of prepare.Workers and does their work in this process, if the test needs no processes."""

    def __enter__(self):
        return self

    @staticmethod
    def map(function, items):
        return (function(pickle.loads(pickle.dumps(item))) for item in items)


class InProcess(PrepareTest):
    """Runs prepare.main() in this process, because starting a process for each run would take most of the time."""

    def run_prepare(self, *arguments, out: Path | None = None) -> tuple[int, str, str]:
        prepare.load_tokenizer.cache_clear()
        with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.chdir(self.folder), \
                contextlib.redirect_stderr(io.StringIO()) as errors, \
                mock.patch.object(prepare, "Workers", NoWorkers), mock.patch.object(prepare.signal, "signal"):
            status = prepare.main([*map(os.fspath, arguments), "--out", str(out or self.out)])
        return status, output.getvalue(), errors.getvalue()


class Folders(InProcess):
    def all_documents(self) -> list[str]:
        return sorted(read_documents(self.out, "train") + read_documents(self.out, "val"))

    def test_links_are_followed_and_what_is_skipped_is_named(self):
        corpus = self.corpus(["one\n", "two\n", "three\n"])
        outside = self.corpus(["behind the link\n"], "outside")
        (corpus / "a link").symlink_to(outside)
        (corpus / "the same").symlink_to(outside)
        (outside / "up").symlink_to(corpus)
        (corpus / ".hidden").mkdir()
        (corpus / ".hidden" / "x.txt").write_text("hidden")
        (corpus / ".also hidden").write_text("hidden")
        (corpus / "empty.txt").write_text("")
        os.mkfifo(corpus / "fifo")
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(corpus / "socket"))
        output = self.prepare("text", "corpus", "--val-fraction", "0.13")
        self.assertEqual(self.all_documents(), ["behind the link\n", "one\n", "three\n", "two\n"])
        kinds = {"hidden": ["corpus/.also hidden", "corpus/.hidden"],
                 "other links to the same folder": ["corpus/a link/up", "corpus/the same"],
                 "pipes, sockets and devices": ["corpus/fifo", "corpus/socket"], "empty documents": []}
        skipped = read_meta(self.out)["skipped"]
        self.assertEqual({kind: sorted(entry["names"]) for kind, entry in skipped.items()}, kinds)
        self.assertEqual({kind: entry["count"] for kind, entry in skipped.items()},
                         {kind: len(names) or 1 for kind, names in kinds.items()})
        [line] = [line for line in output.splitlines() if line.startswith("skipped: ")]
        for part in *sum(kinds.values(), []), "hidden: 2 (", "empty documents: 1":
            self.assertIn(part, line)

    def test_what_cannot_be_read_is_an_error(self):
        corpus = self.corpus(["one\n", "two\n"])
        (corpus / "sub").mkdir()
        (corpus / "sub" / "link").symlink_to("nowhere")
        self.refused(1, "corpus/sub/link: a link to nowhere, which does not exist", "text", "corpus")
        (corpus / "sub" / "link").unlink()
        (corpus / "sub" / "link").symlink_to("link")
        self.refused(1, "corpus/sub/link: Too many levels of symbolic links", "text", "corpus")

    @unittest.skipIf(os.geteuid() == 0, "root may read everything")
    def test_a_folder_without_permission_is_an_error(self):
        corpus = self.corpus(["one\n", "two\n"])
        (corpus / "sub").mkdir(mode=0)
        self.refused(1, "corpus/sub: Permission denied", "text", "corpus")

    def test_out_may_be_in_the_corpus(self):
        corpus = self.corpus(["one " * 20, "two " * 20])
        for out in corpus / "out", corpus:
            for flags in [], ["--overwrite"]:
                output = self.prepare("text", corpus, *flags, out=out)
                self.assertEqual(sum(read_meta(out)["bytes"].values()), 160)
                self.assertEqual("files of the dataset in --out: 4 (" in output, bool(flags))
            for path in final_files(out):
                if not path.startswith("000"):
                    (out / path).unlink()
            if out != corpus:
                out.rmdir()

    def test_names_that_are_not_utf8(self):
        name = os.fsdecode(b"Gr\xfc\xdfe\n")
        for corpus, path in [(self.corpus(["one " * 50], name), f"{name}/.hidden"),
                             (self.corpus(), f"corpus/{name}")]:
            (self.folder / path).write_text("text\n" * 50)
            out = self.folder / f"{corpus.name}.out"
            output = self.prepare("text", corpus.name, "--tokenizer", "bpe:260", out=out)
            self.assertIn("\\n", output + "\\n" * (corpus.name == "corpus"))
            meta = read_meta(out)
            self.assertIn("Gr\ufffd\ufffde\n" if corpus.name == name else "corpus", meta["source"])
        self.refused(1, "Gr\\udcfc\\udcdfe\\n.txt: no such file", "text", name + ".txt")


class Shares(unittest.TestCase):
    def check(self, documents: list[str], share: float, off: float = 1 / 8) -> dict[str, list[str]]:
        parts = {"train": [], "val": []}
        for name, part in split.split(iter(documents), share):
            parts[name].append(part)
        self.assertEqual(sorted("".join(sum(parts.values(), []))), sorted("".join(documents)))
        sizes = {name: sum(len(part.encode()) for part in parts[name]) for name in parts}
        self.assertAlmostEqual(sizes["val"] / sum(sizes.values()), share, delta=share * off)
        return parts

    def test_few_or_unequal_documents_are_cut(self):
        words = random_text(130_000, 1)
        for sizes in [[128_858, 194], [194, 128_858], [100_000], [1000, 1000, 1000], [50, 50, 100_000, 50],
                      [30_000, 20_000, 10_000, 5, 5], [5] * 30 + [100_000] + [5] * 30]:
            for share in 0.001, 0.05, 0.3, 0.5:
                with self.subTest(sizes=sizes, share=share):
                    self.check([words[:size] for size in sizes], share)
        parts = self.check([words[:128_858], words[:194]], 0.05, 0.01)
        self.assertEqual([len(parts["train"]), len(parts["val"]), parts["train"][1]], [2, 1, words[:194]])
        self.assertTrue(words[:128_858].endswith(" " + parts["val"][0]))  # the text ends with a whole word

    def test_shares_are_of_bytes_and_characters_stay_whole(self):
        self.check(["a" * 1000 + "世界" * 500], 0.05, 0.01)
        self.check(["世" * 1000, "a" * 3000, "\U0001f600" * 750], 0.2, 0.02)

    def test_many_documents_stay_whole_and_are_spread_evenly(self):
        documents = [f"document {i:4}" for i in range(1000)]
        self.assertEqual(self.check(documents, 0.05, 0.01)["val"], documents[::20])
        self.assertEqual(self.check(documents, 0.001, 0.01)["val"], documents[:1])
        source = random.Random(3)
        web = [f"{i} " + "x" * int(source.paretovariate(1.1) * 100) for i in range(4000)]
        parts = self.check(web, 0.01, 0.05)
        self.assertLess(len(parts["train"]) + len(parts["val"]), len(web) + 10)

    def test_memory_holds_one_group(self):
        read = 0

        def documents(size: int):
            nonlocal read
            for read in range(1, 1001):
                yield "x" * size
        next(split.split(documents(10), 0.05))
        self.assertEqual(read, 21)
        next(split.split(documents(1_000_000), 0.001))
        self.assertLess(read, 10)

    def test_a_share_that_nobody_asked_for_leaves_enough_of_a_small_part(self):
        documents = [random_text(5000, i) for i in range(40)]
        for repeat, bytes in (1, 10_000), (5, 50_000), (30, 50_000):
            parts = list(split.split(documents * repeat, 0.0005, asked=False))
            self.assertEqual(sum(len(part) for name, part in parts if name == "val"), bytes)
            self.assertEqual(len(parts), 40 * repeat)
        parts = split.split(documents * 5, 0.0005)
        self.assertAlmostEqual(sum(len(part) for name, part in parts if name == "val"), 500, delta=10)

    def test_too_little_text(self):
        self.assertEqual(list(split.split(["x"], 0.05)), [("val", "x")])


class SplitRun(PrepareTest):
    def test_the_rule_is_in_meta_and_workers_do_not_change_it(self):
        corpus = self.corpus([random_text(130_000, 1), random_text(200, 2)])
        for workers in "1", "3":
            self.prepare("text", corpus, "--workers", workers, "--overwrite", out=self.folder / workers)
        self.assertEqual(final_files(self.folder / "1"), final_files(self.folder / "3"))
        meta = read_meta(self.folder / "1")
        self.assertAlmostEqual(meta["bytes"]["val"] / sum(meta["bytes"].values()), 0.05, delta=0.001)
        self.assertEqual(meta["split"], split.rule(0.05, asked=False))


class Texts(InProcess):
    def one_text(self, content: bytes, *flags, name: str = "input.txt") -> str:
        """Returns the text that is read from a file, whose last line is for validation."""
        (self.folder / name).write_bytes(content)
        self.prepare("text", name, "--val-fraction", "0.1", "--overwrite", *flags)
        return "".join(read_documents(self.out, "train") + read_documents(self.out, "val"))

    def test_errors_replace(self):
        self.assertEqual(self.one_text(b"Gr\xfc\xdfe,\n" * 9 + b"an end\xe4\xb8", "--errors", "replace"),
                         "Gr\ufffd\ufffde,\n" * 9 + "an end\ufffd")

    def test_the_place_of_bytes_that_are_not_utf8(self):
        for before in b"", "ü".encode() * 131072, b"x" + "ü".encode() * 200_000, b"\xef\xbb\xbf":
            (self.folder / "bad.txt").write_bytes(before + b"\xe4\xb8x")
            self.refused(1, f"bad.txt: not UTF-8: byte 0xe4 at offset {len(before)}, ", "text", "bad.txt")
        self.refused(1, "--errors replace", "text", "bad.txt")

    def test_errors_replace_is_for_every_dataset_of_text_files(self):
        (self.folder / "train.txt").write_bytes(" = Title = \n".encode() + b"Gr\xfc\xdfe\n" * 20)
        (self.folder / "valid.txt").write_text(" = Title = \n text\n")
        for name, path in ("tinyshakespeare", "train.txt"), ("tinystories", "train.txt"), ("wikitext2", "."):
            self.refused(1, "train.txt: not UTF-8: byte 0xfc at offset 14, ", name, "--from", path,
                         "--overwrite")
            self.prepare(name, "--from", path, "--errors", "replace", "--overwrite")
            self.assertIn("Gr\ufffd\ufffde\n", read_documents(self.out, "train")[0])

    def test_a_byte_order_mark_is_no_text(self):
        for flags in [], ["--errors", "replace"]:
            self.assertEqual(self.one_text("\ufeffone\n\ufefftwo\n".encode() * 1 + b"more\n" * 20, *flags),
                             "one\n\ufefftwo\n" + "more\n" * 20)

    def test_other_formats_are_named(self):
        for content, what in [(b"\x1f\x8b\x08", "a gzip file"), (b"\x28\xb5\x2f\xfd\0", "a Zstandard file"),
                              (b"PAR1\x15\0", "a parquet file"), (b"PK\x03\x04", "a zip file"),
                              (b"BZh91AY&SY", "a bzip2 file"), (b"\xfd7zXZ\0", "a xz file"),
                              ("\ufefftext".encode("utf-16-le"), "a text file in UTF-16")]:
            (self.folder / "input.txt").write_bytes(content)
            self.refused(1, f"input.txt: {what}", "text", "input.txt", "--errors", "replace")

    def test_jsonl(self):
        lines = [{"text": "one\n", "id": 1}, {"text": None}, {"text": " "},
                 {"text": "\U0001f600 <|endoftext|>"}, {"text": "three", "body": "other"}]
        (self.folder / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
        output = self.prepare("text", "a.jsonl", "--val-fraction", "0.148")
        self.assertIn("skipped: empty documents: 2\n", output)
        self.assertEqual(read_documents(self.out, "val"), ["one\n"])
        tokens = read_split(self.out, "train")
        self.assertEqual(bytes(tokens[tokens < 256].astype("u1")).decode(), "\U0001f600 <|endoftext|>three")
        (self.folder / "b.NDJSON").write_text('{"body": "one body"}\n' * 20)
        self.prepare("text", "b.NDJSON", "--jsonl-field", "body", "--overwrite")
        self.assertEqual(read_meta(self.out)["documents"], {"train": 19, "val": 1})
        for line, message in [('{"text": 3}', "'text' holds a value of type int, expected text"),
                              ('{"text": ["a"]}', "'text' holds a value of type list"),
                              ('{"content": "a", "id": 1}', "expected 'text', found 'content', 'id'"),
                              ('["text"]', "expected 'text', found a value of type list"),
                              ('{"text": "a"', "not JSON at column 13"), ("[" * 100_000, "not JSON"),
                              ('{"text": "\\ud83d"}', "'text' has half of a surrogate pair")]:
            (self.folder / "c.jsonl").write_text('{"text": "abc"}\n' + line)
            self.refused(1, f"c.jsonl:2: {message}", "text", "c.jsonl", "--overwrite")
        self.prepare("text", "c.jsonl", "--errors", "replace", "--val-fraction", "0.5", "--overwrite")
        self.assertEqual(read_documents(self.out, "train"), ["\ufffd"])
        self.refused(2, "--jsonl-field: allowed only with the dataset text", "--jsonl-field", "a")

    def test_messages_are_one_short_line(self):
        self.refused(1, "a\\n\\x1b[31mb: no such file", "text", "a\n\x1b[31mb")
        status, _, errors = self.output(self.start("text", "a", "--tokenizer", "x" * 5000))
        self.assertEqual((status, errors.count("\n")), (2, 1))
        self.assertLess(len(errors), 2100)


class Pipes(PrepareTest):
    def piped(self, *arguments, content: str = "", **options) -> subprocess.CompletedProcess:
        command = [*PREPARE, *arguments, "--out", self.out, "--workers", "1", "--overwrite"]
        return subprocess.run(command, text=True, capture_output=True, cwd=self.folder, timeout=60,
                              input=content or None, **options)

    def test_standard_input_and_fifos_are_read_once(self):
        text = "a line of text\n" * 2000
        os.mkfifo(self.folder / "fifo")
        (self.folder / "file").write_text(text)
        for path in "-", "/dev/stdin", "fifo":
            with self.subTest(path=path):
                writer = subprocess.Popen(["cp", "file", "fifo"], cwd=self.folder) if path == "fifo" else None
                done = self.piped("text", path, "--tokenizer", "bpe:262", content=text)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertEqual(writer and writer.wait(), 0 if writer else None)
                self.assertEqual(read_meta(self.out)["source"], path)
                documents = read_documents(self.out, "train") + read_documents(self.out, "val")
                self.assertEqual("".join(documents), text)
                self.assertEqual(len(list(self.out.iterdir())), 4)
        with open(self.folder / "file") as file:  # another process cannot open it by its name
            number = file.fileno()
            done = self.piped("text", f"/dev/fd/{number}", "--tokenizer", "bpe:262", pass_fds=[number])
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        done = self.piped("tinyshakespeare", "--from", "-", "--tokenizer", "bpe:262", content=text)
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_what_is_wrong_with_a_pipe_has_its_name(self):
        bad = self.piped("text", "-", "--jsonl-field", "body", content='{"text": "a"}\n')
        self.assertEqual(bad.stderr, "prepare.py: error: -:1: expected 'body', found 'text'\n")
        closed = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *PREPARE, "text", "-", "--out", self.out],
                                capture_output=True, text=True)
        self.assertEqual(closed.stderr, "prepare.py: error: -: standard input is closed\n")
        self.assertEqual(list(self.out.iterdir()), [])

    def test_no_file_of_a_dataset_may_be_a_pipe(self):
        (self.folder / "gpt2").mkdir()
        os.mkfifo(self.folder / "gpt2" / "encoder.json")
        os.mkfifo(self.folder / "train.txt")
        self.refused(1, "gpt2/encoder.json: not a regular file", "text", self.corpus(), "--tokenizer", "gpt2",
                     "--gpt2-files", "gpt2")
        self.refused(1, "train.txt: not a regular file", "wikitext2", "--from", ".")


class Batch(list):
    def to_pylist(self) -> list[dict]:
        return self


class JsonTable:
    """Takes the place of pyarrow's ParquetFile, because pyarrow may be missing: columns with their values."""

    def __init__(self, file):
        self.columns = json.load(file)
        self.schema_arrow = mock.Mock(names=list(self.columns))

    def iter_batches(self, batch_size: int, columns: list[str]):
        rows = list(zip(*(self.columns[name] for name in columns)))
        for i in range(0, len(rows), 2):
            yield Batch(dict(zip(columns, row)) for row in rows[i:i + 2])


class Tables(InProcess):
    def test_parquet_files(self):
        modules = {"pyarrow": mock.Mock(), "pyarrow.parquet": mock.Mock(ParquetFile=JsonTable)}
        with mock.patch.dict(sys.modules, modules):
            self.check_parquet_files()

    def check_parquet_files(self):
        folder = self.folder / "parquet"
        folder.mkdir()
        for name, columns in ("a", {"id": [1, 2, 3], "text": ["text a", None, ""]}), ("b", {"text": []}), \
                ("c", {"text": [f"text {i}" for i in range(30)]}):
            (folder / f"{name}.parquet").write_text(json.dumps(columns))
        (folder / "README.md").write_text("# A dataset\n")
        for tokenizer in "byte", "bpe:260":
            output = self.prepare("fineweb-edu", "--from", "parquet", "--val-fraction", "0.1", "--overwrite",
                                  "--tokenizer", tokenizer)
            self.assertIn("skipped: files that are not .parquet: 1 (parquet/README.md); empty documents: 2; "
                          "files without rows: 1 (parquet/b.parquet)\n", output)
            self.assertEqual(sorted(read_documents(self.out, "train") + read_documents(self.out, "val")),
                             sorted(["text a", *(f"text {i}" for i in range(30))]))
        for content, message in [
                ('{"text": ["a", 3]}', "d.parquet, row 2: 'text' holds a value of type int, expected text"),
                ('{"id": [1], "body": ["a"]}', "d.parquet: expected a column 'text', found 'id', 'body'"),
                ("PAR", "cannot read parquet/d.parquet: JSONDecodeError")]:
            (folder / "d.parquet").write_text(content)
            for tokenizer in "byte", "bpe:260":
                self.refused(1, message, "openwebtext", "--from", "parquet", "--overwrite",
                             "--tokenizer", tokenizer)
        (self.folder / "none").mkdir()
        (self.folder / "none" / "README.md").write_text("# A dataset\n")
        self.refused(1, "none: no .parquet files in this folder", "openwebtext", "--from", "none",
                     "--overwrite")

    def test_rows_of_the_hub(self):
        rows = [{"text": "text a"}, {"text": None}, {"text": ""}, *({"text": f"text {i}"} for i in range(30))]
        library = mock.Mock(load_dataset=lambda *_, **__: rows)
        with mock.patch.dict(sys.modules, datasets=library):
            for tokenizer in "byte", "bpe:260":
                output = self.prepare("openwebtext", "--val-fraction", "0.1", "--overwrite",
                                      "--tokenizer", tokenizer)
                self.assertIn("skipped: empty documents: 2\n", output)
            for row, message in [({"text": 3}, "'text' holds a value of type int"),
                                 ({"body": "a"}, "expected 'text', found 'body'")]:
                rows[33:] = [row]
                for tokenizer in "byte", "bpe:260":
                    self.refused(1, f"Skylion007/openwebtext, row 34: {message}",
                                 "openwebtext", "--overwrite", "--tokenizer", tokenizer)

    def test_the_package_is_named_where_it_is_absent(self):
        with mock.patch.dict(sys.modules, {"pyarrow": None, "pyarrow.parquet": None}):
            self.refused(1, "pip install pyarrow", "openwebtext", "--from", ".")

    @unittest.skipUnless(importlib.util.find_spec("pyarrow"), "the package pyarrow is not installed")
    def test_real_parquet(self):
        import pyarrow
        from pyarrow import parquet
        name = os.fsdecode(b"\xff.parquet")
        texts = ["text a", None, *(f"text {i}" for i in range(30))]
        with open(self.folder / name, "wb") as file:
            parquet.write_table(pyarrow.table({"id": range(32), "text": texts}), file)
        output = self.prepare("openwebtext", "--from", name, "--val-fraction", "0.1")
        self.assertIn("empty documents: 1\n", output)
        self.assertEqual(sum(read_meta(self.out)["documents"].values()), 31)
        (self.folder / "bad.parquet").write_text("PAR1 and more")
        self.refused(1, "cannot read bad.parquet: ArrowInvalid", "openwebtext", "--from", "bad.parquet",
                     "--overwrite")

    def test_what_a_worker_did_not_expect_is_said(self):
        with prepare.Workers(1) as workers, self.assertRaisesRegex(
                prepare.Failure, "a worker failed: ValueError: invalid literal for int"):
            list(workers.map(int, ["x"]))


class LongWords(PrepareTest):
    def test_bpe_training_is_linear_in_a_words_length(self):
        for name, text in ("x", "x" * 400_000), ("space", "a" + " " * 400_000 + "b"):
            (self.folder / name).write_text(text)
        process = self.start("text", "x", "space", "--tokenizer", "bpe:262")
        self.assertEqual(self.output(process, timeout=25)[0::2], (0, ""))
        merges = json.loads((self.out / "tokenizer.json").read_text())["model"]["merges"]
        self.assertIn(["x", "x"], [list(pair) for pair in merges])
        tokenizer = Tokenizer.from_file(str(self.out / "tokenizer.json"))
        tokens = read_split(self.out, "train")
        self.assertEqual(tokens[1:1000].tolist(), tokenizer.encode("x" * 400_000).ids[:999])

    def test_only_long_words_are_cut(self):
        for text in "", "a b\n\n c", "x" * 256, ("世" * 255 + " ") * 3, " " * 256 + "a":
            self.assertEqual(list(prepare.without_long_words(text)), [text])
        for text in "x" * 257, "a " + "x" * 600 + " b", "a\n" + "  " * 300 + "b", ("世" * 1000 + "\n") * 2:
            parts = list(prepare.without_long_words(text))
            self.assertEqual("".join(parts), text)
            words = [word for part in parts for word in re.findall(r"\S+|\s+", part)]
            self.assertLessEqual(max(map(len, words)), 256)

    def test_progress_goes_on_while_nothing_is_added(self):
        with mock.patch.object(prepare.Progress, "SECONDS", (0.01, 0.01)), \
                contextlib.redirect_stderr(io.StringIO()) as shown, \
                prepare.Progress("merging", 100).ticking():
            time.sleep(0.2)
        self.assertRegex(shown.getvalue(), r"^(merging +0% 0.0 MB, \d s, 0.0 MB/s\n){3,}$")


class Output(PrepareTest):
    def test_progress_that_nobody_sees_does_not_stop_the_work(self):
        closed = mock.Mock(isatty=lambda: False, write=mock.Mock(side_effect=BrokenPipeError))
        with mock.patch.object(prepare.Progress, "SECONDS", (0, 0)), mock.patch.object(sys, "stderr", closed):
            prepare.Progress("encoding", None).add(1)
        closed.write.assert_called_once()

    def test_a_dataset_stays_when_nobody_hears_that_it_is_there(self):
        (self.folder / "a.txt").write_text("text\n" * 100)
        for unbuffered in "", "1":
            process = self.start("text", "a.txt", "--overwrite", PYTHONUNBUFFERED=unbuffered)
            process.stdout.close()
            self.assertEqual(process.stderr.read(), "prepare.py: error: standard output: Broken pipe; the "
                                                    f"dataset in {self.out} is complete\n")
            self.assertEqual(process.wait(), 1)
            self.assertEqual(len(final_files(self.out)), 4)
            (self.out / "meta.json").unlink()
        closed = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *PREPARE, "text", "a.txt",
                                 "--out", self.out, "--overwrite", "--tokenizer", "bpe:258"], cwd=self.folder)
        self.assertEqual(closed.returncode, 0)
        self.assertEqual(len(read_documents(self.out, "train")), 1)

    def test_what_the_disk_does_not_take_at_once_is_written_after_it(self):
        class Slow(io.BytesIO):
            def write(self, content) -> int:
                return super().write(content[:3])
        file = Slow()
        prepare.write_all(file, b"ten bytes.")
        self.assertEqual(file.getvalue(), b"ten bytes.")

    def test_any_locale(self):
        (self.folder / "grün").mkdir()
        (self.folder / "grün" / "a.txt").write_text("text\n" * 100)
        (self.folder / "grün" / ".ü").write_text("")
        output = self.prepare("text", "grün", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0",
                              PYTHONIOENCODING="ascii")
        self.assertIn("hidden: 1 (gr\\xfcn/.\\xfc)", output)


# Runs prepare.py with many faults. Each run is forked from this process, because starting Python anew takes long.
# The forked process does the work of the workers itself, because they write nothing.
FAULTS = """
import contextlib, json, os, sys
import prepare
class Workers(contextlib.nullcontext):
    __enter__ = lambda self: self
    map = staticmethod(map)
prepare.Workers = Workers
for environment, arguments in json.load(sys.stdin):
    os.environ.update(environment)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(environment["ERRORS"], os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(2, 1)
        os._exit(prepare.main(arguments))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@unittest.skipUnless(LIBRARY.exists(), f"{LIBRARY} is not built: make build/fault_preload.so")
class Writes(PrepareTest):
    def run_all(self, runs: list[tuple[Path, dict[str, str]]]) -> list[tuple[int, str]]:
        """Runs prepare.py in each folder with its environment. Returns the exit statuses and the messages."""
        jobs = [({"FAULT_FOLDER": str(out), "FAULT_LOG": "", "ERRORS": f"{out}.errors", **environment},
                 ["text", str(self.folder / "corpus"), "--tokenizer", "byte", "--shard-tokens", "500",
                  "--val-fraction", "0.25", "--overwrite", "--out", str(out)]) for out, environment in runs]
        done = subprocess.run([sys.executable, "-c", FAULTS], input=json.dumps(jobs), check=True, text=True,
                              capture_output=True, env={**os.environ, "PYTHONPATH": str(DATA),
                                                        "LD_PRELOAD": str(LIBRARY), "FAULT_AT": "0"})
        self.assertEqual(done.stderr, "")
        return [(int(status), Path(f"{out}.errors").read_text())
                for status, (out, _) in zip(done.stdout.split(), runs, strict=True)]

    def calls(self, out: Path) -> list[tuple[str, str]]:
        """The calls by which a run changes the folder, each with its file."""
        log = out.with_name(f"{out.name}.log")
        [(status, output)] = self.run_all([(out, {"FAULT_LOG": str(log)})])
        self.assertEqual(status, 0, output)
        lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
        return [(call, "" if path == str(out) else path.removeprefix(f"{out}/")) for call, path in lines]

    def old_dataset(self, out: Path) -> dict[str, bytes]:
        """Makes the files that an earlier run has left, among them shards that the next run does not have."""
        out.mkdir()
        for name in "train_000000.bin", "train_000009.bin", "val_000000.bin", "tokenizer.json", "meta.json":
            (out / name).write_text("old")
        return final_files(out)

    def test_files_get_their_names_when_they_are_on_the_disk(self):
        self.corpus(["some text " * 30] * 4)
        old = self.old_dataset(self.out)
        calls = self.calls(self.out)
        new = list(final_files(self.out))
        self.assertEqual(len(new), 5)
        renames = [calls.index(("rename", name)) for name in new]
        meta = calls.index(("rename", "meta.json"))
        for name in new:
            changes = [i for i, (_, path) in enumerate(calls) if path == f"{name}.tmp"]
            self.assertEqual(calls[changes[-1]][0], "fsync")
            self.assertLess(changes[-1], min(renames))
        self.assertEqual(meta, max(renames))
        # The folder is synced after meta.json has been deleted, before the new one comes, and after it.
        gone = calls.index(("unlink", "meta.json"))
        unlinks = [calls.index(("unlink", name)) for name in old if name != "meta.json"]
        synced = ("fsync", "")
        self.assertEqual((calls[gone + 1], calls[meta - 1], calls[meta + 1:]), (synced, synced, [synced]))
        self.assertTrue(gone + 1 < min(unlinks) and max(unlinks) < min(renames))

    def test_a_dataset_is_whole_or_absent_whatever_write_fails(self):
        self.corpus(["some text " * 30] * 4)
        count = len(self.calls(self.folder / "whole"))
        whole = final_files(self.folder / "whole")
        old = self.old_dataset(self.folder / "before")
        replacing = len(self.calls(self.folder / "before"))
        runs = []
        for kind, calls in ("new", count), ("old", replacing):
            for fault, value in ("half", 0), ("error", 5), ("full", 0):
                for n in range(1, calls + 1):
                    runs.append((self.folder / f"{kind} {fault} {n}",
                                 {"FAULT_AT": str(n), "FAULT_DO": fault, "FAULT_VALUE": str(value)}))
                    if kind == "old":
                        self.old_dataset(runs[-1][0])
        results = self.run_all(runs)
        for (out, _), (status, output) in zip(runs, results):
            kind, fault, _ = out.name.split()
            with self.subTest(out.name):
                files = final_files(out) if out.exists() else {}
                if fault == "half":
                    self.assertEqual((status, output), (-9, ""))
                elif status == 0:  # no later call needed space, or the folder already existed
                    self.assertTrue(fault == "full" or out.name == "old error 1")
                    self.assertEqual(files, whole)
                else:
                    self.assertRegex(output, r"\Aprepare.py: error: /.*: "
                                             r"(Input/output error|No space left on device)\n\Z")
                if "meta.json" in files or fault != "half":
                    self.assertIn(files, [{}, whole, old])
        # The next run must not fail because of the files that are left.
        left = [(out, {"FAULT_AT": "0"}) for out, _ in runs if out.name.startswith("old half")]
        for (out, _), (status, output) in zip(left, self.run_all(left)):
            self.assertEqual((status, final_files(out), list(out.glob("*.tmp"))), (0, whole, []), output)


if __name__ == "__main__":
    unittest.main()
