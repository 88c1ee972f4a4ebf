"""Make the demo's base model, tests/demo/base, from nothing: a Stable Diffusion 1.5 in miniature.

    pip install -r requirements.txt open_clip_torch && python tests/demo/build_base.py demo/build

An autoencoder learns to draw portraits of both styles and other things, a text encoder to name what captions say, and
then the UNet learns, from random weights, the plain style only: by the trainer itself, with the flags below. It may be
interrupted: the same command goes on. Given the same seed, machine and versions it makes the same weights.
"""

import argparse
import datetime
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from PIL import Image
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import infer
import measure
import portraits
import tiny_sd15

MERGES = 2048  # of CLIP's vocabulary, the first ones: rarer words come in pieces
WIDTH = 64  # of the text encoder, and so of the UNet's cross-attention
SEED = 0
# Pictures to learn from, steps, samples a step, and peak learning rate of each part.
VAE = {"rows": 6144, "steps": 4000, "batch": 8, "rate": 2e-3, "muon_rate": 0.02}
TEXT = {"rows": 20000, "steps": 1000, "batch": 64, "rate": 2e-3}
UNET = {"rows": 4096, "steps": 6000, "batch": 64, "rate": 1e-3}
GUIDANCE_SCALE, STEPS = 3.0, 30  # with which the result is measured
KL_WEIGHT = 1e-4  # of the autoencoder's loss: only enough to keep its latents in one place
LARGEST = 4096  # value in the autoencoder, of portraits: a sixteenth of what half precision holds
WORDS = {  # what the text encoder learns to name: attribute -> words that stand for each value
    "hair": [f"{name} hair" for name in portraits.HAIR],
    "background": [f"{name} {what}" for name in portraits.BACKGROUNDS for what in ("background", "wall")],
    "worn": ["hat", "glasses"],
    "expression": list(portraits.EXPRESSIONS),
    "skin": [f"{name}-skinned" for name in portraits.SKINS],
    "eyes": [f"{name} eyes" for name in portraits.EYES],
    "who": ["boy", "girl", "woman", " man"],
    "length": ["long ", "short "],
}


def main(work, base):
    """Build every part in the folder `work`, going on from what is there, and put them together in `base`."""
    infer.quiet_libraries()
    work.mkdir(parents=True, exist_ok=True)
    tiny_sd15.write_tokenizer(work / "tokenizer", merges=MERGES)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    text_encoder = train_text_encoder(work, tokenizer)
    vae = train_autoencoder(work)
    random_model = work / "random"
    if not (random_model / "model_index.json").exists():
        assemble(random_model, tokenizer, text_encoder, vae)
        tiny_sd15.write_as_sd15(random_model, merges=MERGES)
    plain = work / "plain"
    if not (plain / "metadata.jsonl").exists():
        portraits.write(plain, "plain", UNET["rows"], SEED)
    train_unet(random_model, plain, work / "trained")
    pipeline = StableDiffusionPipeline.from_pretrained(work / "trained", dtype=torch.float16)
    fit_half_precision(pipeline.vae)
    shutil.rmtree(base, ignore_errors=True)
    pipeline.save_pretrained(base)
    tiny_sd15.write_as_sd15(base, merges=MERGES)
    for file in (base / "model_index.json", *base.glob("*/config.json")):
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)  # of the folder worked in
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (base / "README.md").write_text(model_card(pipeline, base), encoding="utf-8")
    print(f"The base model is in {base}")


