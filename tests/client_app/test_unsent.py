"""What a client does not send waits for its turn: nothing is lost, nothing is sent twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client_app.objectives import ObjectiveError
from client_app.objectives.unsent import Unsent
from pruning.extract import extract
from pruning.gates import num_winners, upload_spec
from pruning.importance import score_units
from pruning.spec import FULL
from tests.client_app.test_gated import WIDTHS, task_of, trained

QUARTER = {"share": "batch", "num-groups": 2, "upload": "changed", "upload-density": 0.25}


def units_of(task: Any, state: dict[str, torch.Tensor], group: str) -> list[torch.Tensor]:
    """What the units of a group own among the parameters, units first; channels repeat by their pixels in a linear."""
    parameters = dict(task.model.named_parameters())
    axes = [axis for axis in task.layout.by_name[group].axes if axis.key in parameters]
    return [state[axis.key].movedim(axis.dim, 0).reshape(WIDTHS[group], -1) for axis in axes if axis.key in state]


def held_where(task: Any, like: dict[str, torch.Tensor], spec: Any) -> dict[str, torch.Tensor]:
    """True where ``spec`` has an entry, by the masks of its units."""
    found = {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in like.items()}
    for group, size in WIDTHS.items():
        mask = torch.from_numpy(np.isin(np.arange(size), spec.arrays[group]))
        for axis in task.layout.by_name[group].axes:
            if axis.key in found:
                along = mask.repeat_interleave(axis.repeat)
                shape = [-1 if dim == axis.dim else 1 for dim in range(found[axis.key].dim())]
                found[axis.key] = found[axis.key] & along.reshape(shape)
    return found


def test_the_units_that_changed_most_are_sent_and_the_others_changes_wait():
    task = task_of(**QUARTER)
    start = {key: tensor.clone() for key, tensor in task.model.state_dict().items()}
    _, findings = trained(task)
    end = task.model.state_dict()
    change = {key: end[key] - start[key] for key in end if end[key].is_floating_point()}
    for group, size in WIDTHS.items():
        norms = sum(part.double().square().sum(1) for part in units_of(task, change, group))
        best = torch.sort(torch.argsort(-norms)[: num_winners(size, 0.25)]).values
        assert findings.narrowed.units[group] == tuple(best.tolist())
    expected = extract(end, task.layout, findings.narrowed)
    assert findings.state.keys() == expected.keys()
    assert all(torch.allclose(findings.state[key], tensor) for key, tensor in expected.items())
    went = held_where(task, change, findings.narrowed)
    for name, waiting in findings.memory["unsent"].items():
        due = torch.where(went[name], 0, change[name])
        assert torch.equal(waiting, due), "an entry that two units share went if both did"
        assert due.any()


def test_what_waited_is_sent_with_the_next_change_of_its_unit():
    key, late = "blocks.2.conv.weight", slice(64, 96)
    waiting = torch.zeros_like(task_of().model.state_dict()[key])
    waiting[late] = 1.0
    task = task_of(memory={"unsent": {key: waiting}}, **QUARTER)
    start = {key: tensor.clone() for key, tensor in task.model.state_dict().items()}
    _, findings = trained(task)
    assert findings.narrowed.units["stage3"] == tuple(range(64, 96)), "nothing else is due as much"
    columns = list(findings.narrowed.units["stage2"])
    expected = task.model.state_dict()[key] + waiting
    assert torch.allclose(findings.state[key], expected[late][:, columns], atol=1e-6)
    rest = findings.memory["unsent"][key]
    assert not rest[late][:, columns].any(), "what was sent does not wait any more"
    assert torch.equal(rest[:64], task.model.state_dict()[key][:64] - start[key][:64])


def test_what_waits_of_a_unit_that_does_not_move_stays_as_it_is_to_the_bit():
    waiting = {"blocks.2.conv.weight": torch.rand(128, 64, 3, 3)}
    task = task_of(memory={"unsent": waiting})
    unsent = Unsent(task)
    _, due = unsent.add_to(task.model.state_dict())
    assert torch.equal(due["blocks.2.conv.weight"], waiting["blocks.2.conv.weight"])


def test_a_change_that_is_no_number_does_not_wait_for_ever():
    task = task_of()
    unsent = Unsent(task)
    with torch.no_grad():
        task.model.blocks[2].conv.weight[5] = float("nan")
    with pytest.raises(ObjectiveError, match=r"blocks.2.conv.weight.*lower the learning rate"):
        unsent.add_to(task.model.state_dict())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**31), st.sampled_from([0.125, 0.25, 0.5])), min_size=1, max_size=6))
def test_what_was_sent_and_what_waits_is_what_changed(rounds):
    """Summed over any rounds, whatever was sent in each, entry by entry."""
    memory: dict[str, Any] = {}
    task = task_of()
    names = [name for name, _ in task.model.named_parameters()]
    total = {name: torch.zeros_like(task.model.state_dict()[name]) for name in names}
    sent = {name: torch.zeros_like(tensor) for name, tensor in total.items()}
    for seed, density in rounds:
        generator = torch.Generator().manual_seed(seed)
        task = task_of(memory=memory)
        start = {key: tensor.clone() for key, tensor in task.model.state_dict().items()}
        unsent = Unsent(task)
        change = {name: torch.randn(start[name].shape, generator=generator) for name in names}
        summed, due = unsent.add_to({**start, **{name: start[name] + change[name] for name in names}})
        spec = upload_spec(task.layout, FULL, score_units(due, task.layout, "l2", normalize=False), density)
        memory = {"unsent": unsent.rest(due, spec)}
        went = held_where(task, change, spec)
        for name in names:
            total[name] += change[name]
            sent[name] += torch.where(went[name], summed[name] - start[name], 0)
    for name in names:
        rest = memory["unsent"].get(name, torch.zeros_like(total[name]))
        assert torch.allclose(sent[name] + rest, total[name], atol=1e-4), name


@pytest.mark.parametrize("which", ["salient", "changed"])
def test_tensors_that_are_kept_through_training_are_counted(which):
    task = task_of(**{**QUARTER, "upload": which})
    owned = {axis.key for group in task.layout.prunable for axis in group.axes}
    weights = sum(4 * p.numel() for name, p in task.model.named_parameters() if name in owned)
    assert trained(task)[0].kept_bytes == (weights if which == "changed" else 0)
