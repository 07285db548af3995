"""Write a network for programs that have no PyTorch, or not ours, and check that it gives the same logits.

    python trials/export_child.py                      # the newest training below runs/, as ONNX
    python trials/export_child.py --checkpoint runs/cream_mnist5k/child.json --format torchscript
    python trials/export_child.py --checkpoint 287.pth.tar --model cream_287 --output cream_287.onnx

The file is written beside the checkpoint, unless --output says otherwise.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nni_cream.cli import Parser, add_import, run
from nni_cream.errors import UserError
from nni_cream.runs import newest_training


def main() -> None:
    """Read the command line and export."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="model.safetensors of a training, child.json of a search, or a checkpoint of another program (default: "
        "the newest training below runs/)",
    )
    parser.add_argument("--model", help="timm's name of the network, for a checkpoint that does not say it")
    parser.add_argument(
        "--weights",
        choices=("ema", "plain"),
        default="ema",
        help="which weights to take from a checkpoint that has averaged (EMA) and plain ones (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, help="the file to write (default: beside the checkpoint)")
    parser.add_argument(
        "--format", default="onnx", help="onnx, export (torch.export's .pt2) or torchscript (default: %(default)s)"
    )
    parser.add_argument("--resolution", type=int, help="size of the images in pixels (default: as it was trained)")
    parser.add_argument("--opset", type=int, help="version of ONNX's operators (default: PyTorch's choice)")
    add_import(parser)
    arguments = parser.parse_args()
    file = arguments.checkpoint or newest_training()
    if file is None:
        raise UserError(
            "No training has ended yet (there is no model.safetensors below runs/): run trials/retrain_child.py first, "
            "or give a --checkpoint."
        )

    from nni_cream.export import export_checkpoint, print_exported

    print(f"Exporting {file}.", flush=True)
    print_exported(
        export_checkpoint(
            file,
            arguments.model,
            use_ema=arguments.weights == "ema",
            output=arguments.output,
            form=arguments.format,
            resolution=arguments.resolution,
            opset=arguments.opset,
        )
    )


if __name__ == "__main__":
    run(main)
