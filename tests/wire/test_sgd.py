"""The optimiser on CPUs is PyTorch's, bit for bit; the fused ones go where PyTorch's others go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wire.message import TrainConfig
from wire.sgd import SGD
from wire.training import make_optimizer, make_saved_optimizer


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 5e-4])
def test_twenty_steps_are_those_of_torch_bit_for_bit(momentum, nesterov, weight_decay):
    torch.manual_seed(0)
    config = TrainConfig(momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    nets = [nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[0][0].bias.requires_grad_(False)
    nets[1][0].bias.requires_grad_(False)
    ours = make_optimizer(config, nets[0].parameters(), 0.1)
    assert isinstance(ours, SGD)
    torchs = torch.optim.SGD(
        nets[1].parameters(), lr=0.1, momentum=momentum, nesterov=nesterov and momentum > 0, weight_decay=weight_decay
    )
    for _ in range(20):
        x, y = torch.randn(16, 7), torch.randint(3, (16,))
        for net, optimizer in zip(nets, (ours, torchs), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    for one, two in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("is_turned", [False, True])
def test_one_pass_over_memory_goes_where_torch_goes_even_if_weights_lie_otherwise(optimizer, is_turned):
    torch.manual_seed(0)
    config = TrainConfig(optimizer=optimizer, weight_decay=5e-4)
    start, gradients = torch.randn(300, 7), torch.randn(20, 300, 7)
    ours = (start.t().contiguous().t() if is_turned else start.clone()).requires_grad_()
    theirs = start.clone().requires_grad_()
    mine = make_saved_optimizer(config, [ours], 0.1)
    torchs = (
        torch.optim.Adam([theirs], lr=0.1, weight_decay=5e-4)
        if optimizer == "adam"
        else torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=5e-4)
    )
    assert mine.param_groups[0]["fused"] is not is_turned
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        torchs.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
