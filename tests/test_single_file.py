"""A pipeline as one file: every tensor where other programs look for it, and the way back to a folder."""

import json
import shutil
import types
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import infer
import sd_config
from conftest import ROOT, assert_same, assert_says, only

SHORT = ("--train_batch_size=2", "--max_train_steps=1", "--learning_rate=1e-3")
PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def models(assets, tmp_path_factory):
    """Folders of pipelines by name. But for the demo's, no two of their tensors are equal, as norms are at first."""
    folder = tmp_path_factory.mktemp("models")
    tiny, two = (shutil.copytree(assets[0], folder / name) for name in ("tiny", "two"))
    UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(tiny, subfolder="unet"),
        block_out_channels=(16, 32, 32, 48),
        layers_per_block=2,
    ).save_pretrained(two / "unet")
    AutoencoderKL.from_config(
        AutoencoderKL.load_config(tiny, subfolder="vae"), block_out_channels=(4, 8, 8, 16), layers_per_block=2
    ).save_pretrained(two / "vae")
    for file in (folder / name / part for name in ("tiny", "two") for part in PARTS):
        file = only([*file.glob("*.safetensors")])
        generator = torch.Generator().manual_seed(0)
        tensors = {name: torch.randn(value.shape, generator=generator) for name, value in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return {"tiny": tiny, "two": two, "demo": ROOT / "tests/demo/base"}


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """A function that runs infer.py to write naruto.safetensors, in an empty folder, and returns its path."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        args = infer.parse_args(["--single_file=naruto.safetensors", *map(str, flags)])
        infer.main(args)
        return only(args.outputs)

    return run


@pytest.fixture
def refused(convert, capsys):
    """Like `convert`, but it must end with an exit code and one message, which is returned, and leave nothing."""

    def run(*flags, code=2):
        before = sorted(Path().iterdir())
        with pytest.raises(SystemExit) as end:
            convert(*flags)
        assert (end.value.code, sorted(Path().iterdir())) == (code, before)
        lines = capsys.readouterr().err.split("error: ")
        return only(lines[1:]).strip()

    return run


def metadata(path):
    """The metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[sd_config.PNG_TEXT])


def full_size():
    """A pipeline of SD1.5's configuration on the meta device, whose tensors hold one value each: their number."""
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        pipeline = types.SimpleNamespace(
            unet=UNet2DConditionModel(cross_attention_dim=768),
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
            ),
            text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        )
    for part in PARTS:
        model = getattr(pipeline, part)
        number(model, {name: value.ndim for name, value in model.state_dict().items()})
    return pipeline


def number(model, dimensions):
    """Let a model have other tensors, by the numbers of their dimensions. They hold one value each: their number."""
    tensors = {
        name: torch.full((1,) * count, float(value)) for value, (name, count) in enumerate(dimensions.items(), start=1)
    }
    model.state_dict = lambda: tensors


def values(tensors):
    """The one value that each tensor holds."""
    return {name: value.item() for name, value in tensors.items()}


# What is written


@pytest.mark.parametrize("name", ["tiny", "two", "demo"])
def test_diffusers_reads_back_every_bit(models, convert, name):
    file = convert(f"--model_path={models[name]}", "--dtype=fp32")
    folder = StableDiffusionPipeline.from_pretrained(models[name], dtype=torch.float32)
    read = StableDiffusionPipeline.from_single_file(file, config=str(models[name]), local_files_only=True)
    for part in PARTS:
        assert_same(getattr(read, part).state_dict(), getattr(folder, part).state_dict())
    assert {value.dtype for value in load_file(file).values()} == {torch.float32}


def test_names_at_full_size_are_those_that_diffusers_looks_for():
    """Each tensor is found under its own name by the loader, and none is left over."""
    pipeline = full_size()
    written = infer.original_layout(pipeline, torch.float32)
    unet, vae = "model.diffusion_model.", "first_stage_model."
    counts = [sum(name.startswith(prefix) for name in written) for prefix in (unet, vae)]
    assert counts == [686, 248]
    assert values(convert_ldm_unet_checkpoint(written, pipeline.unet.config)) == values(pipeline.unet.state_dict())
    assert values(convert_ldm_vae_checkpoint(written, pipeline.vae.config)) == values(pipeline.vae.state_dict())
    text = {name: value for name, value in written.items() if not name.startswith((unet, vae))}
    prefix = "cond_stage_model.transformer.text_model."
    bare = {name.removeprefix("text_model."): value for name, value in pipeline.text_encoder.state_dict().items()}
    assert values(text) == values({prefix + name: value for name, value in bare.items()})
    assert len(text) == 196


