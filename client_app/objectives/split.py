"""Split learning's client: ``contrastive`` has a loss of its own (AdaSplit), ``split`` waits for the server's gradient.

Settings, beside those of ``half.Half``:

``local-rounds``  rounds that the client trains on its own before anything crosses the network, at the run's first
                  learning rate, whenever it makes them
``round``         the present round; the client makes its steps ``start`` to ``stop`` (-1: to the end)
``upload``        ``none``, ``before`` (the activations of each step, before its update) or ``after`` (trains to the end
                  of the round first, then passes the batches through once more)
``wait``          make no update: the gradient of the one step uploaded comes with the next request
``owed``          the step whose gradient lies in ``companions["gradient"]``; -1 for none
``precision``     ``fp32`` or ``fp16``
``temperature``, ``beta``   of the contrastive loss, and of the penalty beta * sum |a|
``train-client``  false: the half stays as it is (ablation)
``send-weights``  ``never``, ``end`` (when the round's last update is made) or ``always``
``take-weights``, ``renew``   begin with the weights that came along; forget the optimiser's moments
``labels``        number of classes, for the width of the labels on the wire
``test-start``, ``test-stop``   of a test: the samples whose activations are sent now; absent: all
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from client_app.data import Examples
from client_app.meter import MemoryMeter
from client_app.objectives.base import CostOf, Findings, Fitted, Objective, ObjectiveError, Task
from client_app.objectives.half import Half, plan_of
from client_app.objectives.ntxent import has_positive_pair, nt_xent
from pruning.capability import Training
from wire.activations import counted_bytes, encode
from wire.smashed import label_type, pack_upload
from wire.training import optimizer_slots

TEST_BATCH = 256


def contrastive(task: Task) -> Objective:
    """The client learns from its own supervised NT-Xent loss; no gradient has to come down."""
    return _objective(task, has_own_loss=True)


def split(task: Task) -> Objective:
    """The client learns from the server's gradient alone (Gupta and Raskar 2018; Vepakomma et al. 2018)."""
    return _objective(task, has_own_loss=False)


def contrastive_peak_bytes(task: Task, training: Training, cost_of: CostOf) -> int:
    """Estimated peak of ``contrastive``, bytes: half and head under training, and the activations it sends."""
    return _peak_bytes(task, training, has_own_loss=True)


def split_peak_bytes(task: Task, training: Training, cost_of: CostOf) -> int:
    """Estimated peak of ``split``, bytes: the half under training, and the activations it sends."""
    return _peak_bytes(task, training, has_own_loss=False)


def _peak_bytes(task: Task, training: Training, has_own_loss: bool) -> int:
    assert task.examples is not None
    num_examples, config, s = len(task.examples), task.train, task.settings
    plan = plan_of(task.full, str(s["cut"]), tuple(task.examples.x.shape[1:]))
    cost = plan.cost_with_head if has_own_loss else plan.cost
    batch = min(training.batch_size + 1, num_examples)  # a last batch of one joins the batch before it
    num_sent, stop = 0, int(s["stop"])
    if s["upload"] != "none":
        everything = num_examples * config.local_epochs
        num_sent = everything if stop < 0 else min(everything, (stop - int(s["start"])) * batch)
    return cost.peak_memory_bytes(batch, training.optimizer_slots) + num_sent * 4 * torch.Size(plan.shape).numel()


def _objective(task: Task, has_own_loss: bool) -> Objective:
    if task.examples is None:
        return _tested(task)
    worker = _Worker(task, has_own_loss)
    return Objective(worker.half.part, _no_loss, train=worker.train, finish=worker.finish)


def _no_loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    raise ObjectiveError("objective: split learning trains in steps of its own")


@dataclass
class _Uploaded:
    """What one request sends up."""

    activations: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)


