"""Train 12 steps in each of ten configurations, and print digests of everything that came of it.

    python tests/digests.py > new.txt                 # this checkout
    python tests/digests.py path/to/old > old.txt     # the scripts of another one
    diff old.txt new.txt

Two commits that train alike, bit for bit, print the same lines on the same machine: a refactoring must. On another
machine, or with another release of PyTorch, both may print others.
"""

import argparse
import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIGURATIONS = {
    "plain": "",
    "everything drawn": "--use_ema --random_flip --caption_dropout=0.3 --lr_scheduler=cosine --lr_warmup_steps=3",
    "min-SNR": "--snr_gamma=5 --noise_offset=0.1 --input_perturbation=0.1 --use_ema",
    "v-prediction": "--prediction_type=v_prediction --snr_gamma=5",
    "DREAM": "--dream_training --dream_detail_preservation=2",
    "cached": "--use_ema --center_crop --random_flip --cache_latents=on",
    "bf16": "--use_ema --mixed_precision=bf16 --gradient_checkpointing --micro_batch_size=auto",
    "8-bit": "--use_8bit_adam --use_ema",
    "low memory": "--low_memory --use_ema --center_crop",
    "validated": "--use_ema --validation_samples=3 --validation_epochs=1",
    "two processes": "--use_ema --train_batch_size=1 --random_flip",
}
COLUMNS = ("weights", "average", "moments", "metrics", "pictures", "export")


def main():
    """Print a line for each configuration: its name, and a digest for each of `COLUMNS`."""
    parser = argparse.ArgumentParser(description="Print digests of what short trainings give.")
    root = Path(__file__).parent.parent
    parser.add_argument("root", nargs="?", type=Path, default=root, help="the checkout whose trainer is run")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, metavar="NAME", help="some configurations")
    args = parser.parse_args()
    sys.path[:0] = [str(root), str(root / "tests")]
    import tiny_sd15  # noqa: PLC0415 (found through the line above)

    print(f"{'':18}" + "".join(f"{column:14}" for column in COLUMNS), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        with contextlib.redirect_stdout(sys.stderr):
            model, photos = tiny_sd15.build(scratch)
        for name in args.only or CONFIGURATIONS:
            output = Path(scratch, name.replace(" ", "-"))
            train(args.root.resolve(), name, model, photos, output)
            print(f"{name:18}" + "".join(f"{digest[:12]:14}" for digest in digests(output)).rstrip(), flush=True)


def train(root, name, model, photos, output):
    """Run the trainer of the checkout `root` in a process of its own, or in two."""
    flags = [f"--pretrained_model_name_or_path={model}", f"--train_data_dir={photos}", f"--output_dir={output}"]
    flags += ["--resolution=64", "--seed=7", "--train_batch_size=2", "--gradient_accumulation_steps=2"]
    flags += ["--max_train_steps=12", "--checkpointing_steps=12", "--lr_warmup_steps=0", "--report_to=tensorboard"]
    flags += ["--validation_prompts", *(["a cat", "a rocket"] if name == "validated" else [])]
    python = [sys.executable]
    if name == "two processes":
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # torchao would compile its optimizer for every shape of a tensor, which takes many minutes on a CPU.
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    environment |= {"HF_HOME": f"{output}-cache", "ACCELERATE_USE_CPU": "true"}
    command = [*python, str(root / "train_sd1-5_naruto.py"), *flags, *CONFIGURATIONS[name].split()]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def digests(output):
    """Yield the digest of each of `COLUMNS`, for a folder that a run has left."""
    import torchao.optim  # noqa: F401, PLC0415 (makes its 8-bit moments known to `load`; slow, like the others here)
    from PIL import Image  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415
    from torch import load  # noqa: PLC0415

    def tensors(folder):
        return {str(file.relative_to(folder)): load_file(file) for file in folder.rglob("*.safetensors")}

    checkpoint = output / "checkpoint-12"
    yield digest(tensors(checkpoint / "unet"))
    yield digest(tensors(checkpoint / "unet_ema"))
    yield digest(load(checkpoint / "optimizer.pt", weights_only=True))
    yield digest(logged_metrics(output / "logs"))
    pictures = {file.relative_to(output).as_posix(): Image.open(file) for file in output.glob("samples/*/*.png")}
    yield digest({name: picture.tobytes() for name, picture in pictures.items()})
    parts = [
        part for part in output.iterdir() if part.is_dir() and not part.name.startswith((".", "checkpoint", "encoded"))
    ]
    yield digest({part.name: tensors(part) for part in parts})


def logged_metrics(logs):
    """Return what a run logged, but for its speed: {name: {step: value}}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    metrics = {}
    for file in logs.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        for name in set(events.Tags()["scalars"]) - {"train/images_per_sec"}:
            metrics.setdefault(name, {}).update({event.step: event.value for event in events.Scalars(name)})
    return metrics


def digest(value):
    """Return a SHA-256 of tensors, bytes and numbers, nested in dictionaries."""
    hashed = hashlib.sha256()
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            hashed.update(f"{key}:{digest(value[key])};".encode())
    elif hasattr(value, "__tensor_flatten__"):  # torchao's 8-bit moments: codes, scales, and a table
        return digest({name: getattr(value, name) for name in value.__tensor_flatten__()[0]})
    elif hasattr(value, "numpy"):
        hashed.update(f"{value.dtype}{tuple(value.shape)}".encode() + value.detach().float().numpy().tobytes())
    else:
        hashed.update(value if isinstance(value, bytes) else repr(value).encode())
    return hashed.hexdigest()


if __name__ == "__main__":
    main()
