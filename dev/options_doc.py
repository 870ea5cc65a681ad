"""Writes docs/options.md from what `train_gpt COMMAND --help` prints: python3 dev/options_doc.py PROGRAM FILE

`make docs` calls it; tests/dev/test_docs.py compares the file with the program.
"""
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

INTRODUCTION = """\
# Options

`make docs` writes this file from `train_gpt COMMAND --help`; please do not edit it. `train_gptcu` has the same options,
but its default of `train --dtype` is `bf16`.

A checkpoint has the options of its run, so `train --out DIR --resume` needs no others. `train_gpt --version` prints the
version of the program and how it was built.
"""
COMMANDS = "train", "generate", "eval", "dump"


class Option(NamedTuple):
    flag: str
    values: str
    default: str
    text: str


def help_of(program: str, command: str) -> str:
    return subprocess.run([program, command, "--help"], check=True, capture_output=True, text=True).stdout


def parse(help_text: str) -> tuple[str, dict[str, list[Option]]]:
    """Returns the first line, and the options by group. The layout depends on the version of CLI11: the
    description follows the option on the same line, on the next lines, or both."""
    lines = help_text.splitlines()
    entries: list[tuple[str, str]] = []  # group, the whole text of an option
    group = ""
    for line in lines[1:]:
        if header := re.fullmatch(r"(\w[\w ]*):", line.rstrip()):
            group = header[1].capitalize()
        elif re.match(r" {2,12}-", line):
            entries.append((group, line.strip()))
        elif entries and line.startswith("    "):
            entries[-1] = group, f"{entries[-1][1]}  {line.strip()}"
    groups: dict[str, list[Option]] = {}
    for group, entry in entries:
        if "--help" not in entry:
            groups.setdefault(group, []).append(option(entry))
    return lines[0].strip(), groups


ENTRY = re.compile(r"(?P<flag>--[\w-]+)"
                   r"(?: \[(?P<optional>[A-Z]+)\]| (?P<type>[A-Z]+)(?::(?P<choices>[^ =]+))?)?"
                   r"(?:=(?P<default>\S+)| \[(?P<bracketed>[^]]*)\])?"
                   r"(?P<required> REQUIRED)?"
                   r"(?P<notes>(?: (?:Needs|Excludes):(?: --[\w-]+)+)*)"
                   r"(?: {1,}(?P<text>.*))?")


def option(entry: str) -> Option:
    found = ENTRY.fullmatch(entry)
    if not found:
        raise SystemExit(f"options_doc.py: cannot read this line of the help: {entry}")
    if found["choices"]:
        values = ", ".join(c if c.isupper() else f"`{c}`" for c in found["choices"].split("|"))
    elif found["optional"]:
        values = f"[{found['optional']}]"
    else:
        values = found["type"] or ""
    default = found["default"] or found["bracketed"]
    default = f"`{default}`" if default else "required" if found["required"] else ""
    text = re.sub(r"[|*<]", r"\\\g<0>", " ".join((found["text"] or "").split()))
    for word, flags in re.findall(r"(Needs|Excludes):((?: --[\w-]+)+)", found["notes"]):
        flags = ", ".join(f"`{flag}`" for flag in flags.split())
        text += f" ({'only with' if word == 'Needs' else 'not with'} {flags})"
    return Option(f"`{found['flag']}`", values, default, text)


def document(program: str) -> str:
    out = INTRODUCTION
    for command in COMMANDS:
        summary, groups = parse(help_of(program, command))
        out += f"\n## {command}\n\n{summary[0].upper()}{summary[1:]}.\n"
        for group, options in groups.items():
            if len(groups) > 1:
                out += f"\n### {command}: {group}\n"
            out += "\n| | value | default | |\n|---|---|---|---|\n"
            out += "".join("|" + "".join(f" {cell} |" if cell else " |" for cell in o) + "\n" for o in options)
    return out


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    Path(sys.argv[2]).write_text(document(sys.argv[1]), encoding="utf-8")