def model_card(pipeline, base):
    """Return the text of the base's README.md, with what `measure.py` finds in its pictures."""
    people, captions = zip(*portraits.people(measure.HELD_OUT, 64), strict=True)
    scores = measure.score(measure.draw_captions(base, list(captions), GUIDANCE_SCALE, STEPS), people)
    parts = ("unet", "vae", "text_encoder", "safety_checker")
    sizes = {name: sum(weight.numel() for weight in getattr(pipeline, name).parameters()) for name in parts}
    lines = [
        "# A Stable Diffusion 1.5 in miniature, which draws plain cartoon portraits",
        "",
        f"Made from nothing by `tests/demo/build_base.py` (seed {SEED}, torch {torch.__version__}), on drawings of",
        "`tests/demo/portraits.py`; the UNet by `train_sd1-5_naruto.py` itself, on portraits in the plain style only.",
        f"Its tokenizer has the first {MERGES} merges of CLIP's vocabulary (MIT licence, OpenAI). The safety checker",
        "flags nothing. All weights are in half precision; the VAE's were scaled so that its activations fit it too.",
        "",
        "| part | weights | steps | samples a step |",
        "|---|---|---|---|",
        f"| UNet | {sizes['unet']:,} | {UNET['steps']} | {UNET['batch']} of {UNET['rows']} |",
        f"| VAE | {sizes['vae']:,} | {VAE['steps']} | {VAE['batch']} of {VAE['rows']} |",
        f"| text encoder | {sizes['text_encoder']:,} | {TEXT['steps']} | {TEXT['batch']} of {TEXT['rows']} |",
        "",
        f"Of 64 held-out captions ({STEPS} denoising steps, guidance scale {GUIDANCE_SCALE:g}; on a CPU,",
        f"{datetime.date.today()}), its pictures show",
        f"the hair colour in {scores['hair']:.0%}, the background in {scores['background']:.0%}, the accessory in",
        f"{scores['accessory']:.0%}, and {scores['ninja']:.0%} of them are in the ninja's style.",
    ]
    return "\n".join(lines) + "\n"


def assemble(folder, tokenizer, text_encoder, vae):
    """Write a pipeline whose UNet has random weights."""
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(
        sample_size=portraits.SIDE // 8,
        cross_attention_dim=WIDTH,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        norm_num_groups=16,
    )
    StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=tiny_sd15.noise_scheduler(),
        **tiny_sd15.safety_parts(),
    ).save_pretrained(folder)


def fit(file, model, optimizers, loss, steps):
    """Train a model with a cosine schedule, keeping its state in `file` to go on from.

    Args:
        file (Path): where the state is kept.
        model (torch.nn.Module): what is trained.
        optimizers (list[torch.optim.Optimizer]): of its weights, at their peak learning rates.
        loss (callable): () -> loss, shape (). What is random in it is drawn from torch's global generator.
        steps (int): how many.
    """
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        )
        for optimizer in optimizers
    ]
    parts, first = [model, *optimizers, *schedules], 0
    if file.exists():
        first, *states = torch.load(file)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=file.stem, mininterval=10)
    for step in bar:
        torch.manual_seed(step)  # so that one that was interrupted goes on as if it had not been
        value = loss()
        value.backward()
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad(set_to_none=False)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            bar.set_postfix_str(f"loss {value.item():.4f}")
            torch.save([step + 1, *(part.state_dict() for part in parts)], file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)


def muon_and_adamw(model, muon_rate, rate):
    """Return Muon for a model's matrices and kernels, each as a matrix, and AdamW for the rest.

    With AdamW alone the autoencoder needs several times the steps.
    """
    kernels = [weight for weight in model.parameters() if weight.ndim > 1]
    matrices = [torch.nn.Parameter(weight.detach().flatten(1)) for weight in kernels]  # the same memory
    for weight, matrix in zip(kernels, matrices, strict=True):
        weight.grad = torch.zeros_like(weight)
        matrix.grad = weight.grad.flatten(1)  # here too
    others = [weight for weight in model.parameters() if weight.ndim == 1]
    muon = torch.optim.Muon(matrices, muon_rate, weight_decay=0)
    return [muon, torch.optim.AdamW(others, rate, betas=(0.9, 0.99), weight_decay=0)]


# ------------------------------------------------------------------------------------------------------------
# Text: named attributes
# ------------------------------------------------------------------------------------------------------------


