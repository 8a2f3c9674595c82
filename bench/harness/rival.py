"""Clips of packed videos by another library, in a process of its own; needs numpy, that library, and torch
where the library does not resize.

    python bench/harness/rival.py LIBRARY JOBS.json

JOBS.json is a list of clips: path, indices, box (left, top, width, height), fps, size. The process writes a
line of JSON: the library's version, or why it cannot run. Then it answers lines of its input: `round` with
the CPU seconds of making every clip, `clips FILE` with "ok" after writing all of them as an array.
"""

from __future__ import annotations

import json
import sys
import time


def _resized(frames, box, size):
    """uint8 [T, size, size, 3]: as vmae resizes."""
    import numpy as np
    import torch

    left, top, width, height = box
    part = np.ascontiguousarray(frames[:, top : top + height, left : left + width])
    pixels = torch.from_numpy(part).permute(0, 3, 1, 2)
    pixels = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def spdl_clip(job):
    """Only the packets from the key frame before the clip to its last frame; frames chosen, cut, resized and
    converted by one filter graph; a decoder of one thread, in this thread (no pool)."""
    import spdl.io

    indices, (left, top, width, height), fps, size = job["indices"], job["box"], job["fps"], job["size"]
    first, last = (indices[0] - 0.25) / fps, (indices[-1] + 0.25) / fps
    packets = spdl.io.demux_video(job["path"], timestamp=(first, last))
    steps = [
        f"trim=start={first}:end={last}",
        f"select=not(mod(n\\,{indices[1] - indices[0]}))",
        f"crop={width}:{height}:{left}:{top}:exact=1",
        f"scale={size}:{size}:flags=bilinear",
        "format=pix_fmts=rgb24",
    ]
    frames = spdl.io.decode_packets(packets, filter_desc=",".join(steps))
    return spdl.io.to_numpy(spdl.io.convert_frames(frames))


def spdl_indexed_clip(job):
    """By frame numbers: all packets are read, each group is decoded up to the last wanted frame."""
    import spdl.io

    (left, top, width, height), size = job["box"], job["size"]
    steps = (
        f"crop={width}:{height}:{left}:{top}:exact=1,scale={size}:{size}:flags=bilinear,format=pix_fmts=rgb24"
    )
    frames = spdl.io.sample_decode_video(spdl.io.demux_video(job["path"]), job["indices"], filter_desc=steps)
    return spdl.io.to_numpy(spdl.io.convert_frames(frames))


def torchcodec_clip(job):
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(job["path"], dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate")
    return _resized(decoder.get_frames_at(job["indices"]).data.numpy(), job["box"], job["size"])


def decord_clip(job):
    import decord

    reader = decord.VideoReader(job["path"], num_threads=1, ctx=decord.cpu(0))
    return _resized(reader.get_batch(job["indices"]).asnumpy(), job["box"], job["size"])


# name: distribution, function
RIVALS = {
    "spdl": ("spdl-io", spdl_clip),
    "spdl, by number": ("spdl-io", spdl_indexed_clip),
    "torchcodec": ("torchcodec", torchcodec_clip),
    "decord2": ("decord2", decord_clip),
}


def main(name, path):
    import importlib.metadata

    distribution, clip = RIVALS[name]
    with open(path, encoding="utf-8") as file:
        jobs = json.load(file)
    try:
        version = importlib.metadata.version(distribution)
        clip(jobs[0])
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["unknown reason"])[0]
        print(json.dumps({"lack": f"{type(error).__name__}: {reason}"}), flush=True)
        return
    print(json.dumps({"version": version}), flush=True)
    for line in sys.stdin:
        command, _, target = line.rstrip("\n").partition(" ")
        if command == "round":
            start = time.process_time()
            for job in jobs:
                clip(job)
            print(json.dumps({"seconds": time.process_time() - start}), flush=True)
        elif command == "clips":
            import numpy as np

            np.save(target, np.stack([clip(job) for job in jobs]))
            print(json.dumps({"ok": True}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
