from atomdiff.utils.seeds import derive_seed


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
