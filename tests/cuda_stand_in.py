"""A CUDA device that computes nothing, for what happens on a GPU where there is none.

    python tests/cuda_stand_in.py train_sd1-5_naruto.py ...    # builds it (5 seconds), and runs a script on it

PyTorch is the real one, so this tells whether the CUDA paths run: placement, dtypes, peak memory, what happens when
memory runs out, where the host waits for the device, how long the host takes for a step. It cannot tell values (all
read as 0), the time of kernels, cuDNN's workspaces (counted as 0), or the 0.5 GiB of a real context.
"""

import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "cuda_device"
PRELOADED, DRIVER = "libcuda_stand_in.so", "libcuda.so.1"


def unavailable():
    """Return why the device cannot be built here, or None."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the stand-in for CUDA needs Linux on x86-64"
    if not torch.version.cuda or not torch.version.cuda.startswith("13."):
        return f"the stand-in for CUDA needs PyTorch for CUDA 13, and this one is for {torch.version.cuda}"
    missing = [name for name in ("gcc", "g++") if shutil.which(name) is None]
    return f"the stand-in for CUDA needs {missing[0]}" if missing else None


def build(folder):
    """Build the device in a folder, and return the environment variables that have a new process use it."""
    packages = Path(torch.__file__).parent.parent
    triton = Path(importlib.util.find_spec("triton").origin).parent  # has what NVIDIA's package of the headers lacks
    headers = [f"-I{packages / 'nvidia/cu13/include'}", f"-I{triton / 'backends/nvidia/include'}"]
    functions, library = folder / "functions.o", folder / PRELOADED
    for command in (
        ["gcc", "-w", "-c", SOURCES / "functions.c", "-o", functions],
        ["g++", "-std=c++17", "-shared", *headers, SOURCES / "device.cpp", functions, "-o", library],
        ["gcc", "-shared", f"-Wl,-soname,{DRIVER},--no-as-needed", library, "-o", folder / DRIVER],
    ):
        subprocess.run([*map(str, command), "-O1", "-fPIC"], check=True)
    paths = {name: str(folder) for name in ("TRITON_LIBCUDA_PATH", "LIBRARY_PATH", "LD_LIBRARY_PATH")}
    return paths | {"LD_PRELOAD": str(library), "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def reset(total_bytes):
    """Give the device this much memory from now on, and forget all counts."""
    ctypes.CDLL(PRELOADED).stand_in_reset(ctypes.c_size_t(total_bytes))


def counts():
    """Return what the device was asked for since the last `reset`: a dictionary of numbers by their names."""
    library = ctypes.CDLL(PRELOADED)
    library.stand_in_counts.restype = ctypes.c_char_p
    lines = library.stand_in_counts().decode().splitlines()
    return {name: int(number) for name, number in (line.split("\t") for line in lines)}


if __name__ == "__main__":
    if unavailable() or not sys.argv[1:]:
        sys.exit(unavailable() or __doc__)
    print("On a stand-in for CUDA, which computes nothing: do not use what this leaves.", file=sys.stderr)
    with tempfile.TemporaryDirectory() as target:
        environment = os.environ | build(Path(target))
        sys.exit(subprocess.run([sys.executable, *sys.argv[1:]], env=environment, check=False).returncode)
