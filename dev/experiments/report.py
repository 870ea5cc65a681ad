"""Writes the tables and plots of the studies from results.jsonl: tables into docs/evidence.md, between the
comments `<!-- NAME -->` and `<!-- end of NAME -->`, plots to docs/evidence/NAME.png. A cell is empty until all of
its runs have ended.

    python dev/experiments/report.py [STUDY ...]

`plot` in a study's file is {kind: lines, x: FLAG} (a line for each row, over the columns' values of that flag),
{kind: rows} (a line for each column, over the rows), {kind: curves} (loss against the steps times the median time
of a step) or {kind: norms} (loss against the norm of attention). With {optimum_against: FLAG} beside x, there is
also a table of each row's best x and of its largest good one, and of their power laws in that flag of the rows.
"""
import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from study import (HERE, NORMS, RESULTS, Cell, Results, Study, StudyError, exit_status, mean_and_spread,
                   read_study, study_names)

DOCS = HERE.parent.parent / "docs"
TITLES = {"loss": "validation loss", "accuracy": "right answers", "ms": "ms a step", "parameters": "parameters",
          "attention_norm": "norm of A / sqrt(N)", "jacobian_norm": "norm of the Jacobian / sqrt(N)",
          "effective_keys": "effective number of keys", "mean_gate": "mean gate"}


GOOD = 0.05  # nats above the best loss of a row


def title_of(what: str) -> str:
    name, at_start, _ = what.partition(" at the start")
    return TITLES[name] + at_start


def value_of(result: dict, what: str) -> float | None:
    name, at_start, _ = what.partition(" at the start")
    if name in NORMS:
        return result["norms"].get("first" if at_start else "last", {}).get(name)
    return result[what]


def values_of(cell: Cell, results: Results, what: str) -> list[float] | None:
    """One value a seed; None where a run has diverged."""
    values = [value_of(result, what) for result in cell.found(results)]
    return None if None in values else values


def text_of(cell: Cell, results: Results, what: str) -> str:
    found = cell.found(results)
    if not found:
        return ""
    values = values_of(cell, results, what)
    if values is None:
        return "diverged" if any(result["loss"] is None for result in found) else "–"
    mean, spread = mean_and_spread(values)
    if what == "parameters":
        return f"{mean:,.0f}"
    if what == "ms":
        return f"{mean:.1f}"
    return f"{mean:.3f}" + (f" ± {spread:.3f}" if len(values) > 1 else "")


def best_try(cell: Cell, results: Results) -> str:
    best = cell.best(results)
    return "" if not best else f"{next(iter(best.values())):g}"


def tables(study: Study, results: Results) -> str:
    """A table for each dataset and each value that the study shows."""
    tried = next(iter(study.cells[0].tried[0]), "")
    parts = []
    for data in study.tables():
        cells = {(cell.row, cell.column): cell for cell in study.cells if data in (None, cell.data)}
        for what in study.show:
            seeds = {len(cell.found(results)) for cell in cells.values()}
            note = f", mean and standard deviation of {max(seeds)} seeds" if max(seeds) > 1 else ""
            if what == "loss" and tried:
                note += f"; in brackets the best --{tried}"
            lines = [f"{data + ': ' if data else ''}{title_of(what)}{note}", "",
                     "| | " + " | ".join(column["name"] for column in study.columns) + " |",
                     "|---|" + "--:|" * len(study.columns)]
            for row in study.rows:
                texts = []
                for column in study.columns:
                    cell = cells.get((row["name"], column["name"]))
                    text = text_of(cell, results, what) if cell else ""
                    if text and tried and what == "loss":
                        text += f" ({best_try(cell, results)})"
                    texts.append(text)
                lines.append(f"| {row['name']} | " + " | ".join(texts) + " |")
            parts.append("\n".join(lines))
    if "optimum_against" in study.plot:
        parts.append(optima(study, results))
    return "\n\n".join(parts)


def best_x(points: list[tuple[float, float]]) -> float | None:
    """Where the loss is smallest: the vertex of the parabola in log x through the best of the points (x, loss) and
    its two neighbours. None if the best is the first or the last."""
    points = sorted(points)
    best = min(range(len(points)), key=lambda i: points[i][1])
    if best in (0, len(points) - 1):
        return None
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(x), y) for x, y in points[best - 1:best + 2])
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    return math.exp((x0 + x1) / 2 - left * (x2 - x0) / 2 / (right - left))


