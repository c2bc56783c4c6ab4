"""Split learning with the gradient coming down: one exchange per step of every client.

A request brings the gradient of the step before and asks for the activations of the next; the last one brings a
gradient and takes the client's half home. Between a client's first and last request no weights travel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from strategies.setting import Order, Setting
from strategies.split.halves import Halves, common_settings, count_of, largest_batch
from strategies.split.server import SplitServer
from wire.activations import ActivationError
from wire.flat import ConfigError
from wire.message import Report, State
from wire.training import learning_rate


class Relay:
    """The conversations of one round.

    Parameters
    ----------
    setting, halves : of the run.
    server_of : partition id -> (server half that trains on its activations, whose running statistics count).
    """

    def __init__(self, setting: Setting, halves: Halves, server_of: Callable[[int], tuple[SplitServer, int]]) -> None:
        self.setting, self.halves, self.server_of = setting, halves, server_of
        self.open((), 0)

    def open(self, clients: Sequence[int], server_round: int) -> None:
        """Begin with these clients, all at their first step."""
        self.clients, self.server_round = list(clients), server_round
        self._at = dict.fromkeys(clients, 0)
        self._left = dict.fromkeys(clients, 1)
        self._gradients: dict[int, Tensor] = {}
        self._came: set[int] = set()
        self._asked: set[int] = set()

    def next(self) -> dict[int, Order]:
        """The next request of everybody who has not finished; {} when all have."""
        silent = self._asked - self._came
        self.clients = [pid for pid in self.clients if pid not in silent and self._left[pid] >= 0]
        self._asked, self._came = set(self.clients), set()
        return {pid: self._order(pid) for pid in self.clients}

    def _order(self, pid: int) -> Order:
        step, more = self._at[pid], self._left[pid] > 0
        setting, gradient = self.setting, self._gradients.pop(pid, None)
        rate = learning_rate(setting.job.train, self.server_round, setting.job.num_rounds)
        settings = common_settings(setting, self.halves, pid, rate) | {
            "round": self.server_round,
            "start": step,
            "stop": step + 1 if more else step,
            "upload": "before" if more else "none",
            "wait": more,
            "owed": step - 1,
            "precision": "fp32",
            "send-weights": "end",
            "take-weights": step == 0,
            "renew": step == 0,
        }
        return Order(
            objective="split",
            settings=settings,
            companions=lambda: {} if gradient is None else {"gradient": gradient},
            travels=(lambda key: key in self.halves.client_keys) if step == 0 else (lambda key: False),
        )

    def hear(self, pid: int, report: Report, state: State) -> dict[str, Tensor] | None:
        """Check one answer and train the server on it; returns the client's half if that was its last.

        Raises
        ------
        ActivationError, ConfigError
            If the answer is not what was asked for; nothing has changed then.
        ServerDivergedError
            If the server's loss is no number; the server has not moved then.
        """
        step = self._at[pid]
        if self._left[pid] == 0:
            if report.companions:
                raise ActivationError(f"upload: unexpected entries {sorted(report.companions)}")
            self.halves.check_weights(report.state, state)
            self._left[pid] = -1
            self._came.add(pid)
            return dict(report.state)
        if report.state:
            raise ConfigError(f"report: unexpected entries {sorted(report.state)}, weights in the middle of a round")
        steps = self.halves.unpack(report.companions, 1, largest_batch(self.setting.job.train.batch_size))
        if [item.step for item in steps] != [step]:
            raise ActivationError(f"upload: expected step {step}, got {[item.step for item in steps]}")
        left = count_of(report, "steps_left", self.setting.job.train.local_epochs)
        server, owner = self.server_of(pid)
        rate = learning_rate(self.setting.job.train, self.server_round, self.setting.job.num_rounds)
        place = (self.setting.job.seed, self.server_round, step, pid)
        _, gradient = server.step(owner, steps[0].activations, steps[0].labels, rate, place, wants_gradient=True)
        assert gradient is not None
        self._gradients[pid], self._at[pid], self._left[pid] = gradient, step + 1, left
        self._came.add(pid)
        return None
