"""Build, without a network, a model in Stable Diffusion 1.5's exact layout and a captioned set of real photographs.

    python tests/tiny_sd15.py demo          # a model of a few megabytes, and the photographs
    python tests/tiny_sd15.py demo --full   # SD1.5's true configuration (4.3 GB)

Weights are random: such a model draws coloured noise, but every class, file and shape is SD1.5's. The vocabulary is
CLIP's own, from the package open_clip_torch; the photographs come with the package scikit-image.
"""

import argparse
import gzip
import importlib.util
import json
import re
from pathlib import Path

MODEL, PHOTOS = "stable-diffusion-v1-5", "photos"
MERGES = 48894  # of pairs of symbols, in CLIP's vocabulary
SAFETY_SIZE = 32  # side in pixels of the pictures that the tiny safety checker looks at

# File in scikit-image, mode to store it in, suffix to store it with, caption.
PICTURES = [
    ("astronaut.png", "RGB", ".png", "an astronaut in an orange suit smiling in front of a flag"),
    ("chelsea.png", "RGB", ".jpg", "a ginger cat looking into the camera"),
    ("coffee.png", "RGBA", ".png", "a cup of coffee on a wooden table"),
    ("rocket.jpg", "RGB", ".jpg", "a rocket on its launch pad at dusk"),
    ("camera.png", "L", ".png", "a man in a long coat with a camera on a tripod"),
    ("coins.png", "L", ".jpg", "old coins in rows"),
    ("hubble_deep_field.jpg", "RGB", ".jpg", "many galaxies in a black sky"),
    ("motorcycle_left.png", "RGB", ".jpg", "a motorcycle in a garage full of tools"),
    ("motorcycle_right.png", "P", ".png", "a motorcycle seen from a little further right"),
    ("retina.jpg", "CMYK", ".jpg", "the back of an eye with its fine vessels"),
    ("moon.png", "I;16", ".png", "the surface of the moon with craters"),
    ("brick.png", "LA", ".png", "a wall of bricks"),
    ("grass.png", "L", ".png", "dry grass"),
    ("gravel.png", "RGB", ".png", "grey gravel"),
]


def build(folder, *, full=False, seed=0, merges=MERGES):
    """Write the model to `folder`/stable-diffusion-v1-5 and the photographs to `folder`/photos.

    Args:
        folder (path): where to write; made if it does not exist.
        full (bool): build SD1.5's true configuration instead of the tiny one.
        seed (int): of the random weights.
        merges (int): size of the vocabulary, as for `write_tokenizer`.

    Returns:
        tuple[Path, Path]: the two folders.
    """
    model, photos = Path(folder) / MODEL, Path(folder) / PHOTOS
    build_model(model, full=full, seed=seed, merges=merges)
    build_photos(photos)
    return model, photos


def build_model(folder, *, full=False, seed=0, merges=MERGES):
    """Write a random Stable Diffusion pipeline, all in safetensors."""
    import torch  # noqa: PLC0415 (slow imports: --help should not wait for them)
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: PLC0415
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: PLC0415

    torch.manual_seed(seed)
    width = 768 if full else 32  # of the text encoder, and so of the UNet's cross-attention
    # Eight channels in each normalisation group, about as many as in SD1.5. With fewer, a group has so few values at
    # the lowest resolution (1 x 1) that rounding is amplified, and with one channel some gradients are nothing else;
    # Adam would turn that into full steps.
    unet = {} if full else {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "norm_num_groups": 4}
    vae = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512}
    text = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 12, "num_attention_heads": 12}
    if not full:
        vae = {"block_out_channels": (8, 16, 16, 32), "layers_per_block": 1, "sample_size": 64, "norm_num_groups": 2}
        text |= {"num_hidden_layers": 2, "num_attention_heads": 4}

    write_tokenizer(folder / "tokenizer", merges)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
    StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=64 if full else 8, cross_attention_dim=width, **unet),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            scaling_factor=0.18215,
            **vae,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), projection_dim=width, **text)),
        tokenizer=tokenizer,
        scheduler=noise_scheduler(),
        requires_safety_checker=not full,  # the true one would add 1.2 GB that no training touches
        **dict.fromkeys(("safety_checker", "feature_extractor")) if full else safety_parts(),
    ).save_pretrained(folder)
    write_as_sd15(folder, merges)


