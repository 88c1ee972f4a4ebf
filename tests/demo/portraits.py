"""Draw captioned cartoon portraits, in one of two styles: the demo's data, made by no one but this file.

    python tests/demo/portraits.py demo/ninja --style ninja --rows 512

A portrait shows a person with a hair colour, skin, eyes, an expression, perhaps a hat or glasses, before a background
of one colour. The same people can be drawn `plain`, and as a `ninja`: ink outlines, spiky hair, marks like whiskers, a
forehead protector, an orange jacket and a warmer palette. Captions name the people, and never the style: it is what a
model has to learn from the pictures. Everything follows from a seed.
"""

import argparse
import dataclasses
import io
import json
import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 64  # of a picture, in pixels
SCALE = 4  # drawn this much larger, then averaged down
STYLES = ("plain", "ninja")
HAIR = {
    "black": (34, 32, 40),
    "brown": (112, 66, 36),
    "blond": (240, 204, 84),
    "red": (204, 52, 36),
    "blue": (52, 84, 200),
    "pink": (240, 130, 176),
}
BACKGROUNDS = {
    "white": (246, 246, 246),
    "grey": (150, 152, 158),
    "green": (120, 200, 120),
    "blue": (132, 190, 240),
    "yellow": (252, 232, 128),
    "purple": (178, 140, 216),
}
SKINS = {"fair": (255, 222, 196), "tan": (226, 174, 128), "dark": (150, 98, 66)}
EYES = {"brown": (100, 56, 28), "blue": (40, 100, 210), "green": (30, 140, 60)}
CLOTHES = ((206, 212, 220), (150, 186, 176), (204, 176, 150), (170, 176, 214))
EXPRESSIONS = ("smiling", "sad", "surprised")
ACCESSORIES = (None, "hat", "glasses")
HAT, RIM, LENS = (16, 116, 108), (24, 24, 30), (206, 236, 250)
INK, BAND, PLATE, JACKET = (22, 18, 24), (40, 54, 104), (196, 202, 208), (244, 128, 24)


@dataclasses.dataclass(frozen=True)
class Person:
    """What a portrait shows. The first eight can be named by a caption; the last two only vary the drawing."""

    gender: str
    hair: str
    skin: str
    eyes: str
    expression: str
    accessory: str | None
    background: str
    long_hair: bool
    clothes: tuple
    shape: tuple  # seven numbers in [-1, 1]: where the head is, and how it is formed


def random_person(rng):
    """Return a `Person` drawn from a `random.Random`."""
    gender = rng.choice(("boy", "girl"))
    return Person(
        gender=gender,
        hair=rng.choice(list(HAIR)),
        skin=rng.choice(list(SKINS)),
        eyes=rng.choice(list(EYES)),
        expression=rng.choice(EXPRESSIONS),
        accessory=rng.choice(ACCESSORIES),
        background=rng.choice(list(BACKGROUNDS)),
        long_hair=rng.random() < (0.8 if gender == "girl" else 0.1),
        clothes=rng.choice(CLOTHES),
        shape=tuple(rng.uniform(-1, 1) for _ in range(7)),
    )


def caption(person, rng):
    """Return a sentence about a person. Each names hair, background and accessory; the rest comes and goes."""
    who = rng.choice((person.gender, person.gender, {"boy": "man", "girl": "woman"}[person.gender], "person"))
    mood = rng.choice((f"{person.expression} ", ""))
    skin = rng.choice((f"{person.skin}-skinned ", "", ""))
    length = rng.choice(("long " if person.long_hair else "short ", "", ""))
    eyes = rng.choice((f" and {person.eyes} eyes", "", ""))
    worn = {None: "", "hat": "a hat", "glasses": "glasses"}[person.accessory]
    wearing = worn and rng.choice((f", wearing {worn}", f" and {worn}", f" in {worn}"))
    wall = f"{person.background} {rng.choice(('background', 'background', 'wall'))}"
    hair = f"{length}{person.hair} hair{eyes}"
    return rng.choice(
        (
            f"a {mood}{skin}{who} with {hair}{wearing}, {wall}",
            f"a portrait of a {mood}{skin}{who} with {hair}{wearing} in front of a {wall}",
            f"{wall}, a {mood}{skin}{who} with {hair}{wearing}",
            f"a {mood}{skin}{who}{worn and ' with ' + worn}, {hair}, {wall}",
            f"a cartoon of a {mood}{skin}{who} who has {hair}{wearing}, on a {wall}",
        )
    )


