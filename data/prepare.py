"""Makes the token shards that train_gpt reads: python data/prepare.py shakespeare --tokenizer byte --out DIR

Writes train_000000.bin, ..., val_000000.bin, tokenizer.json and meta.json. The documents are read one after
another, encoded by worker processes and written in their order, each after an end-of-text token. So the
shards are the same for any number of workers, and only a few documents and batches are in memory at a time.
Every file is written under a temporary name. When all are complete, they get their final names, meta.json
last.
"""
import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the program quietly even during the slow imports; later see stop()
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import pickle
import re
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import fineweb_edu
import openwebtext
import shakespeare
import stdlib
import text
import tinyshakespeare
import tinystories
import wikitext2
from common import END_OF_TEXT, Failure, Skipped, UsageError, download, one_line, regular, shown
from files import Spooled
from split import rule, split

try:
    import numpy as np
    import recall
    from shards import ShardWriter, our_files, put_in_place, token_type, write_all, write_synced
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
except ImportError as missing:
    sys.exit(f"prepare.py: error: {one_line(missing)}; pip install -r requirements.txt")

DATASETS = {
    "shakespeare": shakespeare,
    "stdlib": stdlib,
    "tinyshakespeare": tinyshakespeare,
    "wikitext2": wikitext2,
    "tinystories": tinystories,
    "openwebtext": openwebtext,
    "fineweb-edu": fineweb_edu,
    "text": text,
    "recall": recall,
}
SPLITS = "train", "val"
TEXT_FLAGS = "tokenizer", "gpt2_files", "bpe_bytes", "errors", "max_documents", "val_fraction"
BATCH = 1 << 18  # characters in a batch, the unit of work of a worker


# --- The command line ---------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(message)


def integer(low: int, high: int):
    def parse(value: str) -> int:
        if not re.fullmatch(r"-?\d{1,18}", value) or not low <= int(value) <= high:
            raise argparse.ArgumentTypeError(f"{value!r} is not an integer from {low} to {high}")
        return int(value)
    return parse


def fraction(value: str) -> float:
    if not re.fullmatch(r"\d*\.?\d+(e-?\d+)?", value) or not 0 < float(value) <= 0.5:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number above 0, at most 0.5")
    return float(value)