def test_landmarks_of_the_original_layout():
    """From the listing of SD1.5's own checkpoint: other programs know models by them."""
    written = infer.original_layout(full_size(), torch.float32)
    assert {
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.8.2.conv.weight",
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
        "first_stage_model.decoder.up.3.block.0.norm1.weight",
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.bias",
    } <= written.keys()
    attention = [value for name, value in written.items() if ".mid.attn_1." in name and name.endswith("weight")]
    assert [value.ndim for value in attention] == [1, 4, 4, 4, 4] * 2


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_names_of_the_text_encoder_with_and_without_prefix(prefix):
    pipeline = full_size()
    names = [name.removeprefix("text_model.") for name in pipeline.text_encoder.state_dict()]
    number(pipeline.text_encoder, {prefix + name: 1 for name in names})
    written = infer.original_layout(pipeline, torch.float32)
    assert {f"cond_stage_model.transformer.text_model.{name}" for name in names} <= written.keys()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_rounded_once(models, convert, dtype):
    """fp16 is the default, on any machine."""
    file = convert(f"--model_path={models['tiny']}", *([] if dtype == "fp16" else [f"--dtype={dtype}"]))
    kind = infer.DTYPES[dtype]
    key, name = "model.diffusion_model.input_blocks.0.0.weight", "conv_in.weight"
    unet = load_file(models["tiny"] / "unet/diffusion_pytorch_model.safetensors")
    tensors = load_file(file)
    assert torch.equal(tensors[key], unet[name].to(kind))
    assert {value.dtype for value in tensors.values()} == {kind}


