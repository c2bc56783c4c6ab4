"""The server's half of a split model: trained on smashed data, under each client's own mask.

One vector holds the shared weights of all layers but the output layer, another the output layer's. The module's
parameters are views of a third, which holds the weights as the client being served sees them.
Running statistics of normalisation layers belong to a client like its mask does: batches of unlike clients share none.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from strategies.closing import RunStoppedError
from strategies.split.masks import STEPPED, MaskConfig, mask_gradients_, mask_weights, step_, step_logits_
from wire.message import TrainConfig
from wire.training import make_saved_optimizer
from zoo.cut import CutModel


class ServerDivergedError(RunStoppedError):
    """The server's loss or its gradient is no number any more: no answer's fault, and no answer mends it."""


@dataclass
class Served:
    """What the server keeps of one client.

    Attributes
    ----------
    logits, optimizer : of its mask; None without masks.
    buffers : its running statistics, by full name.
    """

    logits: Tensor | None
    optimizer: torch.optim.Adam | None
    buffers: dict[str, Tensor]


class SplitServer:
    """Shared server weights, one optimiser for them, and a mask with its own optimiser per client. Works on the CPU.

    Parameters
    ----------
    cut : the model without storage, cut.
    state : full state dict; gives the first weights.
    masks : what masks there are.
    train : optimiser of the shared weights, and label smoothing.

    Attributes
    ----------
    is_random : whether a step draws random numbers (dropout) and so must not run beside another thread that does.
    """

    def __init__(self, cut: CutModel, state: Mapping[str, Tensor], masks: MaskConfig, train: TrainConfig) -> None:
        self.masks, self.train = masks, train
        self.module = copy.deepcopy(cut.server).to_empty(device="cpu").train()
        names = [name for name, _ in self.module.named_parameters()]
        prefix = cut.output + "."
        self._shared = [name for name in names if masks.kind != "none" and not name.startswith(prefix)]
        self._plain = [name for name in names if name not in self._shared]
        self._buffers = [name for name, _ in self.module.named_buffers()]
        self.is_random = any(isinstance(module, nn.modules.dropout._DropoutNd) for module in self.module.modules())
        self.served: dict[int, Served] = {}
        self._first_buffers = {name: state[name].clone() for name in self._buffers}
        self.weights, self.plain = (_flat(state, part) for part in (self._shared, self._plain))
        self._optimizers = [
            make_saved_optimizer(train, vector.split(STEPPED), train.learning_rate)
            for vector in (self.weights, self.plain)
        ]
        self._seen, self._probabilities, self._gradient = (torch.zeros_like(self.weights) for _ in range(3))
        self._plain_gradient = torch.zeros_like(self.plain)
        self._tie(self._shared, self._seen, self._gradient)
        self._tie(self._plain, self.plain, self._plain_gradient)

    def step(
        self,
        partition_id: int,
        activations: Tensor,
        labels: Tensor,
        learning_rate: float,
        place: tuple[int, ...] = (0,),
        wants_gradient: bool = False,
    ) -> tuple[float, Tensor | None]:
        """Train on one batch of one client: mean CE(g(a; U * m(V_i)), y) + lambda * sum sigmoid(V_i).

        Parameters
        ----------
        activations : [batch, ...] at the cut; detached, so that nothing flows back unless ``wants_gradient``.
        labels : int64 [batch].
        place : seed, round, step and client: what the random numbers of this step belong to (dropout), and what an
            error names. A server with one owner for everybody's statistics gets another ``partition_id``.

        Returns
        -------
        loss, gradient
            The cross-entropy before the step, and its gradient with respect to the activations, or None.

        Raises
        ------
        ServerDivergedError
            If either is no number; nothing has moved then.
        """
        client = self._show(partition_id)
        a = activations.detach().requires_grad_(wants_gradient)
        value = self._backward(a, labels, place)
        if self.train.max_grad_norm:  # each half by itself: neither sees the other's gradient
            norm = torch.stack([self._gradient.norm(), self._plain_gradient.norm()]).norm()
            share = (self.train.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in (self._gradient, self._plain_gradient):
                gradient.mul_(share)
        for optimizer in self._optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate
        step_(self._optimizers[1], self._plain_gradient)
        if client.logits is not None and client.optimizer is not None:
            frozen = mask_gradients_(self.weights, self._probabilities, self._gradient, self.masks)
            step_(self._optimizers[0], self._gradient, frozen)
            step_logits_(client.optimizer, self._probabilities, frozen)
        buffers = dict(self.module.named_buffers())
        client.buffers = {name: buffers[name].clone() for name in self._buffers}
        self.served[partition_id] = client
        return value, a.grad

    def _backward(self, a: Tensor, labels: Tensor, place: tuple[int, ...]) -> float:
        """Make the gradients of the cross-entropy, which is returned; raises as ``step`` does."""
        for gradient in (self._gradient, self._plain_gradient):
            gradient.zero_()
        with torch.random.fork_rng(devices=[], enabled=self.is_random), torch.enable_grad():
            if self.is_random:
                torch.manual_seed(hash(place) % 2**63)
            logits = self.module.train()(a)
            loss = functional.cross_entropy(logits, labels, label_smoothing=self.train.label_smoothing)
        value = float(loss.detach())
        if math.isfinite(value):
            loss.backward()
        is_steep = a.grad is not None and not bool(torch.isfinite(a.grad).all())
        if is_steep or not math.isfinite(value):
            what = "gradient" if is_steep else "loss"
            raise ServerDivergedError(
                f"the server's {what} is no number any more (loss {value:g}) at seed, round, step, client = "
                f"{', '.join(map(str, place))}; lower train.learning-rate"
            )
        return value

    @torch.no_grad()
    def logits(self, partition_id: int, activations: Tensor) -> Tensor:
        """Logits [batch, num_classes] for one client's activations, in evaluation mode."""
        self._show(partition_id)
        logits: Tensor = self.module.eval()(activations)
        return logits

    def state_for(self, partition_id: int) -> dict[str, Tensor]:
        """Entries of the server's half as one client has them: masked weights, its own running statistics."""
        self._show(partition_id)
        return {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}

    def state(self) -> dict[str, Tensor]:
        """Entries of the server's half without masks; running statistics are the mean over the clients served."""
        shapes = dict(self.module.named_parameters())
        found = {}
        for names, vector in ((self._shared, self.weights), (self._plain, self.plain)):
            for name, part in zip(names, vector.split([shapes[n].numel() for n in names]), strict=True):
                found[name] = part.clone().view_as(shapes[name])
        for name in self._buffers:
            first = self._first_buffers[name]
            kept = [self.served[pid].buffers[name] for pid in sorted(self.served)]
            is_mean = kept and first.is_floating_point()
            found[name] = torch.stack(kept).mean(0) if is_mean else (kept[0] if kept else first).clone()
        return found

    def export_state(self) -> dict[str, Any]:
        """Weights, masks and all optimisers' memories."""
        clients = {
            str(pid): {
                "logits": client.logits if client.logits is not None else torch.zeros(0),
                "optimizer": client.optimizer.state_dict() if client.optimizer is not None else {},
                "buffers": client.buffers,
            }
            for pid, client in sorted(self.served.items())
        }
        optimizers = [optimizer.state_dict() for optimizer in self._optimizers]
        shared = {"weights": self.weights, "plain": self.plain, "optimizers": optimizers}
        return {**shared, "clients": clients, "first_buffers": self._first_buffers}

    def import_state(self, raw: Mapping[str, Any]) -> None:
        """Go on from ``export_state``."""
        self.weights.copy_(raw["weights"])
        self.plain.copy_(raw["plain"])
        for optimizer, held in zip(self._optimizers, raw["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        # The run's state has everybody's mean by now, and who was never served begins as everybody did.
        self._first_buffers = dict(raw.get("first_buffers", self._first_buffers))  # older checkpoints: none
        self.served = {int(pid): self._serve(item) for pid, item in raw["clients"].items()}

    def _serve(self, raw: Mapping[str, Any] | None = None) -> Served:
        """A client's place, fresh or out of a checkpoint."""
        buffers = dict(self._first_buffers if raw is None else raw["buffers"])
        if self.masks.kind == "none" or not len(self.weights):
            return Served(None, None, buffers)
        logits = torch.full_like(self.weights, self.masks.start) if raw is None else raw["logits"].clone()
        optimizer = torch.optim.Adam([logits], lr=self.masks.rate_in_force, fused=True)
        if raw is not None:
            optimizer.load_state_dict(raw["optimizer"])
        return Served(logits, optimizer, buffers)

    def _show(self, partition_id: int) -> Served:
        """Make the module hold what this client sees; a client whose tests come first is none that was served."""
        client = self.served.get(partition_id) or self._serve()
        if client.logits is not None:
            mask_weights(self.weights, client.logits, self.masks, self._seen, self._probabilities)
        for name, buffer in self.module.named_buffers():
            buffer.copy_(client.buffers[name])
        return client

    def _tie(self, names: list[str], vector: Tensor, gradient: Tensor) -> None:
        """Make parameters and their gradients views of flat vectors."""
        start = 0
        for name in names:
            path, _, leaf = name.rpartition(".")
            owner = self.module.get_submodule(path)
            shape = owner._parameters[leaf].shape  # type: ignore[union-attr]
            stop = start + shape.numel()
            parameter = nn.Parameter(vector[start:stop].view(shape))
            parameter.grad = gradient[start:stop].view(shape)
            owner._parameters[leaf] = parameter
            start = stop


def _flat(state: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([state[name].detach().float().flatten() for name in names]) if names else torch.zeros(0)
