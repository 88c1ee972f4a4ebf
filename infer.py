"""Turn prompts into PNGs with a trained pipeline: `python infer.py --prompt "Lebron James with a hat"`.

Each picture starts from noise drawn on the CPU by its own seed, so it does not depend on how many are asked
for, nor (up to rounding) on the device. Its PNG carries the prompt and all settings as text. The trainer draws
its validation pictures with the functions below, and loads its models with them. With `--single_file`, the pipeline
becomes one file for other programs instead.
"""

import itertools
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import textwrap
import warnings
from pathlib import Path

import sd_config
from sd_config import PATH, choice, integer, real, stop_if

# Samplers by their usual names: diffusers' class, and AUTOMATIC1111's name (modules/sd_samplers_*.py), if it has one.
SCHEDULERS = {
    "pndm": ("PNDMScheduler", "PLMS"),
    "ddim": ("DDIMScheduler", "DDIM"),
    "ddpm": ("DDPMScheduler", None),
    "euler": ("EulerDiscreteScheduler", "Euler"),
    "euler_a": ("EulerAncestralDiscreteScheduler", "Euler a"),
    "heun": ("HeunDiscreteScheduler", "Heun"),
    "dpm++": ("DPMSolverMultistepScheduler", "DPM++ 2M"),
    "unipc": ("UniPCMultistepScheduler", "UniPC"),
}

# fmt: off
FLAGS = {
    "options": [
        ("model_path", "./sd-naruto-model", PATH, "Folder of a diffusers pipeline, or a Hub id (owner/name)."),
        ("checkpoint", None, PATH,
         "Draw with the UNet of this checkpoint folder, on the base model that it was trained from."),
        ("single_file", None, PATH, "Write the pipeline into this new .safetensors file, in the layout that ComfyUI, "
         "AUTOMATIC1111 and Forge read, and draw nothing."),
        ("prompt", ["Lebron James with a hat"], "+", "One or more prompts."),
        ("negative_prompt", None, str, "What the pictures should not show."),
        ("output", "result.png", PATH, "File to write; for several pictures, NAME-0.png, NAME-1.png …"),
        ("num_images", 1, integer(1, 10000), "Pictures of each prompt."),
        ("seed", None, integer(0, 2**32 - 1), "Picture i of a prompt is drawn with seed + i. Default: a random one."),
        ("num_inference_steps", 50, integer(1, 998), "Denoising steps."),  # of 999, some samplers make NaN
        ("guidance_scale", 7.5, real(0), "Strength of classifier-free guidance; 1 or less turns it off."),
        ("height", None, integer(8, 4096, multiple_of=8), "Height in pixels. Default: the model's own."),
        ("width", None, integer(8, 4096, multiple_of=8), "Width in pixels. Default: the model's own."),
        ("scheduler", None, choice(*SCHEDULERS), "Sampler. Default: the pipeline's own."),
        ("device", None, str, "Where to compute: cuda, mps, cpu, cuda:1, ... Default: the best there is."),
        ("dtype", None, choice("fp32", "fp16", "bf16"), "Precision. Default: fp16 on CUDA or in one file, else fp32."),
    ]
}
# fmt: on


def parse_args(argv=None):
    """Return the flags, checked, with `outputs`, the files to write prompt by prompt; exit with 2 on problems."""
    parser = sd_config.Parser("Draw pictures from prompts with a trained Stable Diffusion pipeline.", FLAGS)
    return parser.parse_checked(argv, resolve)


