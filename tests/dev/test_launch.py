"""dev/launch: the model of step time agrees with published runs, and the scripts start what they say."""
import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "dev/launch"))
import step_time  # noqa: E402
from step_time import GPUS, MODELS  # noqa: E402


class StepTimeTest(unittest.TestCase):
    def step(self, model: str, gpu: str, gpus: int, total: int, batch: int, zero: int, **more) -> step_time.Step:
        return step_time.step_time(MODELS[model], GPUS[gpu], gpus, total, batch, zero, **more)

    def test_the_published_runs_of_llm_c(self) -> None:
        for model, gpu, total, batch, published in [("124M", "a100", 1 << 19, 64, 0.300),
                                                    ("1558M", "h100", 1 << 20, 16, 2.80),
                                                    ("124M", "h100", 1 << 19, 64, 45 * 60 / (10e9 / (1 << 19)))]:
            step = self.step(model, gpu, 8, total, batch, 1, gradient_bytes=2)
            self.assertLess(abs(step.seconds / published - 1), 0.08, (model, gpu, step))

    def test_the_sizes_of_gpt2(self) -> None:
        self.assertEqual([m.parameters for m in MODELS.values()], [124439808, 354823168, 774030080, 1557611200])

    def test_what_sharding_saves(self) -> None:
        model = MODELS["124M"]
        N, buffers = model.parameters, model.embedding_parameters + 2 * model.block_parameters / model.layers
        for zero, state in enumerate([18 * N, 6 * N + 12 * N / 8, 2 * N + 16 * N / 8 + 4 * buffers]):
            self.assertAlmostEqual(self.step("124M", "h100", 8, 1 << 19, 64, zero).state / state, 1)

    def test_one_gpu_does_not_communicate(self) -> None:
        for zero in 0, 1, 2:
            step = self.step("124M", "h100", 1, 1 << 16, 64, zero)
            self.assertEqual((step.exposed, step.hidden), (0, 0))

    def test_more_gpus_are_faster_until_latency_counts(self) -> None:
        times = [self.step("1558M", "h100", n, 1 << 22, 1, 0).seconds for n in (8, 64, 512)]
        self.assertEqual(times, sorted(times, reverse=True))
        self.assertGreater(self.step("124M", "h100", 1024, 1 << 20, 1, 1).exposed,
                           self.step("124M", "h100", 1024, 1 << 20, 1, 0).exposed)

    def test_the_table_and_bad_values(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            step_time.main(["--gpus", "8", "--total-batch", "524288"])
        self.assertEqual(len(output.getvalue().splitlines()), 5)
        for arguments, message in [(["--gpus", "1024", "--total-batch", "524288"], "expected a multiple of 1024 GPUs"),
                                   (["--gpus", "0"], "expected positive numbers")]:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error, \
                    self.assertRaises(SystemExit) as stopped:
                step_time.main(arguments)
            self.assertIn(message, f"{stopped.exception.code} {error.getvalue()}")


class ScriptsTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def dry_run(self, script: str, *arguments: str, **environment: str) -> str:
        return subprocess.run([ROOT / "dev/launch" / script, *arguments], text=True, capture_output=True, check=True,
                              env={**os.environ, "OMP_NUM_THREADS": "", "DRY_RUN": "1", **environment}).stdout

    def test_one_node(self) -> None:
        self.assertEqual(self.dry_run("one_node.sh", "--out", "o", "--threads", "1", RANKS="3", PROGRAM="./p"),
                         "exec mpirun -n 3 --bind-to none ./p train --out o --threads 1\n")
        self.assertRegex(self.dry_run("one_node.sh", RANKS="1"), rf"train --threads {len(os.sched_getaffinity(0))}\n")

    def test_ssh(self) -> None:
        line = self.dry_run("ssh.sh", "--out", "o", HOSTS="a b", RANKS_PER_HOST="4")
        self.assertIn("mpirun --host a:4,b:4 -n 8 ", line)
        self.assertIn(" -x MASTER_ADDR=a -x MASTER_PORT=29500 ./train_gpt train --out o\n", line)
        environment = {name: value for name, value in os.environ.items() if name != "HOSTS"}
        failed = subprocess.run([ROOT / "dev/launch/ssh.sh"], text=True, capture_output=True, env=environment)
        self.assertEqual(failed.returncode, 1)
        self.assertIn("expected names of machines", failed.stderr)

    def slurm(self, srun: str, signal_after_start: bool) -> tuple[int, str]:
        """Runs the batch script with a srun and a scontrol of our own. Returns the status and what they have logged."""
        log = self.folder / "log"
        for name, body in [("srun", f'echo srun "$@" >>"{log}"\n{srun}'), ("scontrol", f'echo scontrol "$@" >>"{log}"')]:
            (self.folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (self.folder / name).chmod(0o755)
        path = f"{self.folder}:{os.environ['PATH']}"
        script = subprocess.Popen([ROOT / "dev/launch/slurm.sbatch", "--out", "o"], stdout=subprocess.DEVNULL,
                                  env={**os.environ, "PATH": path, "SLURM_JOB_ID": "77"})
        if signal_after_start:
            while not log.exists() or "ready" not in log.read_text():
                time.sleep(0.01)
            script.send_signal(signal.SIGTERM)
        return script.wait(20), log.read_text()

    def test_slurm_requeues_at_the_time_limit(self) -> None:
        log = self.folder / "log"
        stop = f'echo saved >>"{log}"; sleep 0.1; exit 130'  # what the ranks do when SIGTERM comes
        status, text = self.slurm(f"trap '{stop}' TERM; echo ready >>\"{log}\"; while :; do sleep 0.02; done", True)
        self.assertEqual(status, 0)
        self.assertEqual(text.splitlines(), ["srun --mpi=pmix --kill-on-bad-exit=1 ./train_gpt train --resume --out o",
                                             "ready", "saved", "scontrol requeue 77"])

    def test_slurm_does_not_requeue_otherwise(self) -> None:
        for expected in 0, 3, 130:  # 130 without the signal: the user has stopped the run
            (self.folder / "log").unlink(missing_ok=True)
            status, text = self.slurm(f"exit {expected}", False)
            self.assertEqual(status, expected)
            self.assertNotIn("scontrol", text)
        (self.folder / "log").unlink()
        status, text = self.slurm(f"trap 'exit 1' TERM; echo ready >>\"{self.folder}/log\"; "
                                  "while :; do sleep 0.02; done", True)
        self.assertEqual(status, 1)  # the ranks have failed instead of stopping
        self.assertNotIn("scontrol", text)


if __name__ == "__main__":
    unittest.main()
