"""Compares registers and spills of the CUDA trainer's kernels with the table in tests/golden/cuda_resources.txt."""
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests/golden/cuda_resources.txt"
OBJECTS = [ROOT / "build/ptx" / name  # in the Makefile's order
           for name in ("attention.o", "gated.o", "linear.o", "cached.o", "state.o", "norms.o", "train_gpt.o")]


def check(table: Path, objects: list[Path]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "dev/ptxsim/resources.py", "--check", table, *objects],
                          capture_output=True, text=True, check=False)


@unittest.skipUnless(all(path.exists() for path in OBJECTS), "the CUDA trainer is not built: there is no nvcc")
class Resources(unittest.TestCase):
    def test_no_kernel_takes_more_than_the_table_says(self):
        result = check(TABLE, OBJECTS)
        print(result.stdout, end="")
        self.assertEqual(result.returncode, 0, result.stderr + "\nmake resources writes the table anew")

    def test_a_kernel_that_takes_more_is_found(self):
        lines = TABLE.read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if "clip_factor" in line)
        registers, rest = lines[at].split(maxsplit=1)
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder) / "table.txt"
            # Changes the table as if the kernel had been different and had taken fewer registers.
            fields = rest.split()
            lines[at] = f"{int(registers) - 1} {fields[0]} {fields[1]} 0 {' '.join(fields[3:])}"
            table.write_text("\n".join(lines) + "\n")
            result = check(table, OBJECTS[-1:])
        if "not compared" in result.stdout:
            self.skipTest(result.stdout)
        self.assertEqual(result.returncode, 1)
        self.assertIn("clip_factor", result.stderr)
        self.assertIn("sm_80", result.stderr)


if __name__ == "__main__":
    unittest.main()
