"""The vision transformer of DeepSeek-VL2 (SigLIP) and the projector behind it.

Attributes are named as the tensors of checkpoints are.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-6


def layer_norm(width: int) -> nn.LayerNorm:
    """SigLIP's."""
    return nn.LayerNorm(width, eps=EPSILON)


class VisionAttention(nn.Module):
    """Attention between all patches of a tile."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [tiles, patches, width] -> the same shape."""
        tiles, patches, width = x.shape
        split = self.qkv(x).view(tiles, patches, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(tiles, patches, width))


class VisionMlp(nn.Module):
    """Two layers with a tanh-approximated GELU between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionBlock(nn.Module):
    """One layer of the vision transformer."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = VisionAttention(width, heads)
        self.norm2 = layer_norm(width)
        self.mlp = VisionMlp(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        """x [tiles, patches, width] -> the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
    """Patches of a tile, row by row."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [tiles, 3, size, size] -> [tiles, patches, width]."""
        return self.proj(pixels).flatten(2).transpose(1, 2)


class PoolingHead(nn.Module):
    """SigLIP's head. Checkpoints hold it and DeepSeek-VL2 does not use it: it is only kept."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = layer_norm(width)
        self.mlp = VisionMlp(width, inner)


class VisionTransformer(nn.Module):
    """Features of image tiles."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        patches = (config.image_size // config.patch_size) ** 2
        inner = int(config.width * config.mlp_ratio)
        self.patch_embed = PatchEmbedding(config.width, config.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, patches, config.width))
        self.blocks = nn.ModuleList(
            VisionBlock(config.width, config.heads, inner) for _ in range(config.layers)
        )
        self.norm = layer_norm(config.width)
        if config.global_pool == "map":
            self.attn_pool = PoolingHead(config.width, inner)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [tiles, 3, size, size] -> [tiles, patches, width]."""
        x = self.patch_embed(pixels) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Projector(nn.Module):
    """From image features to vectors that stand beside token embeddings."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        downsamples = config.projector_type == "downsample_mlp_gelu"
        self.ratio = config.downsample_ratio if downsamples else 1
        self.layers = _projector_layers(config, config.input_dim * self.ratio**2)

    def forward(self, features: Tensor) -> Tensor:
        """features [tiles, h·h, input] -> [tiles, s·s, n_embed] with s = ceil(h / ratio)."""
        return self.layers(merge_neighbours(features, self.ratio))


def _projector_layers(config: Any, inputs: int) -> nn.Module:
    if config.projector_type == "identity":
        return nn.Identity()
    if config.projector_type == "linear":
        return nn.Linear(inputs, config.n_embed)
    widths = [config.n_embed] * config.depth
    if config.projector_type == "downsample_mlp_gelu":
        widths = [config.n_embed * config.mlp_ratio] * max(1, config.depth - 1) + [config.n_embed]
    layers: list[nn.Module] = []
    for before, after in pairwise([inputs, *widths]):
        layers += [nn.GELU(), nn.Linear(before, after)]
    return nn.Sequential(*layers[1:])


def merge_neighbours(features: Tensor, ratio: int) -> Tensor:
    """Join squares of ``ratio``² features into one, channel by channel.

    Parameters
    ----------
    features : [tiles, h·h, width], row by row; zeros complete the last column and row of squares.

    Returns
    -------
    [tiles, s·s, width·ratio²]; of each channel of width, the features of the square row by row.
    """
    if ratio == 1:
        return features
    tiles, patches, width = features.shape
    side = round(patches**0.5)
    missing = -side % ratio
    square = F.pad(features.view(tiles, side, side, width), (0, 0, 0, missing, 0, missing))
    merged = (side + missing) // ratio
    split = square.view(tiles, merged, ratio, merged, ratio, width)
    return split.permute(0, 1, 3, 5, 2, 4).reshape(tiles, merged * merged, width * ratio**2)
