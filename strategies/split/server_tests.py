"""Clients' tests on the server: each client's test activations come in pieces, none above the bound of an upload.

Of a piece nothing stays but its loss and its number of right answers, so that memory does not grow with a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from strategies.split.halves import Halves
from strategies.split.server import SplitServer
from wire.activations import ActivationError
from wire.flat import Scalar
from wire.message import Report

AT_ONCE = 512
"""Samples that pass through the server's half together."""


@dataclass
class _Course:
    """How far one client's test has come: samples judged, their mean loss, and how many of them were right."""

    server_round: int
    num_examples: int = 0
    num_judged: int = 0
    loss: float = 0.0
    num_correct: int = 0


class ServerTests:
    """The tests under way.

    Parameters
    ----------
    halves : of the run.
    max_upload_bytes : of one piece, counted dense in fp32; holds at least one sample.
    own_classes : whether a client's classes are its only possible answers.
    """

    def __init__(self, halves: Halves, max_upload_bytes: int, own_classes: bool) -> None:
        self.halves, self.own_classes = halves, own_classes
        self.max_samples = max_upload_bytes // halves.sample_bytes
        self._courses: dict[int, _Course] = {}

    def wish(self, partition_id: int, server_round: int) -> dict[str, Scalar]:
        """Which test samples a client is asked for now; what an earlier round left unfinished is forgotten."""
        course = self._courses.get(partition_id)
        if course is None or course.server_round != server_round:
            course = self._courses[partition_id] = _Course(server_round)
        return {"test-start": course.num_judged, "test-stop": course.num_judged + self.max_samples}

    def judge(self, report: Report, server: SplitServer) -> Report | None:
        """Take one piece in; the finished test without its activations, or None while samples are missing.

        Raises
        ------
        ActivationError
            If the piece is not the one that was asked for.
        """
        pid = report.partition_id
        course = self._courses.pop(pid)
        expected = min(self.max_samples, report.num_examples - course.num_judged)
        if course.num_judged and report.num_examples != course.num_examples:
            raise ActivationError(
                f"upload: a test of {course.num_examples} examples became one of {report.num_examples}"
            )
        steps = self.halves.unpack(report.companions, 1, self.max_samples)
        got = [(item.step, len(item.labels)) for item in steps]
        if got != [(course.num_judged, expected)]:
            raise ActivationError(f"upload: expected {expected} test samples from {course.num_judged} on, got {got}")
        logits = [server.logits(pid, part) for part in steps[0].activations.split(AT_ONCE)]
        loss, num_correct = tested(logits, steps[0].labels, report.label_counts, self.own_classes)
        course.num_examples = report.num_examples
        course.num_judged += expected
        course.num_correct += num_correct
        course.loss += (loss - course.loss) * (expected / course.num_judged)
        if course.num_judged < report.num_examples:
            self._courses[pid] = course
            return None
        accuracy = course.num_correct / course.num_examples
        return replace(report, metrics={"loss": course.loss, "accuracy": accuracy}, companions={})


def tested(
    logits: Sequence[Tensor], labels: Tensor, label_counts: Sequence[int], own_classes: bool
) -> tuple[float, int]:
    """Mean loss, and number of right answers, of some of one client's test samples.

    Parameters
    ----------
    logits : their parts, each [num_samples of the part, num_classes].
    labels : int64 [num_samples].
    label_counts : the client's training examples of each class.
    own_classes : whether the answer is one of the classes that the client has.
    """
    answers = torch.cat(list(logits))
    if own_classes:
        answers = answers.masked_fill(torch.tensor(label_counts) == 0, -1e4)
    return float(torch.nn.functional.cross_entropy(answers, labels)), int((answers.argmax(1) == labels).sum())
