"""Packaging of nni_cream; everything else about the project's tools is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "nni_cream" / "__init__.py").read_text(encoding="utf-8"))

if VERSION is None:
    raise RuntimeError("nni_cream/__init__.py does not say __version__")

TEST = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "playwright>=1.50", "psutil>=5.9"]

setup(
    name="nni_cream",
    version=VERSION.group(1),
    description="Cream and DARTS architecture search for Microsoft NNI 3.0",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["nni_cream*", "search_spaces*"]),
    package_data={"nni_cream": ["py.typed"], "search_spaces": ["py.typed"]},
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10,<3.13",
    install_requires=[
        "nni==3.0",
        # nnictl imports pkg_resources, which later setuptools no longer have.
        "setuptools<81",
        "torch>=2.6",
        "torchvision>=0.21",
        "timm>=1.0.20",
        "pytorch-lightning>=2.4,<3",
        "torchmetrics>=1.4",
        "numpy>=1.26",
        "pillow>=10",
        "scipy>=1.10",
        "matplotlib>=3.8",
        "pydantic>=2.7,<3",
        "pyyaml>=6",
        "requests>=2.31",
        "safetensors>=0.4.5",
        "scikit-learn>=1.4",
        "mlxtend>=0.23",
        "tensorboard>=2.16",
        "wrapt>=1.16",
    ],
    extras_require={
        "elpv": ["elpv-dataset>=1.0"],
        "export": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.3"],
        "test": TEST,
        "dev": [*TEST, "ruff>=0.9", "mypy>=1.13", "types-PyYAML", "types-requests"],
    },
    entry_points={
        # torch calls this in every process that imports it: NNI's children import Lightning, and so torchvision,
        # before they know of us. See nni_cream/compat.py.
        "torch.backends": ["nni_cream = nni_cream.compat:declare_torchvision_operators"],
    },
)
