"""dev/compare.py: accepts two dumps that agree, and rejects them for every way in which they may differ."""
import contextlib
import io
import re
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "dev"))
import compare  # noqa: E402


def dump() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    tensors = {"input_ids": rng.integers(9, size=(2, 3), dtype=np.int32),
               "logits": rng.standard_normal((2, 3, 9), dtype=np.float32),
               "loss": np.array(2.5, dtype=np.float32)}
    for name, shape in {"wte.weight": (9, 4), "h.0.ln_1.bias": (4,)}.items():
        tensors[f"param.{name}"] = rng.standard_normal(shape, dtype=np.float32)
        tensors[f"grad.{name}"] = rng.standard_normal(shape, dtype=np.float32)
    return tensors


class CompareTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def compare(self, a: dict, b: dict, *flags: str) -> tuple[int, str]:
        """Returns the exit status and the output."""
        paths = []
        for name, tensors in [("a", a), ("b", b)]:
            paths.append(str(self.folder / f"{name}.safetensors"))
            save_file(tensors, paths[-1])
        with contextlib.redirect_stdout(io.StringIO()) as output:
            status = compare.main([*paths, *flags])
        return status, output.getvalue()

    def check_differs(self, a: dict, b: dict, name: str, *flags: str, why: str = "") -> None:
        for status, output in [self.compare(a, b, *flags), self.compare(b, a, *flags)]:
            self.assertEqual(status, 1)
            self.assertRegex(output, rf"(?m)^{re.escape(name)} .*{why}")
            self.assertIn(f"1 differ: {name}\n", output)

    def check_refused(self, arguments: list[str], message: str) -> None:
        with contextlib.redirect_stderr(io.StringIO()) as output, self.assertRaises(SystemExit) as stopped:
            compare.main(arguments)
        self.assertEqual(stopped.exception.code, 2)
        self.assertEqual(output.getvalue().count("\n"), 1)
        self.assertIn(message, output.getvalue())

    def test_equal(self) -> None:
        status, output = self.compare(dump(), dump())
        self.assertEqual(status, 0)
        for name in dump():
            self.assertIn(name, output)
        self.assertTrue(output.endswith("all agree\n"))

    def test_rounding_agrees(self) -> None:
        other = dump()
        for x in other.values():
            if x.dtype.kind == "f":
                x *= np.float32(1 + 3e-6)
        self.assertEqual(self.compare(other, dump())[0], 0)

    def test_reports_largest_and_relative(self) -> None:
        a, b = {"x": np.array([3.3, 4.4], np.float32)}, {"x": np.array([3.0, 4.0], np.float32)}
        status, output = self.compare(a, b)
        self.assertEqual(status, 1)
        self.assertRegex(output, r"x +4\.00e-01 +1\.00e-01 +differs")

    def test_one_tampered_element(self) -> None:
        for name in ["logits", "param.wte.weight", "grad.wte.weight", "grad.h.0.ln_1.bias"]:
            other = dump()
            other[name].flat[1] += 1e-2
            self.check_differs(other, dump(), name)

    def test_loss_is_held_to_more(self) -> None:
        other = dump()
        other["loss"] *= np.float32(1 + 3e-5)
        self.check_differs(other, dump(), "loss")
        self.assertEqual(self.compare(other, dump(), "--loss-rtol", "1e-4")[0], 0)

    def test_tolerances(self) -> None:
        other = dump()
        other["logits"] *= np.float32(1 + 1e-3)
        self.check_differs(other, dump(), "logits")
        self.assertEqual(self.compare(other, dump(), "--rtol", "2e-3")[0], 0)
        self.assertEqual(self.compare(other, dump(), "--atol", "1e-2")[0], 0)
        self.check_differs(other, dump(), "logits", "--atol", "1e-4")

    def test_noise_for_a_zero_gradient(self) -> None:
        zero, noise, more = dump(), dump(), dump()
        zero["grad.h.0.ln_1.bias"][:] = 0
        noise["grad.h.0.ln_1.bias"][:] = 1e-8
        more["grad.h.0.ln_1.bias"][:] = 1e-5
        self.assertEqual(self.compare(noise, zero)[0], 0)
        self.check_differs(noise, zero, "grad.h.0.ln_1.bias", "--floor", "0")
        self.check_differs(more, zero, "grad.h.0.ln_1.bias")

    def test_floor_is_for_gradients_only(self) -> None:
        zero, noise = dump(), dump()
        zero["param.h.0.ln_1.bias"][:] = 0
        noise["param.h.0.ln_1.bias"][:] = 1e-8
        self.check_differs(noise, zero, "param.h.0.ln_1.bias")

    def test_not_finite(self) -> None:
        for value in [np.nan, np.inf, -np.inf]:
            for name in ["loss", "logits", "grad.wte.weight"]:
                other = dump()
                other[name].reshape(-1)[-1] = value
                self.check_differs(other, dump(), name, "--atol=1e30", "--rtol=1e30", "--loss-rtol=1e30",
                                   why="NaN or Inf")
                # If both files have NaN they do not agree either.
                self.check_differs(other, other, name)

    def test_not_finite_gradients_hide_no_others(self) -> None:
        a, b = dump(), dump()
        b["grad.wte.weight"][0, 0] = np.inf
        a["grad.h.0.ln_1.bias"] += 1
        status, output = self.compare(a, b)
        self.assertEqual(status, 1)
        self.assertIn("2 differ: grad.h.0.ln_1.bias, grad.wte.weight\n", output)

    def test_missing_tensor(self) -> None:
        for name in dump():
            other = dump()
            del other[name]
            self.check_differs(other, dump(), name, why="not in ")

    def test_other_shape(self) -> None:
        other = dump()
        other["logits"] = other["logits"].reshape(6, 9)
        self.check_differs(other, dump(), "logits")
        # Broadcasting in numpy must not make them agree.
        other["logits"], ones = np.ones((1, 9), np.float32), {**dump(), "logits": np.ones((2, 9), np.float32)}
        self.check_differs(other, ones, "logits")

    def test_integers_are_equal_or_not(self) -> None:
        other = dump()
        other["input_ids"][0, 0] += 1
        self.check_differs(other, dump(), "input_ids", "--rtol", "1e9", "--atol", "1e9")
        other["input_ids"] = dump()["input_ids"].astype(np.float32)
        self.check_differs(other, dump(), "input_ids")

    def test_bad_usage(self) -> None:
        good = str(self.folder / "good.safetensors")
        save_file(dump(), good)
        self.check_refused([], "arguments are required")
        self.check_refused([good, good, "--no-such-flag"], "--no-such-flag")
        for value in ["x", "-1", "nan", "inf"]:
            self.check_refused([good, good, f"--rtol={value}"], "--rtol")

    def test_bad_files(self) -> None:
        good, bad = str(self.folder / "good.safetensors"), str(self.folder / "bad.safetensors")
        save_file(dump(), good)
        self.check_refused([good, bad], bad)
        whole = Path(good).read_bytes()
        for content in [b"", b"not safetensors", whole[:len(whole) // 2], whole[:40]]:
            Path(bad).write_bytes(content)
            self.check_refused([good, bad], bad)
            self.check_refused([bad, good], bad)
        save_file({}, bad)
        self.check_refused([good, bad], "holds no tensors")
        self.check_refused([good, str(self.folder)], str(self.folder))


if __name__ == "__main__":
    unittest.main()
