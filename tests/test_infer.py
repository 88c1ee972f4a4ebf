"""Pictures from prompts: what each flag changes, what is in the text of a PNG, and which flags are refused."""

import json
import os
import re
import shutil
import types
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

import infer
import sd_config
import tiny_sd15
from conftest import assert_says, only

PROMPT = "Lebron James with a hat"
SCHEDULERS = {
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
SHORT = ("--train_batch_size=2", "--max_train_steps=1", "--learning_rate=1e-3")


class Reached(BaseException):
    """Raised in place of loading a pipeline. (An `Exception` would be taken for a pipeline that cannot be loaded.)"""


@pytest.fixture
def draw(assets, tmp_path, monkeypatch):
    """A function that runs infer.py in this process, in an empty folder, and returns the pictures."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, model=assets[0], seed=5):
        flags = [
            *([] if model is None else [f"--model_path={model}"]),
            *([] if seed is None else [f"--seed={seed}"]),
            *("--num_inference_steps=2", "--device=cpu"),
            *map(str, flags),  # of a flag given twice the last one counts
        ]
        args = infer.parse_args(flags)
        infer.main(args)
        return [read(path) for path in args.outputs]

    return run


@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    """A function that runs infer.py, which must end with exit code 2, and returns the messages."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, load=False):
        with pytest.raises(SystemExit) as exit_info:
            args = infer.parse_args([*map(str, flags)])
            assert load, "parse_args should have refused"
            infer.main(args)
        assert exit_info.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        return [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]

    return run


@pytest.fixture
def plain(draw, kept_runs):
    """The picture that no flags but those of `draw` make. It is drawn once for all tests."""
    if "plain" not in kept_runs:
        kept_runs["plain"] = only(draw())
    return kept_runs["plain"]


@pytest.fixture
def checkpoint(train_once):
    """A function that returns the last checkpoint of a run with some flags, which must stay as it is."""
    return lambda *flags: sd_config.checkpoints(train_once(*SHORT, *flags).output)[-1]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another base model."""
    folder = tmp_path_factory.mktemp("other")
    tiny_sd15.build_model(folder, seed=1, merges=1000)
    return folder


def with_state(checkpoint, folder, **changes):
    """Copy a checkpoint to `folder`, with changes to its state."""
    shutil.copytree(checkpoint, folder)
    state = vars(sd_config.read_state(folder)) | changes
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    sd_config.write_manifest(folder)
    return folder


def read(path):
    """Read a picture: its pixels, its size, and its text."""
    with Image.open(path) as image:
        pixels, text = image.convert("RGB").tobytes(), infer.settings_of(image)
        return types.SimpleNamespace(path=path, pixels=pixels, size=image.size, text=text)


def reference(model, unet=None, **scheduler):
    """The pixels that diffusers itself draws at the settings of `draw`."""
    parts = {} if unet is None else {"unet": UNet2DConditionModel.from_pretrained(unet)}
    pipeline = StableDiffusionPipeline.from_pretrained(model, **parts)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **scheduler)
    generator = torch.Generator().manual_seed(5)
    return pipeline(PROMPT, generator=generator, num_inference_steps=2).images[0].tobytes()


def command(text):
    """The flags, according to the text of a PNG, that draw it again as again.png."""
    flags = dict(text)
    flags["scheduler"] = next(name for name, cls in SCHEDULERS.items() if cls == flags["scheduler"])
    return [*(f"--{name}={value}" for name, value in flags.items()), "--output=again.png"]


# The flags


def test_defaults_are_those_of_the_tutorial(assets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sd-naruto-model").symlink_to(assets[0])
    args = infer.parse_args([])
    assert (args.model_path, args.prompt, args.outputs) == ("./sd-naruto-model", [PROMPT], [Path("result.png")])
    assert (args.num_images, args.seed, args.num_inference_steps, args.guidance_scale) == (1, None, 50, 7.5)
    rest = ("checkpoint", "negative_prompt", "height", "width", "scheduler", "device", "dtype")
    assert {getattr(args, name) for name in rest} == {None}
    assert Path(sd_config.Parser("", sd_config.FLAGS).get_default("output_dir")) == Path(args.model_path)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("prompt", "a cup of coffee"),
        ("negative_prompt", "coffee"),
        ("seed", 6),
        ("num_inference_steps", 3),
        ("guidance_scale", 3.0),
        ("height", 72),
        ("width", 128),
        ("dtype", "bf16"),
    ],
)
def test_flag_changes_the_picture_and_is_in_its_text(draw, plain, flag, value):
    changed = only(draw(f"--{flag}={value}"))
    assert changed.pixels != plain.pixels
    assert changed.text == plain.text | {flag: value}
    assert changed.size == (changed.text["width"], changed.text["height"])


def test_model_path_chooses_the_model(draw, plain, assets, other):
    """The picture is the one that diffusers draws."""
    assert only(draw(model=other)).pixels == reference(other) != reference(assets[0]) == plain.pixels
    assert [plain.text[name] for name in ("model_path", "dtype", "device")] == [str(assets[0]), "fp32", "cpu"]


@pytest.mark.parametrize(("name", "used"), SCHEDULERS.items())
def test_every_scheduler_loads_and_is_in_the_text(draw, monkeypatch, name, used):
    """To save time, only one draws here, and two others in `test_picture_can_be_drawn_again_from_its_text`."""
    assert infer.SCHEDULERS.keys() == SCHEDULERS.keys()
    if name != "dpm++":
        monkeypatch.setattr(infer, "sample", lambda *args, **kwargs: Image.new("RGB", (64, 64)))
    assert only(draw(f"--scheduler={name}")).text["scheduler"] == used


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_latents_are_clipped_by_no_scheduler(assets, name):
    """Of which some clip unless told otherwise, with `--scheduler` or in a scheduler's file that says nothing of it."""
    args = infer.parse_args([f"--model_path={assets[0]}", f"--scheduler={name}"])
    pipeline = infer.open_pipeline(args, torch.float32)
    assert not pipeline.scheduler.config.clip_sample
    pipeline.scheduler = getattr(diffusers, SCHEDULERS[name])()
    infer.set_scheduler(pipeline)
    config = pipeline.scheduler.config
    assert (config.clip_sample, config.steps_offset) == (False, 1)  # as StableDiffusionPipeline has them


def test_several_pictures_are_those_drawn_alone(draw):
    """Picture i of a prompt is drawn with seed + i, whatever is drawn before it."""
    pictures = draw("--prompt", "a cat", "a dog", "--num_images=2", "--output=new/folder/pet.png")
    assert [picture.path for picture in pictures] == [Path(f"new/folder/pet-{index}.png") for index in range(4)]
    assert sorted(Path("new/folder").iterdir()) == [picture.path for picture in pictures]
    drawn = [(picture.text["prompt"], picture.text["seed"]) for picture in pictures]
    assert drawn == [("a cat", 5), ("a cat", 6), ("a dog", 5), ("a dog", 6)]
    for picture, (prompt, seed) in zip(pictures, drawn, strict=True):
        assert picture.pixels == only(draw(f"--prompt={prompt}", f"--seed={seed}")).pixels
    assert len({picture.pixels for picture in pictures}) == 4


def test_no_seed_draws_another_picture_each_time(draw):
    one, two = (only(draw(seed=None)) for _ in range(2))
    assert one.text["seed"] != two.text["seed"]
    assert one.pixels != two.pixels


@pytest.mark.parametrize(
    ("there", "best"), [((), "cpu"), (("cuda",), "cuda"), (("mps",), "mps"), (("cuda", "mps"), "cuda")]
)
def test_default_device_is_the_best_there_is(monkeypatch, there, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    monkeypatch.setattr(torch, "empty", lambda *_, device: types.SimpleNamespace(device=device, cpu=lambda: None))
    assert infer.choose_device() == best


@pytest.mark.parametrize(
    ("device", "flags", "dtype"),
    [
        ("cpu", [], torch.float32),
        ("mps", [], torch.float32),
        ("cuda:1", [], torch.float16),
        ("cuda", ["--dtype=bf16"], torch.bfloat16),
        ("cpu", ["--dtype=fp16"], torch.float16),
    ],
)
def test_dtype_is_half_on_cuda_unless_given(monkeypatch, assets, device, flags, dtype):
    def open_pipeline(args, dtype):
        raise Reached(dtype)

    monkeypatch.setattr(infer, "choose_device", torch.device)
    monkeypatch.setattr(infer, "open_pipeline", open_pipeline)
    with pytest.raises(Reached) as reached:
        infer.main(infer.parse_args([f"--model_path={assets[0]}", f"--device={device}", *flags]))
    assert reached.value.args == (dtype,)


# Checkpoints


@pytest.mark.parametrize(
    ("flags", "subfolder", "prediction_type"),
    [
        ([], "unet", "epsilon"),
        (["--use_ema", "--max_train_steps=2"], "unet_ema", "epsilon"),
        (["--prediction_type=v_prediction"], "unet", "v_prediction"),
    ],
)
def test_checkpoint_is_drawn_with_its_best_unet_and_prediction_type(
    checkpoint, draw, assets, flags, subfolder, prediction_type
):
    folder = checkpoint(*flags)
    picture = only(draw(f"--checkpoint={folder}", model=None))
    assert picture.pixels == reference(assets[0], folder / subfolder, prediction_type=prediction_type)
    assert picture.text["checkpoint"] == str(folder)
    other = "epsilon" if prediction_type == "v_prediction" else "v_prediction"
    assert picture.pixels not in (
        reference(assets[0], prediction_type=prediction_type),
        reference(assets[0], folder / subfolder, prediction_type=other),
    )
    if subfolder == "unet_ema":
        assert picture.pixels != reference(assets[0], folder / "unet")


def test_checkpoint_keeps_its_prediction_type_under_another_scheduler(checkpoint, draw, monkeypatch):
    loaded, original = [], infer.open_pipeline
    monkeypatch.setattr(infer, "open_pipeline", lambda *args: loaded.append(original(*args)) or loaded[-1])
    draw(f"--checkpoint={checkpoint('--prediction_type=v_prediction')}", "--scheduler=dpm++", model=None)
    assert only(loaded).scheduler.config.prediction_type == "v_prediction"


def test_model_path_overrides_the_base_of_a_checkpoint(checkpoint, draw, refuse, assets, other, tmp_path):
    on_base, on_other = (only(draw(f"--checkpoint={checkpoint()}", model=model)).pixels for model in (None, other))
    assert on_other == reference(other, checkpoint() / "unet") != on_base
    folder = with_state(checkpoint(), tmp_path / "moved", base_model=str(tmp_path / "gone"))
    problem = only(refuse(f"--checkpoint={folder}"))
    assert problem.startswith(f"--model_path {tmp_path / 'gone'}: no such folder")
    assert only(draw(f"--checkpoint={folder}", model=assets[0])).pixels == on_base


def test_base_is_loaded_as_the_checkpoint_says(checkpoint, tmp_path, monkeypatch):
    """Revision, variant and cache of the checkpoint's base model are not used for another model."""
    base = {"revision": "v2", "variant": "fp16", "cache_dir": "cache"}
    args = sd_config.read_state(checkpoint()).args | base
    folder = with_state(checkpoint(), tmp_path / "on-the-hub", base_model="owner/base", args=args)

    def from_pretrained(model, **kwargs):
        raise Reached(model, {name: value for name, value in kwargs.items() if name in base})

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", from_pretrained)
    for flags, expected in (([], ("owner/base", base)), (["--model_path=owner/other"], ("owner/other", {}))):
        with pytest.raises(Reached) as reached:
            infer.main(infer.parse_args([f"--checkpoint={folder}", "--device=cpu", *flags]))
        assert reached.value.args == expected


def test_damaged_checkpoint_is_refused(checkpoint, refuse, tmp_path):
    folder = shutil.copytree(checkpoint(), tmp_path / "damaged")
    with open(folder / "unet/diffusion_pytorch_model.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(b"x")
    problem = only(refuse(f"--checkpoint={folder}"))
    assert problem.startswith(f"--checkpoint {folder}: not a whole checkpoint: unet/diffusion_pytorch_model")
    (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
    sd_config.write_manifest(folder)
    problem = only(refuse(f"--checkpoint={folder}"))
    assert problem.startswith(f"--checkpoint {folder}: its trainer_state.json cannot be read")


# The PNG


@pytest.mark.parametrize(
    ("flags", "model"),
    [
        (["--height=72", "--width=64", "--guidance_scale=2.5", "--num_inference_steps=3"], "base"),
        (
            ["--prompt", 'a cat, "très" nice\nat 木ノ葉 🍥', "a dog", "--negative_prompt=-blurry", "--num_images=2"],
            "base",
        ),
        (["--scheduler=euler_a", "--dtype=bf16"], "base"),
        (["--scheduler=ddpm", "--guidance_scale=0"], "base"),
        ([], "checkpoint"),
        ([], "checkpoint on another base"),
        (["--seed=4294967295", "--num_images=2"], "base"),
    ],
    ids=["settings", "texts", "euler_a in bf16", "ddpm", "checkpoint", "checkpoint on another base", "last seed"],
)
def test_picture_can_be_drawn_again_from_its_text(checkpoint, draw, assets, other, flags, model):
    if model != "base":
        flags = [*flags, f"--checkpoint={checkpoint()}"]
    base = {"base": assets[0], "checkpoint": None, "checkpoint on another base": other}[model]
    for picture in draw(*flags, model=base, seed=None):
        args = infer.parse_args(command(picture.text))
        infer.main(args)
        again = read("again.png")
        assert again.pixels == picture.pixels
        assert again.text == picture.text


def test_a_picture_says_in_one_chunk_who_drew_it(draw):
    """Which no other program takes for its own; one drawn before had a chunk for each setting."""
    new, old, foreign = only(draw("--prompt=火影")).path, Path("old.png"), Path("foreign.png")
    with Image.open(new) as image:
        assert [*image.text] == ["sd_naruto", "parameters"]
        assert json.loads(image.text["sd_naruto"])["prompt"] == "火影"
        theirs = {"prompt": "{}", "parameters": image.text["parameters"]}
    for path, texts in ((old, {"prompt": "a", "seed": "1", "num_inference_steps": "2"}), (foreign, theirs)):
        chunks = PngInfo()
        for name, value in texts.items():
            chunks.add_itxt(name, value)
        Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
        assert read(path).text == (texts if path is old else {})
    Path("sd_naruto.png").write_bytes(b"sd_naruto")
    mine = [path for path in sorted(Path().glob("*.png")) if sd_config.drawn_by_us(path)]
    assert mine == [old, new]


def read_parameters(text):
    """The settings in a text as AUTOMATIC1111 shows it under its pictures: a parser from the format's description.

    First come the lines of the prompt; after a line that begins with "Negative prompt:", those of the negative one. The
    last line holds at least three settings such as `Steps: 20`, between commas. A value that contains a comma, a colon
    or a line break is a JSON string, and one such as 512x768 counts as two. White space around lines is lost.
    """
    *lines, last = text.strip().split("\n")
    assert last.startswith("Steps: ")  # by which Civitai knows it
    found = re.findall(r'\s*([\w][\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(found) >= 3
    settings = {name: json.loads(value) if value[:1] == '"' else value for name, value in found}
    begin = next((at for at, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[begin:]).removeprefix("Negative prompt:")
    return settings | {"Prompt": "\n".join(lines[:begin]), "Negative prompt": negative.strip()}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({}, {"Sampler": "PLMS", "Steps": "2", "Seed": "5", "CFG scale": "7.5", "Size": "64x64", "RNG": "CPU"}),
        (
            {"height": 72, "width": 128, "scheduler": "euler_a", "num_inference_steps": 3},
            {"Size": "128x72", "Steps": "3"},
        ),
        ({"guidance_scale": 3.25, "negative_prompt": "blurry, Steps: 4, bad\nhands"}, {"CFG scale": "3.25"}),
        ({"guidance_scale": 0}, {"CFG scale": "1"}),  # at which both programs leave guidance out, as here below 1
        ({"prompt": "a cat: black, white\nat 木ノ葉 🍥, IDAT", "negative_prompt": "dog"}, {}),
        ({"prompt": "a très nice cat"}, {}),
        ({"prompt": ""}, {}),
    ],
    ids=["plain", "settings", "negative prompt", "no guidance", "texts", "Latin-1", "no prompt"],
)
def test_parameters_are_read_as_automatic1111_writes_them(draw, monkeypatch, flags, says):
    monkeypatch.setattr(infer, "sample", lambda *args, **kwargs: Image.new("RGB", (64, 64)))
    path = only(draw(*(f"--{name}={value}" for name, value in flags.items()))).path
    with Image.open(path) as image:
        found = read_parameters(image.text["parameters"])
    assert sd_config.drawn_by_us(path)
    texts = {"Prompt": flags.get("prompt", PROMPT), "Negative prompt": flags.get("negative_prompt", "")}
    assert found == found | says | texts
    assert found.keys() == {"Steps", "Sampler", "CFG scale", "Seed", "Size", "Model", "RNG", *texts}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_parameters_name_the_sampler_as_automatic1111_does(draw, monkeypatch, name):
    monkeypatch.setattr(infer, "sample", lambda *args, **kwargs: Image.new("RGB", (64, 64)))
    names = {"pndm": "PLMS", "ddim": "DDIM", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun"}
    names |= {"dpm++": "DPM++ 2M", "unipc": "UniPC"}
    with Image.open(only(draw(f"--scheduler={name}")).path) as image:
        assert read_parameters(image.text["parameters"]).get("Sampler") == names.get(name)


def test_parameters_name_the_model(draw, checkpoint, assets, monkeypatch):
    """A comma or colon in a name needs quotes, and what is not UTF-8 in the path of this folder must not stop it."""
    monkeypatch.setattr(infer, "sample", lambda *args, **kwargs: Image.new("RGB", (64, 64)))
    named, odd = Path('a, "b": c'), Path("odd-\udce9")
    named.symlink_to(assets[0])
    shutil.copytree(assets[0], odd)

    def name(*flags, **model):
        with Image.open(only(draw(*flags, **model)).path) as image:
            return read_parameters(image.text["parameters"])["Model"]

    assert name(model=named) == 'a, "b": c'
    assert name(f"--checkpoint={checkpoint()}", model=None) == f"{checkpoint().parent.name}/checkpoint-1"
    monkeypatch.chdir(odd)
    assert name(model=".") == "odd-\\udce9"


def test_single_picture_is_overwritten(draw):
    Path("result.png").write_text("of before", encoding="utf-8")
    assert only(draw()).size == (64, 64)


def test_a_picture_that_is_not_finite_is_never_saved(draw, assets, tmp_path, capsys):
    """Its autoencoder overflows fp16, which without this would be a black picture; bf16 has the range of fp32."""
    model = shutil.copytree(assets[0], tmp_path / "wide")
    file = model / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.weight"] *= 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    draw("--dtype=bf16", "--output=bf16.png", model=model)
    with pytest.raises(SystemExit) as end:
        draw("--dtype=fp16", model=model)
    message = only(capsys.readouterr().err.splitlines()[-1:])
    assert end.value.code == 1
    assert "bf16" in message
    assert "fp32" in message
    assert not Path("result.png").exists()


def test_a_picture_that_cannot_be_written_replaces_none(draw, monkeypatch, capsys, tmp_path):
    def save(image, file, **_):
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    Path("result.png").write_bytes(b"an earlier picture")
    monkeypatch.setattr(infer, "sample", lambda *args, **kwargs: Image.new("RGB", (64, 64)))
    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(SystemExit) as end:
        draw("--prompt", "a cat")
    assert (end.value.code, Path("result.png").read_bytes()) == (1, b"an earlier picture")
    assert "result.png cannot be written: [Errno 28] No space left on device" in capsys.readouterr().err
    assert [path.name for path in Path().glob("*.png")] == ["result.png"]


def test_a_prompt_that_is_cut_is_noted(draw, monkeypatch, capsys):
    monkeypatch.setattr(infer, "sample", lambda *args, **kwargs: Image.new("RGB", (64, 64)))
    draw("--prompt", "a cat " * 40, "a dog", f"--negative_prompt={'bad ' * 80}")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert [("a cat" in note, "bad" in note, "77 tokens" in note) for note in notes] == [(1, 0, 1), (0, 1, 1)]


# What is refused


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--num_images=0", "--num_images 0: must be … from 1 to 10000"),
        ("--seed=4294967296", "--seed 4294967296: must be … from 0 to 4294967295"),
        ("--num_inference_steps=0", "--num_inference_steps 0: must be … from 1 to 998"),
        ("--num_inference_steps=999", "--num_inference_steps 999: must be … from 1 to 998"),
        ("--guidance_scale=-1", "--guidance_scale -1: must be … at least 0"),
        ("--height=100", "--height 100: must be … multiple of 8"),
        ("--height=1000000", "--height 1000000: must be … multiple of 8 … to 4096"),
        ("--width=0", "--width 0: must be … multiple of 8 from 8"),
        ("--scheduler=dpm", "--scheduler dpm: must be … pndm, ddim, ddpm, euler, euler_a, heun, dpm++, unipc"),
        ("--dtype=fp8", "--dtype fp8: must be … fp32, fp16, bf16"),
        ("--guidance_scale=1 --negative_prompt=cat", "--negative_prompt: has no effect without guidance"),
        ("--num_images=3", "--output result.png: would overwrite result-1.png;"),
        ("--prompt a b c", "--output result.png: would overwrite result-1.png;"),
        ("--output=result.jpg", "--output result.jpg: must end in .png"),
        ("--output=result", "--output result: must end in .png"),
        ("--output=folder.png", "--output folder.png: is a folder"),
        ("--output=file/result.png", "--output file/result.png: is a folder, or a folder in its path is a file"),
        ("--output=", "--output : must end in .png"),
        ("--output= --num_images=2", "--output : must end in .png"),
        (f"--output={'a' * 252}.png", "--output aaa … at most 255 bytes"),
        (f"--output={'a' * 250}.png --num_images=2", "--output aaa … longer than 255 bytes"),
        (f"--output={'a' * 256}/a.png", "--output aaa … at most 255 bytes"),
        ("--prompt=caf\udce9", "--prompt … is not UTF-8"),
        ("--model_path=./nope", "--model_path ./nope: no such folder"),
        ("--model_path=/nope", "--model_path /nope: no such folder"),
        ("--model_path=nope", "--model_path nope: no such folder"),
        ("--model_path=tests/nope", "--model_path tests/nope: no such folder"),
    ],
)
def test_refused_before_anything_is_loaded(refuse, assets, flags, says):
    Path("sd-naruto-model").symlink_to(assets[0])
    for name in ("tests", "folder.png"):
        Path(name).mkdir()
    for name in ("file", "result-1.png"):
        Path(name).touch()
    assert_says(only(refuse(*flags.split())), says)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        *((f"--device={name}", f"--device {name}: not usable here") for name in ("bogus", "cuda:9", "", "hpu", "meta")),
        ("--model_path=owner/name", "--model_path owner/name: … check name and network, or give a local folder"),
        ("--model_path=cut-short", "--model_path cut-short: cannot be loaded (check the folder): "),
        ("--model_path=no-words", "--model_path no-words: its tokenizer lacks its vocabulary"),
    ],
)
def test_refused_while_loading(refuse, assets, flags, says):
    Path("sd-naruto-model").symlink_to(assets[0])
    file = Path(shutil.copytree(assets[0], "cut-short"), "text_encoder/model.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    shutil.copytree(assets[0], "no-words")
    for name in ("vocab.json", "merges.txt"):
        Path("no-words/tokenizer", name).unlink()
    assert_says(only(refuse("--device=cpu", *flags.split(), load=True)), says)


@pytest.mark.parametrize("place", ["result.png", "new/folder/result.png"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_loaded(refuse, assets, monkeypatch, place):
    Path("result.png").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # what root may write anyway
    problem = only(refuse(f"--model_path={assets[0]}", f"--output={place}"))
    assert problem.startswith(f"--output {place}: no permission to write in ")


def test_all_problems_are_reported_together(refuse):
    problems = refuse("--seed=-1", "--height=9", "--promt=x")
    assert sorted(problem.split()[0] for problem in problems) == ["--height", "--promt:", "--seed"]
    assert "--promt: no such flag; did you mean --prompt?" in problems
    problems = refuse("--model_path=nope", "--output=result.jpg")
    assert sorted(problem.split()[0] for problem in problems) == ["--model_path", "--output"]


def test_folder_of_an_unfinished_run_suggests_its_last_checkpoint(refuse, tmp_path):
    for name in ("checkpoint-9", "checkpoint-10"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "trainer_state.json").touch()
        sd_config.write_manifest(tmp_path / "run" / name)
    (tmp_path / "run/checkpoint-11").mkdir()
    problems = refuse("--model_path=run")
    assert problems[0].startswith("--model_path run: no model_index.json")
    assert problems[1].endswith(f"--checkpoint {Path('run/checkpoint-10')}")


# The tutorial


def test_snippet_of_the_tutorial_draws_the_same_picture(checkpoint, draw):
    output = checkpoint("--use_ema", "--max_train_steps=2").parent
    torch.manual_seed(5)
    pipe = StableDiffusionPipeline.from_pretrained(output, torch_dtype=torch.float32)
    pipe = pipe.to("cpu")
    torch.manual_seed(5)
    image = pipe(PROMPT, num_inference_steps=2).images[0]
    image.save("snippet.png")
    assert read("snippet.png").pixels == only(draw(model=output)).pixels
