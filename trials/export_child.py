"""Write a network for programs that have no PyTorch, or not ours, and check that it gives the same logits.

    python trials/export_child.py                      # the newest training below runs/, as ONNX
    python trials/export_child.py --checkpoint runs/cream_mnist5k/child.json --format torchscript
    python trials/export_child.py --checkpoint 287.pth.tar --model cream_287 --output cream_287.onnx

The file is written beside the checkpoint, unless --output says otherwise; only an earlier export is replaced there.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nni_cream.cli import Parser, add_checkpoint_options, add_import, checkpoint_of, refuse_unwritable, run
from nni_cream.imports import large_imports


def main() -> None:
    """Read the command line and export."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    add_checkpoint_options(parser)
    parser.add_argument("--output", type=Path, help="the file to write (default: beside the checkpoint)")
    parser.add_argument(
        "--format", default="onnx", help="onnx, export (torch.export's .pt2) or torchscript (default: %(default)s)"
    )
    parser.add_argument("--resolution", type=int, help="size of the images in pixels (default: as it was trained)")
    parser.add_argument("--opset", type=int, help="version of ONNX's operators (default: PyTorch's choice)")
    add_import(parser)
    arguments = parser.parse_args()
    file = checkpoint_of(arguments)

    with large_imports():
        from nni_cream.export import export_checkpoint, file_beside, print_exported

    refuse_unwritable(arguments.output or file_beside(file, arguments.format))
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
    run(main, goes_on=False)
