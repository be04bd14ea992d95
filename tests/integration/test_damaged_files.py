"""Damaged files: each loads as what it says or gives our error, and the pipeline is as it was."""

import copy
import json
import random
import warnings

import pytest
import torch

import atomdiff
from atomdiff.concepts import peft_folder
from atomdiff.concepts.compatibility import check_base
from atomdiff.concepts.concept_file import read_concept_file, read_header
from atomdiff.pipelines.models import pipeline_models
from atomdiff.pipelines.placeholder_tokens import tokens_in
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_tensors
from tests.integration.mutations import (
    EITHER,
    HUGE,
    REFUSED,
    SLOW_PATTERNS,
    VALID,
    cut_or_longer,
    flipped_bits,
    something_else,
    wrong_header_length,
)


@pytest.fixture(scope="module")
def pipe(pipe_template):
    """One pipeline for all files; each test leaves it as it was, which is what they test."""
    pipe = copy.deepcopy(pipe_template)
    tokens_in(pipe)
    return pipe


def weights(pipe):
    """A hash of all weights."""
    models = pipeline_models(pipe).items()
    return hash_tensors({f"{part}.{key}": value for part, model in models for key, value in model.state_dict().items()})


def structure(pipe):
    """All but the weights that a load could change."""
    models = pipeline_models(pipe)
    tables = [(id(p), p.shape, p.dtype, p.requires_grad) for m in models.values() for p in m.parameters()]
    modules = [(n, id(x), type(x), len(x._forward_hooks)) for m in models.values() for n, x in m.named_modules()]
    attributes = [(sorted(vars(m)), m.training, hasattr(m, "peft_config")) for m in models.values()]
    words = (id(pipe.tokenizer), len(pipe.tokenizer), pipe.text_encoder.config.vocab_size, tokens_in(pipe))
    return len(tables), tables, modules, attributes, words, sorted(vars(pipe))