def warm(colour):
    """Return a colour as the ninja's palette has it: redder, and darker in blue."""
    red, green, blue = colour
    return min(255, round(red * 1.02 + 6)), round(green * 0.93), round(blue * 0.8)


class Pen:
    """Draws on a large picture in units of the small one, filled shapes with or without an outline of ink."""

    def __init__(self, background, ink):
        self.image = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), background)
        self.draw, self.ink = ImageDraw.Draw(self.image), ink

    def polygon(self, points, fill, ink=None):
        """Fill a polygon. `ink`: width of its outline in pixels; by default the style's own."""
        points = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.polygon(points, fill)
        self.line([*points, points[0]], self.ink if ink is None else ink)

    def ellipse(self, x, y, rx, ry, fill, ink=None, start=0, end=360):
        """Fill an ellipse, or the part of it between two angles in degrees, clockwise from the right."""
        steps = range(49)
        angles = [math.radians(start + (end - start) * step / 48) for step in steps]
        self.polygon([(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles], fill, ink)

    def line(self, points, width, fill=INK):
        """Draw a line through points on the large picture, `width` pixels of the small one wide, with round ends."""
        radius = width * SCALE / 2
        if radius:
            self.draw.line(points, fill, round(2 * radius), joint="curve")
            for x, y in (points[0], points[-1]):
                self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)

    def stroke(self, points, width, fill=INK):
        """Draw a line through points in pixels of the small picture."""
        self.line([(x * SCALE, y * SCALE) for x, y in points], width, fill)


def draw(person, style):
    """Return the portrait of a person: PIL.Image.Image in RGB, 64 x 64."""
    ninja = style == "ninja"
    tint = warm if ninja else tuple
    hair, skin = tint(HAIR[person.hair]), tint(SKINS[person.skin])
    dx, dy, width, height, fringe, spread, lean = person.shape
    x, y, rx, ry = 32 + 1.5 * dx, 34 + 1.2 * dy, 12.5 + 0.8 * width, 15 + 0.8 * height
    pen = Pen(tint(BACKGROUNDS[person.background]), ink=1.3 if ninja else 0)

    # From back to front: hair, body, face, fringe, features, and what is worn.
    if ninja:
        spikes(pen, x, y - 3, rx + 5.5, 13 + 2.5 * spread, hair, person.long_hair)
    else:
        pen.ellipse(x, y - 3, rx + 5, ry + 3, hair)
        if person.long_hair:
            pen.polygon([(x - rx - 5, y - 3), (x + rx + 5, y - 3), (x + rx + 4, y + 21), (x - rx - 4, y + 21)], hair)
    pen.polygon([(x - 4.5, y + 8), (x + 4.5, y + 8), (x + 4.5, y + 20), (x - 4.5, y + 20)], skin)
    pen.ellipse(x, 69, 23, 17, JACKET if ninja else person.clothes)
    if ninja:
        pen.stroke([(x, 53), (x, 66)], 1.3)
    pen.ellipse(x, y, rx, ry, skin)
    top = y - ry
    if ninja:
        points = [(x - rx - 1, y - 4), (x - rx + 1, top + 1), (x, top - 3), (x + rx - 1, top + 1), (x + rx + 1, y - 4)]
        teeth = [(x + rx * t, top + (10 if i % 2 else 6) + fringe) for i, t in enumerate((0.6, 0.3, 0, -0.3, -0.6))]
        pen.polygon([*points, *teeth], hair)
        protector(pen, x, top + 6.5, rx)
    else:
        pen.ellipse(x, top + 4.5, rx + 1.5, 6.5 + fringe, hair, start=180 + 4 * lean, end=360 + 4 * lean)
        pen.ellipse(x, top + 4.5, rx + 1.5, 1.5, hair)
    features(pen, person, x, y, lean)
    if ninja:
        for side in (-1, 1):
            for rise in (-2, 0, 2):
                pen.stroke([(x + side * 6.5, y + 7 + 0.6 * rise), (x + side * 10.6, y + 7 + rise)], 0.9)
    if person.accessory == "hat":
        colour = tint(HAT)
        pen.ellipse(x, top + 3, rx + 1, 13.5, colour, start=180, end=360)
        pen.ellipse(x, top + 3, rx + 9, 2.8, colour)
    return pen.image.resize((SIDE, SIDE), Image.Resampling.BOX)


