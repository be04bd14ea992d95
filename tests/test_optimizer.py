import dataclasses

import pytest
import torch

from atomdiff.concept import build_concept
from atomdiff.optimizer import build_optimizer
from atomdiff.train_config import TrainConfig
from atomdiff.tuner import AtomConfig

CONFIG = TrainConfig(
    pretrained_model_name_or_path="base",
    instance_data_dir="photos",
    class_name="mug",
    learning_rate=0.1,
    token_learning_rate=0.2,
    max_train_steps=10,
)


@pytest.fixture
def concept(tiny_pipe):
    return build_concept(CONFIG, tiny_pipe, AtomConfig(), ("a photo of sks mug",), torch.float32)


def test_the_token_has_its_own_learning_rate_and_no_decay(concept):
    adapter, token = build_optimizer(CONFIG, concept)[0].param_groups
    assert (adapter["initial_lr"], adapter["weight_decay"]) == (0.1, CONFIG.adam_weight_decay)
    assert (token["initial_lr"], token["weight_decay"]) == (0.2, 0)
    assert len(token["params"]) == 1 and token["params"][0] is concept.token_vector
    assert len(adapter["params"]) == len(concept.trained()) - 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [1, 1, 1]),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4}, [0, 1, 1]),
        ({"lr_scheduler": "linear"}, [1, 0.5, 0]),
        ({"lr_scheduler": "cosine"}, [1, 0.5, 0]),
        ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2}, [1, 1, 0]),
        ({"lr_scheduler": "polynomial", "lr_power": 2.0}, [1, 0.25, 0]),
    ],
)
def test_the_course_of_the_learning_rates(concept, fields, expected):
    factor = build_optimizer(dataclasses.replace(CONFIG, **fields), concept)[1]
    assert [factor(step) for step in (0, 5, 10)] == pytest.approx(expected, abs=1e-5)
