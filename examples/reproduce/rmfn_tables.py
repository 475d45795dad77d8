"""Tables 1 and 2 of Shekarforoush et al. 2022: what coarse-to-fine fitting does to the scales.

    python examples/reproduce/rmfn_tables.py OUT [--full] [--pictures 2]

The paper's picture sets are not to be had offline; natural pictures that scikit-image ships and
text drawn by Pillow stand in for them. What is to be reproduced is the order of the methods: the
proposed one changes scales 2 and 3 least, at a PSNR near the best. Small by default: 128 px
and 24 units, the paper's 500/500/1000/8000 iterations; `--full` takes 512 px and 256 units. Both
have half as many units as scale 2 has frequencies: with more, a linear readout can always fit that
scale, and BACON's changes little whatever its layers do.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

NATURAL = ("astronaut", "cat", "coffee", "rocket", "immunohistochemistry", "hubble_deep_field")
WORDS = "residual multiplicative filter networks fit pictures coarse to fine one band at a time"


def natural_pictures(folder: Path, size: int) -> list[Path]:
    """Those of scikit-image's pictures that come with it."""
    from skimage import data

    paths = []
    for name in NATURAL:
        try:
            picture = Image.fromarray(np.asarray(getattr(data, name)())).convert("RGB")
        except Exception as error:  # the picture would have to be downloaded
            print(f"{name} is left out: {type(error).__name__}")
            continue
        paths.append(save_square(picture, folder / f"{name}.png", size))
    return paths


def text_pictures(folder: Path, size: int, count: int = 6) -> list[Path]:
    """Coloured words in random places, sizes and colours."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        picture = Image.new("RGB", (512, 512), tuple(int(v) for v in rng.integers(150, 256, 3)))
        draw = ImageDraw.Draw(picture)
        for word in WORDS.split():
            font = ImageFont.load_default(size=int(rng.integers(20, 70)))
            colour = tuple(int(v) for v in rng.integers(0, 140, 3))
            place = (int(rng.integers(0, 350)), int(rng.integers(0, 460)))
            draw.text(place, word, fill=colour, font=font)
        paths.append(save_square(picture, folder / f"text{number}.png", size))
    return paths


def save_square(picture: Image.Image, path: Path, size: int) -> Path:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    square.resize((size, size), Image.Resampling.LANCZOS).save(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--pictures", type=int, default=6, help="of each kind, at most")
    args = parser.parse_args()
    size = 512 if args.full else 128
    options = [] if args.full else ["--width", "24"]
    for name, make in (("natural", natural_pictures), ("text", text_pictures)):
        folder = args.output / f"{name}_pictures"
        folder.mkdir(parents=True, exist_ok=True)
        pictures = map(str, make(folder, size)[: args.pictures])
        command = [sys.executable, "-m", "cryorecon", "fit-image", *pictures]
        command += ["-o", str(args.output / name), "--overwrite", *options]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
