import math

import torch
from accelerate import Accelerator

from atomdiff.training.loop import clip_gradients, mean_over_processes, set_learning_rates, update_average


def test_every_group_follows_the_schedule():
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 1.0, "initial_lr": rate} for rate in (1.0, 0.1)]
    optimizer = torch.optim.AdamW(groups)
    set_learning_rates(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05]


def test_the_average_begins_with_the_first_loss():
    assert update_average(math.nan, 3.0) == 3.0
    assert 1.0 < update_average(1.0, 2.0) < 1.1


def test_gradients_are_clipped_unless_the_norm_is_0():
    parameter = torch.nn.Parameter(torch.zeros(2))
    for max_norm, expected in ((0.0, 5.0), (1.0, 1.0)):
        parameter.grad = torch.tensor([3.0, 4.0])
        assert clip_gradients(Accelerator(cpu=True), [parameter], max_norm) == 5.0
        torch.testing.assert_close(parameter.grad.norm(), torch.tensor(expected))


def test_the_mean_of_one_process_is_its_loss():
    assert mean_over_processes(Accelerator(cpu=True), torch.tensor(2.5, requires_grad=True)) == 2.5
