"""Central evaluation against models built by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from client_app.data import Examples
from client_app.evaluation import reestimate_batch_norm
from pruning.cost import measure_costs
from pruning.extract import extract, resize
from pruning.spec import SubModelSpec
from server_app.evaluation import CentralEvaluator
from zoo import get_model


@pytest.fixture
def setting():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, layout = get_model("cnn", 10, 1, 8, width=0.25)
    cost = measure_costs(model, layout, torch.zeros(2, 1, 8, 8))
    x, y = torch.randn(100, 1, 8, 8), torch.randint(10, (100,))
    held_out = Examples(x, y, torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    return model, layout, cost, held_out


def test_calibration_images_are_not_tested_on(setting):
    evaluator = CentralEvaluator(*setting, calibration_ratio=0.2)
    assert (len(evaluator.calibration), len(evaluator.test)) == (20, 80)
    assert evaluator(setting[0].state_dict(), {})["num_examples"] == 80


def test_the_family_is_tested_as_physically_small_models_and_the_best_is_named(setting):
    model, layout, cost, held_out = setting
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    spec = SubModelSpec.of({"stage1": [0, 3, 5], "stage2": range(1, 9), "stage3": range(20)})
    row = CentralEvaluator(model, layout, cost, held_out, 0.2)(state, {"small": spec})
    small = resize(get_model("cnn", 10, 1, 8, width=0.25)[0], layout, spec)
    small.load_state_dict(extract(state, layout, spec))
    expected = (small.eval()(held_out.x[20:]).argmax(1) == held_out.y[20:]).float().mean()
    member, base = row["family"]
    assert member["name"] == "small"
    assert member["accuracy"] == pytest.approx(float(expected))
    assert member["retention_ratio"] == pytest.approx(cost.retention_ratio(spec))
    assert (base["name"], base["retention_ratio"], base["accuracy"]) == ("base", 1.0, row["accuracy"])
    best = max(row["family"], key=lambda m: max(m["accuracy"], m["accuracy_reestimated"]))
    assert row["best"] == best["name"]


def test_evaluating_does_not_change_the_state_that_was_passed(setting):
    model, layout, cost, held_out = setting
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = {key: tensor.clone() for key, tensor in state.items()}
    evaluator = CentralEvaluator(model, layout, cost, held_out, 0.2)
    first, second = evaluator(state, {}), evaluator(state, {})
    assert first == second
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_re_estimated_statistics_are_those_of_the_calibration_images(setting):
    _, _, _, held_out = setting
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.LazyLinear(2))
    model(held_out.x)
    reestimate_batch_norm(model, held_out)
    features = model[0](held_out.x)
    assert torch.allclose(model[1].running_mean, features.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(model[1].running_var, features.var((0, 2, 3)), rtol=1e-4)
    assert model[1].momentum == 0.1
    assert not model.training


def test_models_without_batch_norm_are_left_alone(setting):
    model, _ = get_model("mlp", 10, 1, 8)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    reestimate_batch_norm(model, setting[3])
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("prediction", ["deepest", "ensemble"])
def test_a_model_with_exits_is_tested_exit_by_exit_and_on_what_it_predicts_with(prediction, setting):
    torch.manual_seed(1)
    model, layout = get_model("cnn", 10, 1, 8, width=0.25, exits=True)
    cost = measure_costs(model, layout, torch.zeros(2, 1, 8, 8))
    held_out = setting[3]
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    evaluator = CentralEvaluator(model, layout, cost, held_out, 0.2)
    row = evaluator(state, {"two": SubModelSpec(depth=2), "one": SubModelSpec(depth=1)}, prediction=prediction)
    x, y = held_out.x[20:], held_out.y[20:]
    outputs = model_with(state).eval()(x)
    each = [float((logits.argmax(1) == y).float().mean()) for logits in outputs]
    for tested, num_exits in ((row, 3), (row["family"][0], 2)):
        assert tested["exits"] == pytest.approx(each[:num_exits])
        mean = torch.stack(outputs[:num_exits]).mean(0)
        logits = mean if prediction == "ensemble" else outputs[num_exits - 1]
        assert tested["accuracy"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
    assert "exits" not in row["family"][1]
    assert row["family"][1]["accuracy"] == pytest.approx(each[0])


def model_with(state: dict[str, torch.Tensor]) -> nn.Module:
    model = get_model("cnn", 10, 1, 8, width=0.25, exits=True)[0]
    model.load_state_dict(state)
    return model
