"""One door for checkpoints: from a path to settings and weights, from there to a model, and back to a file.

    source = read_checkpoint("runs/tuned")                     # path -> settings and weights
    model, report = to_model(source, "classifier", {"num_frames": 32})

The format of training checkpoints is in `format`, a run's folder in `folder`, saving in `saver`; names and
settings of the published code are in `published`, those of transformers in `huggingface`.
"""

from vmae.checkpoint.classifier import LoadedClassifier, load_classifier
from vmae.checkpoint.folder import export_weights, find_weights
from vmae.checkpoint.huggingface import save_pretrained
from vmae.checkpoint.models import kind_of, to_model
from vmae.checkpoint.source import Source, read_checkpoint

__all__ = [
    "LoadedClassifier",
    "Source",
    "export_weights",
    "find_weights",
    "kind_of",
    "load_classifier",
    "read_checkpoint",
    "save_pretrained",
    "to_model",
]
