"""In what batches the images of a job are generated."""

from pathlib import Path

import pytest

from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.sampling.batching import Sample, make_batches, shard, sort_by_concepts
from atomdiff.sampling.concept_source import ConceptSource
from atomdiff.sampling.prompt_requests import PromptRequest


def plain(kind, number, mixes=True):
    """A sample of a kind such as "ab": it uses the concepts a and b."""
    request = PromptRequest("", "", tuple((CONCEPTS[name, mixes], AdapterWeight()) for name in kind))
    return Sample(f"{kind}{number}", request)


CONCEPTS = {
    (name, mixes): ConceptSource(name, name, Path(__file__), (), read=(lambda: None) if mixes else None)
    for name in "abc"
    for mixes in (True, False)
}


def names(batches):
    return [[name for name, _ in batch] for batch in batches]


def test_items_alike_share_batches_and_what_is_left_is_mixed():
    kinds = ["a", "b", "", "a", "ab", "a", "", "a", "c", "", "a"]
    samples = sort_by_concepts([plain(kind, number) for number, kind in enumerate(kinds)])
    assert [name for name, _ in samples] == ["2", "6", "9", "a0", "a3", "a5", "a7", "a10", "ab4", "b1", "c8"]
    assert names(make_batches(samples, 3)) == [
        ["2", "6", "9"],
        ["a0", "a3", "a5"],
        ["a7", "a10", "ab4"],
        ["b1", "c8"],
    ]
    assert names(make_batches(samples, 2)) == [
        ["2", "6"],
        ["a0", "a3"],
        ["a5", "a7"],
        ["9", "a10"],
        ["ab4", "b1"],
        ["c8"],
    ]
    assert make_batches([], 2) == []


def test_other_weights_are_another_kind():
    lines = [PromptRequest("", "", ((CONCEPTS["a", True], AdapterWeight(weight)),)) for weight in (1.0, 0.5, 1.0, 0.5)]
    samples = sort_by_concepts([Sample(*each) for each in zip("abcd", lines, strict=True)])
    assert names(make_batches(samples, 2)) == [["a", "c"], ["b", "d"]]


def test_a_job_of_one_kind_stays_in_its_order():
    samples = [plain("a", number) for number in (3, 1, 2, 0, 4)]
    assert sort_by_concepts(samples) == samples
    assert names(make_batches(samples, 2)) == [["a3", "a1"], ["a2", "a0"], ["a4"]]


def test_other_methods_are_never_mixed():
    samples = [plain("a", 0, False), plain("a", 1, False), plain("a", 2, False), plain("b", 3, False), plain("c", 4)]
    assert names(make_batches(samples, 2)) == [["a0", "a1"], ["a2"], ["b3"], ["c4"]]


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_share_all_items_evenly(processes):
    shares = [shard(list(range(5)), process, processes) for process in range(processes)]
    assert [each for share in shares for each in share] == list(range(5))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
