"""Make subImageNet, the small data set of "Cream of the Crop", out of ImageNet.

    python trials/make_subimagenet.py /data/imagenet /data/subimagenet

The new folder is a data set for ``data.name=imagenet``; ``listing.csv`` in it says where each image comes from.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nni_cream.cli import Parser, run
from nni_cream.subimagenet import CLASSES, TRAIN_IMAGES, VAL_IMAGES, Mode, make_subimagenet


def main() -> None:
    """Read the command line, make the data set, and say what was made."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="ImageNet's folder, with train/ in it; it is only read")
    parser.add_argument("destination", type=Path, help="folder to make; nothing is overwritten")
    parser.add_argument("--classes", type=int, default=CLASSES, help="the first ones by name (default: %(default)s)")
    parser.add_argument("--train-images", type=int, default=TRAIN_IMAGES, help="of each class (default: %(default)s)")
    parser.add_argument("--val-images", type=int, default=VAL_IMAGES, help="of each class (default: %(default)s)")
    parser.add_argument(
        "--mode",
        choices=get_args(Mode),
        default="symlink",
        help="symbolic links need the originals to stay, hard links one file system (default: %(default)s)",
    )
    arguments = parser.parse_args()
    listing = make_subimagenet(**vars(arguments))
    train, val = arguments.classes * arguments.train_images, arguments.classes * arguments.val_images
    print(
        f"Made {listing.parent}: {arguments.classes:,} classes, {train:,} training and {val:,} validation images, "
        f"listed in {listing}."
    )


if __name__ == "__main__":
    run(main, goes_on=False)
