"""Time how soon the scripts answer --help, typos and what else the flags alone tell: best of so many processes.

    python tests/benchmarks/answers.py

What it should be: 0.3 s for --help and typos, 0.5 s for any other problem of the flags. That nothing slow is imported
before is what the tests hold.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TRAINER, INFER = "train_sd1-5_naruto.py", "infer.py"
CASES = [  # script, flags, exit code, seconds allowed
    (TRAINER, "--help", 0, 0.3),
    (TRAINER, "--learing_rate 1", 2, 0.3),
    (INFER, "--help", 0, 0.3),
    (INFER, "--promt x", 2, 0.3),
    (TRAINER, "--pretrained_model_name_or_path ./none", 2, 0.5),
    (TRAINER, "--train_batch_size 0 --mixed_precision bf8 --resolution 100", 2, 0.5),
    (TRAINER, "--resume_from_checkpoint checkpoint-2", 2, 0.5),
    (INFER, "--model_path ./none", 2, 0.5),
]


def seconds(script, flags, code):
    """Return how long a script takes to answer, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        answer = subprocess.run(
            [sys.executable, str(ROOT / script), *flags.split()], cwd=folder, capture_output=True, check=False
        )
        end = time.perf_counter()
    if answer.returncode != code:
        sys.exit(f"{script} {flags}: exit code {answer.returncode} instead of {code}\n{answer.stderr.decode()}")
    return end - start


def main():
    """Print a line for each case; exit with code 1 if one took longer than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=5, help="for each answer")
    options, late = parser.parse_args(), 0
    for script, flags, code, allowed in CASES:
        best = min(seconds(script, flags, code) for _ in range(options.processes))
        late += best > allowed
        print(f"{best:.2f} s of {allowed} s: {script} {flags}")
    sys.exit(1 if late else 0)


if __name__ == "__main__":
    main()
