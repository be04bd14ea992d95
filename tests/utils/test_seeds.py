import warnings

import torch

from atomdiff.utils.seeds import derive_seed, fork_rng


def test_seeds_differ_by_path_and_stay_what_they_are():
    seeds = {
        derive_seed(0),
        derive_seed(1),
        derive_seed(0, "batch", 1),
        derive_seed(0, "batch", 2),
        derive_seed(0, "b", 1),
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "batch", 1) == derive_seed(0, "batch", 1)


def test_generators_are_as_before_a_fork_without_a_word_about_other_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fork_rng():
            torch.manual_seed(1)
            torch.rand(3)
    assert torch.equal(torch.random.get_rng_state(), before)
