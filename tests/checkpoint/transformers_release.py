"""Folders of `convert` in the transformers that this interpreter finds, both ways; prints what was found, as
JSON.

`test_transformers_releases.py` runs it, once for each release.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from vmae import DualMask, ModelConfig, build_classifier, build_pretrainer
from vmae.checkpoint import huggingface as hf
from vmae.checkpoint import kind_of, read_checkpoint, to_model

SMALL = dict(embed_dim=48, depth=2, num_heads=3, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2)
CONFIG = ModelConfig(img_size=64, num_frames=8, **SMALL)


@torch.no_grad()
def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Numbers other than the initial ones everywhere: zero biases and unit norms hide mistakes."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def zero_biases(theirs: torch.nn.Module) -> list[str]:
    """Biases of q and v that are 0 (or not numbers) somewhere: the file's were all drawn."""
    names = ("q_bias", "v_bias", "query.bias", "value.bias")
    own = [(name, bias) for name, bias in theirs.named_parameters() if name.endswith(names)]
    assert len(own) == 2 * sum(type(module).__name__ == "VideoMAELayer" for module in theirs.modules()), (
        "biases are missing"
    )
    return [name for name, bias in own if not bias.abs().min() > 0]


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def compare_processor(folder: Path) -> dict[str, float]:
    """Of grey frames; nothing where this release's processor needs torchvision, which is not installed."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
    except ImportError:
        return {}
    frames = [torch.full((3, 64, 64), 128, dtype=torch.uint8) for _ in range(8)]
    expected = (128 / 255 - torch.tensor(hf.IMAGENET_MEAN)) / torch.tensor(hf.IMAGENET_STD)
    seen = processor(frames, return_tensors="pt")["pixel_values"]
    return {"processor": largest(seen, expected[:, None, None].expand(1, 8, 3, 64, 64))}


@torch.no_grad()
def main(folder: Path) -> dict:
    clips = torch.randn(2, 8, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    mask = DualMask.sample(
        2, CONFIG.grid, encoder="tube", encoder_ratio=0.75, decoder="none", generator=torch.Generator()
    )
    hidden, errors, zeros, saved = mask.to_bool()[0], {}, [], {}

    def compare(name: str, ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
        if type(theirs).__name__ == hf.CLASSIFICATION:
            errors[name] = largest(ours(clips.transpose(1, 2)), theirs(clips).logits)
            return
        found = theirs(clips, hidden)
        errors[name] = largest(ours.predict(clips.transpose(1, 2), mask), found.logits)
        errors[f"{name}, loss"] = largest(ours(clips.transpose(1, 2), mask), found.loss)

    models = {
        "mean": randomised(build_classifier(CONFIG, 5)),
        "first": randomised(build_classifier(CONFIG, 5, pooling="first")),
        "no biases": randomised(build_classifier(CONFIG.replace(qkv_bias=False), 5)),
        "pretrainer": randomised(build_pretrainer(CONFIG)),
    }
    for name, ours in models.items():
        hf.save_pretrained(ours, folder / name)
        kind = json.loads((folder / name / "config.json").read_text())["architectures"][0]
        theirs = getattr(transformers, kind).from_pretrained(folder / name).eval()
        zeros += zero_biases(theirs) if name != "no biases" else []
        compare(f"{name}, there", ours, theirs)
        randomised(theirs).save_pretrained(folder / f"{name}, theirs")  # with biases of k, where it has them
        source = read_checkpoint(folder / f"{name}, theirs")
        compare(f"{name}, back", to_model(source, kind_of(source))[0], theirs)
        saved[name] = sorted(
            {key.split(".attention.")[-1] for key in theirs.state_dict() if "attention.attention" in key}
        )
    errors |= compare_processor(folder / "mean")
    return {
        "transformers": transformers.__version__,
        "errors": errors,
        "zeros": zeros,
        "parameters": saved["mean"],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(main(Path(folder))))
    sys.exit(0)