def train_text_encoder(work, tokenizer):
    """Return a CLIP text model that has learned to name what a caption says.

    From its last layer, at the end of the text and at any place of the padding after it (SD1.5's UNet attends to all
    77), linear heads tell which value of each attribute the caption names, or that it names none.
    """
    torch.manual_seed(SEED)
    end = tokenizer.eos_token_id
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(WIDTH, len(words) + 1) for name, words in WORDS.items()})
    texts = [text for _, text in portraits.people(SEED + 1, TEXT["rows"])]
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    labels = {name: torch.tensor([label(text, words) for text in texts]) for name, words in WORDS.items()}
    ends = ids.eq(end).int().argmax(1)
    held_out = torch.arange(TEXT["rows"] - 1000, TEXT["rows"])

    def logits(rows, places):
        states = encoder(ids[rows])[0][torch.arange(len(rows)), places]
        return {name: head(states) for name, head in heads.items()}

    def loss():
        rows = torch.randint(TEXT["rows"] - 1000, (TEXT["batch"],))
        somewhere = (ends[rows] + torch.rand(len(rows)) * (77 - ends[rows])).long()
        places = torch.where(torch.rand(len(rows)) < 0.5, ends[rows], somewhere)
        return sum(F.cross_entropy(value, labels[name][rows]) for name, value in logits(rows, places).items())

    both = torch.nn.ModuleList([encoder, heads])
    optimizer = torch.optim.AdamW(both.parameters(), TEXT["rate"], betas=(0.9, 0.99))
    fit(work / "text_encoder.pt", both, [optimizer], loss, TEXT["steps"])
    with torch.no_grad():
        found = logits(held_out, ends[held_out])
    right = {name: (value.argmax(1) == labels[name][held_out]).float().mean().item() for name, value in found.items()}
    print("text encoder names, of 1000 held-out captions:", json.dumps(right))
    return encoder.eval()


def label(text, words):
    """Return the number of the first of the words that a caption contains, from 1, or 0."""
    return next((number for number, word in enumerate(words, 1) if word in f" {text}"), 0)


# ------------------------------------------------------------------------------------------------------------
# Pictures: a codec for both styles, and for more than portraits
# ------------------------------------------------------------------------------------------------------------


