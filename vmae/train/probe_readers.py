"""What a probe reads tokens with: nearest neighbours, and an attentive reader that is trained in some hundred
milliseconds.

Legend: M gallery, Q queries, B clips, N tokens, D width, K classes, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmae.config import ModelConfig
from vmae.model.classifier import AttentivePool, init_truncated_normal
from vmae.train.parallel import Parallel

# As in DINO (Caron et al., 2021, arXiv 2104.14294, and its eval_knn.py): 20 neighbours, temperature 0.07.
NEIGHBOURS, TEMPERATURE = 20, 0.07
# Our choice. On tokens of moving shapes (width 128, 600 videos of 10 classes to read, 600 to test), 100 steps
# at 0.01 gave 8 %; 200, 300 and 400 at 0.005 gave 57, 61 and 61 %; 400 at 0.003 and at 0.01 gave 60 %.
READER_STEPS, READER_RATE, READER_DECAY = 300, 5e-3, 0.05


def nearest_neighbours(gallery_MD: Tensor, labels_M: Tensor, queries_QD: Tensor, num_classes: int) -> Tensor:
    """int64 [Q]: the class that the nearest of the gallery vote for, each with exp(cosine / temperature)."""
    gallery_MD, queries_QD = (F.normalize(one.double(), dim=1) for one in (gallery_MD, queries_QD))
    cosine, nearest = (queries_QD @ gallery_MD.T).topk(min(NEIGHBOURS, len(gallery_MD)), dim=1)
    votes = (cosine / TEMPERATURE).exp()[..., None] * F.one_hot(labels_M[nearest], num_classes)
    return votes.sum(1).argmax(1)


class AttentiveReader(nn.Module):
    """The head of `vmae finetune --probe attentive`: one query that attends to all tokens, a norm, a linear
    layer. It takes tokens normalised by `normed`."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        dim, eps = config.embed_dim, config.layer_norm_eps
        self.pool = AttentivePool(dim, config.num_heads, eps)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.head = nn.Linear(dim, num_classes)
        self.apply(init_truncated_normal)

    def normed(self, tokens_BND: Tensor) -> Tensor:
        """float32 tokens, normalised once for all steps."""
        return F.layer_norm(tokens_BND.float(), tokens_BND.shape[-1:], eps=self.norm.eps)

    def forward(self, normed_BND: Tensor) -> Tensor:
        """Logits [B, K]."""
        return self.head(self.norm(self.pool.of_normed(normed_BND)))


def reader_macs(config: ModelConfig, num_classes: int) -> int:
    """Multiply-accumulates of the reader's forward pass of one clip."""
    dim = config.embed_dim
    return 2 * config.num_tokens * dim * config.num_heads + dim * (2 * dim + num_classes)


def build_reader(config: ModelConfig, num_classes: int, device: torch.device) -> AttentiveReader:
    """A fresh reader, always the same; nobody else's random numbers move on."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return AttentiveReader(config, num_classes).to(device)


def train_reader(
    reader: AttentiveReader, normed: Sequence[Tensor], labels: Tensor, parallel: Parallel
) -> None:
    """Train the reader on the gallery, all of it in each step; all ranks together, each with its share.

    Args:
        normed: tokens [B, N, D] of `AttentiveReader.normed`, in parts; none where this rank has no video.
        labels: int64, of all parts.
    """
    total = parallel.exchange([len(labels)]).sum().item()
    if not total:
        return
    classes = labels.split([len(part) for part in normed]) if normed else ()
    parameters = list(reader.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=READER_RATE, weight_decay=READER_DECAY)
    for step in range(READER_STEPS):
        optimizer.param_groups[0]["lr"] = READER_RATE * (1 - step / READER_STEPS)
        grad = labels.new_zeros(sum(sizes), dtype=torch.float32)
        for part, truth in zip(normed, classes, strict=True):
            loss = F.cross_entropy(reader(part), truth, reduction="sum") / total
            grad += torch.cat([one.flatten() for one in torch.autograd.grad(loss, parameters)])
        for parameter, one in zip(parameters, parallel.sum(grad).split(sizes), strict=True):
            parameter.grad = one.view_as(parameter)
        optimizer.step()
