"""dev/experiments: studies are read, what is missing is run (by a program that only looks like train_gpt), and
reported."""
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "dev/experiments"))
import report  # noqa: E402
import run  # noqa: E402
import study  # noqa: E402

GRID = """
question: Which?
data: [plays, code]
flags: {layers: 2, qk-norm: true}
try: {lr: [1.0e-3, 2.0e-3, 4.0e-3]}
seeds: [5, 6]
rows:
  - {name: short, context: 8}
  - {name: long, context: 16, only: [softmax]}
columns:
  - {name: softmax, attention: softmax}
  - {name: cubic, attention: poly3}
show: [loss, attention_norm]
plot: {kind: rows}
"""

# Its loss is best at lr 2e-3 with the first seed, at 1e-3 with the other, and much worse at 4e-3. It is smaller for
# poly3. At context 16 and lr 4e-3 it diverges.
FAKE = '''#!{python} -SE
import json, sys
from pathlib import Path
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
if flags["--context"] == "8" and flags["--seed"] == "7":
    sys.exit("train_gpt: error: no memory")
assert flags["--threads"] == "1" and flags["--qk-norm"] == "true"
lr = float(flags["--lr"])
loss = 3 + {{1e-3: 0.04, 2e-3: 0, 4e-3: 0.2}}[lr] + int(flags["--seed"]) / 100
loss += 0.3 * (lr == 2e-3 and flags["--seed"] == "6") - 0.5 * (flags["--attention"] == "poly3")
out = Path(flags["--out"])
out.mkdir()
diverges = flags["--context"] == "16" and lr == 4e-3
def head(step, number, norm, jacobian):
    return {{"step": step, "layer": 0, "head": number, "attention_norm": norm, "jacobian_norm": jacobian}}
lines = [{{"step": 1, "loss": 7, "ms": 250}}, head(1, 0, 0.5, None), {{"step": 2, "loss": 6, "ms": 750}},
         head(2, 0, 1.5, 2), head(2, 1, 0.5, 4)]
if not diverges:
    lines.append({{"step": 2, "val_loss": loss}})
out.joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
print("model      2 layers: 1234 parameters")
sys.exit(3 * diverges)
'''


class ExperimentsTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.grid = self.folder / "grid.yaml"
        self.grid.write_text(GRID)
        self.results = study.Results(self.folder / "results.jsonl")
        self.program = self.folder / "train_gpt"
        self.program.write_text(FAKE.format(python=sys.executable))
        self.program.chmod(0o755)
        for name in "plays", "code":
            (self.folder / name).mkdir()
            (self.folder / name / "meta.json").write_text('{"source": "a test"}')

    def train(self, jobs: int = 2) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            run.train([study.read_study(self.grid)], self.results, str(self.program), self.folder, jobs)
        return output.getvalue()

    def test_the_best_mean_counts_and_what_is_much_worse_is_given_up(self) -> None:
        printed = self.train()
        # 3 cells x 2 datasets x (3 tries with the first seed + 2 with the other)
        self.assertEqual(len(printed.splitlines()), 30)
        all_results = self.results.runs.values()
        self.assertEqual({result["flags"]["lr"] for result in all_results if result["flags"]["seed"] == 6},
                         {1e-3, 2e-3})
        found = study.read_study(self.grid).cells[0].found(self.results)
        self.assertEqual([result["loss"] for result in found], [3.09, 3.1])
        self.assertEqual(found[0]["curve"], [[2, 1.0, 3.09]])
        self.assertEqual(found[0]["ms"], 500)
        self.assertEqual(found[0]["parameters"], 1234)
        self.assertEqual(found[0]["norms"]["first"]["attention_norm"], 0.5)
        self.assertEqual(found[0]["norms"]["last"]["attention_norm"], 1)
        self.assertIsNone(found[0]["norms"]["first"]["jacobian_norm"])
        diverged = [result["flags"] for result in all_results if result["loss"] is None]
        self.assertEqual([(flags["lr"], flags["context"]) for flags in diverged], [(4e-3, 16)] * 2)

    def test_what_is_there_is_not_run_again(self) -> None:
        self.train()
        lines = self.results.path.read_text().splitlines(keepends=True)
        self.results.path.write_text("".join(lines[1:]))
        self.results = study.Results(self.results.path)
        self.assertEqual(len(self.train().splitlines()), 1)
        self.assertEqual(set(study.Results(self.results.path).runs),
                         {study.key_of(json.loads(line)) for line in lines})

    def test_half_a_cell_is_no_result(self) -> None:
        """The other seed of the rate that is better by the first seed alone is missing."""
        self.train()
        cell = study.read_study(self.grid).cells[0]
        del self.results.runs[study.key_of(cell.run({"lr": 2e-3}, 6))]
        self.assertEqual(cell.found(self.results), [])

    def test_every_study_has_a_place_on_the_page(self) -> None:
        page = (ROOT / "docs/evidence.md").read_text()
        self.assertEqual(re.findall("(?m)^<!-- end of (.*) -->$", page), re.findall("(?m)^<!-- ([a-z]*) -->$", page))
        self.assertEqual(sorted(re.findall("(?m)^<!-- ([a-z]*) -->$", page)), study.study_names())

    def test_a_failed_run_is_named_and_is_no_result(self) -> None:
        self.grid.write_text(GRID.replace("[5, 6]", "[7]"))
        with self.assertRaisesRegex(study.StudyError, "--seed 7.*\nended with status 1: train_gpt: error: no memory"):
            self.train(jobs=1)
        self.assertFalse(self.results.path.exists())

    def test_stopped(self) -> None:
        """No training goes on alone after a signal."""
        started = self.folder / "started"
        self.program.write_text(f"#!/bin/sh\necho $$ >> {started}\nexec sleep 60\n")
        for name in "shakespeare", "stdlib":
            (self.folder / name).mkdir()
            (self.folder / name / "meta.json").write_text('{"source": "a test"}')
        with subprocess.Popen([sys.executable, ROOT / "dev/experiments/run.py", "ladder", "--jobs", "2",
                               "--train-gpt", self.program, "--data", self.folder, "--results",
                               self.folder / "none.jsonl"]) as running:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and not (started.exists() and len(started.read_text().split()) == 2):
                time.sleep(0.02)
            trainings = [int(line) for line in started.read_text().split()]
            running.terminate()
            self.assertEqual(running.wait(30), 130)
        self.assertEqual(len(trainings), 2)
        for training in trainings:
            with self.assertRaises(ProcessLookupError):
                os.kill(training, 0)

    def test_report(self) -> None:
        self.train()
        page = self.folder / "evidence.md"
        page.write_text("before\n<!-- grid -->\nold\n<!-- end of grid -->\nafter\n")
        here, report.HERE = report.HERE, self.folder
        self.addCleanup(setattr, report, "HERE", here)
        arguments = ["grid", "--results", str(self.results.path), "--docs", str(self.folder)]
        with contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(report.main(arguments), 0)
        text = page.read_text()
        self.assertTrue(text.startswith("before\n<!-- grid -->\nplays: validation loss, mean and standard deviation "
                                        "of 2 seeds; in brackets the best --lr\n\n| | softmax | cubic |\n"))
        self.assertTrue(text.endswith("<!-- end of grid -->\nafter\n"))
        self.assertNotIn("old", text)
        self.assertIn("| short | 3.095 ± 0.007 (0.001) | 2.595 ± 0.007 (0.001) |", text)
        self.assertIn("| long | 3.095 ± 0.007 (0.001) |  |", text)
        self.assertIn("| short | 1.000 ± 0.000 | 1.000 ± 0.000 |", text)
        self.assertTrue((self.folder / "evidence/grid.png").read_bytes().startswith(b"\x89PNG"))
        page.write_text("nothing\n")
        with contextlib.redirect_stderr(io.StringIO()) as error:
            self.assertEqual(report.main(arguments), 1)
        self.assertIn("expected one place for grid", error.getvalue())

    def test_optimum(self) -> None:
        self.assertAlmostEqual(report.best_x([(4, 0.25), (2, 0.25), (1, 2.25), (8, 2.25)]), 2 ** 1.5)
        self.assertIsNone(report.best_x([(1, 3), (2, 2), (4, 1)]))
        self.grid.write_text("""
data: [plays]
seeds: [1]
rows: [{name: a, context: 4}, {name: b, context: 16}, {name: c, context: 64}]
columns: [{name: x1, scale: 1}, {name: x2, scale: 2}, {name: x4, scale: 4}, {name: x8, scale: 8}]
plot: {kind: lines, x: scale, optimum_against: context}
""")
        grid, results = study.read_study(self.grid), study.Results(self.results.path)
        best = {4: 4, 16: 2, 64: 8}
        for cell in grid.cells:
            loss = 3 + abs(cell.flags["scale"].bit_length() - best[cell.flags["context"]].bit_length())
            loss -= 0.96 * (cell.flags["scale"] == 4 and cell.flags["context"] == 16)  # nearly as good as the best
            results.add(cell.run({}, 1) | {"loss": loss})
        self.assertEqual(report.optima(grid, results).splitlines(), [
            "| context | best scale | largest scale within 0.05 of the best loss |", "|--:|--:|--:|",
            "| 4 | 4 | 4 |", "| 16 | 2.75 | 4 |", "| 64 | at an end of the range | 8 |",
            "| power law | context^-0.27 | context^0.25 |"])

    def test_wrong_files_are_named(self) -> None:
        for old, new, message in [("question: Which?", "quest: Which?", "unknown keys quest"),
                                  ("name: short, ", "", "needs a name"),
                                  ("only: [softmax]", "only: [soft]", "no column is named soft"),
                                  ("data: [plays, code]", "", "no runs"),
                                  ("lr: [1.0e-3, 2.0e-3, 4.0e-3]", "lr: [1], beta1: [2]", "2 flags"),
                                  (GRID, "a: [", "not YAML"), (GRID, "3", "keys")]:
            with self.subTest(message):
                self.grid.write_text(GRID.replace(old, new))
                with self.assertRaisesRegex(study.StudyError, f"{re.escape(str(self.grid))}.*{message}"):
                    study.read_study(self.grid)
        self.results.path.write_text('{"data": "plays"}\n')
        with self.assertRaisesRegex(study.StudyError, "results.jsonl:1"):
            study.Results(self.results.path)

    def test_committed_studies_use_flags_that_exist(self) -> None:
        options = (ROOT / "docs/options.md").read_text()
        flags = set(re.findall(r"^\| `--([a-z0-9-]+)", options, flags=re.MULTILINE))
        datasets = study.read_yaml(study.HERE / "datasets.yaml")
        studies = [study.read_study(path) for path in study.HERE.glob("*.yaml") if path.stem != "datasets"]
        self.assertGreater(len(studies), 3)
        for each in studies:
            with self.subTest(each.name):
                for cell in each.cells:
                    self.assertLessEqual(cell.run(cell.tried[0], 1)["flags"].keys(), flags)
                    self.assertIn(cell.data, datasets)


if __name__ == "__main__":
    unittest.main()