def write_as_sd15(folder, merges=MERGES):
    """Write some things of a pipeline as SD1.5 has them, and transformers 4 reads them, but today's libraries do not.

    They are the tokenizer's files (see `write_tokenizer`), and names of weights.
    """
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    write_tokenizer(folder / "tokenizer", merges)
    for part, old, new in (
        ("text_encoder", r"^(text_model\.)?", "text_model."),
        ("safety_checker", r"^(vision_model\.)+", "vision_model.vision_model."),
    ):
        if (file := folder / part / "model.safetensors").exists():
            tensors = {re.sub(old, new, name): value for name, value in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})


def noise_scheduler():
    """Return SD1.5's noise schedule and sampler."""
    from diffusers import PNDMScheduler  # noqa: PLC0415

    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def safety_parts():
    """Return a tiny safety checker that flags nothing, and the feature extractor that it needs."""
    import torch  # noqa: PLC0415
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker  # noqa: PLC0415
    from transformers import CLIPConfig, CLIPImageProcessor  # noqa: PLC0415

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = tower | {"image_size": SAFETY_SIZE, "patch_size": 16}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=tower, vision_config=vision, projection_dim=16))
    with torch.no_grad():  # a picture is flagged where a cosine exceeds its threshold: no cosine exceeds 2
        checker.concept_embeds_weights.fill_(2)
        checker.special_care_embeds_weights.fill_(2)
    size = {"height": SAFETY_SIZE, "width": SAFETY_SIZE}
    return {
        "safety_checker": checker,
        "feature_extractor": CLIPImageProcessor(size={"shortest_edge": SAFETY_SIZE}, crop_size=size),
    }


def write_tokenizer(folder, merges=MERGES):
    """Write CLIP's tokenizer, 49408 entries, or one with only the first `merges`, as the four files of SD1.5.

    The vocabulary is, in order: 256 byte symbols, the same at the end of a word, 48894 merges, and two special tokens
    (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2.4).
    """
    package = Path(importlib.util.find_spec("open_clip").submodule_search_locations[0])
    packed = (package / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode("utf-8").split("\n")[1 : merges + 1]
    # Bytes that print stand for themselves; the others, in order, for the characters from 256 on.
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = len(set(range(256)) - set(printing))
    symbols = [chr(byte) for byte in printing] + [chr(256 + index) for index in range(others)]
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokens = [
        *symbols,
        *(f"{symbol}</w>" for symbol in symbols),
        *(merge.replace(" ", "") for merge in merges),
        start,
        end,
    ]

    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.iterdir():
        stale.unlink()
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    config = special | {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    for name, content in {"vocab": vocabulary, "special_tokens_map": special, "tokenizer_config": config}.items():
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def build_photos(folder):
    """Write the photographs, in several sizes, modes and formats, with a metadata.jsonl that captions them."""
    from PIL import Image  # noqa: PLC0415

    source = Path(importlib.util.find_spec("skimage").submodule_search_locations[0]) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    captions = []
    for index, (name, mode, suffix, caption) in enumerate(PICTURES):
        image = Image.open(source / name)
        image.thumbnail((160 + 16 * index, 160 + 16 * index))
        path = (folder / name).with_suffix(suffix)
        in_mode(image, mode).save(path)
        captions.append(json.dumps({"file_name": path.name, "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(captions) + "\n", encoding="utf-8")


def in_mode(image, mode):
    """Return the picture in another mode: 16 bits fill their range, transparency fades out to the left."""
    from PIL import Image  # noqa: PLC0415

    if mode == "I;16":
        return image.convert("I").point(lambda grey: grey * 257).convert("I;16")
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").rotate(90).resize(image.size))
        return image
    return image.convert(mode)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build a model in SD1.5's layout, and a small captioned data set.")
    parser.add_argument("folder", help="where to write")
    parser.add_argument(
        "--full", action="store_true", help="build SD1.5's true configuration: 4.3 GB of random weights"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    options = parser.parse_args()
    for path in build(options.folder, full=options.full, seed=options.seed):
        print(path)
