"""The labelled data sets that the published programs know by name (`--data_set`), and what a name decides.

Source: dataset/build.py and dataset/datasets.py of OpenGVLab/VideoMAEv2, datasets.py of MCG-NJU/VideoMAE.
"""

from __future__ import annotations

from dataclasses import dataclass

USUAL = "Kinetics-400"  # of the published program, where none is named


@dataclass(frozen=True)
class DataSet:
    """What a name decides.

    Attributes:
        num_classes: the size of the head; the published program refuses another `--nb_classes`.
        sparse: whether a clip's frames are spread over the whole video.
        flip: whether half of the clips to train on are mirrored.
    """

    num_classes: int
    sparse: bool = False
    flip: bool = True


DATA_SETS = {
    "Kinetics-400": DataSet(400),
    "Kinetics-600": DataSet(600),
    "Kinetics-700": DataSet(700),
    "Kinetics-710": DataSet(710),
    "SSV2": DataSet(174, sparse=True, flip=False),
    "UCF101": DataSet(101),
    "HMDB51": DataSet(51),
    "Diving48": DataSet(48),
    "MIT": DataSet(339),
}
