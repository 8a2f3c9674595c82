"""Videos in: list files, decoding, sampling, cropping, and the loader that pre-training reads."""

from vmae.data.augment import CropBox, crop_and_resize, sample_crop
from vmae.data.dataset import Batch, EpochSampler, PretrainDataset, check_decodable
from vmae.data.decode import DecodeError, VideoReader, open_video
from vmae.data.loaders import PretrainLoader, build_loader
from vmae.data.manifest import VideoEntry, read_list
from vmae.data.mix import Mix, describe_data, read_data
from vmae.data.prefetch import Prefetcher
from vmae.data.quarantine import Failure, Quarantine
from vmae.data.sampling import sample_frame_indices

__all__ = [
    "Batch",
    "CropBox",
    "DecodeError",
    "EpochSampler",
    "Failure",
    "Mix",
    "Prefetcher",
    "PretrainDataset",
    "PretrainLoader",
    "Quarantine",
    "VideoEntry",
    "VideoReader",
    "build_loader",
    "check_decodable",
    "crop_and_resize",
    "describe_data",
    "open_video",
    "read_data",
    "read_list",
    "sample_crop",
    "sample_frame_indices",
]