def refusal(action):
    """The message of the error that an action gives, or None; any other exception is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            action()
        except UserError as error:
            assert len(str(error)) < 3000 and str(error).isprintable(), str(error)[:3000]
            return str(error)
    return None


def fuzz(seeds, valid_files, pipe, path):
    """Read a damaged file for each seed, and load some; kinds of mutations and of files take turns."""
    mutations = [(mutate, kind) for kind in (REFUSED, VALID, EITHER) for mutate in kind]
    before, clean = weights(pipe), structure(pipe)
    loaded = 0
    for seed in seeds:
        rng = random.Random(seed)
        mutate, kind = mutations[seed % len(mutations)]
        name = rng.choice(sorted(valid_files))
        data = mutate(valid_files[name], rng)
        if data == valid_files[name]:
            continue
        path.write_bytes(data)
        try:
            through_pipe = seed // len(mutations) % (8 if kind is REFUSED else 2) == 0
            loaded += check_file(path, kind, pipe, (before, clean), through_pipe)
            if seed % 16 == 0:
                assert weights(pipe) == before
        except BaseException as problem:
            what = f"seed {seed}: {mutate.__name__} of {name}"
            problem.add_note(what) if hasattr(problem, "add_note") else print(what)
            raise
    assert weights(pipe) == before
    return loaded


def check_file(path, kind, pipe, before, through_pipe):
    """Check that a file is what its kind of mutation promises and leaves the pipeline alone; whether it was loaded."""
    clean_weights, clean_structure = before
    if through_pipe:
        error = refusal(lambda: atomdiff.load_atoms(pipe, path, "x"))
        if error is None:
            atomdiff.unload_atoms(pipe)
            assert weights(pipe) == clean_weights
    else:
        error = refusal(lambda: accept(path, pipeline_models(pipe)))
    assert structure(pipe) == clean_structure
    if kind is REFUSED:
        assert error is not None
        assert refusal(lambda: read_header(path)) is None or refusal(lambda: read_concept_file(path))
    if kind is VALID:
        assert error is None, error
    return through_pipe and error is None


def accept(path, models):
    """What `load_atoms` does before it changes anything, for a file with at least one known layer."""
    concept = read_concept_file(path)
    check_base(concept, models)
    for word, vectors in concept.tokens.items():
        for encoder, vector in vectors.items():
            if not word.strip() or word.split() != [word] or encoder != "text_encoder" or vector.shape != (32,):
                raise UserError("refused by atomdiff.pipelines.placeholder_tokens")
    for tensors in concept.layers.values():
        assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.slow
def test_damaged_files_are_refused_or_are_what_they_say(valid_files, pipe, tmp_path):
    assert fuzz(range(160), valid_files, pipe, tmp_path / "x.atoms.safetensors") > 0


@pytest.mark.slow
def test_many_damaged_files_are_refused_or_are_what_they_say(valid_files, pipe, tmp_path):
    assert fuzz(range(1000, 2600), valid_files, pipe, tmp_path / "x.atoms.safetensors") > 100


BAD_PEFT_SETTINGS = {
    "peft_type": [None, 5, [], {}, "NO_SUCH", "__class__", HUGE],
    "target_modules": [*SLOW_PATTERNS, "(", "[", "a{9999999999999}", "x" * 10**6],
    "exclude_modules": [*SLOW_PATTERNS, "("],
    "layers_pattern": [*SLOW_PATTERNS, ["layers", SLOW_PATTERNS[0]], 5],
    "rank_pattern": [{pattern: 4} for pattern in [*SLOW_PATTERNS, "("]] + [{f"x{i}": 4 for i in range(5000)}],
    "alpha_pattern": [{pattern: 4} for pattern in SLOW_PATTERNS],
    "megatron_config": [{"a": 1}],
    "adapters": [{"a": "../../x"}],
    "modules_to_save": [["conv_in"]],
    "init_lora_weights": ["pissa", "olora", "corda", "loftq", "lora_ga"],
    "task_type": ["x", 5, [], {}],
}
JSON_TEXTS = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"5",
    b'"x"',
    b"{}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"\xff\xfe",
    b"\0" * 9,
]
JSON_TEXTS += [
    b'{"peft_type": "LORA", "peft_type": "LORA"}',
    b'{"peft_type": "LORA", "r": "\\ud800"}',
    b" " * (2 << 20),
]


def fuzz_folders(seeds, valid_folder, folder):
    """Read a damaged folder for each seed."""
    for seed in seeds:
        rng, files, refused = random.Random(seed), dict(valid_folder), True
        kind = seed % 5
        if kind == 0:
            name = rng.choice(sorted(BAD_PEFT_SETTINGS))
            settings = json.loads(files["adapter_config.json"]) | {name: rng.choice(BAD_PEFT_SETTINGS[name])}
            files["adapter_config.json"] = json.dumps(settings).encode()
        elif kind == 1:
            files["adapter_config.json"] = rng.choice(JSON_TEXTS)
        else:
            name = rng.choice(
                ["adapter_model.safetensors", "learned_embeds.safetensors", "adapter_config.json"][: 5 - kind]
            )
            mutate = rng.choice([cut_or_longer, wrong_header_length] if kind == 4 else [flipped_bits, something_else])
            refused = kind == 4
            files[name] = mutate(files[name], rng)
        for file, data in files.items():
            (folder / file).write_bytes(data)
        error = refusal(lambda: peft_folder.read(folder, ["unet"], "unet"))
        assert error or not refused, f"seed {seed}: {name}"


def test_damaged_folders_are_refused(valid_folder, tmp_path):
    fuzz_folders(range(60), valid_folder, tmp_path)


@pytest.mark.slow
def test_many_damaged_folders_are_refused(valid_folder, tmp_path):
    fuzz_folders(range(1000, 1500), valid_folder, tmp_path)
