"""Collects the measurements of dev/gpu_check.sh so far in one JSON file and one Markdown file.

    python dev/bench/gpu_report.py WORK OUT

WORK has stages.tsv (name, outcome, seconds, reason), a log of each stage, and the JSON files of the stages.
"""
import json
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path



def table(header: list[str], rows: list[list[object]]) -> list[str]:
    def line(cells: list[object]) -> str:
        return f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |"
    return [line(header), "|---" + "|--:" * (len(header) - 1) + "|", *map(line, rows), ""]


def number(value: float | None, digits: int = 3) -> str | None:
    """Three significant digits, without an exponent."""
    if value is None:
        return None
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def stage_lines(stages: list[dict]) -> list[str]:
    rows = [[stage["name"], stage["outcome"], stage["seconds"], stage.get("reason")] for stage in stages]
    return ["## Stages", "", *table(["stage", "outcome", "s", ""], rows)]


def layer_lines(layers: dict) -> list[str]:
    rows = []
    for x in layers["layers"]:
        if "error" in x:
            rows.append([x["layer"], x["error"]])
            continue
        rows.append([x["layer"], number(x["ms"]), number(x["bytes"] / 1e6),
                     number(x["operations"] / 1e9) if x["operations"] else None, number(x["gb_s"]),
                     number(x["tflop_s"]) if x["operations"] else None, percent(x["share_of_copy"]),
                     percent(x["share_of_product"]) if x["operations"] else None])
    return [f"## Layers, {layers['dtype']}, {layers['batch']} x {layers['seq']}, C={layers['channels']}", "",
            f"Ceilings: a copy {layers['copy_gb_s']:,.0f} GB/s, a large cuBLASLt product "
            f"{layers['product_tflop_s']:,.0f} TFLOP/s.", "",
            *table(["layer", "ms", "MB", "GFLOP", "GB/s", "TFLOP/s", "of copy", "of product"], rows)]


def training_lines(training: dict, peak: float | None) -> list[str]:
    rows = []
    for x in training["rows"]:
        if "error" in x:
            rows.append([x["program"], x["attention"], x["error"]])
            continue
        agree = {True: "yes", False: "NO", None: None}[x.get("losses_agree")]
        rows.append([x["program"], x["attention"], number(x["ms"]), number(x["tokens_per_second"]),
                     number(x["tflop_s"]), percent(x["tflop_s"] / peak) if peak else None,
                     number(x["gpu_mib"]), f"{x['ratio']:.2f}" if "ratio" in x else None, agree])
    sizes = f"{training['model']}, {training['dtype']}, {training['batch']} x {training['seq']}"
    return [f"## Training, {sizes}", "",
            *table(["program", "attention", "ms a step", "tokens/s", "TFLOP/s", "of product", "GPU MiB",
                    "its time to the trainer's", "losses agree"], rows)]


def attention_lines(attention: dict | None, sdpa: dict | None) -> list[str]:
    cells: dict[str, dict[int, dict]] = {}
    for x in attention["attention"] if attention else []:
        cells.setdefault(f"{x['attention']} {x['kernel']}", {})[x["T"]] = {
            "forward": x["forward"].get("ms"), "backward": x["backward"].get("ms")}
    for x in sdpa["rows"] if sdpa else []:
        cells.setdefault(f"PyTorch SDPA {x['backend']}", {})[x["T"]] = {
            "forward": x.get("forward_ms"), "backward": x.get("backward_ms")}
    lengths = sorted({T for by_length in cells.values() for T in by_length})
    lines = ["## Attention alone, ms", ""]
    for what in ("forward", "backward"):
        rows = [[name, *(number(by_length.get(T, {}).get(what)) for T in lengths)]
                for name, by_length in cells.items()]
        lines += table([what, *(f"T={T:,}" for T in lengths)], rows)
    return lines


def curve_lines(curves: dict[str, dict]) -> list[str]:
    rows = [[name.removeprefix("curve_"), x["steps"], f"{x['largest_difference']:.1e}", f"{x['rtol']:g}",
             *(f"{loss:.4f}" for loss in x["last_losses"])] for name, x in curves.items()]
    return ["## Losses compared with the CPU trainer's in fp32", "",
            *table(["", "steps", "largest difference", "allowed", "CPU's last", "GPU's last"], rows)]


def markdown(results: dict) -> str:
    lines = ["# GPU check", "", *(f"- {key}: {value}" for key, value in results["machine"].items()), "",
             *stage_lines(results["stages"])]
    layers = results.get("layers")
    if training := results.get("training"):
        lines += training_lines(training, layers and layers["product_tflop_s"])
    if results.get("attention") or results.get("sdpa"):
        lines += attention_lines(results.get("attention"), results.get("sdpa"))
    if layers:
        lines += layer_lines(layers)
    curves = {name: x for name, x in results.items() if name.startswith("curve_") and x}
    if curves:
        lines += curve_lines(curves)
    return "\n".join(lines)


def output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def describe_machine() -> dict[str, str]:
    """Leaves out what is not known."""
    names = {"name": "card", "driver_version": "driver", "memory.total": "memory",
             "power.limit": "power limit", "clocks.max.sm": "highest clock",
             "compute_cap": "compute capability"}
    card = output("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader").split("\n")[0]
    nvcc = output("nvcc", "--version") or output("/usr/local/cuda/bin/nvcc", "--version")
    nvcc = re.search(r"release ([\d.]+)", nvcc)
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = ""
    machine = dict(zip(names.values(), card.split(", "))) if card else {"card": "none: the simulator"}
    machine |= {"nvcc": nvcc[1] if nvcc else "", "compiler": output("g++", "--version").split("\n")[0],
                "PyTorch": torch, "Python": platform.python_version(), "processor": cpu[1] if cpu else "",
                "system": platform.platform(), "commit": output("git", "describe", "--always", "--dirty"),
                "date": output("date", "-u", "+%Y-%m-%d %H:%M")}
    return {key: value for key, value in machine.items() if value}


def last_words(log: Path) -> str:
    """Why a stage failed: the tests that failed, or the last line about an error, or the last line."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    lines = [line.strip() for line in lines if line.strip()] or ["no output"]
    if tests := dict.fromkeys(line for line in lines if line.startswith("TEST CASE:")):
        names = ", ".join(test.removeprefix("TEST CASE:").strip() for test in tests)
        reason = f"{len(tests)} tests: {names}"
    else:
        errors = [line for line in lines if re.search("error|failed", line, re.IGNORECASE)]
        reason = (errors or lines)[-1]
    return reason[:300].replace("|", "/")


def collect(work: Path) -> dict:
    results = {"machine": describe_machine(), "stages": []}
    for line in (work / "stages.tsv").read_text().splitlines():
        name, outcome, seconds, reason = line.split("\t")
        stage = {"name": name, "outcome": outcome, "seconds": int(seconds)}
        if outcome.startswith("failed"):
            reason = last_words(work / f"{name}.log")
        results["stages"].append(stage | ({"reason": reason} if reason else {}))
    for path in sorted(work.glob("*.json")):
        try:
            results[path.stem] = json.loads(path.read_text())
        except json.JSONDecodeError:  # its stage was stopped while it wrote the file
            results[path.stem] = None
    return results


def report(work: Path, out: Path) -> None:
    results = collect(work)
    (out / "gpu_check.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "gpu_check.md").write_text(markdown(results) + "\n")


if __name__ == "__main__":
    report(*map(Path, sys.argv[1:]))