def test_a_checkpoint_and_its_export_are_the_same_file(train_once, convert, capsys):
    """Which holds the average, and says where it comes from. What no run of ours made says nothing."""
    output = train_once(*SHORT, "--use_ema").output
    checkpoint = only(sd_config.checkpoints(output))
    saved = sd_config.read_state(checkpoint)
    known = {"seed": "7", "step": "1", "base_model": Path(saved.base_model).name}
    files = []
    for name, flag in {"export": "--model_path", "checkpoint": "--checkpoint"}.items():
        folder = output if name == "export" else checkpoint
        files.append(convert(f"{flag}={folder}", "--dtype=fp32", f"--single_file={name}/new/{name}.safetensors"))
        assert metadata(files[-1]) == known
        assert [path.name for path in files[-1].parent.iterdir()] == [files[-1].name]
    assert_same(*map(load_file, files))
    average = load_file(checkpoint / "unet_ema/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert torch.equal(load_file(files[0])["model.diffusion_model.input_blocks.0.0.weight"], average)
    assert "note:" not in capsys.readouterr().out
    stranger = shutil.copytree(output, "stranger")
    unet = Path(stranger, "unet/diffusion_pytorch_model.safetensors")
    save_file({name: value + 1 for name, value in load_file(unet).items()}, unet, metadata={"format": "pt"})
    assert metadata(convert(f"--model_path={stranger}")) == {}


def test_the_same_file_twice_has_the_same_bytes_and_is_as_readable_as_others(models, convert):
    """Programs know a model by its hash. What safetensors writes by itself is for the user alone."""
    files = [convert(f"--model_path={models['tiny']}", f"--single_file={n}.safetensors") for n in range(3)]
    assert len({file.read_bytes() for file in files}) == 1
    (other := Path("other")).touch()
    assert {file.stat().st_mode for file in files} == {other.stat().st_mode}


def test_v_prediction_is_noted(train_once, convert, capsys):
    convert(f"--checkpoint={only(sd_config.checkpoints(train_once(*SHORT, '--prediction_type=v_prediction').output))}")
    note = only([line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")])
    assert "naruto.yaml" in note
    assert "`parameterization: v`" in note


# What is refused


@pytest.mark.parametrize(
    ("part", "name", "dimensions"),
    [
        ("unet", "class_embedding.weight", 2),
        ("unet", "conv_in.extra", 1),
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.weight", 2),
        ("unet", "down_blocks.0.motion_modules.0.norm.weight", 1),
        ("unet", "down_blocks.0.downsamplers.0.conv1.weight", 4),
        ("vae", "encoder.down_blocks.0.attentions.0.to_q.weight", 2),
        ("vae", "decoder.up_blocks.0.downsamplers.0.conv.weight", 4),
        ("text_encoder", "embeddings.position_ids", 2),
        ("text_encoder", "encoder.layers.0.self_attn.q_proj.lora_A.weight", 2),
    ],
)
def test_a_name_without_a_place_is_an_error(part, name, dimensions, capsys):
    pipeline = full_size()
    model = getattr(pipeline, part)
    number(model, {key: value.ndim for key, value in model.state_dict().items()} | {name: dimensions})
    with pytest.raises(SystemExit) as end:
        infer.original_layout(pipeline, torch.float32)
    assert end.value.code == 2
    assert f"no place for {name} of the {part}" in capsys.readouterr().err


def test_what_overflows_is_an_error_that_names_the_tensor(models, convert, refused, tmp_path):
    """65520 rounds to infinity in fp16, and 65519 does not."""
    model = shutil.copytree(models["tiny"], tmp_path / "wide")
    file = model / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for value in (65520, 65519):
        tensors["decoder.conv_in.bias"][3] = value
        save_file(tensors, file, metadata={"format": "pt"})
        if value == 65520:
            problem = refused("--model_path=wide")
            assert_says(
                problem, "--single_file: first_stage_model.decoder.conv_in.bias overflows torch.float16; … bf16 … fp32"
            )
            convert("--model_path=wide", "--dtype=bf16", "--single_file=bf16.safetensors")
    convert("--model_path=wide")


def test_a_model_like_stable_diffusion_2_is_refused(models, refused, tmp_path):
    model = shutil.copytree(models["tiny"], tmp_path / "two")
    config = UNet2DConditionModel.load_config(model, subfolder="unet")
    UNet2DConditionModel.from_config(config, use_linear_projection=True).save_pretrained(model / "unet")
    assert "this one is like Stable Diffusion 2" in refused("--model_path=two")


def test_a_model_that_lacks_tensors_is_refused(models, refused, tmp_path):
    """transformers would fill them with random numbers."""
    file = shutil.copytree(models["tiny"], tmp_path / "holes") / "text_encoder/model.safetensors"
    tensors = load_file(file)
    del tensors["text_model.final_layer_norm.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert "text_encoder has 35 of its 36 tensors" in refused("--model_path=holes")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--single_file=a.ckpt", "--single_file a.ckpt: must end in .safetensors"),
        ("--single_file=", "--single_file : must end in .safetensors"),
        ("--single_file=folder.safetensors", "--single_file folder.safetensors: is a folder"),
        ("--single_file=file/a.safetensors", "--single_file file/a.safetensors: is a folder, or a folder in its path"),
        ("--single_file=old.safetensors", "--single_file old.safetensors: would overwrite old.safetensors"),
        ("--prompt=cat --seed=1 --device=cpu", "--single_file: draws nothing; leave out --device, --prompt, --seed"),
    ],
)
def test_refused_before_anything_is_loaded(models, refused, monkeypatch, flags, says):
    monkeypatch.setattr(infer, "open_pipeline", None)
    Path("folder.safetensors").mkdir()
    for name in ("file", "old.safetensors"):
        Path(name).touch()
    assert_says(refused(f"--model_path={models['tiny']}", *flags.split()), says)


def test_a_file_that_cannot_be_written_leaves_nothing(models, refused, monkeypatch):
    def save(tensors, file, metadata):
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(infer, "save_file", save)
    problem = refused(f"--model_path={models['tiny']}", code=1)
    assert_says(problem, "naruto.safetensors cannot be written … needed … free … No space left on device")


# The way back


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_file_given_as_base_model_is_answered_with_two_lines_that_make_a_folder(
    models, convert, train, monkeypatch, capsys, suffix
):
    """Offline, they need the configuration of a model of its size, which diffusers otherwise fetches from the Hub."""
    file = convert(f"--model_path={models['tiny']}", "--dtype=fp32")
    if suffix == ".ckpt":
        torch.save({"state_dict": load_file(file)}, "naruto.ckpt")
        file.unlink()
    says = []
    convert_it = (f"--model_path=naruto{suffix}", "--single_file=again.safetensors")
    for run in (lambda: train("--dry_run", model=f"naruto{suffix}"), lambda: convert(*convert_it)):
        with pytest.raises(SystemExit) as end:
            run()
        assert end.value.code == 2
        says.append(capsys.readouterr().err)
        assert f"naruto{suffix}: is one file" in says[-1]
    lines = [text.splitlines()[-2:] for text in says]
    assert lines[0] == lines[1]
    load, offline = StableDiffusionPipeline.from_single_file, {"config": str(models["tiny"]), "local_files_only": True}
    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", lambda name: load(name, **offline))
    exec("\n".join(lines[0]))
    train("--dry_run", model="naruto-folder")
    for part in PARTS:
        one, other = (only([*Path(folder, part).glob("*.safetensors")]) for folder in (models["tiny"], "naruto-folder"))
        one, other = (
            {name.removeprefix("text_model."): value for name, value in load_file(file).items()}
            for file in (one, other)
        )
        assert_same(one, other)
