"""Run a Python script on the device: `PYTHONPATH=tests python -m cuda_stand_in train_sd1-5_naruto.py --flags`."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import cuda_stand_in

with tempfile.TemporaryDirectory() as folder:
    environment = os.environ | cuda_stand_in.build(Path(folder))
    sys.exit(subprocess.run([sys.executable, *sys.argv[1:]], env=environment, check=False).returncode)
