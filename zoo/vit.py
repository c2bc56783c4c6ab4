"""Pre-norm vision transformers with exit heads: ``vit_micro``, ``vit_tiny``, ``vit_86m`` and ``vit_115m``.

Dosovitskiy et al. (arXiv 2010.11929) for the body; exit heads behind L/4, L/2, 3L/4 and L blocks as in Co-S2P.
The residual width never shrinks: layer normalisation mixes all of it, so removing a channel would not be silencing it.
Units are attention heads and MLP neurons; if so asked, also the features that a layer writes into the residual stream.

B samples, N tokens (class token first), D residual width, H heads, E width of a head, M neurons.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.groups import Axis, Block, Group, Layout
from pruning.residual import ResidualSum
from pruning.unit_scale import UnitScale
from zoo.chain import BlockChain
from zoo.declare import classes, columns, declare_blocks, rows, scale_width, unit_scale


class PatchEmbedding(nn.Module):
    """Patches to tokens, a class token in front, learned positions added: [B, C, S, S] -> [B, N, D]."""

    def __init__(self, in_channels: int, dim: int, image_size: int, patch_size: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, dim))
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Embed images."""
        tokens_bnd = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(len(x), -1, -1), tokens_bnd], dim=1) + self.position


class Attention(nn.Module):
    """Multi-head self-attention: [B, N, D] -> [B, N, D], with one fused qkv layer or three separate ones.

    The number of heads is read from the weights, so a narrowed layer just has fewer; the softmax scale depends on the
    width of one head only and therefore stays that of the full model.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, fused_qkv: bool, scales: bool) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * inner) if fused_qkv else None
        if not fused_qkv:
            self.q, self.k, self.v = (nn.Linear(dim, inner) for _ in range(3))
        self.scale = UnitScale(num_heads, head_dim) if scales else nn.Identity()
        self.proj = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the tokens."""
        parts = self.qkv(x).chunk(3, dim=-1) if self.qkv is not None else (self.q(x), self.k(x), self.v(x))
        q_bhne, k_bhne, v_bhne = (p.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in parts)
        mixed_bhne = F.scaled_dot_product_attention(q_bhne, k_bhne, v_bhne, scale=self.head_dim**-0.5)
        return self.proj(self.scale(mixed_bhne.transpose(1, 2).flatten(2)))


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP, both residual: [B, N, D] -> [B, N, D]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        neurons: int,
        fused_qkv: bool,
        scales: bool,
        *,
        residual_outputs: bool,
    ) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, num_heads, head_dim, fused_qkv, scales)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, neurons), nn.Linear(neurons, dim)
        self.scale = UnitScale(neurons) if scales else nn.Identity()
        self.sum1, self.sum2 = ResidualSum(dim, residual_outputs), ResidualSum(dim, residual_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Apply one encoder block."""
        x = self.sum1(self.attention(self.norm1(x)), x)
        return self.sum2(self.fc2(self.scale(F.gelu(self.fc1(self.norm2(x))))), x)


class TokenHead(nn.Module):
    """LayerNorm and linear classifier on the class token: [B, N, D] -> [B, num_classes]."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify by the class token."""
        return self.linear(self.norm(x[:, 0]))


def vit(
    num_classes: int,
    in_channels: int,
    image_size: int,
    *,
    dim: int,
    num_heads: int,
    num_blocks: int,
    patch_size: int | None = None,
    grid: int | None = None,
    mlp_ratio: float = 4.0,
    fused_qkv: bool = True,
    exits: bool = False,
    scales: bool = False,
    residual_outputs: bool = False,
    width: float = 1.0,
) -> tuple[BlockChain, Layout]:
    """A vision transformer; ``dim`` is the residual width and ``dim / num_heads`` the width of one head.

    ``patch_size`` None means the image in ``grid`` by ``grid`` patches where that is given, else 16 pixels from 128 up
    and an eighth of the image (at least 1) below that.
    ``width`` scales heads and neurons, never the residual width. Groups: ``block0.heads``, ``block0.mlp``, ...
    With ``scales`` every head and neuron has a learnable factor, which the L1 penalty can shrink.
    With ``residual_outputs`` the features that attention and MLP write into the residual stream are units as well,
    ``block0.attention_out`` and ``block0.mlp_out``; where nothing is written, the stream stays as it was (Co-S2P).
    Without exits the only head stays at every depth; with them each exit belongs to the block it stands behind.
    """
    if patch_size is None and grid is not None:
        patch_size = max(1, image_size // grid)
    elif patch_size is None:
        patch_size = 16 if image_size >= 128 else max(1, image_size // 8)
    if patch_size < 1 or image_size % patch_size:
        raise ValueError(
            f"vit: image-size {image_size} is not a multiple of patch-size {patch_size}; "
            "choose a divisor of it (model.patch-size)"
        )
    if dim % num_heads:
        raise ValueError(f"vit: dim must be a multiple of num-heads, got dim {dim} and num-heads {num_heads}")
    if exits and num_blocks % 4:
        raise ValueError(f"vit: exits at quarters of the depth need num-blocks divisible by 4, got {num_blocks}")
    head_dim = dim // num_heads
    heads, neurons = scale_width(num_heads, width), scale_width(round(dim * mlp_ratio), width)
    exit_blocks = tuple(num_blocks * quarter // 4 - 1 for quarter in (1, 2, 3, 4)) if exits else ()
    model = BlockChain(
        PatchEmbedding(in_channels, dim, image_size, patch_size),
        [
            EncoderBlock(dim, heads, head_dim, neurons, fused_qkv, scales, residual_outputs=residual_outputs)
            for _ in range(num_blocks)
        ],
        [TokenHead(dim, num_classes) for _ in range(len(exit_blocks) or 1)],
        exit_blocks,
    )
    groups: list[Group] = []
    for index in range(num_blocks):
        groups += _groups_of(index, heads, head_dim, neurons, fused_qkv, scales)
        groups += _outputs_of(index, dim) if residual_outputs else ()
    groups.append(classes(num_classes, *(f"heads.{j}.linear" for j in range(len(model.heads)))))
    blocks: tuple[Block, ...] = declare_blocks(num_blocks, {block: j for j, block in enumerate(exit_blocks)})
    return model, Layout(tuple(groups), blocks)


def _groups_of(
    index: int, heads: int, head_dim: int, neurons: int, fused_qkv: bool, scales: bool
) -> tuple[Group, Group]:
    """The heads and the neurons of one block."""
    block = f"blocks.{index}"
    attention = f"{block}.attention"
    if fused_qkv:
        parts = [rows(f"{attention}.qkv", True, head_dim, part * heads * head_dim) for part in range(3)]
    else:
        parts = [rows(f"{attention}.{part}", True, head_dim) for part in "qkv"]
    of_heads, of_neurons = (unit_scale(prefix) if scales else () for prefix in (attention, block))
    of_attention = tuple(axis for part in parts for axis in part) + of_heads + columns(f"{attention}.proj", head_dim)
    of_mlp = rows(f"{block}.fc1", bias=True) + of_neurons + columns(f"{block}.fc2")
    return Group(f"block{index}.heads", heads, of_attention), Group(f"block{index}.mlp", neurons, of_mlp)


def _outputs_of(index: int, dim: int) -> tuple[Group, Group]:
    """What the attention and the MLP of one block write into the residual stream."""
    block = f"blocks.{index}"
    of_attention, of_mlp = (
        Group(f"block{index}.{name}", dim, (*rows(f"{block}.{layer}", bias=True), Axis(f"{block}.{total}.units", 0)))
        for name, layer, total in (("attention_out", "attention.proj", "sum1"), ("mlp_out", "fc2", "sum2"))
    )
    return of_attention, of_mlp
