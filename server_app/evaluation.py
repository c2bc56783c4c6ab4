"""Central evaluation: the global model and its family on the server's held-out data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from client_app.data import Examples
from client_app.evaluation import evaluate, reestimate_batch_norm
from client_app.objectives.distillation import predict_with
from pruning.cost import CostModel
from pruning.extract import extract, resize
from pruning.groups import Layout
from pruning.spec import FULL, SubModelSpec
from wire.message import State


class CentralEvaluator:
    """Tests a state and named sub-models of it.

    Every model is tested twice: with the BatchNorm statistics it has, and with statistics re-estimated on unlabelled
    calibration images, for merged statistics of unequal widths describe no network exactly.

    Parameters
    ----------
    model : full model; its weights are overwritten.
    layout, cost : of the full model.
    held_out : examples no client has.
    calibration_ratio : the first share of them serves calibration, the rest the test.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, cost: CostModel, held_out: Examples, calibration_ratio: float
    ) -> None:
        self.model, self.layout, self.cost = model, layout, cost
        cut = max(2, min(1024, int(len(held_out) * calibration_ratio)))
        self.calibration = Examples(held_out.x[:cut], held_out.y[:cut], held_out.mean, held_out.std)
        self.test = Examples(held_out.x[cut:], held_out.y[cut:], held_out.mean, held_out.std)

    def __call__(
        self,
        state: State,
        family: Mapping[str, SubModelSpec],
        deployed: SubModelSpec = FULL,
        prediction: str = "deepest",
    ) -> dict[str, Any]:
        """Accuracy and loss of the global model; accuracies of the family; the name of the best member.

        ``deployed`` is the part of the model that stands for it; ``depth`` says so where that is not all of it.
        ``prediction`` says what a model with exits predicts with: its ``deepest`` exit, or the ``ensemble`` of all.
        Such a model's row has the accuracy of every exit as well, in ``exits``, shallowest first.
        """
        row: dict[str, Any] = {"num_examples": len(self.test), **self._test(state, deployed, prediction)}
        if deployed.depth is not None:
            row["depth"] = deployed.depth
        members = []
        for name, spec in family.items():
            tested = self._test(state, spec, prediction)
            members.append({"name": name, "retention_ratio": self.cost.retention_ratio(spec), **tested})
        if members:
            base = {
                "name": "base",
                "retention_ratio": self.cost.retention_ratio(deployed),
                **{k: v for k, v in row.items() if k != "num_examples"},
            }
            row["family"] = [*members, base]
            row["best"] = max(row["family"], key=lambda m: max(m["accuracy"], m["accuracy_reestimated"]))["name"]
        return row

    def _test(self, state: State, spec: SubModelSpec, prediction: str) -> dict[str, Any]:
        self.model.load_state_dict(dict(state))
        model = resize(self.model, self.layout, spec) if spec != FULL else self.model
        if spec != FULL:
            model.load_state_dict(extract(state, self.layout, spec))
        metrics = self._measure(model, prediction)
        reestimate_batch_norm(model, self.calibration)
        return {**metrics, "accuracy_reestimated": self._measure(model, prediction)["accuracy"]}

    def _measure(self, model: nn.Module, prediction: str) -> dict[str, Any]:
        """Loss and accuracy of what the model predicts, and of all exits where it has several."""
        answers: list[torch.Tensor] = []

        def predict(x: torch.Tensor) -> torch.Tensor:
            output = model(x)
            if isinstance(output, torch.Tensor):
                return output
            answers.append(torch.stack([logits.argmax(1) for logits in output]))
            return predict_with(prediction)(output)

        metrics: dict[str, Any] = evaluate(model, self.test, predict=predict)
        if answers and len(answers[0]) > 1:
            metrics["exits"] = (torch.cat(answers, dim=1) == self.test.y).float().mean(1).tolist()
        return metrics