class _Worker:
    """One request carried out."""

    def __init__(self, task: Task, has_own_loss: bool) -> None:
        self.task, self.has_own_loss, self.settings = task, has_own_loss, task.settings
        self.half = _half(task, task.examples)
        trained = [self.half.part, *([self.half.head] if has_own_loss else [])]
        self.meter = MemoryMeter(nn.ModuleList(trained), optimizer_slots(task.train))
        self.uploaded = _Uploaded()
        self.losses: list[float] = []  # of the client's own: what stands for the server's gradient is none
        self.macs, self.num_seen, self.num_steps, self.num_left = 0.0, 0, 0, 0

    def train(self, examples: Examples) -> Fitted:
        half, s = self.half, self.settings
        if s.get("renew", False):
            half.renew_optimizer()
        # Its own progress says the rate: a client that comes late catches up while the others' is on schedule.
        half.set_rate(self.task.train.learning_rate)
        while half.rounds_done < int(s.get("local-rounds", 0)):
            self._steps(half.rounds_done + 1, 0, -1, "none")
            half.rounds_done += 1
            self.task.save_draft(half.export())
        half.set_rate(float(s["learning-rate"]))
        if int(s["round"]) > half.rounds_done:
            self._global_round(int(s["round"]))
        metrics = {"loss": sum(self.losses) / len(self.losses)} if self.losses else {}
        return Fitted(metrics, self._peak_bytes(), self.num_seen, self.num_steps)

    def _global_round(self, number: int) -> None:
        order = self.half.order(number)
        start, stop, upload = int(self.settings["start"]), int(self.settings["stop"]), str(self.settings["upload"])
        stop = len(order) if stop < 0 else min(stop, len(order))
        owed = int(self.settings.get("owed", -1))
        if owed >= 0:
            self._update(number, owed, order[owed], self.task.companions["gradient"])
        if upload == "after":
            if start == 0:
                self._steps(number, 0, -1, "none")
            self._pass_through(order[start:stop], start)
        else:
            self._steps(number, start, stop, upload)
        self.num_left = max(0, len(order) - max(start, stop))
        if not self.num_left and not self.settings.get("wait", False):
            self.half.rounds_done = number

    def _steps(self, number: int, start: int, stop: int, upload: str) -> None:
        order = self.half.order(number)
        for step in range(start, len(order) if stop < 0 else stop):
            if self.settings.get("wait", False):
                self._look(number, step, order[step])
            else:
                self._update(number, step, order[step], None, keep=upload == "before")

    def _update(self, number: int, step: int, index: Tensor, gradient: Tensor | None, keep: bool = False) -> None:
        """One step on the client's own loss, on the server's gradient, or on both."""
        half = self.half
        x, y = half.batch(index, number, step)
        half.part.train()
        half.head.train()
        with self.meter:
            activations = half.part(x)
            own = loss = self._own_loss(activations, y)
        if keep:
            self._keep(activations, y, step)
        if loss is not None:
            self.losses.append(float(loss.detach()))
        if gradient is not None:
            pulled = (activations * gradient.to(activations.device)).sum()
            if not bool(torch.isfinite(pulled)):
                raise ObjectiveError("objective: the server's gradient is no number any more; lower the learning rate")
            loss = pulled if loss is None else loss + pulled
        self.num_seen += len(y)
        if loss is None:
            self.macs += len(y) * half.plan.cost.macs
            return
        self.macs += len(y) * (half.plan.cost if own is None else half.plan.cost_with_head).train_macs
        half.optimizer.zero_grad()
        loss.backward()
        if self.task.train.max_grad_norm:
            parameters = [*half.part.parameters(), *half.head.parameters()]
            torch.nn.utils.clip_grad_norm_(parameters, self.task.train.max_grad_norm)
        half.optimizer.step()
        self.num_steps += 1

    def _own_loss(self, activations: Tensor, labels: Tensor) -> Tensor | None:
        """None where there is nothing to learn from: a batch without a positive pair is skipped."""
        is_idle = not self.has_own_loss or not self.settings.get("train-client", True)
        if is_idle or not has_positive_pair(labels):
            return None
        loss = nt_xent(self.half.head(activations), labels, float(self.settings["temperature"]))
        beta = float(self.settings.get("beta", 0.0))
        return loss + beta * activations.abs().sum() if beta else loss

    @torch.no_grad()
    def _look(self, number: int, step: int, index: Tensor) -> None:
        """Pass one batch through and send it up; the update comes with the gradient, and passes through again.

        Running statistics must move once, so they are put back. The second pass is the price of clients that live no
        longer than a message; it is not counted as work.
        """
        x, y = self.half.batch(index, number, step)
        buffers = {name: buffer.clone() for name, buffer in self.half.part.named_buffers()}
        self._keep(self.half.part.train()(x), y, step)
        for name, buffer in self.half.part.named_buffers():
            buffer.copy_(buffers[name])

    @torch.no_grad()
    def _pass_through(self, order: list[Tensor], first: int) -> None:
        self.half.part.eval()
        for step, index in enumerate(order, first):
            x, y = self.half.examples.batch(index)
            self._keep(self.half.part(x), y, step)
            self.macs += len(y) * self.half.plan.cost.macs

    def _keep(self, activations: Tensor, labels: Tensor, step: int) -> None:
        self.uploaded.activations.append(activations.detach().cpu())
        self.uploaded.labels.append(labels.cpu())
        self.uploaded.steps.append((step, len(labels)))

    def _peak_bytes(self) -> int:
        return self.meter.peak_bytes + sum(a.numel() * a.element_size() for a in self.uploaded.activations)

    def finish(self, num_steps: int) -> Findings:
        up = self.uploaded
        companions: dict[str, Tensor] = {}
        metrics = {"steps_left": float(self.num_left), "round_steps": float(len(self.half.order(1)))}
        if up.steps:
            activations = torch.cat(up.activations)
            companions = pack_upload(
                encode(activations, str(self.settings["precision"])),
                torch.cat(up.labels).to(label_type(int(self.settings["labels"]))),
                torch.tensor(up.steps, dtype=torch.int32),
            )
            is_all = not self.has_own_loss
            metrics["counted_bytes"] = 4.0 * activations.numel() if is_all else float(counted_bytes(activations))
            metrics["dense_bytes"] = 4.0 * activations.numel()
        if "gradient" in self.task.companions:
            down = 4.0 * self.task.companions["gradient"].numel()
            metrics["counted_bytes"] = metrics.get("counted_bytes", 0.0) + down
        when = self.settings.get("send-weights", "never")
        is_due = when == "always" or (when == "end" and not self.num_left and not self.settings.get("wait", False))
        state = self.half.part.state_dict() if is_due else {}
        return Findings(
            companions=companions,
            memory=self.half.export(),
            metrics=metrics,
            state=copy.deepcopy(state),
            train_macs=self.macs,
        )


