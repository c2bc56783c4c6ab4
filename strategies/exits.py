"""What methods for models with exits share: where exits stand, and the refusal of models that have none."""

from __future__ import annotations

from pruning.groups import Layout
from pruning.spec import SubModelSpec
from wire.flat import refuse

PREDICTIONS = ("deepest", "ensemble")


def check_exits(layout: Layout, strategy: str, model: str) -> None:
    """Refuse a model that is not cut in depth because only one head stands somewhere in it.

    Raises
    ------
    ConfigError
        With the remedy.
    """
    refuse(
        len(layout.exits) < 2,
        f"strategy={strategy} with model.name={model}",
        f"the model has {len(layout.exits)} exits, and a client that is cut in depth needs one to learn by; set "
        "model.exits=true (mlp, cnn, resnet*, vit_*), or declare a layout whose blocks own exit heads",
    )


def cut_behind(layout: Layout, num_exits: int) -> SubModelSpec:
    """The sub-model of full width that ends with exit number ``num_exits``, counted from 1, the shallowest."""
    depth = layout.exits[num_exits - 1]
    return SubModelSpec(depth=None if depth == len(layout.blocks) else depth)
