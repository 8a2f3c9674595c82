"""Settings of the probe of a pre-training run (`vmae.train.probe`)."""

from __future__ import annotations

from dataclasses import dataclass

from vmae.config import VALIDATION, _Checked
from vmae.errors import InputError
from vmae.settings import COUNT, STEPS, OneOf, Real, Whole, setting

MEASURES = ("attentive", "knn")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(_Checked):
    """When a run is probed and on what. It decides no weights, but where a run with `patience` or a
    `goal` ends."""

    group = VALIDATION

    every: int | None = setting(
        None,
        "steps from one probe of the encoder to the next; the start and the last step have one too",
        STEPS,
        name="probe_every",
        metavar="STEPS",
        unset="no probe",
    )
    data: str | None = setting(
        None,
        "labelled list to probe on; half of each class's videos are the gallery, the others the queries",
        name="probe_data",
        metavar="LIST",
    )
    val: str | None = setting(
        None,
        "labelled list of the queries; --probe-data is the gallery then",
        name="probe_val",
        metavar="LIST",
    )
    videos: int = setting(
        512, "most videos of a probe, gallery and queries together", Whole(2, 10**6), name="probe_videos"
    )
    measure: str = setting(
        "attentive",
        "which number decides the best probe: attentive (a small attentive reader), knn (nearest neighbours)",
        OneOf("measure of a probe", MEASURES),
        name="probe_measure",
    )
    patience: int | None = setting(
        None,
        "end after so many probes without a better one",
        COUNT,
        name="probe_patience",
        metavar="N",
        unset="never",
    )
    margin: float = setting(
        0.0,
        "points that a probe must be better by, to count as better for --probe-patience",
        Real(least=0, most=100),
        name="probe_margin",
    )

    goal: float | None = setting(
        None,
        "end once a probe reaches so many percent",
        Real(above=0, most=100),
        name="probe_goal",
        metavar="PERCENT",
        unset="train to the end",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every is not None and self.data is None:
            raise InputError(f"--probe-every {self.every} needs labelled videos: --probe-data LIST")
        if self.data is not None and self.every is None:
            raise InputError(f"--probe-data {self.data} needs --probe-every N, in steps")
        about = (self.val, self.patience, self.margin or None, self.goal)
        if self.data is None and any(value is not None for value in about):
            raise InputError(
                "--probe-val, --probe-patience, --probe-margin and --probe-goal are about probes: name "
                "--probe-every N and --probe-data LIST"
            )
        if self.margin and self.patience is None:
            raise InputError(f"--probe-margin {self.margin:g} needs --probe-patience N")
