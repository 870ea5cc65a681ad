#!/usr/bin/env python3
"""Prints how much of the kernels' PTX has run, by the figures of dev/ptxsim (PTXSIM=figures=FILE.json).

    LLMC_THOROUGH=1 PTXSIM=figures=build/figures.json build/ptxsim/tests -tc="cuda*,the CUDA*,attention on*" \\
        -tce="cuda figures*"
    dev/ptxsim/coverage.py build/figures.json

All instances of a kernel count together. The least covered kernels come first. --lines adds the source lines of the
instructions that never ran, and how many there are in each.
"""
import argparse
import collections
import json
import re
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures")
    parser.add_argument("--lines", action="store_true")
    args = parser.parse_args()
    try:
        with open(args.figures, encoding="utf-8") as file:
            kernels = json.load(file)["kernels"]
    except (OSError, ValueError, KeyError) as error:
        print(f"coverage: {args.figures}: {error}: expected figures of dev/ptxsim", file=sys.stderr)
        return 1
    families = collections.defaultdict(list)
    for kernel in kernels:
        families[re.sub(r"<.*", "", kernel["name"])].append(kernel)

    def count(instances, key):
        return sum(kernel[key] for kernel in instances)

    def covered(instances):
        return count(instances, "executed") / max(count(instances, "instructions"), 1)

    print("covered  instructions  instances  kernel")
    for name, instances in sorted(families.items(), key=lambda item: covered(item[1])):
        print(f"{covered(instances):7.1%} {count(instances, 'instructions'):13} {len(instances):10}  {name}")
        if args.lines:
            missed = collections.Counter()
            for kernel in instances:
                missed.update(kernel["not_executed"])
            for line, instructions in missed.most_common():
                print(f"{instructions:20}               {line}")
    print(f"{covered(kernels):7.1%} {count(kernels, 'instructions'):13} {len(kernels):10}  all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
