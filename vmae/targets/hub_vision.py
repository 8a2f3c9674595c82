"""Models of transformers, as `vmae.targets.image_encoder` needs them: the vision part, its blocks, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from vmae.errors import InputError


def load_vision(folder: Path, attention: str | None) -> Any:
    """The vision part of a model of transformers, float32; no code of the folder is run."""
    try:
        import transformers
    except ImportError:
        raise InputError(
            f"--teacher {folder} is a model of transformers, which is not installed: pip install 'vmae[hf]'"
        ) from None
    own = {} if attention is None else {"attn_implementation": attention}
    try:
        model, told = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, **own
        )
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        reason = (str(error) or repr(error)).strip().splitlines()[0]
        raise InputError(f"--teacher {folder}: transformers cannot read it: {reason}") from None
    vision = getattr(model, "vision_model", model)
    if getattr(vision, "main_input_name", "pixel_values") != "pixel_values":
        raise InputError(f"--teacher {folder} is a {type(model).__name__}, which takes no images")
    lacking = [
        name for name in told["missing_keys"] if not {"pooler", "head", "text_model"} & {*name.split(".")}
    ]
    if lacking:
        raise InputError(f"--teacher {folder}: its weights lack {', '.join(sorted(lacking)[:4])}")
    if hasattr(vision, "use_head"):
        vision.use_head = False  # SigLIP's pooling, of which nothing is taken
    return vision.float().eval()


def blocks_of(vision: nn.Module) -> nn.ModuleList:
    """Its blocks."""
    depth = getattr(vision.config, "num_hidden_layers", None)
    for module in vision.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    return nn.ModuleList()


def whole(value: Any) -> int | None:
    """A side that is given as a number, or twice."""
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:
        value = value[0]
    return value if isinstance(value, int) and value > 0 else None


def side_of(value: Any) -> int | None:
    """A side in a processor's words."""
    if isinstance(value, dict):
        value = value.get("shortest_edge", value.get("height"))
    return whole(value)
