"""Any sequence of our calls and diffusers': every image is that of a new pipeline, and every bit comes back."""

import copy
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import atomdiff
from atomdiff.utils.errors import UserError
from tests.helpers import assert_unchanged, predict, sharing_pipeline, snapshot

pytestmark = pytest.mark.slow

PARTS = ["unet", "text_encoder"]
NAMES = st.sampled_from(["mug", "cat", "style"])
SOME = st.dictionaries(NAMES, st.sampled_from([1.0, 0.5, -0.3]), max_size=3)
OUR_CALLS = {"load": NAMES, "unload": NAMES, "set_active": SOME, "mixed": NAMES}
OUR_CALLS |= {"merge": st.none(), "restore": st.none()}
CALLS_OF_OTHERS = {
    "set_adapters": SOME,
    "fuse_lora": st.none(),
    "unfuse_lora": st.none(),
    "disable_lora": st.none(),
    "enable_lora": st.none(),
    "delete_adapters": NAMES,
    "unload_lora_weights": st.none(),
    "unload_textual_inversion": st.none(),
}
STEPS = st.one_of(
    *(st.tuples(st.just(call), st.integers(0, 1), value) for call, value in (OUR_CALLS | CALLS_OF_OTHERS).items()),
    st.tuples(st.just("load"), st.integers(0, 1), NAMES),
)


def act(pipe, paths, call, value):
    """One call; what it refuses is an error in one line."""
    loaded = {concept.name for concept in atomdiff.list_atoms(pipe)}
    adapters = {name for names in pipe.get_list_adapters().values() for name in names}
    if call == "load":
        atomdiff.load_atoms(pipe, paths[value], value)
    elif call == "unload":
        atomdiff.unload_atoms(pipe, value)
    elif call == "set_active":
        atomdiff.set_active(pipe, {name: weight for name, weight in value.items() if name in loaded})
    elif call == "mixed":
        with atomdiff.mixed_batch(pipe, [value]):
            predict(pipe)
    elif call in ("merge", "restore"):
        getattr(atomdiff, call)(pipe)
    elif call in ("fuse_lora", "unfuse_lora"):
        getattr(pipe, call)(components=PARTS)
    elif call == "set_adapters":
        if chosen := {name: weight for name, weight in value.items() if name in adapters}:
            pipe.set_adapters(list(chosen), list(chosen.values()))
    elif call == "delete_adapters":
        pipe.delete_adapters(value)
    elif call == "unload_textual_inversion":
        if pipe.tokenizer.added_tokens_encoder.keys() & {"ohwx", "zwx"}:
            pipe.unload_textual_inversion()
    else:
        getattr(pipe, call)()


def run(template, paths, steps, own):
    pipes = [copy.deepcopy(template)]
    pipes.append(sharing_pipeline(pipes[0], *own))
    before = [snapshot(pipe) for pipe in pipes]
    predicted = [predict(pipe, "a mug") for pipe in pipes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call, which, value in steps:
            try:
                act(pipes[which], paths, call, value)
            except UserError as error:
                assert "\n" not in str(error)
            assert torch.isfinite(predict(pipes[which], "a ohwx zwx mug")).all()
        for pipe in pipes:
            atomdiff.restore(pipe)
            atomdiff.set_active(pipe, {})
            table = pipe.text_encoder.get_input_embeddings().weight
            assert table.shape[0] >= len(pipe.tokenizer)
        assert all(torch.equal(predict(pipe, "a mug"), base) for pipe, base in zip(pipes, predicted, strict=True))
        for pipe in pipes:
            atomdiff.unload_atoms(pipe)
    for pipe, its_own in zip(pipes, before, strict=True):
        assert_unchanged(pipe, its_own)


@given(steps=st.lists(STEPS, min_size=1, max_size=8), own=st.sampled_from([(), ("unet",), ("tokenizer",)]))
@example(
    steps=[
        ("load", 0, "mug"),
        ("load", 1, "style"),
        ("set_active", 1, {"mug": 1.0, "style": 0.5}),
        ("delete_adapters", 0, "mug"),
        ("unload_lora_weights", 0, None),
    ],
    own=(),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_after_any_sequence_every_bit_is_back(pipe_template, concept_files, steps, own):
    run(pipe_template, concept_files, steps, own)


def test_copies_and_pickles_have_words_and_calls_of_their_own(tiny_pipe, concept_files):
    before = snapshot(tiny_pipe)
    for name in ("mug", "style"):
        atomdiff.load_atoms(tiny_pipe, concept_files[name], name)
    atomdiff.set_active(tiny_pipe, {"mug": {"steps": {0: 1, 1: 0.5}}, "style": 0.5})
    predicted, loaded = predict(tiny_pipe), snapshot(tiny_pipe)
    for twin in (copy.deepcopy(tiny_pipe), pickle.loads(pickle.dumps(tiny_pipe))):
        assert torch.equal(predict(twin), predicted)
        twin.fuse_lora(components=PARTS)
        twin.unload_lora_weights()
        atomdiff.unload_atoms(twin)
        assert_unchanged(twin, before)
        assert_unchanged(tiny_pipe, loaded)
        assert torch.equal(predict(tiny_pipe), predicted)


IMAGE_CALLS = st.tuples(
    st.sampled_from(["load", "unload", "set_active", "set_adapters", "merge", "restore", "mixed"]),
    st.integers(0, 1),
    NAMES,
    SOME,
)


def expected_after(state, call, name, value):
    """What acts after a call, {adapter: weight}, kept in a state of adapters, their weights, and what is written."""
    if call == "load":
        state["weights"][name], state["active"], state["written"] = 1.0, {name}, None
    elif call == "unload":
        del state["weights"][name]
        state["active"], state["written"] = state["active"] - {name}, None
    elif call in ("set_active", "set_adapters"):
        state["weights"].update(value)
        state["active"], state["written"] = set(value), dict(value) if call == "set_active" else None
    elif call == "merge":
        state["written"] = {each: state["weights"][each] for each in state["active"]}
    elif call == "restore":
        state["written"] = None
    active = {each: state["weights"][each] for each in state["active"]}
    return active if state["written"] is None else state["written"]


@given(calls=st.lists(IMAGE_CALLS, min_size=2, max_size=8))
@settings(max_examples=4, deadline=None, derandomize=True)
def test_every_image_in_between_is_that_of_a_fresh_pipeline(pipe_template, concept_files, calls):
    one = copy.deepcopy(pipe_template)
    pipes, state = [one, sharing_pipeline(one)], {"weights": {}, "active": set(), "written": None}
    for call, which, name, value in [("load", 0, "mug", {}), *calls]:
        value = {each: weight for each, weight in value.items() if each in state["weights"]}
        if (name in state["weights"]) == (call == "load") or (call == "mixed" and name == "style"):
            continue
        if call == "set_adapters":
            if not value:
                continue
            atomdiff.restore(pipes[which])
        if call != "mixed":
            act(pipes[which], concept_files, call, value if call in ("set_active", "set_adapters") else name)
        acting = {name: 1.0} if call == "mixed" else expected_after(state, call, name, value)
        new = copy.deepcopy(pipe_template)
        for each in state["weights"]:
            atomdiff.load_atoms(new, concept_files[each], each)
        atomdiff.set_active(new, acting)
        if call == "mixed" and "style" in (state["active"] if state["written"] is None else state["written"]):
            continue  # it is refused
        with atomdiff.mixed_batch(one, [name]) if call == "mixed" else nullcontext():
            predicted = predict(one, "a OHWX zwx mug")
        torch.testing.assert_close(predicted, predict(new, "a OHWX zwx mug"), atol=1e-4, rtol=0)
