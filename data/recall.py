"""Made-up sequences that only a model that retrieves can predict, because their tokens are drawn at random.

mqar, multi-query associative recall (arXiv 2312.04927). N keys, each before its value, then every key once
more, as a query, before its answer, which is the same value:

    end k1 v1 k2 v2 k3 v3 blank blank k2 v2 k1 v1 blank blank blank blank k3 v3 blank ...

Keys and values do not repeat in an example. As in the paper, the distances of the queries from the end of the
first part follow a power law, of exponent 0.01 - 1.

induction. A run of N + 1 different tokens, and later the same run again. Each token of the second run except
its first is an answer: it follows a token that was there before.

    end blank t1 t2 t3 t4 blank blank blank t1 t2 t3 t4 blank ...

The tokens are numbered in this order: keys, values, blank, end. In induction every token of a run is a key
and a value. meta.json has the ranges. An answer is a value after a key that was in the same example before;
llmc/recall.h finds the answers by that rule.

An example has as many tokens as a sequence of the trainer, and a shard has one more token than its examples.
So with the same --seq each sequence is one example (see llmc/dataloader.h), and the target of its last token
is the `end` with which the next one begins.

The trainer's loss is that of all tokens, so examples in which most tokens are answers are learned much sooner.
--seq 4N + 1 (induction: 2N + 3) leaves no blank. The defaults are sizes of the paper, which trains on answers
alone.
"""
from collections.abc import Iterator

import numpy as np
from common import UsageError

DESCRIPTION = "made-up sequences that need retrieval: multi-query associative recall, or induction"
SOURCE = "random numbers"
POWER = 0.01  # 1 would be an even distribution
BLOCK = 1 << 17  # about how many tokens are made at a time
# The flags that are only for this dataset and their defaults, which are sizes of the paper.
FLAGS = {"task": "mqar", "pairs": 8, "vocabulary": 8192, "seq": 128, "sequences": 100_000,
         "val_sequences": 3000, "seed": 1}


def check(args) -> None:
    """Sets the defaults, and fails if the sizes do not fit together."""
    for flag, default in FLAGS.items():
        if getattr(args, flag) is None:
            setattr(args, flag, default)
    least = 1 + (4 * args.pairs if args.task == "mqar" else 2 * args.pairs + 2)
    if args.seq < least:
        raise UsageError(f"--seq {args.seq}: too short for --pairs {args.pairs} of --task {args.task}, "
                         f"expected at least {least}")
    least = 2 + (2 * args.pairs if args.task == "mqar" else args.pairs + 1)
    if args.vocabulary < least:
        raise UsageError(f"--vocabulary {args.vocabulary}: too small for --pairs {args.pairs} of --task "
                         f"{args.task}, expected at least {least}")
    if args.shard_tokens <= args.seq:
        raise UsageError(f"--shard-tokens {args.shard_tokens}: expected at least {args.seq + 1}, a sequence "
                         f"of --seq {args.seq} and the token after it")


def ranges(args) -> dict[str, tuple[int, int]]:
    """The first token of each kind, and the one after the last."""
    blank = args.vocabulary - 2
    if args.task == "induction":
        return {"keys": (0, blank), "values": (0, blank)}
    return {"keys": (0, blank // 2), "values": (blank // 2, blank)}


def meta(args) -> dict:
    return {"eot_token": args.vocabulary - 1, "recall": {**{flag: getattr(args, flag) for flag in FLAGS},
                                                         **ranges(args)}}


def shard_tokens(args) -> int:
    """As many as fit into --shard-tokens: whole examples, and the token after the last one."""
    return (args.shard_tokens - 1) // args.seq * args.seq + 1


def tokens(args) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (split, tokens) pairs."""
    in_block, in_shard = block_examples(args), shard_tokens(args) // args.seq
    for number, (split, count) in enumerate([("train", args.sequences), ("val", args.val_sequences)]):
        done = 0
        while done < count:
            # Each block has its own generator, of the kind whose numbers NumPy has promised not to change.
            random = np.random.RandomState([args.seed, number, done // in_block])
            block = EXAMPLES[args.task](random, args)[:count - done]
            while len(block):
                part, block = np.split(block, [in_shard - done % in_shard])
                yield split, part.ravel()
                done += len(part)
                if done % in_shard == 0 or done == count:
                    yield split, np.array([args.vocabulary - 1])


def block_examples(args) -> int:
    return max(1, BLOCK // args.seq)


def blank_examples(args) -> np.ndarray:
    examples = np.full((block_examples(args), args.seq), args.vocabulary - 2)
    examples[:, 0] = args.vocabulary - 1
    return examples


def mqar(random: np.random.RandomState, args) -> np.ndarray:
    examples, pairs = blank_examples(args), 2 * args.pairs
    keys, values = (low + distinct(random, len(examples), args.pairs, high - low)
                    for low, high in ranges(args).values())
    examples[:, 1:1 + pairs:2], examples[:, 2:2 + pairs:2] = keys, values
    # Each place gets a random time of arrival, and the weights are the rates. The first to arrive are a
    # sample without repetition that has these weights. Key i gets the i-th of them.
    weights = np.arange(1, 1 + (args.seq - 1 - pairs) // 2) ** (POWER - 1)
    arrivals = -np.log1p(-random.random_sample((len(examples), len(weights)))) / weights
    places = 1 + pairs + 2 * np.argsort(arrivals, axis=1, kind="stable")[:, :args.pairs]
    np.put_along_axis(examples, places, keys, axis=1)
    np.put_along_axis(examples, places + 1, values, axis=1)
    return examples


def induction(random: np.random.RandomState, args) -> np.ndarray:
    examples, length = blank_examples(args), args.pairs + 1
    [(low, high), _] = ranges(args).values()
    run = low + distinct(random, len(examples), length, high - low)
    blanks = np.sort(integers(random, (len(examples), 2), args.seq - 2 * length), axis=1)  # before each run
    for begin in 1 + blanks[:, :1], 1 + length + blanks[:, 1:]:
        np.put_along_axis(examples, begin + np.arange(length), run, axis=1)
    return examples


EXAMPLES = {"mqar": mqar, "induction": induction}


def integers(random: np.random.RandomState, shape, below) -> np.ndarray:
    return (random.random_sample(shape) * below).astype(np.int64)


def distinct(random: np.random.RandomState, rows: int, count: int, below: int) -> np.ndarray:
    """(rows,count): in each row, different integers in [0, below) in random order. Floyd's algorithm: a
    number that is taken already is replaced by the one that could not be drawn before."""
    chosen = np.empty((rows, count), np.int64)
    for i, last in enumerate(range(below - count, below)):
        drawn = integers(random, rows, last + 1)
        taken = (chosen[:, :i] == drawn[:, None]).any(axis=1)
        chosen[:, i] = np.where(taken, last, drawn)
    order = np.argsort(random.random_sample(chosen.shape), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1)