def resolve(args, given, problems):
    """Complete `args` in place: the base of a checkpoint, and the files to write. Nothing is loaded yet."""
    args.base, args.trained, args.origin = {}, {}, {"model_path": args.model_path}
    if args.checkpoint is not None:
        if damage := sd_config.find_damage(Path(args.checkpoint), "unet"):
            stop_if([f"--checkpoint {args.checkpoint}: not a whole checkpoint: {damage}"])
        saved = sd_config.read_state(args.checkpoint, "--checkpoint")
        args.trained["prediction_type"] = saved.prediction_type
        args.origin["checkpoint"] = args.checkpoint
        if "model_path" not in given:  # given, it says where the base has moved since
            args.model_path, args.origin["model_path"] = saved.base_model, None
            args.base = {name: saved.args[name] for name in ("revision", "variant", "cache_dir")}
    if sd_config.is_local(args.model_path):
        problems.extend(sd_config.pipeline_problems("--model_path", args.model_path))
        newest_first = reversed(sd_config.checkpoints(args.model_path) if problems else [])
        if whole := next((path for path in newest_first if not sd_config.find_damage(path)), None):
            problems.append(f"--model_path {args.model_path}: holds an unfinished run; try --checkpoint {whole}")

    if args.negative_prompt is not None and args.guidance_scale <= 1:
        problems.append("--negative_prompt: has no effect without guidance; give a --guidance_scale above 1")

    flag = "output" if args.single_file is None else "single_file"
    if flag == "single_file" and (drawing := given - {flag, "model_path", "checkpoint", "dtype"}):
        problems.append(f"--{flag}: draws nothing; leave out {', '.join(f'--{name}' for name in sorted(drawing))}")
    problems.extend(f"--{flag} {getattr(args, flag)}: {problem}" for problem in resolve_output(args))


def resolve_output(args):
    """List in `args` the files to write, and yield what keeps them from being written, if anything does."""
    one = args.single_file is not None
    output, count = (Path(args.single_file), 1) if one else (Path(args.output), args.num_images * len(args.prompt))
    if output.suffix.lower() != (".safetensors" if one else ".png"):
        yield "must end in .safetensors" if one else "must end in .png: only PNGs hold the settings as text"
        return
    args.outputs = [output] if count == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(count)]
    existing = ", ".join(str(path) for path in args.outputs if os.path.exists(path))
    if max(len(os.fsencode(name)) for name in args.outputs[-1].parts) > 255:
        yield "a name in it is longer than 255 bytes"
    elif any(map(os.path.isdir, args.outputs)) or any(map(os.path.isfile, output.parents)):
        yield "is a folder, or a folder in its path is a file"
    elif existing and (count > 1 or one):
        yield f"would overwrite {existing}; move away what is there, or choose another name"
    elif not os.access(folder := sd_config.disk_of(output.parent), os.W_OK | os.X_OK):
        yield f"no permission to write in {folder}"


if __name__ == "__main__":
    sd_config.outlive_streams()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to save
    ARGS = parse_args()  # answers --help and typos before the slow imports below
    sd_config.announce_imports()

import diffusers
import safetensors
import torch
import transformers
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The original layout: where its parts stand, and modules that it names otherwise than diffusers does, or the same.
LAYOUT = {"unet": "model.diffusion_model", "vae": "first_stage_model"}
LAYOUT["text_encoder"] = "cond_stage_model.transformer.text_model"
RENAMED = {"unet.conv_in": "input_blocks.0.0", "unet.conv_norm_out": "out.0", "unet.conv_out": "out.2"}
RENAMED |= {"unet.time_embedding.linear_1": "time_embed.0", "unet.time_embedding.linear_2": "time_embed.2"}
RENAMED |= {"unet.resnets.norm1": "in_layers.0", "unet.resnets.conv1": "in_layers.2", "unet.downsamplers.conv": "op"}
RENAMED |= {"unet.resnets.norm2": "out_layers.0", "unet.resnets.conv2": "out_layers.3"}
RENAMED |= {"unet.resnets.time_emb_proj": "emb_layers.1", "unet.resnets.conv_shortcut": "skip_connection"}
RENAMED |= {f"vae.{coder}.conv_norm_out": f"{coder}.norm_out" for coder in ("encoder", "decoder")}
RENAMED |= {"vae.resnets.conv_shortcut": "nin_shortcut", "vae.attentions.group_norm": "norm"}
RENAMED |= {"vae.attentions.to_out.0": "proj_out"} | {f"vae.attentions.to_{name}": name for name in "qkv"}
SAME = r"""unet\.upsamplers\.conv | unet\.attentions\.(norm | proj_in | proj_out
    | transformer_blocks\.\d+\.(norm[123] | attn[12]\.to_([qkv]|out\.0) | ff\.net\.(0\.proj|2)))
    | vae\.((post_)?quant_conv | (en|de)coder\.conv_(in|out) | resnets\.(norm|conv)[12] | (down|up)samplers\.conv)
    | text_encoder\.(embeddings\.(token|position)_embedding | final_layer_norm
    | encoder\.layers\.\d+\.(layer_norm[12] | mlp\.fc[12] | self_attn\.([qkv]|out)_proj))"""


