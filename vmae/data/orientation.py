"""How a stored picture is displayed: turned and mirrored by its display matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from vmae.data.video_reader import DecodeError

if TYPE_CHECKING:
    import av
    from av.sidedata.sidedata import SideData


@dataclass(frozen=True)
class Orientation:
    """How a stored picture is displayed: first transposed, then mirrored."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    @property
    def mirrored(self) -> bool:
        """Whether no rotation does the same."""
        return (self.transpose + self.mirror_x + self.mirror_y) % 2 == 1

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """[H, W, 3] or [W, H, 3] of a stored [H, W, 3]."""
        if self == UPRIGHT:
            return picture
        picture = picture.swapaxes(0, 1) if self.transpose else picture
        return np.ascontiguousarray(picture[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1])


UPRIGHT = Orientation()


def read_orientation(frame: av.VideoFrame, path: str) -> Orientation:
    """By a frame's display matrix (ISO/IEC 14496-12, 8.3.2): x' = a x + c y, y' = b x + d y. Sizes are not
    scaled by it.

    Raises:
        DecodeError: it turns by an angle that is no multiple of 90 degrees (by more than one degree).
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return UPRIGHT
    a, b, _, c, d = np.frombuffer(bytes(cast("SideData", data)), np.int32)[:5].tolist()
    straight, turned = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, turned) > 0.0175 * max(straight, turned):
        raise DecodeError(
            f"{path}: cannot be decoded: it is displayed at an angle that is no multiple of 90 degrees"
        )
    if turned > straight:
        return Orientation(transpose=True, mirror_x=c < 0, mirror_y=b < 0)
    return Orientation(mirror_x=a < 0, mirror_y=d < 0)