def optima(study: Study, results: Results) -> str:
    """The table of each row's best x, and of its largest one with a good loss, with the exponents of the power laws
    that fit these best."""
    x, against = study.plot["x"], study.plot["optimum_against"]
    points, fits = {}, ([], [])
    lines = [f"| {against} | best {x} | largest {x} within {GOOD} of the best loss |", "|--:|--:|--:|"]
    for cell in study.cells:
        losses = values_of(cell, results, "loss") if cell.found(results) else None
        if losses:
            points.setdefault(cell.flags[against], []).append((cell.flags[x], statistics.fmean(losses)))
    for value, found in points.items():
        limit = min(loss for _, loss in found) + GOOD
        answers = best_x(found), max(place for place, loss in found if loss <= limit)
        lines.append(f"| {value} | " + " | ".join(f"{answer:.3g}" if answer else "at an end of the range"
                                                  for answer in answers) + " |")
        for fit, answer in zip(fits, answers):
            fit += [(math.log(value), math.log(answer))] if answer else []
    laws = [statistics.linear_regression(*zip(*fit))[0] if len(fit) > 1 else None for fit in fits]
    lines.append("| power law | " + " | ".join("" if law is None else f"{against}^{law:.2f}" for law in laws) + " |")
    return "\n".join(lines)


def draw(study: Study, results: Results, path: Path) -> bool:
    """Draws the study's plot, a panel for each dataset. Returns whether there was anything to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kind, what = study.plot["kind"], study.plot.get("y", study.show[0])
    panels = study.tables()
    figure, grid = plt.subplots(1, len(panels), figsize=(1 + 5.5 * len(panels), 4.6), layout="constrained",
                                squeeze=False)
    drawn = False
    for data, axes in zip(panels, grid[0]):
        cells = [cell for cell in study.cells if data in (None, cell.data) and values_of(cell, results, what)]
        cells = [cell for cell in cells if all(result["loss"] for result in cell.found(results))]
        if kind in ("lines", "rows"):
            entries, names = (study.rows, "row") if kind == "lines" else (study.columns, "column")
            for i, entry in enumerate(entries):
                points = []
                for cell in cells:
                    if getattr(cell, names) != entry["name"]:
                        continue
                    place = float(cell.flags[study.plot["x"]]) if kind == "lines" else \
                        [row["name"] for row in study.rows].index(cell.row)
                    points.append((place, *mean_and_spread(values_of(cell, results, what))))
                if points:
                    x, y, spread = zip(*sorted(points))
                    axes.errorbar(x, y, spread, marker="o", markersize=4, capsize=3, color=f"C{i}",
                                  label=entry["name"])
            if kind == "rows":
                axes.set_xticks(range(len(study.rows)), [row["name"] for row in study.rows], rotation=35, ha="right")
            else:
                axes.set_xscale("log", base=2)
                axes.set_xlabel("--" + study.plot["x"])
        for i, cell in enumerate(cells if kind == "curves" else []):
            found = cell.found(results)[0]
            steps, _, losses = zip(*[point for point in found["curve"] if point[0] > 0])
            seconds = [step * found["ms"] / 1000 for step in steps]
            axes.plot(seconds, losses, marker="o", markersize=3, color=f"C{i % 10}", label=cell.name())
            axes.set_xlabel("seconds of training")
        for i, cell in enumerate(cells if kind == "norms" else []):
            norm, _ = mean_and_spread(values_of(cell, results, "attention_norm"))
            axes.errorbar(norm, *mean_and_spread(values_of(cell, results, what)), marker="o", color=f"C{i % 10}",
                          label=cell.name())
            axes.set_xscale("log", base=2)
            axes.set_xlabel(TITLES["attention_norm"])
        axes.set_ylabel(title_of(what))
        axes.set_title(data or "")
        axes.grid(alpha=0.3)
        if cells:
            drawn = True
            axes.legend(fontsize=8)
    if drawn:
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=120)
    plt.close(figure)
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="default: all studies of this folder")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE",
                        help="default: results.jsonl of this folder")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR",
                        help="folder of evidence.md (default: docs)")
    args = parser.parse_args(argv)
    page = args.docs / "evidence.md"

    def work() -> int:
        results = Results(args.results)
        studies = [read_study(HERE / f"{name}.yaml") for name in args.studies or study_names()]
        text = page.read_text()
        for study in studies:
            begin, end = f"<!-- {study.name} -->\n", f"<!-- end of {study.name} -->"
            if text.count(begin) != 1 or text.count(end) != 1:
                raise StudyError(f"{page}: expected one place for {study.name}, between {begin.strip()} and {end}")
            before, after = text.split(begin)
            text = before + begin + tables(study, results) + "\n\n" + end + after.split(end)[1]
        for study in studies:
            picture = args.docs / "evidence" / f"{study.name}.png"
            if study.plot and draw(study, results, picture):
                print(f"wrote {picture}")
        part = page.with_suffix(".tmp")
        part.write_text(text)
        part.replace(page)  # so that the page is never half written
        print(f"wrote {page}")
        return 0

    return exit_status("report.py", work)


if __name__ == "__main__":
    sys.exit(main())