def main(args):
    """Draw every picture that `args` asks for, and write it as a PNG with its settings; or write the single file."""
    quiet_libraries()
    if args.single_file is not None:
        write_single_file(args)
        return
    device = choose_device(args.device)
    dtype = args.dtype or ("fp16" if device.type == "cuda" else "fp32")
    print(f"Loading {args.checkpoint or args.model_path} ({dtype} on {device})")
    pipeline = open_pipeline(args, DTYPES[dtype]).to(device)
    pipeline.set_progress_bar_config(desc="Denoising")

    for text in cut_texts(pipeline.tokenizer, [*args.prompt, args.negative_prompt or ""]):
        print(f"note: has more than {pipeline.tokenizer.model_max_length} tokens, and will be cut: {text!r}")
    first_seed = secrets.randbits(32) if args.seed is None else args.seed
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    for index, path in enumerate(args.outputs):
        settings = {
            "prompt": args.prompt[index // args.num_images],
            "negative_prompt": args.negative_prompt,
            "seed": (first_seed + index % args.num_images) % 2**32,
            "num_inference_steps": args.num_inference_steps,
            "guidance_scale": args.guidance_scale,
            "height": args.height or size,
            "width": args.width or size,
        }
        drawn_by = {"scheduler": type(pipeline.scheduler).__name__, "dtype": dtype, "device": device}
        with sd_config.exit_on(sd_config.ReportedError, OSError, torch.OutOfMemoryError):
            path.parent.mkdir(parents=True, exist_ok=True)
            image = draw(pipeline, path, settings, args.origin | drawn_by)
        print(f"{path}: {image.width}x{image.height}, seed {settings['seed']}, {settings['prompt']!r}")


def cut_texts(tokenizer, texts):
    """Return those of the texts (a list of strings) that have more tokens than the text encoder reads."""
    token_ids = tokenizer(texts, truncation=False, verbose=False).input_ids if texts else []
    return [text for text, ids in zip(texts, token_ids, strict=True) if len(ids) > tokenizer.model_max_length]


def quiet_libraries():
    """Silence the libraries: progress bars of loading, and notes that the user can do nothing about."""
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # The trainer tokenises captions once before its loader's workers fork, which tokenizers would warn about.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module="torch._dynamo|diffusers")  # what both think of diffusers' code


def choose_device(name=None):
    """Return the device asked for, or the best there is. Exits with code 2 if it is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        (probe := torch.empty(0, device=name)).cpu()  # which `meta`, that holds no numbers, refuses
        return probe.device
    except (RuntimeError, AssertionError, ImportError) as error:  # torch fails in another way for each device
        return stop_if([f"--device {name}: not usable here: {str(error).splitlines()[0]}"])


def open_pipeline(args, dtype):
    """Load the pipeline that `args` describes: of a model, or of a checkpoint's UNet on its base model."""
    options, load_unet = args.base | {"dtype": dtype}, UNet2DConditionModel.from_pretrained
    if args.checkpoint is not None:
        name = "unet_ema" if Path(args.checkpoint, "unet_ema").is_dir() else "unet"
        options["unet"] = load(load_unet, "--checkpoint", args.checkpoint, subfolder=name, dtype=dtype)
    pipeline = load(StableDiffusionPipeline.from_pretrained, "--model_path", args.model_path, **options)
    check_tokenizer(pipeline.tokenizer, f"--model_path {args.model_path}")
    set_scheduler(pipeline, args.scheduler and SCHEDULERS[args.scheduler][0], **args.trained)
    return pipeline


def load(loader, flag, model, **kwargs):
    """Return `loader(model, **kwargs)`, or exit with code 2 and a message that names `flag`, which named the model."""
    try:
        return loader(model, **kwargs)
    except Exception as error:  # the libraries raise many types of error
        remedy = "check the folder" if sd_config.is_local(model) else "check name and network, or give a local folder"
        return sd_config.stop(f"{flag} {model}: cannot be loaded ({remedy}): {error}")


def check_tokenizer(tokenizer, model):
    """Exit with code 2 if a model's tokenizer lacks files, without which it loads nevertheless, and knows no word."""
    if len(tokenizer) < 256 or tokenizer.model_max_length > 10**6:
        stop_if([f"{model}: its tokenizer lacks its vocabulary or its settings"])


def restore_precision(pipeline, flag, variant=None):
    """Cast the parts of a pipeline that are not trained back to the precision of their files.

    diffusers loads half-precision files as float32. Exits with code 2, naming `flag`, if a file lacks tensors, which
    transformers would otherwise fill with random numbers without a word.
    """
    for name in ("unet", "vae", "text_encoder", "safety_checker"):
        part = getattr(pipeline, name)
        dtypes = stored_dtypes(part, variant) if part is not None else []
        expected = sum(tensor.is_floating_point() for tensor in part.state_dict().values()) if dtypes else 0
        if len(dtypes) < expected:
            what = f"{name} has {len(dtypes)} of its {expected} tensors"
            sd_config.stop(f"{flag} {pipeline.config._name_or_path}: {what}")
        if dtypes and name != "unet":
            part.to(dtypes[0])


def stored_dtypes(model, variant):
    """Return the dtypes of the floating-point tensors in the safetensors file that a model came from, if any."""
    folder, stems = Path(model.config._name_or_path), ("diffusion_pytorch_model", "model")
    files = [folder / f"{stem}{infix}.safetensors" for infix in (f".{variant}", "") for stem in stems]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return []
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with safetensors.safe_open(file, "pt") as tensors:
        names = [tensors.get_slice(name).get_dtype() for name in tensors.keys()]  # noqa: SIM118 (not a dictionary)
    return [dtypes[name] for name in names if name in dtypes]


def set_scheduler(pipeline, name=None, **settings):
    """Give a pipeline a scheduler of a class of diffusers, by its name, or of the same; `settings` change its own."""
    scheduler, kind = pipeline.scheduler, getattr(diffusers, name) if name else type(pipeline.scheduler)
    # As StableDiffusionPipeline makes it, but only its first one: latents go beyond the [-1, 1] of clipped samples.
    pipeline.scheduler = kind.from_config(scheduler.config, clip_sample=False, steps_offset=1, **settings)


def draw(pipeline, path, settings, text):
    """Draw a picture and write it as a PNG, whose text holds its settings and more as JSON. Return it, a PIL image.

    `settings` are the arguments of `sample`; `text` is what else the PNG is to say. Values of None are not written.
    The folder of `path` must exist.
    """
    image, chunks = sample(pipeline, **settings), PngInfo()
    said = {name: value for name, value in (settings | text).items() if value is not None}
    said = json.dumps(said, default=str, ensure_ascii=False).encode(errors="backslashreplace")  # a path may not be text
    chunks.add_itxt(sd_config.PNG_TEXT, said)  # in one chunk that only we read: ComfyUI takes `prompt` for its own JSON
    chunks.add_text("parameters", parameters(settings, text, type(pipeline.scheduler).__name__))
    part = path.with_name(f".{os.getpid()}.png")
    try:
        image.save(part, pnginfo=chunks)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise sd_config.WriteError(f"{path} cannot be written: {error}") from error
    return image


def parameters(settings, text, scheduler):
    """Return `draw`'s arguments as AUTOMATIC1111 writes them, for itself, Civitai and ComfyUI: prompts, and a line.

    The format is that of AUTOMATIC1111's `create_infotext` (modules/processing.py) and `quote` (infotext_utils.py).
    """
    folder = Path(os.path.abspath(text.get("checkpoint") or text.get("model_path") or os.sep))
    model = f"{folder.parent.name}/{folder.name}" if text.get("checkpoint") else folder.name
    line = {"Steps": settings["num_inference_steps"], "Sampler": dict(SCHEDULERS.values()).get(scheduler)}
    line |= {"CFG scale": max(1, settings["guidance_scale"]), "Seed": settings["seed"]}  # 1 is without guidance there
    line |= {"Size": f"{settings['width']}x{settings['height']}", "RNG": "CPU"}  # of the starting noise
    line["Model"] = json.dumps(model, ensure_ascii=False) if re.search("[,:\n]", model) else model
    line = ", ".join(f"{name}: {value}" for name, value in line.items() if value not in (None, ""))
    negative = f"\nNegative prompt: {settings['negative_prompt']}" if settings.get("negative_prompt") else ""
    return f"{settings['prompt']}{negative}\n{line}".strip().encode(errors="backslashreplace").decode()


def settings_of(image):
    """Return what `draw` wrote into a PNG (PIL.Image.Image) by its names, or {} where it wrote nothing."""
    text, old = image.info.get(sd_config.PNG_TEXT), image.info.keys() >= sd_config.OLD_PNG_TEXTS
    return json.loads(text) if text else dict(image.text) if old else {}


def sample(pipeline, prompt, seed, **settings):
    """Return a picture that is finite, with `settings` of `pipeline.__call__`.

    Its noise comes from a generator on the CPU with this `seed` (0 to 2^32 - 1), so it is the same on every device.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    pixels = pipeline(prompt, generator=generator, output_type="pt", **settings).images
    if pixels.isfinite().logical_not().any():  # diffusers would make it black
        raise sd_config.ReportedError(f"{prompt!r}: its picture is not finite; bf16 and fp32 reach further than fp16")
    return pipeline.image_processor.postprocess(pixels, do_denormalize=[False])[0]


def command(settings):
    """Return the command line that draws a picture with these settings, which are named as the flags are."""
    flags = (f"--{name}={shlex.quote(str(value))}" for name, value in settings.items() if value is not None)
    return " ".join(("python infer.py", *flags))


def captioned_grid(rows, captions):
    """Return rows (lists) of PIL pictures of one size as one picture, with a caption (a string) under each column.

    Pictures narrower than 256 pixels are enlarged without blur. PIL's font draws non-Latin letters as boxes.
    """
    (across, down), gap = rows[0][0].size, 8
    factor = -(-256 // across)
    across, down = factor * across, factor * down
    font = ImageFont.load_default(max(14, across // 20))
    wrapped = [textwrap.fill(caption, int(across / font.getlength("W"))) for caption in captions]  # its widest letter
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    below = max(measure.multiline_textbbox((0, 0), text, font)[3] for text in wrapped) + gap
    grid = Image.new("RGB", (len(captions) * (across + gap) + gap, len(rows) * (down + gap) + gap + below), "white")
    for row, column in itertools.product(range(len(rows)), range(len(captions))):
        picture = rows[row][column].resize((across, down), Image.Resampling.NEAREST)
        grid.paste(picture, (gap + column * (across + gap), gap + row * (down + gap)))
    for column, text in enumerate(wrapped):
        place = gap + column * (across + gap) + across / 2, len(rows) * (down + gap) + gap
        ImageDraw.Draw(grid).multiline_text(place, text, "black", font, anchor="ma", align="center")
    return grid


def write_single_file(args):
    """Write the pipeline that `args` describes as one file in the original layout. All is done on the CPU."""
    path, dtype = args.outputs[0], args.dtype or "fp16"
    print(f"Loading {args.checkpoint or args.model_path}")
    pipeline = open_pipeline(args, torch.float32)
    restore_precision(pipeline, "--model_path", args.base.get("variant"))  # which ends this if its files lack tensors
    if pipeline.unet.config.use_linear_projection:  # its text encoder has another layout there
        sd_config.stop("--single_file: for models like Stable Diffusion 1.5, and this one is like Stable Diffusion 2")
    tensors = original_layout(pipeline, DTYPES[dtype])
    size = sum(tensor.nbytes for tensor in tensors.values())
    with sd_config.exit_on(sd_config.WriteError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with sd_config.written_whole(path.parent / f".{os.getpid()}", path, size) as hidden:
            known = json.dumps(known_run(args))  # as one entry: several would come in another order each time
            save_file(tensors, hidden / path.name, {sd_config.PNG_TEXT: known})
            sd_config.write_manifest(hidden)  # which makes the file as readable as others, and flushes it
            (hidden / path.name).rename(path)
            shutil.rmtree(hidden)
    print(f"{path}: {len(tensors)} tensors in {dtype}, {sd_config.gigabytes(size)}")
    if pipeline.scheduler.config.prediction_type == "v_prediction":
        yaml = f"{path.with_suffix('.yaml')}, its v1-inference.yaml with `parameterization: v` under `params`"
        print(f"note: it predicts v: AUTOMATIC1111 needs beside it {yaml}; ComfyUI, the node ModelSamplingDiscrete")


def known_run(args):
    """Return seed, step and base model, as texts, of a checkpoint's run, or of the run that made an export."""
    beside = [] if args.checkpoint else sd_config.checkpoints(args.model_path)
    file = Path(args.model_path, "unet/diffusion_pytorch_model.safetensors")
    entry = [file.stat().st_size, sd_config.checksum(file)] if beside and file.is_file() else None
    same = [path for path in beside if entry in sd_config.read_json(path / sd_config.MANIFEST).values()]
    state = sd_config.read_json(Path(args.checkpoint or same[-1], sd_config.STATE)) if args.checkpoint or same else {}
    known = {name: str(state[name]) for name in ("seed", "step", "base_model") if name in state}
    return {name: os.path.basename(text) if os.path.isabs(text) else text for name, text in known.items()}


def original_layout(pipeline, dtype):
    """Return a pipeline's tensors in `dtype` by their names in the original layout, that of CompVis' latent diffusion.

    Exits with code 2 at a name that has no place in it, and at a value too large for `dtype`.
    """
    tensors = {}
    for part, prefix in LAYOUT.items():
        for name, tensor in getattr(pipeline, part).state_dict().items():
            try:
                original = f"{prefix}.{original_name(pipeline, part, name)}"
            except KeyError:
                sd_config.stop(f"--single_file: the original layout has no place for {name} of the {part}")
            if ((cast := tensor.to(dtype)).isinf() & tensor.isfinite()).any():
                sd_config.stop(f"--single_file: {original} overflows {dtype}; give --dtype bf16 or --dtype fp32")
            # The VAE's only matrices are those of its attention, which there is made of convolutions of 1 x 1.
            tensors[original] = cast[..., None, None] if part == "vae" and cast.ndim == 2 else cast
    return tensors


def original_name(pipeline, part, name):
    """Return the original layout's name of a tensor of one of the `LAYOUT`; raise a `KeyError` if it has none.

    It counts the UNet's layers over all levels, with downsampling as one, and the VAE's levels from the largest.
    """
    inner, _, kind = name.removeprefix("text_model.").rpartition(".")  # a prefix that some versions add
    if kind not in ("weight", "bias"):
        raise KeyError(kind)
    place, group = "", part
    if block := re.fullmatch(r"(?:(encoder|decoder)\.)?(down|mid|up)_blocks?\.?(\d*)\.(\w+)\.(\d+)\.(.+)", inner):
        coder, side, i, group, j, inner = block.groups()
        i, j, group, owner = int(i or 0), int(j), f"{part}.{group}", getattr(pipeline, part)
        blocks = getattr(getattr(owner, coder) if coder else owner, f"{side}_blocks", ())  # the middle has none
        first, after = (sum(len(level.resnets) for level in blocks[:end]) for end in (i, i + 1))
        level, last = len(blocks) - 1 - i if side == "up" else i, 1 + hasattr((*blocks, None)[i], "attentions")
        place = {
            "unet.resnets.down": f"input_blocks.{first + i + j + 1}.0.",
            "unet.attentions.down": f"input_blocks.{first + i + j + 1}.1.",
            "unet.downsamplers.down": f"input_blocks.{after + i + 1}.0.",
            "unet.resnets.mid": f"middle_block.{2 * j}.",
            "unet.attentions.mid": f"middle_block.{2 * j + 1}.",
            "unet.resnets.up": f"output_blocks.{first + j}.0.",
            "unet.attentions.up": f"output_blocks.{first + j}.1.",
            "unet.upsamplers.up": f"output_blocks.{after - 1}.{last}.",
            f"vae.resnets.{side}": f"{coder}.{side}.{level}.block.{j}.",
            f"vae.{side}samplers.{side}": f"{coder}.{side}.{level}.{side}sample.",
            "vae.resnets.mid": f"{coder}.mid.block_{j + 1}.",
            "vae.attentions.mid": f"{coder}.mid.attn_1.",
        }[f"{group}.{side}"]
    renamed = inner if re.fullmatch(SAME, f"{group}.{inner}", re.VERBOSE) else RENAMED[f"{group}.{inner}"]
    return f"{place}{renamed}.{kind}"


if __name__ == "__main__":
    main(ARGS)
