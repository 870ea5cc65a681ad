"""dev/plot_norms.py: draws runs of every kind, predicts as llmc/norms.h does, and refuses files that it cannot read."""
import contextlib
import io
import json
import math
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "dev"))
import plot_norms  # noqa: E402

CONFIG = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "attention": "poly3",
          "attention_scale": "row", "decay": "none"}


def norm_lines(scores: dict | None = None) -> list[dict]:
    lines = [{"step": 1, "loss": 3.5}]
    for step in [0, 10, 20]:
        for layer in range(2):
            for head in range(2):
                line = {"step": step, "layer": layer, "head": head, "attention_norm": 0.5 + step * (head + 1),
                        "jacobian_norm": 0.25 + step, "effective_keys": 5.0 + layer}
                lines.append(line | {"score_std": 1.0} | (scores or {"moment_excess": step - 0.5}))
            lines.append({"step": step, "layer": layer, "gradient_norm": 0.5})
    return lines


class PlotNormsTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def make_run(self, name: str, lines: list, config: dict | str | None = CONFIG, seq: int = 32) -> str:
        """Makes a run. Lines or a config that are strings are written unchanged."""
        def text(value) -> str:
            return value if isinstance(value, str) else json.dumps(value)
        run = self.folder / name
        run.mkdir()
        (run / "metrics.jsonl").write_text("".join(text(line) + "\n" for line in lines))
        if config is not None:
            for step, content in [(10, "not read, for it is not the newest"), (20, text(config))]:
                checkpoint = run / f"step_{step:08}"
                checkpoint.mkdir()
                (checkpoint / "config.json").write_text(content)
                (checkpoint / "trainer.json").write_text(json.dumps({"options": {"--seq": seq}}))
        return str(run)

    def check_drawn(self, *runs: str) -> None:
        picture = self.folder / "norms.png"
        with contextlib.redirect_stdout(io.StringIO()) as output:
            self.assertEqual(plot_norms.main([*runs, "--out", str(picture)]), 0)
        self.assertEqual(output.getvalue(), f"wrote {picture}\n")
        self.assertTrue(picture.read_bytes().startswith(b"\x89PNG"))
        self.assertGreater(picture.stat().st_size, 10000)
        picture.unlink()

    def check_refused(self, arguments: list[str], *parts: str) -> None:
        with contextlib.redirect_stderr(io.StringIO()) as output, self.assertRaises(SystemExit) as stopped:
            plot_norms.main(arguments)
        self.assertEqual(stopped.exception.code, 2)
        self.assertEqual(output.getvalue().count("\n"), 1)
        for part in parts:
            self.assertIn(part, output.getvalue())

    def test_softmax_beside_a_polynomial(self) -> None:
        softmax = self.make_run("softmax", norm_lines({"entropy": 1.5}), CONFIG | {"attention": "softmax"})
        self.check_drawn(softmax, self.make_run("cubic", norm_lines()))

    def test_sigmoid(self) -> None:
        lines = [{key: line[key] for key in line if key != "moment_excess"} for line in norm_lines()]
        folder = self.make_run("run", lines, CONFIG | {"attention": "sigmoid"})
        self.check_drawn(folder)
        run = plot_norms.read_run(folder)
        self.assertEqual((run.label, run.scores, run.predicted), ("run: sigmoid", "score_std", []))

    def test_some_blocks_have_softmax(self) -> None:
        lines = [line | {"entropy": 1.5} if line.get("layer") == 1 else line for line in norm_lines()]
        for line in lines:
            if "entropy" in line:
                line.pop("moment_excess", None)
        folder = self.make_run("run", lines, CONFIG | {"softmax_every": 2})
        self.check_drawn(folder)
        run = plot_norms.read_run(folder)
        self.assertEqual((run.label, run.scores), ("run: poly3, scale row, softmax every 2 blocks", "moment_excess"))
        self.assertEqual(len(run.predicted), 1)
        self.assertEqual(plot_norms.predictions(CONFIG | {"softmax_every": 1}, 32), [])

    def test_what_a_run_may_lack(self) -> None:
        self.check_drawn(self.make_run("no checkpoint yet", norm_lines(), None))
        self.check_drawn(self.make_run("$\\frac$", norm_lines()[:2]))  # one line; the name is not a formula
        nulls = [line | {"attention_norm": None, "moment_excess": None} if "head" in line else line
                 for line in norm_lines()]
        self.check_drawn(self.make_run("nulls", nulls))

    def test_a_half_written_last_line_is_left_out(self) -> None:
        run = self.make_run("live", norm_lines())
        with open(Path(run) / "metrics.jsonl", "a") as metrics:
            metrics.write('{"step":30,"layer":0,"head":0,"attention_no')
        self.assertEqual([step for step, _ in plot_norms.read_run(run).heads[0, 0]], [0, 10, 20])

    def test_label_and_newest_checkpoint(self) -> None:
        config = CONFIG | {"attention": "poly2", "attention_scale": "mean", "decay": "fixed"}
        run = plot_norms.read_run(self.make_run("run", norm_lines(), config))
        self.assertEqual(run.label, "run: poly2, scale mean, fixed decay")
        self.assertEqual(len(run.predicted), 2)
        self.assertEqual(sorted(run.heads), [(0, 0), (0, 1), (1, 0), (1, 1)])
        self.assertEqual([step for step, _ in run.heads[0, 1]], [0, 10, 20])
        self.assertEqual(sorted(run.layers), [(0,), (1,)])
        # A config.json without our keys is GPT-2's.
        plain = plot_norms.read_run(self.make_run("gpt2", norm_lines({"entropy": 1.5}), {"n_positions": 64}))
        self.assertEqual((plain.label, plain.scores, plain.predicted), ("gpt2: softmax", "entropy", []))

    def test_predictions(self) -> None:
        def predicted(T: int = 32, **changes) -> list[tuple[float, float]]:
            return plot_norms.predictions(CONFIG | changes, T)
        D, T = 16, 32
        m = [1, 1, 3 * (1 + 2 / D), 15 * (1 + 2 / D) * (1 + 4 / D)]
        harmonic = sum(1 / i for i in range(1, T + 1)) / T
        gamma = 1 / (1 + math.exp(-1))  # the decay of the first head
        for expected, changes in [
                ((1, 3 * math.sqrt(m[2] / m[3])), {}),
                ((1, 2 * math.sqrt(m[1] / m[2])), {"attention": "poly2", "decay": "learned"}),
                ((1, 2 * math.sqrt(m[1] / m[2])), {"attention": "poly2", "decay": "gate"}),
                ((math.sqrt(harmonic), math.sqrt(harmonic)),
                 {"attention": "poly1", "attention_scale": "mean"}),
                ((math.sqrt(m[3] * 16.5 / 64), 3 * math.sqrt(m[2] * 16.5 / 64)),
                 {"attention_scale": "context"}),
                ((0.5 * math.sqrt(m[3] * 16.5), 1.5 * math.sqrt(m[2] * 16.5)), {"attention_scale": "-0.5"}),
                ((math.sqrt((2 + gamma ** 2) / 2), math.sqrt((2 + gamma ** 2) / 2)),
                 {"T": 2, "attention": "poly1", "attention_scale": "1", "decay": "fixed"})]:
            with self.subTest(**changes):
                for got, value in zip(predicted(**changes)[0], expected):
                    self.assertAlmostEqual(got, value, places=12)
        for changes in [{"attention": "softmax"}, {"attention": "sigmoid"}, {"attention_scale": "sum"},
                        {"attention_scale": "mean", "decay": "learned"},
                        {"attention_scale": "mean", "decay": "gate"}]:
            self.assertEqual(predicted(**changes), [])

    def test_bad_usage(self) -> None:
        self.check_refused([], "arguments are required")
        self.check_refused([self.make_run("run", norm_lines()), "--no-such-flag"], "--no-such-flag")

    def test_bad_metrics(self) -> None:
        missing = str(self.folder / "missing")
        self.check_refused([missing], f"{missing}/metrics.jsonl: No such file")
        without = self.make_run("without", [{"step": 1, "loss": 3.5}])
        self.check_refused([without], without, "no attention norms")
        for i, line in enumerate(['{"step": 3, "lay', "[1]", "", '{"step":0,"layer":0,"attention_norm":1}',
                                  '{"step":0,"layer":0,"head":"a","attention_norm":1}',
                                  '{"step":0,"layer":0,"head":0,"attention_norm":"1"}']):
            run = self.make_run(f"broken{i}", [*norm_lines(), line])
            self.check_refused([run], f"{run}/metrics.jsonl:{len(norm_lines()) + 1}: ")
        binary = self.make_run("binary", norm_lines())
        (Path(binary) / "metrics.jsonl").write_bytes(b"\xff\xfe\x00\n")
        self.check_refused([binary], f"{binary}/metrics.jsonl:1: expected a JSON object")

    def test_bad_config(self) -> None:
        for i, config in enumerate(["{", "[]", {"attention": "poly3"}, CONFIG | {"attention": "cubic"},
                                    CONFIG | {"attention_scale": "rows"}, CONFIG | {"n_head": 0}]):
            run = self.make_run(f"run{i}", norm_lines(), config)
            self.check_refused([run], f"{run}/step_00000020/config.json: ")

    def test_bad_picture(self) -> None:
        run = self.make_run("run", norm_lines())
        for picture in [str(self.folder / "no" / "such.png"), str(self.folder / "norms.xyz")]:
            self.check_refused([run, "--out", picture], picture)


if __name__ == "__main__":
    unittest.main()
