"""Train a sub-model and, inside it, the core that everybody holds."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from client_app.objectives.base import Objective, ObjectiveError, Task, last_logits
from client_app.objectives.cross_entropy import cross_entropy
from client_app.objectives.distillation import divergence
from client_app.objectives.inner import InnerNetwork
from pruning.spec import SubModelSpec
from wire.spec import spec_from_json


def nested(task: Task) -> Objective:
    """Train the sub-model and, inside it, the core that everybody holds: CE(wide) + CE(core) + T^2 KL(wide || core).

    The core's weights are the sub-model's own, so that it stays a network of its own, and what lies around it is
    learned as an addition to it (universally slimmable networks and in-place distillation: Yu and Huang 2019).
    Settings: ``core``, a spec as JSON; ``temperature``.

    Raises
    ------
    ObjectiveError
        If the core is not part of the client's sub-model.
    """
    core_spec = spec_from_json(str(task.settings["core"])) or SubModelSpec()
    if not core_spec.is_subset_of(task.spec, task.layout):  # other entries would be taken for the core's
        raise ObjectiveError("objective: core: it is not part of the sub-model that was sent")
    if task.spec == core_spec:
        return cross_entropy(task)
    temperature = float(task.settings.get("temperature", 3.0))
    core = InnerNetwork(task, core_spec)

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = last_logits(task.model(x))
        core_logits = core(x)
        smoothing = task.train.label_smoothing
        value = functional.cross_entropy(logits, y, label_smoothing=smoothing)
        value = value + functional.cross_entropy(core_logits, y, label_smoothing=smoothing)
        return value + divergence(logits, core_logits, temperature), logits

    return Objective(task.model, loss, extra=(core.module,))
