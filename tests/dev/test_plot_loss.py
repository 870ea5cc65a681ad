"""dev/plot_loss.py: draws runs, also those that are still running, and refuses files that it cannot read."""
import contextlib
import io
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "dev"))
import plot_loss  # noqa: E402


class PlotLossTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.run_folder = Path(folder.name)
        self.metrics = self.run_folder / "metrics.jsonl"
        self.metrics.write_text('{"step":1,"loss":3.5}\n{"step":1,"val_loss":3.25}\n{"step":2,"loss":3}\n'
                                '{"step":2,"layer":0,"gradient_norm":0.5}\n')

    def test_drawn(self) -> None:
        picture = self.run_folder / "loss.png"
        with contextlib.redirect_stdout(io.StringIO()) as output:
            plot_loss.main([str(self.run_folder), "--out", str(picture)])
        self.assertEqual(output.getvalue(), f"wrote {picture}\n")
        self.assertTrue(picture.read_bytes().startswith(b"\x89PNG"))

    def test_a_half_written_last_line_is_left_out(self) -> None:
        whole = self.metrics.read_bytes()
        # The last line of a run that is still running, and what a power cut may leave.
        for last in b'{"step":3,"lo', b'{"step":3,"loss":2.', b"\0" * 20:
            self.metrics.write_bytes(whole + last)
            self.assertEqual(plot_loss.read_losses(str(self.run_folder)),
                             {"loss": [(1, 3.5), (2, 3)], "val_loss": [(1, 3.25)]})

    def test_refused(self) -> None:
        for number, content in [(2, b'{"step":1,"loss":2}\n{"step":2,"lo\n'), (1, b"[1]\n"), (1, b"\xff\n"),
                                (1, b'{"step":1,"loss":null}\n'), (1, b'{"loss":1}\n')]:
            with self.subTest(content=content):
                self.metrics.write_bytes(content)
                with self.assertRaises(SystemExit) as stopped:
                    plot_loss.read_losses(str(self.run_folder))
                self.assertTrue(stopped.exception.code.startswith(f"plot_loss: {self.metrics}:{number}: "))
        self.metrics.unlink()
        with self.assertRaisesRegex(SystemExit, "metrics.jsonl: No such file or directory"):
            plot_loss.read_losses(str(self.run_folder))


if __name__ == "__main__":
    unittest.main()
