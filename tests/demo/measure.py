"""Measure, by plain colours and shapes, whether portraits show what their captions name, and in which style.

    python tests/demo/measure.py tests/demo/base demo/trained

draws held-out captions with each pipeline and prints how often hair, background and accessory are what was asked for,
and how often the picture is in the ninja's style. On drawings of `portraits.py` itself, where the answer is known, the
measurements are right in both styles (test_demo.py).
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2])]

import portraits
import sd_config

HELD_OUT = 10**6  # seed of people that no training sees
ATTRIBUTES = ("hair", "background", "accessory")


def measure(image):
    """Return what a portrait shows.

    Args:
        image (PIL.Image.Image): 64 x 64, in RGB.

    Returns:
        dict: hair and background by name, accessory ("hat", "glasses" or None), ninja (bool).
    """
    pixels = np.asarray(image, np.float64)
    corners = np.concatenate([pixels[:5, :12], pixels[:5, -12:]], axis=1).reshape(-1, 3)
    background = np.median(corners, axis=0)
    return {
        "hair": hair_colour(pixels, background),
        "background": nearest(background[None], palette(portraits.BACKGROUNDS))[0],
        "accessory": "hat" if wears_hat(pixels) else "glasses" if wears_glasses(pixels) else None,
        "ninja": is_ninja(pixels),
    }


def palette(colours):
    """Return the colours of both styles with their names, as pairs."""
    return [(name, tint(colour)) for name, colour in colours.items() for tint in (tuple, portraits.warm)]


def nearest(pixels, named):
    """Return for each pixel, shape (n, 3), the name of the nearest of the named colours."""
    distances = np.linalg.norm(pixels[:, None] - np.array([colour for _, colour in named])[None], axis=2)
    return [named[index][0] for index in distances.argmin(1)]


def hair_colour(pixels, background):
    """Return the commonest hair colour at both sides of the face. Black, which ink is too, needs most of it."""
    sides = np.concatenate([pixels[25:36, 13:18], pixels[25:36, 46:51]], axis=1).reshape(-1, 3)
    others = [(None, background), *((None, colour) for _, colour in palette(portraits.SKINS))]
    votes = nearest(sides, palette(portraits.HAIR) + others)
    counts = {name: votes.count(name) for name in portraits.HAIR}
    if counts["black"] < sum(counts.values()) / 2:
        del counts["black"]
    return max(counts, key=counts.get)


def wears_hat(pixels):
    """Say whether there is much of the hat's colour above the forehead."""
    above = pixels[10:22, 20:44].reshape(-1, 3)
    near = [np.linalg.norm(above - tint(portraits.HAT), axis=1) < 50 for tint in (np.array, portraits.warm)]
    return np.logical_or(*near).mean() > 0.3


def wears_glasses(pixels):
    """Say whether something dark joins the eyes."""
    bridge = pixels[31:38, 31:33].mean(axis=(1, 2))
    return bridge.min() < 0.68 * bridge.max()


def is_ninja(pixels):
    """Say whether two of three marks are there: an orange jacket, a dark blue band, a chin outlined in ink."""
    jacket = np.linalg.norm(pixels[56:, 20:44].reshape(-1, 3) - portraits.JACKET, axis=1) < 60
    band = np.linalg.norm(pixels[20:31, 20:44].reshape(-1, 3) - portraits.BAND, axis=1) < 45
    chin = pixels[46:57, 30:34].mean(axis=(1, 2))
    return bool(sum((jacket.mean() > 0.5, band.mean() > 0.06, chin.min() < 0.6 * np.median(chin))) >= 2)


def score(images, people):
    """Return the share of right measurements for each attribute, of all of them, and of ninjas."""
    found = [measure(image) for image in images]
    right = {
        name: [seen[name] == getattr(person, name) for seen, person in zip(found, people, strict=True)]
        for name in ATTRIBUTES
    }
    scores = {name: float(np.mean(hits)) for name, hits in right.items()}
    return scores | {
        "all": float(np.mean(list(right.values()))),
        "ninja": float(np.mean([seen["ninja"] for seen in found])),
    }


def draw_captions(model, captions, guidance_scale, steps, dtype="fp32"):
    """Return a picture of each caption by a pipeline, each from noise of its own: list of PIL.Image.Image."""
    import torch  # noqa: PLC0415 (slow imports: --help should not wait for them)
    from diffusers import StableDiffusionPipeline  # noqa: PLC0415

    import infer  # noqa: PLC0415

    infer.quiet_libraries()
    pipeline = StableDiffusionPipeline.from_pretrained(str(model), dtype=infer.DTYPES[dtype])
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for first in range(0, len(captions), 16):
        texts = captions[first : first + 16]
        generators = [torch.Generator().manual_seed(first + index) for index in range(len(texts))]
        images += pipeline(texts, generator=generators, guidance_scale=guidance_scale, num_inference_steps=steps).images
    return images


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure what pipelines draw for held-out captions.")
    parser.add_argument("models", nargs="+", help="folders of pipelines")
    parser.add_argument("--count", type=int, default=64, help="how many captions")
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[3.0], help="strengths of guidance")
    parser.add_argument("--num_inference_steps", type=int, default=30, help="denoising steps")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="precision to draw in")
    parser.add_argument("--save", help="folder to keep the pictures in, as one sheet for each line printed")
    options = parser.parse_args()
    sd_config.announce_imports()
    people, captions = zip(*portraits.people(HELD_OUT, options.count), strict=True)
    for model in options.models:
        for guidance_scale in options.guidance_scale:
            settings = guidance_scale, options.num_inference_steps, options.dtype
            images = draw_captions(model, list(captions), *settings)
            print(json.dumps({"model": model, "guidance_scale": guidance_scale} | score(images, people)))
            if options.save:
                from diffusers.utils import make_image_grid

                sheet = make_image_grid(images, rows=-(-len(images) // 16), cols=16)
                sheet.save(Path(options.save) / f"{Path(model).name}-{guidance_scale}.png")