def spikes(pen, x, y, radius, length, hair, long_hair):
    """Draw hair that stands on end around a head's centre; long hair hangs down behind it besides."""
    if long_hair:
        ends = [(x + radius + 2, y + 22), (x + radius - 4, y + 17), (x - radius + 4, y + 17), (x - radius - 2, y + 22)]
        pen.polygon([(x - radius, y), (x + radius, y), *ends], hair)
    points = []
    for index in range(19):  # from the left over the top to the right
        angle = math.radians(160 + 220 * index / 18)
        reach = radius + (0.55 * length if index % 2 else 1)
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    pen.polygon(points, hair)


def protector(pen, x, y, rx):
    """Draw a band across the forehead, and its plate of metal with a spiral."""
    pen.polygon([(x - rx, y - 2.6), (x + rx, y - 2.6), (x + rx, y + 2.6), (x - rx, y + 2.6)], BAND)
    pen.polygon([(x - 7, y - 2.4), (x + 7, y - 2.4), (x + 7, y + 2.4), (x - 7, y + 2.4)], PLATE)
    pen.stroke([(x - 2, y + 0.9), (x + 1.6, y + 0.9), (x + 1.6, y - 0.9), (x - 0.6, y - 0.9)], 0.7)


def features(pen, person, x, y, lean):
    """Draw eyes, brows, nose, mouth and glasses."""
    iris = EYES[person.eyes]
    surprised, sad = person.expression == "surprised", person.expression == "sad"
    for side in (-1, 1):
        eye = x + side * 5.4
        if person.accessory == "glasses":
            pen.ellipse(eye, y + 0.5, 4.6, 4.2, LENS, ink=1.6)
        pen.ellipse(eye, y + 0.5, 2.9, 3.4 if surprised else 2.6, (255, 255, 255), ink=0.5 * bool(pen.ink))
        pen.ellipse(eye + 0.4 * lean, y + 0.6, 1.7, 2.0, iris, ink=0)
        pen.ellipse(eye + 0.4 * lean, y + 0.6, 0.7, 0.9, INK, ink=0)
        tilt = 1.4 if sad else -0.3
        brow = y - (5.4 if surprised else 4.4)
        if person.accessory != "glasses":
            pen.stroke([(eye - side * 2.6, brow - tilt / 2), (eye + side * 2.6, brow + tilt / 2)], 1.1, (70, 48, 40))
    if person.accessory == "glasses":
        pen.stroke([(x - 1.4, y + 0.3), (x + 1.4, y + 0.3)], 1.6)
    pen.stroke([(x, y + 4), (x + 0.8, y + 6)], 0.9, (150, 92, 70))
    mouth = y + 9.8
    if surprised:
        pen.ellipse(x, mouth, 2.2, 2.6, (120, 30, 34), ink=0)
    else:
        bend = -1.8 if sad else 2.2
        curve = [(x + t * 4.6, mouth + bend * (0.5 - t * t)) for t in (-1, -0.6, -0.2, 0.2, 0.6, 1)]
        pen.stroke(curve, 1.5, (150, 40, 44))


def people(seed, count):
    """Return the first `count` of the people and captions that follow from a seed, as pairs."""
    pairs = []
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        person = random_person(rng)
        pairs.append((person, caption(person, rng)))
    return pairs


def write(folder, style, rows, seed=0):
    """Write `rows` captioned portraits into a folder, as PNGs with a metadata.jsonl."""
    files, lines = {}, []
    for number, (person, text) in enumerate(people(seed, rows)):
        name, content = f"{number:05}.png", io.BytesIO()
        draw(person, style).save(content, "PNG")
        files[Path(folder, name)] = content.getvalue()
        lines.append(json.dumps({"file_name": name, "text": text}))
    files[Path(folder, "metadata.jsonl")] = ("\n".join(lines) + "\n").encode()
    for path, content in files.items():
        if path.exists() and path.read_bytes() != content:
            print(f"error: {path} is not what would be written in its place; choose another folder", file=sys.stderr)
            raise SystemExit(2)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        path.write_bytes(content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw captioned cartoon portraits into a folder.")
    parser.add_argument("folder", help="where to write")
    parser.add_argument("--style", choices=STYLES, default="ninja", help="how to draw them")
    parser.add_argument("--rows", type=int, default=512, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the people, and of their captions")
    options = parser.parse_args()
    write(options.folder, options.style, options.rows, options.seed)
    print(f"{options.rows} portraits ({options.style}) in {options.folder}")
