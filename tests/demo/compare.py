"""Put pictures that `infer.py` drew before and after a training one above the other, with their prompts.

    python tests/demo/compare.py --before demo/before-*.png --after demo/after-*.png --output demo/comparison.png

The prompts are read from the pictures' own text.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[2])]

import sd_config

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Show pictures from before and after a training in one.")
    parser.add_argument("--before", nargs="+", required=True, help="pictures in the upper row")
    parser.add_argument("--after", nargs="+", required=True, help="pictures of the same prompts, in the lower row")
    parser.add_argument("--output", required=True, help="file to write")
    options = parser.parse_args()
    sd_config.announce_imports()
    import infer

    rows = [[Image.open(path) for path in paths] for paths in (options.before, options.after)]
    prompts = [[infer.settings_of(image)["prompt"] for image in row] for row in rows]
    if prompts[0] != prompts[1]:
        parser.error("the two rows show different prompts")
    infer.captioned_grid(rows, prompts[0]).save(options.output)
    print(f"{options.output}: above, before the training; below, after it")
