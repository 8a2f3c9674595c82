"""Published weights: what they are, where they are, and what their authors say of them.

Sources: docs/MODEL_ZOO.md of OpenGVLab/VideoMAEv2, MODEL_ZOO.md and README.md of MCG-NJU/VideoMAE, the model
cards and file listings on the Hugging Face hub, and the list of names in transformers' conversion script.
None of the numbers was verified here. What none of these says is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

V2, V2_HUB, V1_HUB, V1 = "VideoMAE V2", "VideoMAE V2, encoders", "VideoMAE V1, transformers", "VideoMAE V1"
FORM = "request form in docs/MODEL_ZOO.md of github.com/OpenGVLab/VideoMAEv2"
_DRIVE = "Google Drive, links in MODEL_ZOO.md of github.com/MCG-NJU/VideoMAE"
_REPOSITORY = "hub:OpenGVLab/VideoMAE2/"
_NON_COMMERCIAL = "cc-by-nc-4.0"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A published file or folder of weights.

    Attributes:
        name: of the file or the hub's model.
        family: heading that it stands under.
        model: our preset; None where no source says it.
        kind: "pre-trained", "fine-tuned", "distilled" or "encoder".
        data: of the last training.
        epochs: of the pre-training.
        top1, top5: accuracy in per cent on `data`, of `views` (frames x segments x crops).
        size: of the file, as listed.
        licence: of the repository, by its tag.
        get: the argument that fetches it, or the place to ask for it.
        note: what else its authors say.
    """

    name: str
    family: str
    get: str
    model: str | None = None
    kind: str | None = None
    data: str | None = None
    epochs: int | None = None
    top1: float | None = None
    top5: float | None = None
    views: str | None = None
    size: str | None = None
    licence: str | None = None
    note: str = ""

    def matches(self, words: Sequence[str]) -> bool:
        """Whether each of the words is in one of its fields, in any case."""
        text = " ".join(str(value) for value in vars(self).values() if value is not None).lower()
        return all(word.lower() in text for word in words)


def _giant(name: str, data: str, scores: tuple[float, float] | None, *, size: str | None = None) -> Weights:
    """A file of ViT-g; those whose size is known lie on the hub, the others are had by the form."""
    file = f"vit_g_hybrid_pt_1200e{name}.pth" if size else ""
    return Weights(
        name=f"vit_g_hybrid_pt_1200e{name}.pth",
        family=V2,
        get=f"{_REPOSITORY}mae-g/{file}" if file else FORM,
        model="vit_g",
        kind="fine-tuned" if scores else "pre-trained",
        data=data,
        epochs=1200,
        top1=scores[0] if scores else None,
        top5=scores[1] if scores else None,
        views=("16x2x3" if data == "SSv2" else "16x5x3") if scores else None,
        size=size,
        licence="apache-2.0" if file else None,
        note=f"also by the {FORM}" if file else "",
    )


def _hub_encoder(name: str, model: str, epochs: int | None, size: str | None, licence: str | None) -> Weights:
    return Weights(
        name=f"OpenGVLab/VideoMAEv2-{name}",
        family=V2_HUB,
        get=f"hub:OpenGVLab/VideoMAEv2-{name}",
        model=model,
        kind="encoder",
        data="UnlabeledHybrid-1M",
        epochs=epochs,
        size=size,
        licence=licence,
        note="no head; pooled features after fc_norm",
    )


def _first(
    name: str,
    model: str,
    data: str,
    epochs: int | None,
    scores: tuple[float, float] | None = None,
    size: str | None = None,
) -> Weights:
    tuned = "finetuned" in name
    return Weights(
        name=f"MCG-NJU/{name}",
        family=V1_HUB,
        get=f"hub:MCG-NJU/{name}",
        model=model,
        kind="fine-tuned" if tuned else "pre-trained",
        data=data,
        epochs=epochs,
        top1=scores[0] if scores else None,
        top5=scores[1] if scores else None,
        views=("16x2x3" if data == "SSv2" else "16x5x3") if scores else None,
        size=size,
        licence=_NON_COMMERCIAL,
    )


def _drive(model: str, data: str, epochs: int, scores: tuple[float, float] | None) -> Weights:
    tuned = scores is not None
    return Weights(
        name=f"{model} {data} {epochs} epochs, {'fine-tuned' if tuned else 'pre-trained'}",
        family=V1,
        get=_DRIVE,
        model=model,
        kind="fine-tuned" if tuned else "pre-trained",
        data=data,
        epochs=epochs,
        top1=scores[0] if scores else None,
        top5=scores[1] if scores else None,
        views=("16x2x3" if data == "SSv2" else "16x5x3") if scores else None,
        licence=_NON_COMMERCIAL,
    )


