"""The operations that dual-masked pre-training adds to a vision transformer, each touching only what it
needs.

Every operation takes `backend="auto"`: Triton on a GPU, plain PyTorch elsewhere. `*_ref` is that PyTorch: the
reference that tests and benchmarks compare with.
"""

from vmae_kernels.assemble_decoder_tokens import assemble_decoder_tokens, assemble_decoder_tokens_ref
from vmae_kernels.backend import resolve_backend
from vmae_kernels.embed_visible import embed_visible, embed_visible_ref
from vmae_kernels.head_patch_loss import head_patch_loss, head_patch_loss_ref
from vmae_kernels.layer_norm import layer_norm, layer_norm_ref
from vmae_kernels.patch_loss import patch_loss, patch_loss_ref, patch_targets_ref
from vmae_kernels.select_decoded import select_decoded, select_decoded_ref
from vmae_kernels.tubelets import Statistics, gather_tubelets

__all__ = [
    "Statistics",
    "assemble_decoder_tokens",
    "assemble_decoder_tokens_ref",
    "embed_visible",
    "embed_visible_ref",
    "gather_tubelets",
    "head_patch_loss",
    "head_patch_loss_ref",
    "layer_norm",
    "layer_norm_ref",
    "patch_loss",
    "patch_loss_ref",
    "patch_targets_ref",
    "resolve_backend",
    "select_decoded",
    "select_decoded_ref",
]