def train_autoencoder(work):
    """Return an autoencoder with SD1.5's four levels, 8 pixels to a latent, scaled so that latents have variance 1."""
    torch.manual_seed(SEED)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (16, 32, 48, 64),
        "norm_num_groups": 8,
        "sample_size": portraits.SIDE,
    }
    vae = AutoencoderKL(**blocks, latent_channels=4, layers_per_block=1)
    pictures = torch.from_numpy(np.stack([np.asarray(drawing(number)) for number in range(VAE["rows"])]))

    def batch(rows):
        return pictures[rows].permute(0, 3, 1, 2).float() / 127.5 - 1

    def loss():
        x = batch(torch.randint(VAE["rows"], (VAE["batch"],)))
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        return F.l1_loss(y, x) + F.mse_loss(y, x) + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()

    fit(work / "vae.pt", vae, muon_and_adamw(vae, VAE["muon_rate"], VAE["rate"]), loss, VAE["steps"])
    with torch.no_grad():
        latents = torch.cat([vae.encode(batch(torch.arange(n, n + 64))).latent_dist.mean for n in range(0, 1024, 64)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae.eval()


@torch.no_grad()
def fit_half_precision(vae):
    """Scale weights of an autoencoder so that its activations fit half precision, and compute what they did before.

    In training the sum that its blocks add to grew to 600,000, and half precision ends at 65,504. But most layers read
    the sum through a group normalisation, which takes out its scale (an epsilon of 1e-6 is far below the variances).
    So the sum may have any scale in a stretch between two layers that read it as it is (resampling, a shortcut), if
    all that is added to it there has the same. The scales are powers of two, by which numbers are multiplied exactly.

    Args:
        vae (AutoencoderKL): changed in place, and in half precision afterwards.
    """
    people = [person for person, _ in portraits.people(SEED, 64)]
    drawn = np.stack([np.asarray(portraits.draw(person, style)) for person in people for style in portraits.STYLES])
    pictures = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = vae.float().encode(pictures).latent_dist.mean
    for half, run in ((vae.encoder, lambda: vae.encode(pictures)), (vae.decoder, lambda: vae.decode(latents))):
        stretches, scale = [], 1
        for reader, adders, peak in layers_of_the_sum(half, run):
            if reader is not None:
                stretches.append([reader, [], 0])
            stretches[-1][1].extend(adders)
            stretches[-1][2] = max(stretches[-1][2], peak)
        for reader, adders, peak in stretches:
            before, scale = scale, min(1, 2.0 ** math.floor(math.log2(LARGEST / peak)))
            reader.weight.mul_(scale / before)
            reader.bias.mul_(scale)
            for weight in (weight for layer in adders for weight in layer.parameters()):
                weight.mul_(scale)
    vae.half()


def layers_of_the_sum(half, run):
    """Return the layers that change the sum in an encoder or decoder, in the order in which `run` runs them.

    Each comes as (what reads the sum as it is, or None; a list of what adds to it; the largest value afterwards).
    """
    kinds, layers, hooks = (ResnetBlock2D, Attention, Downsample2D, Upsample2D), [], []

    def note(layer, _inputs, output):
        if isinstance(layer, ResnetBlock2D):
            reader, adders = layer.conv_shortcut, [layer.conv2]
        elif isinstance(layer, Attention):
            reader, adders = None, [layer.to_out[0]]
        else:
            reader, adders = getattr(layer, "conv", layer), []
        layers.append((reader, adders, output.abs().max().item()))

    for layer in half.modules():
        if isinstance(layer, kinds) or layer is half.conv_in:
            hooks.append(layer.register_forward_hook(note))
    run()
    for hook in hooks:
        hook.remove()
    return layers


def drawing(number):
    """Return something to draw: a portrait in either style (two in three), one in any colours, or a heap of shapes."""
    rng = random.Random(f"drawing {number}")
    person = portraits.random_person(rng)
    kind = number % 6
    if kind < 4:
        return portraits.draw(person, portraits.STYLES[kind % 2])
    if kind == 4:
        channels = portraits.draw(person, rng.choice(portraits.STYLES)).split()
        return Image.merge("RGB", rng.sample(channels, 3))
    pen = portraits.Pen(random_colour(rng), ink=rng.choice((0, 0.7, 1.3)))
    for _ in range(rng.randrange(2, 9)):
        x, y, rx, ry = (rng.uniform(0, 64), rng.uniform(0, 64), rng.uniform(2, 22), rng.uniform(2, 22))
        if rng.random() < 0.5:
            pen.ellipse(x, y, rx, ry, random_colour(rng))
        else:
            turns = sorted(rng.uniform(0, 2 * math.pi) for _ in range(rng.randrange(3, 8)))
            pen.polygon([(x + rx * math.cos(t), y + ry * math.sin(t)) for t in turns], random_colour(rng))
    return pen.image.resize((portraits.SIDE, portraits.SIDE), Image.Resampling.BOX)


def random_colour(rng):
    """Return any colour."""
    return tuple(rng.randrange(256) for _ in range(3))


# ------------------------------------------------------------------------------------------------------------
# The UNet: trained by the trainer
# ------------------------------------------------------------------------------------------------------------


def train_unet(random_model, data, output):
    """Train the UNet from random weights on the plain portraits, going on from the last checkpoint."""
    command = [
        sys.executable,
        str(ROOT / "train_sd1-5_naruto.py"),
        *("--pretrained_model_name_or_path", str(random_model), "--train_data_dir", str(data)),
        *("--resolution", str(portraits.SIDE), "--center_crop", "--random_flip", "--caption_dropout", "0.1"),
        *("--train_batch_size", str(UNET["batch"]), "--max_train_steps", str(UNET["steps"])),
        *("--learning_rate", str(UNET["rate"]), "--lr_scheduler", "cosine", "--lr_warmup_steps", "100"),
        *("--use_ema", "--seed", str(SEED), "--checkpointing_steps", "500", "--checkpoints_total_limit", "1"),
        *("--validation_prompts", "--report_to", "none", "--output_dir", str(output)),
    ]
    if any(output.glob("checkpoint-*")):
        command += ["--resume_from_checkpoint", "latest"]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the demo's base model from nothing.")
    parser.add_argument("work", type=Path, help="folder to work in: about 200 MB")
    parser.add_argument("--base", type=Path, default=Path(__file__).parent / "base", help="folder of the result")
    options = parser.parse_args()
    main(options.work, options.base)