def tokenizer_name(value: str) -> str:
    if value not in ("byte", "gpt2"):
        kind, _, size = value.partition(":")
        if kind != "bpe":
            raise argparse.ArgumentTypeError(f"{value!r} is not byte, bpe:N or gpt2")
        try:
            integer(257, 1 << 24)(size)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{value!r}: N = {error}") from error
    return value


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    listed = ["datasets:", *(f"  {name:16} {dataset.DESCRIPTION}" for name, dataset in DATASETS.items()),
              "\nlocal copies for --from:", *(f"  {name:16} {dataset.LOCAL}"
                                              for name, dataset in DATASETS.items()
                                              if hasattr(dataset, "LOCAL"))]
    parser = Parser(prog="prepare.py", description="Tokenizes a dataset into shards of tokens for train_gpt.",
                    epilog="\n".join(listed), formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    add = parser.add_argument
    add("name", nargs="?", default="shakespeare", metavar="NAME",
        help="the dataset, one of the list below (default: shakespeare)")
    add("paths", nargs="*", metavar="PATH",
        help="files and folders of the dataset `text`, or - for standard input")
    add("--out", required=True, type=Path, metavar="DIR", help="the folder to write to")
    add("--overwrite", action="store_true", help="replace the dataset that is in --out")
    add("--tokenizer", type=tokenizer_name, default="byte", metavar="byte|bpe:N|gpt2",
        help="the tokenizer: each byte is a token; or a byte-level BPE with a vocabulary of N, trained on "
             "the train split; or GPT-2's tokenizer (default: byte)")
    add("--gpt2-files", type=Path, metavar="DIR",
        help="read GPT-2's encoder.json and vocab.bpe from this folder instead of downloading them")
    add("--bpe-bytes", type=integer(1, 1 << 50), default=1 << 30, metavar="N",
        help="train the BPE on about the first N bytes of the train split (default: 1 GiB)")
    add("--from", dest="local", metavar="PATH", help="read a local copy (see below) instead of downloading")
    add("--errors", choices=["strict", "replace"], default="strict",
        help="what to do with bytes that are not UTF-8: strict refuses them, replace reads them as U+FFFD "
             "(default: strict)")
    add("--jsonl-field", metavar="NAME",
        help="the field of each line of .jsonl files that has the text (default: text); with this option, "
             "standard input and pipes are read as JSON lines, too")
    add("--max-documents", type=integer(2, 1 << 50), metavar="N", help="use only the first N documents")
    add("--val-fraction", type=fraction, metavar="F",
        help="share of the text that is used for validation: evenly spread whole documents, and also ends "
             "of documents if there are few documents or their sizes differ much; meta.json has the exact "
             "rule (default: the dataset's own validation split, or a share that fits its size)")
    add("--shard-tokens", type=integer(1, 2**31 - 1), default=100_000_000, metavar="N",
        help="tokens in a shard (default: 100000000)")
    add("--workers", type=integer(1, 1024), default=min(32, os.cpu_count() or 1), metavar="N",
        help="number of processes that encode (default: one for each CPU, at most 32)")
    made = parser.add_argument_group("of the dataset recall")
    add = made.add_argument
    add("--task", choices=["mqar", "induction"],
        help="keys and values, then the keys again as queries; or a run of tokens and the same run again "
             "(default: mqar)")
    add("--pairs", type=integer(1, 1 << 16), metavar="N",
        help="pairs of key and value in a sequence, each asked for once; or answers in a run (default: 8)")
    add("--vocabulary", type=integer(4, 1 << 24), metavar="N",
        help="number of different tokens: as many keys as values, and two others (default: 8192)")
    add("--seq", type=integer(1, 1 << 20), metavar="N",
        help="tokens in a sequence, the same as --seq of train_gpt; 4 times --pairs and 1 more (induction: "
             "twice --pairs and 3 more) leave no blanks, which is easier to learn (default: 128)")
    add("--sequences", type=integer(1, 1 << 40), metavar="N", help="sequences for training (default: 100000)")
    add("--val-sequences", type=integer(1, 1 << 40), metavar="N",
        help="sequences for validation (default: 3000)")
    add("--seed", type=integer(0, 2**32 - 1), metavar="N", help="seed of the random numbers (default: 1)")
    args = parser.parse_intermixed_args(argv)
    if args.name not in DATASETS:
        raise UsageError(f"unknown dataset {args.name!r}, expected one of {', '.join(DATASETS)}")
    for flags, allowed in (recall.FLAGS, args.name == "recall"), (TEXT_FLAGS, args.name != "recall"):
        for flag in flags:
            if not allowed and getattr(args, flag) != parser.get_default(flag):
                raise UsageError(f"--{flag.replace('_', '-')}: not allowed with the dataset {args.name}")
    if args.paths and args.name != "text":
        raise UsageError(f"unexpected {args.paths[0]!r}: only the dataset text takes paths")
    if not args.paths and args.name == "text":
        raise UsageError("text: expected at least one PATH after it")
    if args.jsonl_field is not None and args.name != "text":
        raise UsageError(f"--jsonl-field: allowed only with the dataset text, not {args.name}")
    if args.local and not hasattr(DATASETS[args.name], "LOCAL"):
        raise UsageError(f"--from: not allowed with the dataset {args.name}, because it downloads nothing")
    if args.gpt2_files and args.tokenizer != "gpt2":
        raise UsageError(f"--gpt2-files: allowed only with --tokenizer gpt2, not {args.tokenizer}")
    if args.name == "recall":
        recall.check(args)
    args.skipped = Skipped()
    return args


# --- Documents, their splits, and the pieces in which they are encoded --------------------------------------

def split_documents(args) -> tuple[str, Iterator[tuple[str, str]]]:
    """A text that says how the dataset is split, and (split, document) pairs, always in the same order."""
    dataset = DATASETS[args.name]
    documents = itertools.islice(not_blank(dataset.documents(args), args), args.max_documents)
    if args.val_fraction is None and hasattr(dataset, "validation"):
        own = dataset.validation(args)
        if own is not None:
            return "the dataset's own", itertools.chain(zip(itertools.repeat("train"), documents),
                                                        zip(itertools.repeat("val"), not_blank(own, args)))

    share = args.val_fraction or dataset.VAL_FRACTION
    first = next(documents, None)
    if first is None:
        raise Failure(f"{source(args)}: no text in it")
    asked = args.val_fraction is not None
    return rule(share, asked), split(itertools.chain([first], documents), share, asked)


def not_blank(documents: Iterable[str], args) -> Iterator[str]:
    for document in documents:
        if document.strip():
            yield document
        else:
            args.skipped.add("empty documents")


def source(args) -> str:
    return shown(args.local or " ".join(map(str, args.paths)) or DATASETS[args.name].SOURCE)


class Piece(NamedTuple):
    split: str
    starts: bool  # whether a document starts here
    text: str


# In a word of GPT-2's pattern, white space never follows another character. So the two sides of such a place
# can be encoded one after the other, and the tokens are those of the whole text.
SAFE_CUT = re.compile(r"(?<=\S)(?=[ \t\r\n])")


def pieces(documents: Iterable[tuple[str, str]]) -> Iterator[Piece]:
    """Cuts the documents into pieces of little more than a batch, so that a long one needs no more memory."""
    for split, document in documents:
        start = 0
        while len(document) - start > BATCH and (place := SAFE_CUT.search(document, start + BATCH)):
            yield Piece(split, start == 0, document[start:place.start()])
            start = place.start()
        yield Piece(split, start == 0, document[start:])


def batches(all_pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in all_pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# --- Tokenizers ---------------------------------------------------------------------------------------------

def byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits with GPT-2's pattern
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def from_merges(merges: list[tuple[str, str]]) -> Tokenizer:
    """The tokens are the bytes in their order, then the results of the merges, then end of text."""
    printable = {*range(33, 127), *range(161, 256)} - {173}  # these are written as themselves
    others = itertools.count(256)  # the other bytes are written as U+0100, U+0101, ...
    vocab = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    vocab[END_OF_TEXT] = len(vocab)
    return byte_level_bpe(vocab, merges)


# The training time grows with the square of a word's length, so longer words are cut. There are few of them,
# and they are cut only for the training, not when they are encoded.
LONGEST_WORD = 256
LONG_WORD = re.compile(rf"(?<!\S)\S{{{LONGEST_WORD}}}\S+|(?<!\s)\s{{{LONGEST_WORD}}}\s+")


def without_long_words(text: str) -> Iterator[str]:
    """Yields the text in parts, so that long words are cut."""
    start = 0
    for word in LONG_WORD.finditer(text):
        for end in range(word.start(), word.end(), LONGEST_WORD):
            yield text[start:end]
            start = end
    yield text[start:]


def train_bpe(args) -> Tokenizer:
    wanted = int(args.tokenizer.removeprefix("bpe:"))
    total = expected_size(args)
    progress = Progress("training the BPE", total and min(total, args.bpe_bytes))

    def train_texts() -> Iterator[str]:
        left = args.bpe_bytes
        for piece in pieces(split_documents(args)[1]):
            if piece.split == "train":
                size = len(piece.text.encode())
                left -= size
                progress.add(size)
                yield from without_long_words(piece.text)
            if left <= 0:
                return

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with progress.ticking():
        trained.train_from_iterator(train_texts(), trainers.BpeTrainer(
            vocab_size=wanted - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    progress.close()
    tokenizer = from_merges([tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]])
    if tokenizer.get_vocab_size() != wanted:
        raise Failure(f"--tokenizer {args.tokenizer}: the train split of {source(args)} has too little text; "
                      f"it is enough for bpe:{tokenizer.get_vocab_size()}")
    return tokenizer


GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_SHA256 = {"encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
               "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"}


def gpt2_tokenizer(folder: Path | None) -> Tokenizer:
    contents = {}
    for name, expected in GPT2_SHA256.items():
        where = f"{folder or GPT2_URL}/{name}"
        if folder:
            regular(where)
        data = Path(where).read_bytes() if folder else download(where, "--gpt2-files DIR reads local copies")
        if hashlib.sha256(data).hexdigest() != expected:
            raise Failure(f"{where}: not GPT-2's {name}: its SHA-256 is not {expected}")
        contents[name] = data.decode()
    merges = [tuple(line.split()) for line in contents["vocab.bpe"].splitlines()[1:]]  # first its version
    return byte_level_bpe(json.loads(contents["encoder.json"]), merges)


# --- What the workers do ------------------------------------------------------------------------------------

def make_tokenizer(args) -> str:
    """The content of tokenizer.json."""
    if args.tokenizer == "gpt2":
        tokenizer = gpt2_tokenizer(args.gpt2_files)
    else:
        tokenizer = from_merges([]) if args.tokenizer == "byte" else train_bpe(args)
    return tokenizer.to_str(pretty=True)


@functools.cache
def load_tokenizer(path: Path) -> Tokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # because the workers run in parallel
    # from_file does not accept a name that is not UTF-8.
    tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    tokenizer.encode_special_tokens = True  # an <|endoftext|> inside a document is text
    return tokenizer


class Encoded(NamedTuple):
    tokens: np.ndarray
    bytes: int  # number of bytes of text
    documents: int


def encode(path: Path, batch: list[Piece]) -> dict[str, Encoded]:
    """Encodes a batch. For each split, the tokens are in the order of its pieces."""
    tokenizer = load_tokenizer(path)
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    encodings = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
    encoded = {}
    for split in SPLITS:
        mine = [(piece, encoding) for piece, encoding in zip(batch, encodings) if piece.split == split]
        ids: list[int] = []
        for piece, encoding in mine:
            ids += [end_of_text] * piece.starts
            ids += encoding.ids
        encoded[split] = Encoded(np.array(ids, dtype=token_type(tokenizer.get_vocab_size())),
                                 sum(len(piece.text.encode()) for piece, _ in mine),
                                 sum(piece.starts for piece, _ in mine))
    return encoded


class Workers:
    """Processes that share the calls of a function. Each one is this program, as `prepare.py --worker`.

    Each has a session of its own, so that Ctrl-C reaches only this process, and ends when this process has
    ended. If one is killed, map fails (multiprocessing.Pool would hang).
    """

    def __init__(self, count: int):
        command = [sys.executable, __file__, "--worker"]
        self.workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         start_new_session=True) for _ in range(count)]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for worker in self.workers:
            worker.kill()
            with contextlib.suppress(BrokenPipeError):  # it does not read the rest of its call
                worker.communicate()

    def map(self, function, items: Iterable) -> Iterator:
        """Yields function(item) for each item, in order. Takes an item only when a worker is free for it."""
        idle, busy = deque(self.workers), deque()
        try:
            for item in items:
                if not idle:
                    idle.append(busy.popleft())
                    yield self.receive(idle[0])
                send(idle[0].stdin, (function, item))
                busy.append(idle.popleft())
            for worker in busy:
                yield self.receive(worker)
        except (EOFError, pickle.UnpicklingError, BrokenPipeError) as error:
            raise Failure("a worker process was killed; too little memory?") from error

    @staticmethod
    def receive(worker):
        result = pickle.load(worker.stdout)
        if isinstance(result, Exception):
            raise result
        return result


def send(pipe, value) -> None:
    pickle.dump(value, pipe)
    pipe.flush()


def work() -> None:
    """The work of a worker: reads calls and writes their results, or errors, until the parent has ended."""
    calls, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that output of a library does not get into the results
    with contextlib.suppress(EOFError, pickle.UnpicklingError, BrokenPipeError):
        while True:
            function, item = pickle.load(calls)
            try:
                result = function(item)
            except (Failure, OSError) as error:
                result = error
            except Exception as error:
                result = Failure(f"a worker failed: {type(error).__name__}: {one_line(error)[:300]}")
            send(results, result)
    os._exit(0)


# --- Progress -----------------------------------------------------------------------------------------------

def expected_size(args) -> int | None:
    return None if args.local or args.max_documents else DATASETS[args.name].size(args)


CLEAR_LINE = "\r\033[K"


class Progress:
    """Shows progress on stderr: as a bar on a terminal, otherwise as a line every ten seconds."""
    SECONDS = 10, 0.1

    def __init__(self, what: str, total: int | None):
        self.what, self.total, self.done, self.tokens = what, total, 0, 0
        self.terminal = sys.stderr.isatty()
        self.seconds = self.SECONDS[self.terminal]  # between two lines
        self.start = self.shown = time.monotonic()

    def add(self, done: int, tokens: int = 0) -> None:
        self.done += done
        self.tokens += tokens
        if time.monotonic() - self.shown >= self.seconds:
            self.show()

    @contextlib.contextmanager
    def ticking(self):
        """Updates the time while nothing is added."""
        ended = threading.Event()

        def tick() -> None:
            while not ended.wait(self.seconds):
                if time.monotonic() - self.shown >= self.seconds:
                    self.show()

        thread = threading.Thread(target=tick)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def show(self) -> None:
        self.shown = time.monotonic()
        part = min(1.0, self.done / self.total) if self.total else None
        line = self.what
        if part is not None and self.terminal:
            line += f" [{'#' * int(30 * part):30}]"
        if part is not None:
            line += f" {100 * part:3.0f}%"
        line += f" {self.done / 1e6:.1f} MB"
        if self.tokens:
            line += f", {self.tokens / 1e6:.1f} million tokens"
        seconds = self.shown - self.start
        line += f", {seconds:.0f} s, {self.done / 1e6 / max(seconds, 1e-3):.1f} MB/s"
        self.write(f"{CLEAR_LINE}{line}" if self.terminal else f"{line}\n")

    def close(self) -> None:
        if self.terminal:
            self.write(CLEAR_LINE)

    @staticmethod
    def write(text: str) -> None:
        with contextlib.suppress(OSError):  # the work continues even if nobody can see its progress
            sys.stderr.write(text)
            sys.stderr.flush()


# --- Pipes --------------------------------------------------------------------------------------------------

DESCRIPTOR = re.compile(r"/dev/(stdin|fd/\d+)|/proc/self/fd/\d+")


def spool(given, folder: Path):
    """Returns what to read for a path of the command line. A pipe is copied first, because it can be read
    only once, and so is a descriptor, because only this process can read it."""
    name = os.fspath(given)
    if name != "-" and not DESCRIPTOR.fullmatch(name):
        if not os.path.exists(name) or os.path.isdir(name) or os.path.isfile(name):
            return given
    if name == "-" and sys.stdin is None:
        raise Failure("-: standard input is closed")
    copy = folder / f"input_{len(our_files(folder, temporary=True)):06d}.tmp"
    progress = Progress(f"reading {shown(name)}", None)
    with open(0 if name == "-" else name, "rb", buffering=0, closefd=name != "-") as pipe, \
            open(copy, "wb", buffering=0) as file:
        while block := read(pipe, name):
            write_all(file, block)
            progress.add(len(block))
    progress.close()
    return Spooled(name, copy)


def read(pipe: FileIO, name: str) -> bytes:
    try:
        return pipe.read(1 << 20)
    except OSError as error:  # it has no file name
        raise Failure(f"{name}: {one_line(error)}") from error


# --- All of it ----------------------------------------------------------------------------------------------

def prepare(args) -> None:
    start, folder = time.monotonic(), args.out
    folder.mkdir(parents=True, exist_ok=True)
    there = our_files(folder, temporary=False)
    if there and not args.overwrite:
        raise Failure(f"{folder}: already holds a dataset ({there[0].name}); --overwrite replaces it")
    try:
        args.paths = [spool(path, folder) for path in args.paths]
        args.local = args.local and spool(args.local, folder)
        paths, report = (write_made if args.name == "recall" else write_files)(args)
        put_in_place(folder, paths)
    finally:
        for leftover in our_files(folder, temporary=True):  # from this run or an earlier one that was killed
            leftover.unlink()
    say([*report, f"done in {time.monotonic() - start:.1f} s"], folder)


def say(lines: list[str], folder: Path) -> None:
    """Prints the lines. The dataset is complete by then, so it does not matter if nobody reads them."""
    try:
        print(*map(printable, lines), sep="\n", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # because the interpreter writes again when it ends
        raise Failure(f"standard output: {one_line(error)}; the dataset in {folder} is complete") from error


def printable(line: str) -> str:
    """Makes one line of limited length, whatever names and values are quoted in it."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= 2000 else f"{line[:1000]} ... {line[-900:]}"


def write_files(args) -> tuple[list[Path], list[str]]:
    """Writes all files under temporary names. Returns these names in the order in which they are to become
    final, and the lines to print about them."""
    tokenizer_path, meta_path = args.out / "tokenizer.json.tmp", args.out / "meta.json.tmp"
    how_split, documents = split_documents(args)
    with Workers(args.workers) as workers:
        [tokenizer_json] = workers.map(make_tokenizer, [args])
        write_synced(tokenizer_path, tokenizer_json)
        tokenizer = Tokenizer.from_str(tokenizer_json)
        dtype = token_type(tokenizer.get_vocab_size())
        writers = {split: ShardWriter(args.out, split, args.shard_tokens, dtype) for split in SPLITS}
        progress = Progress("encoding", expected_size(args))
        text_bytes, counts = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
        for encoded in workers.map(functools.partial(encode, tokenizer_path), batches(pieces(documents))):
            for split, part in encoded.items():
                writers[split].write(part.tokens)
                text_bytes[split] += part.bytes
                counts[split] += part.documents
                progress.add(part.bytes, len(part.tokens))
        progress.close()
    for split in SPLITS:
        writers[split].close()
        if not counts[split]:
            raise Failure(f"{source(args)}: there is too little text to split: nothing is for {split}")
    meta = {"name": args.name, "source": source(args), "tokenizer": args.tokenizer,
            "vocab_size": tokenizer.get_vocab_size(), "eot_token": tokenizer.token_to_id(END_OF_TEXT),
            "split": how_split, "documents": counts, "bytes": text_bytes,
            "tokens": {split: writers[split].tokens for split in SPLITS},
            "shards": {split: len(writers[split].paths) for split in SPLITS},
            "skipped": args.skipped.kinds}
    write_synced(meta_path, json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
    report = [f"{split}: {counts[split]} documents, {text_bytes[split]} bytes, {writer.tokens} tokens, "
              f"shards: {len(writer.paths)}" for split, writer in writers.items()]
    if args.skipped.kinds:
        report.append(f"skipped: {args.skipped}")
    return [tokenizer_path, *writers["train"].paths, *writers["val"].paths, meta_path], report


def write_made(args) -> tuple[list[Path], list[str]]:
    """The same for a dataset that makes tokens, not text, so there is no tokenizer."""
    dataset, meta_path = DATASETS[args.name], args.out / "meta.json.tmp"
    writers = {split: ShardWriter(args.out, split, dataset.shard_tokens(args), token_type(args.vocabulary))
               for split in SPLITS}
    progress = Progress("making tokens", None)
    for split, tokens in dataset.tokens(args):
        writers[split].write(tokens)
        progress.add(0, len(tokens))
    progress.close()
    for writer in writers.values():
        writer.close()
    meta = {"name": args.name, "source": source(args), "vocab_size": args.vocabulary, **dataset.meta(args),
            "tokens": {split: writer.tokens for split, writer in writers.items()},
            "shards": {split: len(writer.paths) for split, writer in writers.items()}}
    write_synced(meta_path, json.dumps(meta, indent=2) + "\n")
    report = [f"{split}: {writer.tokens} tokens, shards: {len(writer.paths)}"
              for split, writer in writers.items()]
    return [*writers["train"].paths, *writers["val"].paths, meta_path], report


def stop(number: int, frame) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second signal ends the program at once
    os.write(2, b"\n" * os.isatty(2))  # to begin below the progress bar
    sys.exit(128 + number)


def open_standard_streams() -> None:
    """Opens standard streams that are closed, because otherwise a file that is opened later would take their
    place. Makes it possible to print any character."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)  # the workers need it, too
    os.close(descriptor)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    sys.stdout.reconfigure(errors="backslashreplace")


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        args = parse_arguments(argv)
        try:
            prepare(args)
        except OSError as error:
            raise Failure(f"{error.filename or args.out}: {one_line(error)}") from error
    except Failure as failure:
        message = f"prepare.py: error: {printable(str(failure))}"
        print(f"{CLEAR_LINE * sys.stderr.isatty()}{message}", file=sys.stderr)
        return failure.status
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        work()
    open_standard_streams()
    sys.exit(main())
