"""Checks that transformers of Hugging Face and the trainer can read each other's checkpoints.

    python dev/check_transformers.py --train-gpt ./train_gpt --data DIR

1. transformers loads a softmax checkpoint of the trainer, with every tensor by its name. It computes the same
   logits and the same loss as `train_gpt dump`.
2. The trainer loads a checkpoint of transformers and computes the same logits and loss. With --init-from it
   starts its training from that loss.

DIR is a dataset folder. All output goes to a temporary folder. Exit status: 0 all agree, 1 something differs
or fails, 2 bad usage.
"""
import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

BATCH, SEQ, CONTEXT = 2, 48, 64
SIZES = ["--batch", str(BATCH), "--seq", str(SEQ)]
QUIET = ["--val-every", "0", "--sample-every", "0"]
TOLERANCE = 1e-4


class Failure(Exception):
    pass


class Check:
    def __init__(self, train_gpt: str, data: Path, folder: Path):
        self.train_gpt, self.data, self.folder = train_gpt, data, folder

    def run(self, *arguments: str | Path) -> None:
        command = [self.train_gpt, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise Failure(f"{' '.join(command)}: exit status {result.returncode}: {result.stderr.strip()}")

    def same(self, what: str, found, expected) -> None:
        """Compares numbers, arrays or tensors by the Euclidean norm of their difference."""
        import numpy as np
        found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
        if found.shape != expected.shape:
            raise Failure(f"{what}: shapes {found.shape} and {expected.shape}")
        difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        if not difference <= TOLERANCE:
            raise Failure(f"{what}: a relative difference of {difference:.1e}")
        print(f"{what}: the same to {difference:.1e}")

    def same_pass(self, what: str, model, folder: Path) -> float:
        """Compares `train_gpt dump` of a checkpoint with the model of transformers. Returns the loss."""
        import torch
        from safetensors.torch import load_file
        file = self.folder / "dump.safetensors"
        self.run("dump", "--model", folder, "--data", self.data, *SIZES, "--file", file)
        dump = load_file(file)
        with torch.no_grad():
            logits = model.eval()(dump["input_ids"].long()).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), dump["targets"].long().flatten())
        self.same(f"{what}, logits", dump["logits"], logits)
        self.same(f"{what}, loss", dump["loss"], loss)
        return loss.item()

    def from_trainer(self) -> None:
        from transformers import GPT2LMHeadModel
        out = self.folder / "trained"
        self.run("train", "--data", self.data, "--out", out, "--attention", "softmax", "--layers", "2",
                 "--heads", "4", "--channels", "64", "--context", CONTEXT, *SIZES, "--steps", "2",
                 "--lr", "1e-2", *QUIET)
        model, report = GPT2LMHeadModel.from_pretrained(out / "step_00000002", output_loading_info=True)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report[problem]:
                raise Failure(f"transformers reports {problem} in the checkpoint: {sorted(report[problem])}")
        self.same_pass("transformers with the trainer's checkpoint", model, out / "step_00000002")

    def to_trainer(self) -> None:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel
        meta = self.data / "meta.json"
        vocab_size = json.loads(meta.read_text())["vocab_size"] if meta.exists() else 50257
        torch.manual_seed(1)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=CONTEXT, n_embd=48, n_layer=3,
                                           n_head=3, bos_token_id=0, eos_token_id=0))
        for parameter in model.parameters():  # also changes the biases, which are 0 at first
            parameter.data += 0.1 * torch.randn_like(parameter)
        folder = self.folder / "huggingface"
        model.save_pretrained(folder)
        loss = self.same_pass("the trainer with transformers' checkpoint", model, folder)

        out, data = self.folder / "finetuned", self.one_batch()
        self.run("train", "--data", data, "--out", out, "--init-from", folder, *SIZES, "--steps", "1", *QUIET)
        first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
        self.same("the trainer with transformers' checkpoint, loss of the first step", first["loss"], loss)

    def one_batch(self) -> Path:
        """Makes a dataset that has only the batch of dump, so that shuffling changes nothing."""
        sys.path.insert(0, str(Path(__file__).parent / "reference"))
        from shards import windows, write_shard
        folder = self.folder / "one_batch"
        folder.mkdir()
        write_shard(folder / "train_000000.bin", next(windows(self.data, BATCH * SEQ)))
        if (self.data / "meta.json").exists():  # its numbers of tokens and shards would be wrong
            meta = json.loads((self.data / "meta.json").read_text())
            (folder / "meta.json").write_text(json.dumps({"vocab_size": meta["vocab_size"]}))
        return folder


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks that transformers and the trainer read each other's "
                                                 "checkpoints.")
    parser.add_argument("--train-gpt", required=True, metavar="FILE", help="the trainer")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="a dataset folder")
    args = parser.parse_args()
    needed = ("torch", "transformers", "safetensors")
    if any(importlib.util.find_spec(module) is None for module in needed):
        print(f"check_transformers.py: not installed: pip install {' '.join(needed)}", file=sys.stderr)
        return 2
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        check = Check(str(Path(args.train_gpt).resolve()), args.data, Path(folder))
        try:
            check.from_trainer()
            check.to_trainer()
        except (Failure, OSError, ValueError) as error:
            print(f"check_transformers.py: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
