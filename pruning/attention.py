"""Self-attention whose heads are units: found in a module by the names and shapes of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from pruning.groups import Axis, Group
from pruning.unit_scale import UnitScale

# What the layer that reads the heads is called.
OUTPUT_NAMES = ("proj", "out_proj")


@dataclass(frozen=True)
class Attention:
    """Self-attention whose heads are units.

    Attributes
    ----------
    path : dotted path of the module.
    inputs : names of its query, key and value layers; one name if they are fused.
    output : name of the layer that reads the heads.
    num_heads, head_dim : heads, and width of each.
    """

    path: str
    inputs: tuple[str, ...]
    output: str
    num_heads: int
    head_dim: int


def find_attentions(model: nn.Module) -> Iterator[Attention]:
    """Attention modules whose heads can be told from their children's names and shapes."""
    for path, module in model.named_modules():
        children = dict(module.named_children())
        output = next((name for name in OUTPUT_NAMES if isinstance(children.get(name), nn.Linear)), None)
        separate = (("q", "k", "v"), ("query", "key", "value"), ("q_proj", "k_proj", "v_proj"))
        inputs = next(
            (names for names in (("qkv",), *separate) if all(isinstance(children.get(n), nn.Linear) for n in names)),
            None,
        )
        if output is None or inputs is None:
            continue
        widths = {children[name].out_features for name in inputs}
        read = children[output].in_features
        if widths != {read * 3 // len(inputs)}:
            continue
        num_heads, head_dim = getattr(module, "num_heads", None), getattr(module, "head_dim", None)
        # ``resize`` adapts the attribute num_heads beside a fused qkv; who has none reads the heads off the weights.
        if not isinstance(head_dim, int) or read % head_dim or (num_heads is not None and inputs != ("qkv",)):
            continue
        num_heads = read // head_dim
        # Anything with parameters beside these, but norms within a head and a scale of heads, ties them together.
        others = [
            child
            for name, child in children.items()
            if name not in (*inputs, output, "q_norm", "k_norm")
            and any(True for _ in child.parameters())
            and not (isinstance(child, UnitScale) and child.unit_width == head_dim)
        ]
        own = list(module.parameters(recurse=False))
        if not others and not own:
            yield Attention(path, tuple(inputs), output, num_heads, head_dim)


def head_group(attention: Attention, shapes: dict[str, tuple[int, ...]]) -> Group:
    """The group whose units are the heads; ``shapes`` are those of the state dict, by key."""
    width = attention.num_heads * attention.head_dim
    prefix = f"{attention.path}." if attention.path else ""
    offsets = (0, width, 2 * width) if len(attention.inputs) == 1 else (0,)
    axes = [
        Axis(f"{prefix}{name}.{tensor}", 0, attention.head_dim, offset)
        for name in attention.inputs
        for offset in offsets
        for tensor in ("weight", "bias")
        if f"{prefix}{name}.{tensor}" in shapes
    ]
    if (scale := f"{prefix}scale.weight") in shapes:
        axes.append(Axis(scale, 0))
    axes.append(Axis(f"{prefix}{attention.output}.weight", 1, attention.head_dim))
    return Group(f"{prefix}heads", attention.num_heads, tuple(axes))
