"""Encoder, decoder, pre-trainer and classifier, with the published parameter names."""

from vmae.model.classifier import Classifier, build_classifier
from vmae.model.pretrainer import Pretrainer, build_pretrainer
from vmae.model.reference import ReferencePretrainer, build_reference

__all__ = [
    "Classifier",
    "Pretrainer",
    "ReferencePretrainer",
    "build_classifier",
    "build_pretrainer",
    "build_reference",
]
