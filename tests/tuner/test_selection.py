"""Learned layer choice: what a score does, its gradient by differences, the penalty, and layers that are left out."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from atomdiff.atoms.variants import SCORE_NAME
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.adapter_state import atom_layers
from atomdiff.tuner.inject import inject
from atomdiff.tuner.selection import frozen_scores, has_budget, layer_scores, leave_out, selection_penalty


def make_model(**settings):
    """Three layers in a row with random deltas, and their base."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1))
    model = copy.deepcopy(base)
    inject(model, AtomConfig(**{"select": "adaptive", "target_modules": "all", **settings}), "default")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_delta" in name:
                parameter.normal_(std=0.1)
    return model, base


def set_scores(model, *values):
    for layer, value in zip(atom_layers(model).values(), values, strict=True):
        layer.tensors(SCORE_NAME)["default"].data.fill_(value)


def loss_of(model):
    return model(torch.ones(1, 4, 6, 6, dtype=torch.float64)).square().sum()


@pytest.mark.parametrize("recursion", [None, 2])
def test_a_layer_below_the_threshold_does_not_act(recursion):
    model, base = make_model(recursion=recursion)
    layers = [*atom_layers(model).values()]

    def changed():
        adapted = [layer.adapted_weight(["default"]) for layer in layers]
        return [not torch.equal(weight, module.weight) for weight, module in zip(adapted, base, strict=True)]

    set_scores(model, 0.0999, -1.0, 0.0)
    assert changed() == [False, False, False]
    set_scores(model, 0.1, 0.0, 0.0)
    once = layers[0].adapted_weight(["default"])
    assert changed() == [True, False, False]
    set_scores(model, 7.0, 0.0, 0.5)
    assert changed() == [True, False, True]
    assert torch.equal(layers[0].adapted_weight(["default"]), once)  # a score decides, it does not scale


def test_a_score_has_the_gradient_of_the_weight_of_its_layer():
    model, _ = make_model()
    model.double()
    set_scores(model, 0.3, 0.05, 0.2)
    loss_of(model).backward()
    for layer, indicator in zip(atom_layers(model).values(), (1, 0, 1), strict=True):
        score, step = layer.tensors(SCORE_NAME)["default"], 1e-4
        found, saved = float(score.grad), score.data.clone()
        score.data.fill_(1.0)  # so that the adapter weight alone decides
        losses = []
        for weight in (indicator + step, indicator - step):
            layer.set_scale("default", weight)
            losses.append(float(loss_of(model)))
        layer.set_scale("default", 1.0)
        score.data.copy_(saved)
        assert found == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-3) and abs(found) > 1e-3
        deltas = [layer.tensors("channel_delta")["default"].grad]
        assert all(bool(grad.any()) == bool(indicator) for grad in deltas)  # what does not act is not trained


def test_the_penalty_is_the_mean_size_of_the_scores_after_a_warm_up():
    model, _ = make_model(select_penalty=0.5)
    set_scores(model, 0.3, -0.1, 0.2)
    scores = layer_scores(model, "default")
    assert selection_penalty(scores, 0.19) == 0.0
    penalty = selection_penalty(scores, 0.2)
    assert penalty.item() == pytest.approx(0.5 * np.mean(np.abs([0.3, -0.1, 0.2])))
    penalty.backward()
    grads = [float(layer.tensors(SCORE_NAME)["default"].grad) for layer in atom_layers(model).values()]
    assert grads == pytest.approx([0.5 / 3, -0.5 / 3, 0.5 / 3])
    others, _ = make_model(select="all")
    assert layer_scores(others, "default") == [] and selection_penalty([], 0.9) == 0.0


def test_each_adapter_has_its_own_penalty():
    scores = []
    for penalty, values in ((0.5, (0.3, -0.1, 0.2)), (0.1, (0.4, 0.4, 0.4))):
        model, _ = make_model(select_penalty=penalty)
        set_scores(model, *values)
        scores += layer_scores(model, "default")
    assert selection_penalty(scores, 1.0).item() == pytest.approx((0.5 * 0.6 + 0.1 * 1.2) / 6)


def test_layers_that_are_left_out_stay_out():
    model, _ = make_model(select_budget="8KB")
    scores = layer_scores(model, "default")
    assert has_budget(scores) and frozen_scores(scores) == []
    leave_out(scores, {"1"})
    assert {score.path: float(score.parameter) for score in scores} == {"0": 0.0, "1": pytest.approx(0.15), "2": 0.0}
    assert frozen_scores(scores) == [scores[0].parameter, scores[2].parameter]
    without = layer_scores(make_model()[0], "default")
    leave_out(without, {"1"})
    assert not has_budget(without) and frozen_scores(without) == []
    assert not has_budget([]) and frozen_scores([]) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select": "some"}, "select='some': expected 'all' or 'adaptive'"),
        ({"select": "adaptive", "select_penalty": -1}, "select_penalty=-1: expected a number of at least 0"),
        ({"select": "adaptive", "select_penalty": "1"}, "select_penalty='1'"),
        ({"select": "adaptive", "select_penalty": float("inf")}, "select_penalty=inf"),
        ({"select": "adaptive", "select_budget": "many"}, "select_budget='many': expected a number of bytes, such as"),
        ({"select": "adaptive", "select_budget": 0}, "select_budget=0: expected"),
        ({"select_budget": "8KB"}, "select_budget='8KB' with select='all'.*atomdiff prune"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AtomConfig(**settings)


def test_a_budget_is_read_as_people_write_it():
    for text, count in (("8KB", 8000), ("8 KiB", 8192), ("1.5kb", 1500), (8192, 8192), ("1MB", 1_000_000)):
        assert AtomConfig(select="adaptive", select_budget=text).budget == count