CATALOGUE: tuple[Weights, ...] = (
    Weights(
        name="vit_s_k710_dl_from_giant.pth",
        family=V2,
        get=f"{_REPOSITORY}distill/vit_s_k710_dl_from_giant.pth",
        model="vit_s",
        kind="distilled",
        data="K710",
        top1=77.6,
        views="16x5x3",
        size="44.3 MB, float16",
        licence="apache-2.0",
        note="K400 83.7, K600 83.1; fine-tuned further (16x7x3) K400 84.0, K600 84.6",
    ),
    Weights(
        name="vit_b_k710_dl_from_giant.pth",
        family=V2,
        get=f"{_REPOSITORY}distill/vit_b_k710_dl_from_giant.pth",
        model="vit_b",
        kind="distilled",
        data="K710",
        top1=81.5,
        views="16x5x3",
        licence="apache-2.0",
        note="K400 86.6, K600 85.9; fine-tuned further (16x7x3) K400 87.1, K600 87.4",
    ),
    Weights(
        name="mae-b/pytorch_model.bin",
        family=V2,
        get=f"{_REPOSITORY}mae-b/pytorch_model.bin",
        licence="apache-2.0",
        note="no source says what it holds: `vmae weights inspect` does",
    ),
    _giant("", "UnlabeledHybrid", None, size="4.11 GB, float32"),
    _giant("_k710_ft", "K710", (83.8, 96.4), size="2.03 GB, float16"),
    _giant("_k400_ft", "K400", (87.2, 97.4)),
    _giant("_k710_it_k400_ft", "K400", (88.4, 98.0)),
    _giant("_k710_it_k600_ft", "K600", (88.8, 98.2)),
    _giant("_ssv2_ft", "SSv2", (77.0, 95.9), size="2.02 GB, float16"),
    _giant("_k710_it_ucf101_ft", "UCF101", (99.6, 100.0)),
    _giant("_k710_it_hmdb51_ft", "HMDB51", (88.1, 98.5)),
    _hub_encoder("Base", "vit_b", 800, "345 MB", _NON_COMMERCIAL),
    _hub_encoder("Large", "vit_l", None, "1.22 GB", _NON_COMMERCIAL),
    _hub_encoder("Huge", "vit_h", None, None, None),
    _hub_encoder("giant", "vit_g", 800, None, _NON_COMMERCIAL),
    _first("videomae-base-short", "vit_b", "K400", 800),
    _first("videomae-base", "vit_b", "K400", 1600),
    _first("videomae-large", "vit_l", "K400", 1600, size="1.37 GB"),
    _first("videomae-base-short-ssv2", "vit_b", "SSv2", 800),
    _first("videomae-base-ssv2", "vit_b", "SSv2", 2400),
    _first("videomae-small-finetuned-kinetics", "vit_s", "K400", 1600),
    _first("videomae-base-short-finetuned-kinetics", "vit_b", "K400", 800, (79.4, 94.1)),
    _first("videomae-base-finetuned-kinetics", "vit_b", "K400", 1600, (80.9, 94.7)),
    _first("videomae-large-finetuned-kinetics", "vit_l", "K400", 1600, (84.7, 96.5)),
    _first("videomae-huge-finetuned-kinetics", "vit_h", "K400", 1600),
    _first("videomae-small-finetuned-ssv2", "vit_s", "SSv2", None),
    _first("videomae-base-short-finetuned-ssv2", "vit_b", "SSv2", 800, (69.6, 92.0)),
    _first("videomae-base-finetuned-ssv2", "vit_b", "SSv2", 2400, (70.6, 92.6)),
    _drive("vit_b", "K400", 800, None),
    _drive("vit_b", "K400", 800, (79.4, 94.1)),
    _drive("vit_b", "K400", 1600, None),
    _drive("vit_b", "K400", 1600, (80.9, 94.7)),
    _drive("vit_l", "K400", 1600, None),
    _drive("vit_l", "K400", 1600, (84.7, 96.5)),
    _drive("vit_b", "SSv2", 800, None),
    _drive("vit_b", "SSv2", 800, (69.6, 92.0)),
    _drive("vit_b", "SSv2", 2400, None),
    _drive("vit_b", "SSv2", 2400, (70.6, 92.6)),
)


def find_published(words: Sequence[str] = ()) -> list[Weights]:
    """Entries in which each of the words is found, in order; all of them without words."""
    return [weights for weights in CATALOGUE if weights.matches(words)]
