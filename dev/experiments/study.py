"""Reads the studies (NAME.yaml) and the results (results.jsonl) of this folder.

A study is a table. Each of its cells has the flags of `train_gpt train` that its row, its column and the whole
study give, and a dataset. A cell is trained with every value of `try` (usually the learning rate) and the first
seed, then with the other seeds, except for values that were much worse. The value with the best mean counts. The
keys of a NAME.yaml:

    question   what the study asks; the report prints it
    data       names of datasets, the keys of datasets.yaml; a row or column may have a `data` of its own
    flags      flags of all runs; a flag that takes no value has none here, either
    try        one flag and the values to try: {lr: [3.0e-3, 6.0e-3]}; a row may have its own
    seeds      the seeds, 1 to 3 if there is no such key
    rows       a list of {name: ..., FLAG: VALUE ...}; `only` lists the columns that a row has, if not all
    columns    the same
    show       what the report prints of a cell: loss, accuracy, ms, parameters or one of NORMS, which may end in " at the start"
    plot       see report.py
    jobs       runs at once, if not one for each core: 1 where the study is about time

A run is known by its dataset and flags, so studies share runs. Nobody notices here if the trainer changes: then
remove results.jsonl.
"""
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.jsonl"
# Means over all heads of numbers that llmc/norms.h explains.
NORMS = ("attention_norm", "jacobian_norm", "effective_keys", "mean_gate")
MUCH_WORSE = 0.05  # nats above the best loss of the first seed
KEYS = {"question", "data", "flags", "try", "seeds", "rows", "columns", "show", "plot", "jobs"}
NOT_FLAGS = {"name", "only", "data", "try"}


class StudyError(Exception):
    """A mistake in a file of this folder; the text names the file."""


def key_of(run: dict) -> str:
    """What tells runs apart: {"data": name, "flags": {flag: value}} as a text."""
    return json.dumps([run["data"], run["flags"]], sort_keys=True)


class Results:
    """results.jsonl: a line for each run that has ended."""

    def __init__(self, path: Path = RESULTS):
        self.path, self.runs = path, {}
        if not path.exists():
            return
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                result = json.loads(line)
                self.runs[key_of(result)] = result
            except (ValueError, KeyError, TypeError):
                raise StudyError(f"{path}:{number}: expected a result of run.py; without this line, it runs "
                                 "again") from None

    def get(self, run: dict) -> dict | None:
        return self.runs.get(key_of(run))

    def add(self, result: dict) -> None:
        self.runs[key_of(result)] = result
        with self.path.open("a") as file:
            file.write(json.dumps(result, sort_keys=True) + "\n")


def loss_of(result: dict) -> float:
    """The last validation loss; a run that has diverged is worse than all others."""
    return float("inf") if result["loss"] is None else result["loss"]


@dataclass
class Cell:
    row: str
    column: str
    data: str
    flags: dict
    tried: list[dict]  # the flags of each try
    seeds: list[int]

    def name(self) -> str:
        return f"{self.row} {self.column}".strip()

    def run(self, tried: dict, seed: int) -> dict:
        return {"data": self.data, "flags": self.flags | tried | {"seed": seed}}

    def of_try(self, tried: dict, results: Results) -> list[dict]:
        """Its results, one for each seed that has run."""
        runs = [results.get(self.run(tried, seed)) for seed in self.seeds]
        return [result for result in runs if result]

    def worth(self, results: Results) -> list[dict]:
        """The tries that go on to the other seeds; none while a run of the first seed is missing."""
        found = [results.get(self.run(tried, self.seeds[0])) for tried in self.tried]
        if None in found:
            return []
        limit = min(map(loss_of, found)) + MUCH_WORSE
        return [tried for tried, result in zip(self.tried, found) if loss_of(result) <= limit]

    def missing(self, results: Results) -> list[dict]:
        """The runs that can be started now."""
        worth = self.worth(results)
        runs = [self.run(tried, seed) for tried in worth or self.tried
                for seed in (self.seeds if worth else self.seeds[:1])]
        return [run for run in runs if results.get(run) is None]

    def best(self, results: Results) -> dict | None:
        """The try with the best mean loss; None while a run is missing, because half the runs may name another."""
        if self.missing(results):
            return None
        return min(self.worth(results), key=lambda tried: statistics.fmean(map(loss_of, self.of_try(tried, results))))

    def found(self, results: Results) -> list[dict]:
        """The results of the best try, one for each seed."""
        best = self.best(results)
        return [] if best is None else self.of_try(best, results)


@dataclass
class Study:
    name: str
    question: str
    cells: list[Cell]
    rows: list[dict]
    columns: list[dict]
    show: list[str]
    plot: dict
    jobs: int | None

    def missing(self, results: Results) -> Iterator[dict]:
        for cell in self.cells:
            yield from cell.missing(results)

    def tables(self) -> list[str | None]:
        """The dataset of each table. None: of a single table, whose rows or columns have datasets of their own."""
        if any("data" in entry for entry in self.rows + self.columns):
            return [None]
        return list(dict.fromkeys(cell.data for cell in self.cells))


def read_yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise StudyError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise StudyError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise StudyError(f"{path}: expected keys and values")
    return content


def read_study(path: Path) -> Study:
    content = read_yaml(path)
    if unknown := content.keys() - KEYS:
        raise StudyError(f"{path}: unknown keys {', '.join(sorted(map(str, unknown)))}; "
                         f"expected some of {', '.join(sorted(KEYS))}")
    rows, columns = (content.get(key) or [{"name": ""}] for key in ("rows", "columns"))
    for entry in rows + columns:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise StudyError(f"{path}: each row and column needs a name, a text: {entry}")
    for tries in [entry.get("try") or {} for entry in [content, *rows]]:
        if len(tries) > 1:
            raise StudyError(f"{path}: `try` has {len(tries)} flags, expected one")
    names = [column["name"] for column in columns]
    cells = []
    for row in rows:
        tries = row.get("try") or content.get("try") or {}
        tried = [{flag: value} for flag, values in tries.items() for value in values] or [{}]
        if unknown := set(row.get("only", [])) - set(names):
            raise StudyError(f"{path}: row {row['name']!r}: no column is named {', '.join(sorted(unknown))}")
        for column in columns:
            if column["name"] not in row.get("only", names):
                continue
            own = row.get("data") or column.get("data")
            flags = {flag: value for flag, value in ((content.get("flags") or {}) | row | column).items()
                     if flag not in NOT_FLAGS}
            for data in [own] if own else content.get("data") or []:
                cells.append(Cell(row["name"], column["name"], data, flags, tried,
                                  content.get("seeds") or [1, 2, 3]))
    if not cells:
        raise StudyError(f"{path}: no runs in it; expected rows or columns, and data")
    return Study(path.stem, " ".join((content.get("question") or "").split()), cells, rows, columns,
                 content.get("show") or ["loss"], content.get("plot") or {}, content.get("jobs"))


def exit_status(program: str, work: Callable[[], int]) -> int:
    """What `work` returns, or 1 after one line on stderr that says what was wrong with a file."""
    try:
        return work()
    except StudyError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}"
    print(f"{program}: {message}", file=sys.stderr)
    return 1


def study_names() -> list[str]:
    """All studies of this folder."""
    return sorted(path.stem for path in HERE.glob("*.yaml") if path.stem != "datasets")


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """The mean and the standard deviation of the values, which is 0 for a single one."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
