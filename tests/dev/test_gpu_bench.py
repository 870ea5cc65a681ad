"""dev/bench/cuda_layers.cu on the simulator, and the scripts that make a report of its measurements. The measured
values are not tested, because on the simulator they mean nothing."""
import json
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAYERS = ROOT / "build" / "cuda_layers_sim"
sys.path.insert(0, str(ROOT / "dev" / "bench"))
import gpu_report  # noqa: E402
import losses  # noqa: E402

NAMES = re.search(r"kAttentionNames\[\] = {(.*?)}", (ROOT / "llmc" / "activation.h").read_text(), re.DOTALL)[1]
ATTENTION = re.findall(r'"(\w+)"', NAMES)


class Folder(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)


@unittest.skipUnless(LAYERS.exists(), "build/cuda_layers_sim has not been built: there is no nvcc")
class LayersTest(Folder):
    def measure(self, *flags: str) -> dict:
        file = self.folder / "layers.json"
        done = subprocess.run([LAYERS, "--quick", "--json", file, *flags], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr), (0, ""))  # the simulator has reported nothing
        return json.loads(file.read_text())

    def test_layers(self) -> None:
        for dtype in ("bf16", "fp32"):
            results = self.measure("--dtype", dtype)
            self.assertEqual(results["dtype"], dtype)
            self.assertGreater(results["copy_gb_s"], 0)
            self.assertGreater(results["product_tflop_s"], 0)
            names = [layer["layer"] for layer in results["layers"]]
            self.assertEqual(len(names), len(set(names)))
            for part in ("embedding", "layernorm", "qk-norm and RoPE", "short conv", "output gate", "matmul qkv", "GELU",
                         *(f"attention {name}" for name in ATTENTION)):
                for direction in ("forward", "backward"):
                    self.assertTrue(any(name.startswith(part) and name.endswith(direction) for name in names),
                                    f"{part} {direction}")
            for layer in results["layers"]:
                self.assertGreater(layer["ms"], 0)
                self.assertGreater(layer["bytes"], 0)

    def test_attention_against_length(self) -> None:
        results = self.measure("--attention-only", "--lengths", "16,65")
        rows = [(row["T"], row["B"], row["attention"]) for row in results["attention"]
                if row["kernel"] == "tiled"]
        self.assertEqual(rows, [(T, B, name) for T, B in ((16, 4), (65, 1)) for name in ATTENTION])
        self.assertFalse(results["layers"])
        for row in results["attention"]:
            self.assertEqual(row["backward"]["operations"], 2.5 * row["forward"]["operations"])

    def test_bad_usage(self) -> None:
        for flags in (["--dtype", "fp64"], ["--batch", "0"], ["--no-such-flag"]):
            done = subprocess.run([LAYERS, *flags], capture_output=True, text=True)
            self.assertEqual(done.returncode, 2)
            self.assertEqual(done.stderr.count("\n"), 1)


class LossesTest(unittest.TestCase):
    def test_difference(self) -> None:
        self.assertEqual(losses.difference({1: 2.0, 2: 4.0}, {1: 2.0, 2: 4.0}), 0)
        self.assertAlmostEqual(losses.difference({1: 2.0, 2: 4.0}, {1: 2.0, 2: 3.0}), 0.25)
        for other in ({1: 2.0}, {1: 2.0, 3: 4.0}, {1: float("nan"), 2: 4.0}, {}):
            self.assertEqual(losses.difference(other, {1: 2.0, 2: 4.0}), float("inf"))


class ReportTest(Folder):
    def test_whatever_there_is(self) -> None:
        """A stage that failed leaves no file, half a file or a file with errors. The other stages are still shown."""
        def write(name: str, content: str) -> None:
            (self.folder / name).write_text(content)

        write("stages.tsv", "build\tok\t90\t\ntests\tfailed (1)\t5\t\nsdpa\tskipped\t0\tno torch\n")
        write("tests.log", "one\nTEST: cuda gelu\nCUDA error: | out of memory\nlast line\n")
        write("training.json", '{"rows": [')
        write("curve_poly3_fp32.json", json.dumps({"steps": 200, "largest_difference": 2e-5,
                                                   "rtol": 1e-3, "last_losses": [2.5, 2.50001]}))
        layer = {"layer": "GELU forward", "ms": 0.5, "bytes": 1e9, "operations": 0, "gb_s": 2000,
                 "tflop_s": 0, "share_of_copy": 0.8, "share_of_product": 0}
        write("layers.json", json.dumps({"dtype": "bf16", "batch": 16, "seq": 1024, "channels": 768,
                                         "copy_gb_s": 2500, "product_tflop_s": 700,
                                         "layers": [layer, {"layer": "fc", "error": "no algorithm"}]}))
        out = self.folder / "out"
        out.mkdir()
        gpu_report.report(self.folder, out)
        results = json.loads((out / "gpu_check.json").read_text())
        self.assertEqual([stage["outcome"] for stage in results["stages"]], ["ok", "failed (1)", "skipped"])
        text = (out / "gpu_check.md").read_text()
        for line in ("| tests | failed (1) | 5 | CUDA error: / out of memory |",
                     "| sdpa | skipped | 0 | no torch |",
                     "| GELU forward | 0.5 | 1,000 |  | 2,000 |  | 80% |  |", "| fc | no algorithm |",
                     "| poly3_fp32 | 200 | 2.0e-05 | 0.001 | 2.5000 | 2.5000 |"):
            self.assertIn(line, text)


if __name__ == "__main__":
    unittest.main()
