"""The lock of a pipeline's models: threads change concepts one after the other, and calls under it see one change."""

import threading
from contextlib import suppress

import pytest
import torch

import atomdiff
from tests.helpers import sharing_pipeline, together
from tests.pipelines.helpers import assert_same_bits, bits, generate, predict_repeated


@pytest.mark.slow
def test_images_under_the_lock_have_the_concepts_set_before_whatever_others_do(pipe, concepts):
    other = sharing_pipeline(pipe)
    expected, found = {}, {"spatial": [], "separable": []}
    for name in found:
        atomdiff.set_active(pipe, name)
        expected[name] = generate(pipe)
    atomdiff.restore(pipe)
    before = bits(pipe)

    def serve(pipe, name):
        for _ in range(3):
            with atomdiff.locked(pipe):
                atomdiff.set_active(pipe, name)
                found[name].append(generate(pipe))

    def load():
        for method in ("atoms", "lora", "atoms"):
            atomdiff.unload_atoms(other, atomdiff.load_atoms(other, concepts[method]))

    together(lambda: serve(pipe, "spatial"), lambda: serve(other, "separable"), load)
    for name, images in found.items():
        assert len(images) == 3
        for image in images:
            torch.testing.assert_close(image, expected[name], atol=1e-5, rtol=0)
    atomdiff.restore(pipe)
    assert_same_bits(bits(pipe), before)


@pytest.mark.slow
def test_calls_beside_changes_without_the_lock_do_no_lasting_damage(tiny_pipe, concepts):
    before, expected, done = bits(tiny_pipe), predict_repeated(tiny_pipe), threading.Event()

    def call():
        while not done.is_set():
            with suppress(Exception):  # layers come and go meanwhile
                predict_repeated(tiny_pipe)

    def change():
        try:
            for method in ("atoms", "sparse atoms", "lora"):
                name = atomdiff.load_atoms(tiny_pipe, concepts[method])
                atomdiff.set_active(tiny_pipe, {name: 0.5})
                atomdiff.restore(tiny_pipe)
                atomdiff.unload_atoms(tiny_pipe)
        finally:
            done.set()

    together(call, change)
    assert_same_bits(bits(tiny_pipe), before)
    assert torch.equal(predict_repeated(tiny_pipe), expected)


@pytest.mark.slow
def test_a_mixed_batch_begins_between_changes(pipe):
    begun = threading.Event()

    def mix():
        with atomdiff.mixed_batch(pipe, ["spatial"]):
            begun.set()

    thread = threading.Thread(target=mix)
    with atomdiff.locked(pipe):
        thread.start()
        assert not begun.wait(0.5)
    assert begun.wait(60)
    thread.join()