def _half(task: Task, examples: Examples | None) -> Half:
    assert examples is not None
    return Half(task, examples.x.shape[1:], examples.x.device, _latest(task))


def _latest(task: Task) -> Mapping[str, Any]:
    """What the client has done last: with an answer that was merged, or on its own."""
    if task.memory:
        return task.memory
    return task.load_draft() if int(task.settings.get("local-rounds", 0)) else {}


def _tested(task: Task) -> Objective:
    """The test: activations for the server, or the whole chain here where the server's half came along."""

    @torch.no_grad()
    def upload(examples: Examples) -> Findings:
        part = _half(task, examples).part.eval()
        start = int(task.settings.get("test-start", 0))
        stop = min(int(task.settings.get("test-stop", len(examples))), len(examples))
        cuts = range(start, stop, TEST_BATCH)
        made = [part(examples.batch(slice(i, min(i + TEST_BATCH, stop)))[0]) for i in cuts]
        activations = torch.cat(made).cpu()
        packed = pack_upload(
            encode(activations, str(task.settings["precision"])),
            examples.y[start:stop].cpu().to(label_type(int(task.settings["labels"]))),
            torch.tensor([(start, stop - start)], dtype=torch.int32),
        )
        return Findings(companions=packed)

    if not task.companions:
        return Objective(task.model, _no_loss, examine=upload)
    return _whole_chain(task)


def _whole_chain(task: Task) -> Objective:
    chain: list[torch.nn.Module] = []

    def predict(x: Tensor) -> Tensor:
        if not chain:
            half = Half(task, x.shape[1:], x.device, _latest(task))
            server = copy.deepcopy(half.plan.cut.server).to_empty(device=x.device)
            server.load_state_dict(dict(task.companions))
            chain.extend([half.part.eval(), server.eval()])
        logits: Tensor = chain[1](chain[0](x))
        return logits

    return Objective(task.model, _no_loss, predict=predict)
