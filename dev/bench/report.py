"""Makes what the benchmark writes: the rows of the table, and the Markdown."""
from statistics import geometric_mean, median

import curve
import ranks
from cases import Case
from programs import COMPARED_STEPS, COMPILED, EAGER, LLMC, TRAINER, Run, largest_loss_difference

SHORT = {TRAINER: "train_gpt ms", EAGER: "PyTorch ms", COMPILED: "compiled ms", LLMC: "llm.c ms"}


def summarise(case: Case, runs: list[Run]) -> dict:
    """The numbers of a row, except its floor."""
    ms, mib = {}, {}
    for program in dict.fromkeys(run.program for run in runs):
        mine = [run for run in runs if run.program == program]
        ms[program] = median(value for run in mine for value in run.ms)
        mib[program] = median(run.peak_mib for run in mine)
    better = min((program for program in (EAGER, COMPILED) if program in ms), key=ms.get)
    difference = largest_loss_difference(runs)
    return {"ms": ms, "peak_mib": mib, "better": better, "ratio": ms[better] / ms[TRAINER],
            "operations": case.operations(), "loss_difference": difference,
            "losses_agree": difference <= case.loss_rtol}


def share_of_floor(row: dict, gflops: dict[str, float]) -> float:
    floor_ms = row["summary"]["operations"] / gflops[row["case"]["dtype"]] / 1e6
    return floor_ms / row["summary"]["ms"][TRAINER]


def table_line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def step_table(rows: list[dict], gflops: dict[str, float]) -> list[str]:
    programs = [p for p in SHORT if any(p in row["summary"]["ms"] for row in rows)]
    header = ["model", "dtype", "attention", *(SHORT[p] for p in programs), "ratio", "MiB", "PyTorch MiB",
              "of the floor"]
    lines = [table_line(header), "|---|---|---" + "|--:" * (len(header) - 3) + "|"]
    for row in rows:
        case, s = row["case"], row["summary"]
        ratio = f"{s['ratio']:.2f}" if s["losses_agree"] else "losses differ"
        lines.append(table_line([
            row["shape"], case["dtype"], row["kind"],
            *(f"{s['ms'][p]:.4g}" if p in s["ms"] else "" for p in programs), ratio,
            f"{s['peak_mib'][TRAINER]:.0f}", f"{s['peak_mib'][s['better']]:.0f}",
            f"{100 * share_of_floor(row, gflops):.0f}%"]))
    return lines


def attention_table(times: dict[str, dict[int, float]]) -> list[str]:
    lengths = sorted(next(iter(times.values())))
    lines = [table_line(["ms", *(f"T={T:,}" for T in lengths)]), "|---" + "|--:" * len(lengths) + "|"]
    return lines + [table_line([name, *(f"{by_length[T]:.4g}" for T in lengths)])
                    for name, by_length in times.items()]


def mean_ratio(rows: list[dict]) -> float | None:
    ratios = [row["summary"]["ratio"] for row in rows if row["summary"]["losses_agree"]]
    return geometric_mean(ratios) if ratios else None


def markdown(machine: dict, gflops: dict[str, float], rows: list[dict],
             attention: dict[str, dict[int, float]], of_ranks: list[dict], failures: list[str]) -> str:
    lines = ["# Benchmark", "", *(f"- {key}: {value}" for key, value in machine.items()),
             *(f"- a matrix product of 2048^3 by oneDNN, {dtype}: {rate:.0f} GFLOP/s"
               for dtype, rate in gflops.items()), ""]
    if rows:
        worst = {dtype: max((row["summary"]["loss_difference"] for row in rows
                             if row["case"]["dtype"] == dtype), default=None) for dtype in gflops}
        agree = ", ".join(f"{value:.0e} in {dtype}" for dtype, value in worst.items() if value is not None)
        mean = mean_ratio(rows)
        lines += [
            "## A training step", "", *step_table(rows, gflops), "",
            f"Geometric mean of the ratios: **{f'{mean:.2f}' if mean else 'none'}**.", "",
            "Times are medians over all steps of all rounds, after the warm-up; the programs took turns. The "
            "ratio is the time of the faster of PyTorch eager and compiled, divided by that of train_gpt, "
            "with the same weights, batch and dtype (bf16: autocast). Memory is the peak of the whole "
            "process with its libraries, for train_gpt and for the faster PyTorch. The floor is the time of "
            f"the step's matrix products at the rate above. The losses of all programs agree, in each of the first "
            f"{COMPARED_STEPS} steps, to {agree}.", ""]
        lines += [f"{row['name']}: PyTorch compiled does not work here: {row['absent']}\n"
                  for row in rows if row["absent"]]
    if attention:
        crossings = "; ".join(f"{c['attention']} with D={c['head_size']}: {c['T']}"
                              for c in curve.crossings(attention))
        lines += [f"## Attention alone, {curve.DTYPE}, forward and backward", "", "![](attention.png)", "",
                  *attention_table(attention), "",
                  f"T from which linear takes less time than tiled: {crossings}.", ""]
    if of_ranks:
        lines += ranks.markdown(of_ranks)
    lines += [f"FAILED: {failure}\n" for failure in failures]
    return "\n".join(lines)
