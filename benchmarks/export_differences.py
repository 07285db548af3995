"""How far ONNX Runtime's logits are from PyTorch's, for every published network at its own resolution.

    python benchmarks/export_differences.py

The networks are new. So that they resemble trained ones, batch norms have the statistics of the images that are
compared on, and a bias of 1, with which most activations let most through: otherwise every layer makes rounding larger.
Their classifier is scaled so that the largest logit is 10. Each is written and checked by what
``trials/export_child.py`` does, and then read again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from common import save_result
from timm.data import resolve_model_data_config

from nni_cream.export import check_images, export_checkpoint
from nni_cream.models import cream, darts_published

LARGEST_LOGIT = 10.0


def compare(name: str, folder: Path) -> dict[str, Any]:
    """Write a network as ONNX into ``folder``, and return the largest difference of a logit."""
    torch.manual_seed(0)
    network = timm.create_model(name)
    images = check_images(resolve_model_data_config(network))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # The mean over all batches, which is one.
            module.momentum = None
            if module.affine:
                torch.nn.init.ones_(module.bias)
    with torch.no_grad():
        network.train()(images)
        classifier = network.eval().get_classifier()
        factor = LARGEST_LOGIT / network(images).abs().max()
        for parameter in classifier.parameters():
            parameter *= factor
        expected = network(images)
    torch.save({"state_dict": network.state_dict()}, folder / f"{name}.pth")
    exported = export_checkpoint(folder / f"{name}.pth", name)
    session = onnxruntime.InferenceSession(exported.file)
    (logits,) = session.run(None, {"images": images.numpy()})
    absolute = (torch.from_numpy(logits) - expected).abs().max().item()
    return {
        "resolution": exported.resolution,
        "opset": exported.opset,
        "absolute": absolute,
        "relative": absolute / expected.abs().max().item(),
    }


def main() -> None:
    """Compare, save the result, and print it as a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [*cream.PUBLISHED, *darts_published.PUBLISHED]
    parser.add_argument("--networks", nargs="+", choices=names, default=names, help="which ones (default: all)")
    rows = {}
    print("| network | pixels | opset | largest difference | of the largest logit |")
    print("|---|---|---|---|---|")
    for name in parser.parse_args().networks:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = row = compare(name, Path(folder))
        told = f"{row['absolute']:.1e} | {row['relative']:.1e}"
        print(f"| `{name}` | {row['resolution']} | {row['opset']} | {told} |", flush=True)
    save_result("export_differences", {"onnxruntime": onnxruntime.__version__, "networks": rows})


if __name__ == "__main__":
    main()
