"""Clips of other shapes than the model's, from the sources of a mix: what they need, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vmae.config import MaskConfig, ModelConfig
from vmae.data.dataset import PretrainDataset
from vmae.data.loaders import check_shapes
from vmae.data.mix import Mix
from vmae.data.shapes import ClipShape
from vmae.errors import InputError
from vmae.model.cost import masked_macs, token_counts
from vmae.model.target import Target
from vmae.train.checks import check_mask


@dataclass(frozen=True)
class MixShapes:
    """The shapes of a run's clips.

    Attributes:
        models: the model as it would be for clips of each shape.
        shares: of the clips, and of the steps, that have it.
    """

    models: Sequence[ModelConfig]
    shares: Sequence[float]

    @classmethod
    def of(cls, dataset: PretrainDataset, model: ModelConfig) -> MixShapes:
        """Those of a data set.

        Raises:
            InputError: a clip of too many tokens.
        """
        shapes = dataset.shapes
        if shapes == [dataset.usual_shape]:
            return cls([model], [1.0])
        models = [model.replace(num_frames=frames, img_size=(*size,)) for frames, *size in shapes]
        counts = [len(dataset)]
        if len(shapes) > 1:
            counts = [sum(map(len, group)) for group in dataset.groups]
        return cls(models, [count / len(dataset) for count in counts])

    @property
    def clip_bytes(self) -> int:
        """Of the largest clip, uint8."""
        return max(model.clip_bytes for model in self.models)

    def macs(self, mask: MaskConfig, width: int | None = None) -> float:
        """Of a clip's forward pass, in the mean over the run; see `masked_macs`."""
        each = (masked_macs(model, mask, width=width) for model in self.models)
        return sum(share * macs for share, macs in zip(self.shares, each))

    def most_tokens(self, mask: MaskConfig) -> tuple[int, int]:
        """(visible, decoded) tokens of the clip that has most of them."""
        counts = [token_counts(model, mask) for model in self.models]
        return max(count.visible for count in counts), max(count.decoded for count in counts)

    def describe(self) -> list[str]:
        """A line on the shapes of the steps, where there are several."""
        if len(self.models) == 1:
            return []
        texts = [
            f"{ClipShape(model.num_frames, *model.image_hw)} in {share:.1%} of the steps"
            for model, share in zip(self.models, self.shares)
        ]
        return [f"clips of {', '.join(texts)}; a step has clips of one shape"]


def check_mix_shapes(
    dataset: PretrainDataset,
    model: ModelConfig,
    mask: MaskConfig,
    *,
    target: Target,
    loader: str,
    cuda_graphs: bool,
) -> MixShapes:
    """The shapes of a run's clips.

    Raises:
        InputError: the loader, the positions, the target or CUDA graphs are for the model's own shape alone,
            or the mask does not fit a shape.
    """
    if isinstance(dataset.data, Mix) and any(source.images for source in dataset.data.sources):
        model.check_rgb("a source of images")
    check_shapes(loader, dataset)
    found, others = MixShapes.of(dataset, model), dataset.shapes != [dataset.usual_shape]
    reasons = {
        "learned positions are": model.learned_pos,
        "positions of another grid (--pos-grid) are": model.pos_grid is not None,
        f"the target {target.name} is": not target.any_shape,
        "--cuda-graphs is": cuda_graphs,
    }
    for reason, holds in reasons.items():
        if others and holds:
            raise InputError(
                f"the mix has clips of {', '.join(map(str, dataset.shapes))}, and {reason} for the model's "
                f"{dataset.usual_shape} alone: take `frames` and `size` out of the mix's sources; one of "
                f"images then needs `frames: {model.num_frames}`"
            )
    for one in found.models:
        check_mask(mask, one.grid)
    return found
