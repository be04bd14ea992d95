"""Whatever is in a file: it loads as what it says or gives our error, and nothing is run, opened or taken for it."""

import copy
import gzip
import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load, save

import atomdiff
from atomdiff.concepts import peft_folder
from atomdiff.concepts.compatibility import check_base
from atomdiff.concepts.concept_file import read_delta_file, read_header
from atomdiff.pipelines.models import pipeline_models
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding, tokens_in
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError

pytestmark = pytest.mark.slow

CONCEPTS = {
    "default": AtomConfig(channel_block=4, target_modules=["conv_in", "conv1", "to_q"]),
    "dct": AtomConfig(channel_block=2, basis="dct", target_modules="attention"),
    "joint": AtomConfig(channel_block=2, joint=True, num_atoms=4, target_modules=["conv_in", "conv_out"]),
    "recursive": AtomConfig(channel_block=1, recursion=2, target_modules=["conv_in"]),
    "sparse": AtomConfig(channel_block=1, basis="sparse", num_atoms=12, target_modules=["conv_in"]),
}
NAN, INF, HUGE = float("nan"), float("inf"), 10**400
SLOW_PATTERNS = [
    "(a|b|c_)*x",
    r"(\w+\.?)+X",
    r"(.*.*)+\d",
    ".*.*.*.*.*.*X",
    "(_?){40}X",
    "(?:.*.*.*.*.*.*X)?",
    r"x)|((\w+\.?)+X",
]


class Written:
    """A safetensors file taken apart, whose header can say what no writer would: a key twice, any JSON, lies."""

    def __init__(self, data):
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        self.metadata = list(header.pop("__metadata__", {}).items())
        self.tensors = list(header.items())
        self.data = data[8 + size :]
        self.more = []  # further entries of the header

    def key(self, rng, start="unet."):
        """The place of a random tensor."""
        return rng.choice([i for i, (key, _) in enumerate(self.tensors) if key.startswith(start)])

    def set(self, name, text):
        """Give a field of the metadata another text (None: take it away)."""
        self.metadata = [(k, v) for k, v in self.metadata if k != name] + ([] if text is None else [(name, text)])

    def get(self, name):
        return json.loads(dict(self.metadata)[name])

    def bytes(self):
        header = _object([("__metadata__", _Json(_object(self.metadata))), *self.tensors, *self.more]).encode()
        return len(header).to_bytes(8, "little") + header + self.data


class _Json(str):
    """Text that is JSON already."""


def _object(pairs):
    return "{" + ",".join(f"{json.dumps(k)}:{v if isinstance(v, _Json) else json.dumps(v)}" for k, v in pairs) + "}"


# Mutations: (bytes of a valid file, random numbers) -> other bytes. REFUSED ones never give a file that loads, VALID
# ones always do, EITHER may give one.
REFUSED, VALID, EITHER = [], [], []


def mutation(kind):
    return lambda function: kind.append(function) or function


def taken_apart(function):
    def mutate(data, rng):
        file = Written(data)
        function(file, rng)
        return file.bytes()

    mutate.__name__ = function.__name__
    return mutate


def with_tensors(function):
    def mutate(data, rng):
        tensors = load(data)
        key = rng.choice([key for key in sorted(tensors) if key.startswith("unet.")])
        tensors = function(tensors, key, rng)
        return save(tensors, dict(Written(data).metadata))

    mutate.__name__ = function.__name__
    return mutate


@mutation(REFUSED)
@taken_apart
def wrong_dtype(file, rng):
    file.tensors[file.key(rng)][1]["dtype"] = rng.choice(
        ["I64", "BOOL", "U8", "F8_E4M3", "F8_E8M0", "F4", "C64", "f32", "", None, 7, ["F32"], {}]
    )


@mutation(REFUSED)
@taken_apart
def wrong_shape(file, rng):
    info = file.tensors[file.key(rng)][1]
    m, d = info["shape"][0], info["shape"][-1]
    wrong = [[], [m], [1, m, d, 1], [m * d + 1], [-m, -d], [0, 2**62], [0, 2**63], [2**32, 2**32], [m, d, 10**30]]
    info["shape"] = rng.choice([*wrong, [m, float(d)], ["9", "9"], [[m], [d]], None, {}, 9, [1] * 1000, [NAN]])


@mutation(REFUSED)
@taken_apart
def wrong_offsets(file, rng):
    info = file.tensors[file.key(rng)][1]
    start, end = info["data_offsets"]
    values = [start - 1, start + 1, -1, -(2**63), 2**63, 2**64, end, HUGE, 0.5, "0", None, [start], True, NAN]
    wrong = [[value, end] for value in values if value != start]
    wrong += [[start, value] for value in values if value != end]
    info["data_offsets"] = rng.choice([*wrong, [end, start + 1], [start], [start, end, end], [], None, {}, "ab", 5])


@mutation(REFUSED)
@taken_apart
def missing_or_wrong_entry(file, rng):
    place = file.key(rng)
    key, info = file.tensors[place]
    if rng.random() < 0.5:
        del info[rng.choice(sorted(info))]
    else:
        file.tensors[place] = (key, rng.choice([None, [], "x", 5, NAN, [info], {}]))


@mutation(REFUSED)
@taken_apart
def a_key_twice(file, rng):
    kind = rng.randrange(4)
    if kind == 0:
        file.more.append(file.tensors[file.key(rng)])
    elif kind == 1:
        file.metadata.append(rng.choice(file.metadata))
    elif kind == 2:
        file.more.append(("__metadata__", dict(file.metadata)))
    else:
        name = rng.choice(["adapter_config", "base_fingerprint"])
        values = list(file.get(name).items())
        file.set(name, _object([*values, rng.choice(values)]))


@mutation(REFUSED)
@taken_apart
def another_name(file, rng):
    place = file.key(rng)
    key, info = file.tensors[place]
    module, _, kind = key.rpartition(".")
    names = [
        "../../x",
        "/etc/passwd",
        "unet.__class__",
        "unet",
        "",
        ".",
        "unet..conv_in",
        "unet.conv_in.weight",
        "token",
    ]
    names += [
        "unet.nowhere",
        "pipe.unet.conv_in",
        "unet.conv_in\0",
        "unet.\x1b[2Jconv_in",
        "ünet.conv_in",
        "x" * 100_000,
    ]
    names += ["unet.conv_in.base_layer", "scheduler.x", "tokenizer.y", "text_encoder.z", "\u202eunet.conv_in", "%s{0}"]
    other = f"{rng.choice(names)}.{kind}"
    if rng.random() < 0.3:
        other = f"{module}.{rng.choice(['weight', 'lora_A', '__class__', 'atom_delta.x', '', 'ATOM_DELTA', '0'])}"
    file.tensors[place] = (other, info)
    if rng.random() < 0.5:  # the fingerprint may know it, too
        prints = file.get("base_fingerprint")
        file.set("base_fingerprint", json.dumps({**prints, other.rpartition(".")[0]: prints[module]}))


@mutation(REFUSED)
@taken_apart
def wrong_metadata(file, rng):
    name = rng.choice(["format", "format_version", "adapter_config", "base_fingerprint", "training"])
    texts = [None, "", "1.0", "2", "ATOMDIFF", "[]", "null", "{", "[" * 100_000, '{"a":' * 100_000, "NaN", "\ud800"]
    file.set(name, rng.choice(texts))
    if rng.random() < 0.2:
        file.metadata.append(("x", rng.choice([None, 5, ["a"], {"a": "b"}, True])))
    if rng.random() < 0.05:
        file.metadata = []


DEEP = json.loads("[" * 400 + "]" * 400)
BAD_SETTINGS = {
    "num_atoms": [0, -1, 1.5, "9", True, [9], {}, 10**18, HUGE, INF, DEEP],
    "channel_block": [0, None, "4", [4], -4, NAN, 1e9],
    "channel_block_pattern": [[1], "x", 5, {"x": 0}, {"x": "y"}, {"[": 2}, {"(?i)a": 2}, {"x{9999999999999}": 2}]
    + [{pattern: 4} for pattern in SLOW_PATTERNS]
    + [{f"x{i}": 2 for i in range(5000)}, {"a" * 10**6: 2}, {"(" * 5000 + ")" * 5000: 2}],
    "joint": [1, "yes", None, [], DEEP],
    "recursion": [0, "2", 10**12, HUGE, 1.0, True, [1]],
    "basis": ["x", None, [], 5, {"a": 1}, "SVD", "x" * 10**6],
    "sparsity": [0, -1, NAN, INF, -INF, HUGE, True, "1", None, [], 1e300],
    "seed": [-1, 2**32, 1.5, None, "0", True, HUGE],
    "target_modules": [5, True, {"a": 1}, [1], [[["x"]]], [None], NAN, DEEP],
    "exclude_modules": [5, {"a": 1}, [1], [["x"]]],
    "layers_pattern": [5, [1], {"a": "b"}],
    "layers_to_transform": ["x", [True], [[1]], 1.5, {"a": 1}],
    "peft_type": ["LORA", None, 5, [], "atoms"],
    **{
        name: [None] for name in ("init_weights", "modules_to_save", "auto_mapping", "__class__", "inference_mode", "a")
    },
}


@mutation(REFUSED)
@taken_apart
def wrong_setting(file, rng):
    name = rng.choice(sorted(BAD_SETTINGS))
    file.set("adapter_config", json.dumps(file.get("adapter_config") | {name: rng.choice(BAD_SETTINGS[name])}))
    if name == "sparsity" and rng.random() < 0.3:
        values = [*file.get("adapter_config").items(), ("target_modules", "\ud800")]
        file.set("adapter_config", _object(values))


@mutation(REFUSED)
@taken_apart
def wrong_fingerprint(file, rng):
    prints = file.get("base_fingerprint")
    module = rng.choice(sorted(prints))
    values = prints[module]
    bad = [NAN, INF, "1", None, True, [1.0], {}, HUGE, 10**4000, -1.0, 1e308, 1e61]
    prints[module] = rng.choice(
        [[*values[:-1], rng.choice(bad)], values[:-1], [*values, 0.0], [], None, "x", 5, {}, [values], [0.5] * 100_000]
    )
    if rng.random() < 0.2:
        prints = rng.choice([{}, [], {**prints, "unet.x": [1.0]}, {f"x{i}": [1.0] for i in range(1000)}])
    file.set("base_fingerprint", json.dumps(prints))


@mutation(REFUSED)
@with_tensors
def not_finite(tensors, key, rng):
    flat = tensors[key].to(rng.choice([torch.float16, torch.bfloat16, torch.float32, torch.float64])).flatten()
    flat[rng.randrange(len(flat))] = rng.choice([NAN, INF, -INF])
    if flat.dtype == torch.float64 and rng.random() < 0.5:
        flat = torch.full_like(flat, 1e300)  # finite, but not in float32
    return tensors | {key: flat.view(tensors[key].shape)}


@mutation(REFUSED)
@with_tensors
def other_numbers(tensors, key, rng):
    kinds = [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
    key = rng.choice([key, *(["token.sks"] if "token.sks" in tensors else [])])
    return tensors | {key: tensors[key].to(rng.choice([*kinds, torch.complex64]))}


@mutation(REFUSED)
@with_tensors
def other_tensors(tensors, key, rng):
    tensor = tensors[key]
    wrong = [tensor[None], tensor[:0], tensor[..., :0], tensor[:-1], tensor[..., 1:], tensor.flatten(), tensor[0, 0]]
    wrong += [torch.cat([tensor, tensor]), torch.cat([tensor, tensor], -1), torch.zeros(1), torch.zeros(64, 64)]
    wrong = [value for value in wrong if value.shape != tensor.shape]
    module = key.rpartition(".")[0]
    changes = [{key: value.contiguous()} for value in wrong]
    changes += [{f"{module}.{kind}": torch.zeros(2, 2) for kind in ("recursion_delta", "channel_delta", "atom_delta")}]
    change = rng.choice([*changes, {key: None}, {f"{module}.atom_delta2": tensor.clone()}])
    return {name: value for name, value in {**tensors, **change}.items() if value is not None}


@mutation(REFUSED)
@with_tensors
def wrong_words(tensors, key, rng):
    words = ["", " ", "a b", "a\nb", "\t", "sks.text_encoder_2", "x.text_encoder_9", "x" * 101, "y" * 10**6]
    vectors = [torch.zeros(33), torch.zeros(1, 32), torch.zeros(()), torch.zeros(0), torch.zeros(0, 32)]
    change = rng.choice(
        [{f"token.{rng.choice(words)}": torch.zeros(32)}, {"token.new": rng.choice(vectors)}]
        + [{f"token.w{i}": torch.zeros(32) for i in range(65)}]
    )
    return tensors | change


@mutation(VALID)
@with_tensors
def extreme_numbers(tensors, key, rng):
    key = rng.choice([key for key in sorted(tensors) if not key.endswith("_basis")])
    return extreme_atoms(tensors, key, rng)


def extreme_atoms(tensors, key, rng):
    tensor, value = tensors[key], rng.choice([65504.0, -65504.0, 6e-8, 1e-40, 3e38, -0.0, 0.0, 2**-24])
    dtype = rng.choice([torch.float32, torch.float64, *([torch.float16, torch.bfloat16] if abs(value) < 1e5 else [])])
    return tensors | {key: torch.full_like(tensor, value, dtype=dtype)}


mutation(EITHER)(with_tensors(extreme_atoms))


@mutation(VALID)
@taken_apart
def texts_that_nothing_uses(file, rng):
    text = rng.choice([*SLOW_PATTERNS, "(", "../../etc/passwd", "os.system('x')", "\x1b[2J", "\u202e", "x" * 10**5, ""])
    settings = file.get("adapter_config")
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        settings[name] = rng.choice([text, [text, text], []])
    file.set("adapter_config", json.dumps(settings))
    for name in ("base_model", "trigger_phrase", "modelspec.title", "modelspec.thumbnail", "x", "__class__"):
        file.set(name, text)
    file.set("training", json.dumps({"loss": NAN, "steps": HUGE, "seed": [INF], "deep": DEEP, text: text}))


@mutation(EITHER)
@taken_apart
def other_settings(file, rng):
    values = {"num_atoms": [1, 3, 12, 10**18], "channel_block": [1, 2, 3, 8, 10**9, 10**18], "joint": [True, False]}
    values |= {"channel_block_pattern": [{"conv.*": 2, r"(.*\.)?to_[qkv]": 8}], "basis": ["svd", "dct", "sparse"]}
    values |= {"recursion": [1, 2, 3, 10**12], "sparsity": [5e-324, 1e-30, 1e30, 10**29], "seed": [7]}
    name = rng.choice(sorted(values))
    file.set("adapter_config", json.dumps(file.get("adapter_config") | {name: rng.choice(values[name])}))


@mutation(EITHER)
@with_tensors
def strange_words(tensors, key, rng):
    words = [
        "<|endoftext|>",
        "<|startoftext|>",
        "a",
        "photo",
        "\0",
        "\x1b[2J",
        "\u200b",
        "ö",
        "日本",
        "𝔞",
        "e\u0301",
        "##",
        "!",
    ]
    words += [
        "../../x",
        "__class__",
        "x" * 100,
        "A",
        "ﬁ",
        "\u202e",
        "</w>",
        "a</w>",
        "🤖" * 20,
        "token.token",
        ".",
        "'",
        '"',
    ]
    return {**tensors, f"token.{rng.choice(words)}": torch.zeros(32)}


@mutation(EITHER)
@taken_apart
def other_floats(file, rng):
    file.data = bytearray(file.data)
    for _, info in file.tensors:
        info["dtype"] = {"F16": "BF16", "BF16": "F16"}.get(info["dtype"], info["dtype"])


@mutation(EITHER)
def flipped_bits(data, rng):
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8, 100])):
        end = min(rng.choice([8, 8 + int.from_bytes(data[:8], "little"), len(data)]), len(data))
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


@mutation(EITHER)
def other_bytes(data, rng):
    start = rng.randrange(len(data))
    end = min(start + rng.choice([1, 2, 8, 100, 5000]), len(data))
    other = rng.choice(
        [bytes(end - start), b"\xff" * (end - start), rng.randbytes(end - start), data[: end - start], b""]
    )
    return data[:start] + other + data[end:]


@mutation(REFUSED)
def cut_or_longer(data, rng):
    header = 8 + int.from_bytes(data[:8], "little")
    ends = [
        0,
        1,
        7,
        8,
        9,
        header - 1,
        header,
        header + 1,
        len(data) - 1,
        rng.randrange(len(data)),
        rng.randrange(header),
    ]
    more = [b"\0", b" ", data, rng.randbytes(5), b"\0" * 4096]
    return data[: rng.choice(ends)] if rng.random() < 0.7 else data + rng.choice(more)


@mutation(REFUSED)
def wrong_header_length(data, rng):
    size = int.from_bytes(data[:8], "little")
    lengths = [
        0,
        1,
        2,
        size - 1,
        size + 1,
        len(data) - 8,
        len(data),
        len(data) + 1,
        2**31,
        2**32,
        2**63,
        2**64 - 1,
        10**8,
    ]
    return rng.choice(lengths).to_bytes(8, "little") + data[8:]


@mutation(REFUSED)
def something_else(data, rng):
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    others = [b"", b"\0" * 100, b"hello\n", header, gzip.compress(data, 1), pickle.dumps(_Trap()), rng.randbytes(1000)]
    for text in (
        b"{}",
        b"[]",
        b"null",
        b'"x"',
        b"{" * 50_000,
        b"[" * 50_000,
        b"\xff\xfe{\0}\0",
        b"\xef\xbb\xbf{}",
        b"NaN",
    ):
        others.append(len(text).to_bytes(8, "little") + text)
    return rng.choice(others)


class _Trap:
    def __reduce__(self):
        return os._exit, (77,)


@pytest.fixture(scope="module")
def originals(pipe_template, tmp_path_factory):
    """The bytes of a valid file of every kind of concept, some in float16, one with a word and a text encoder."""
    folder, originals = tmp_path_factory.mktemp("originals"), {}
    for seed, (name, config) in enumerate(CONCEPTS.items()):
        pipe = copy.deepcopy(pipe_template)
        pipe.unet.add_adapter(copy.deepcopy(config), "made")
        generator = torch.Generator().manual_seed(seed)
        if name == "default":
            pipe.text_encoder.add_adapter(AtomConfig(channel_block=4, target_modules=["q_proj"]), "made")
            add_placeholder_token(pipe, "sks")
            set_token_embedding(pipe, "sks", {"text_encoder": torch.randn(32, generator=generator)})
        for model in (pipe.unet, pipe.text_encoder):
            for key, parameter in model.named_parameters():
                if key.endswith(".made"):
                    parameter.data.add_(torch.randn(parameter.shape, generator=generator) / 20)
        dtype = torch.float32 if seed % 2 else torch.float16
        originals[name] = atomdiff.save_atoms(pipe, folder / name, "made", dtype=dtype).read_bytes()
    return originals


@pytest.fixture(scope="module")
def pipe(pipe_template):
    """One pipeline for all files; each test leaves it as it was, which is what they test."""
    pipe = copy.deepcopy(pipe_template)
    tokens_in(pipe)
    return pipe


def weights(pipe):
    found = hashlib.sha256()
    for model in pipeline_models(pipe).values():
        for key, value in model.state_dict().items():
            found.update(key.encode())
            found.update(value.numpy().tobytes())
    return found.hexdigest()


def structure(pipe):
    """All but the weights that a load could change."""
    models = pipeline_models(pipe)
    tables = [(id(p), p.shape, p.dtype, p.requires_grad) for m in models.values() for p in m.parameters()]
    modules = [(n, id(x), type(x), len(x._forward_hooks)) for m in models.values() for n, x in m.named_modules()]
    attributes = [(sorted(vars(m)), m.training, hasattr(m, "peft_config")) for m in models.values()]
    word = (id(pipe.tokenizer), len(pipe.tokenizer), pipe.text_encoder.config.vocab_size, tokens_in(pipe))
    return len(tables), tables, modules, attributes, word, sorted(vars(pipe))


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


def fuzz(seeds, originals, pipe, path):
    """Read a damaged file for each seed, and load some; kinds of mutations and originals take turns."""
    kinds = [(function, kind) for kind in (REFUSED, VALID, EITHER) for function in kind]
    models, first, clean = pipeline_models(pipe), weights(pipe), structure(pipe)
    loaded = 0
    for seed in seeds:
        rng = random.Random(seed)
        function, kind = kinds[seed % len(kinds)]
        name = rng.choice(sorted(originals))
        data = function(originals[name], rng)
        if data == originals[name]:
            continue
        what = f"seed {seed}: {function.__name__} of {name}"
        path.write_bytes(data)
        try:
            through_pipe = seed // len(kinds) % (8 if kind is REFUSED else 2) == 0
            if through_pipe:
                error = refusal(lambda: atomdiff.load_atoms(pipe, path, "x"))
                if error is None:
                    loaded += 1
                    atomdiff.unload_atoms(pipe)
                    assert weights(pipe) == first
            else:
                error = refusal(lambda: _accept(path, models))
            assert structure(pipe) == clean
            if seed % 16 == 0:
                assert weights(pipe) == first
            if kind is REFUSED:
                assert error is not None
                assert refusal(lambda: read_header(path)) is None or refusal(lambda: read_delta_file(path))
            if kind is VALID:
                assert error is None, error
        except BaseException as problem:
            problem.add_note(what) if hasattr(problem, "add_note") else print(what)
            raise
    assert weights(pipe) == first
    return loaded


def _accept(path, models):
    """What `load_atoms` does before it changes anything, for a file with at least one known layer."""
    delta = read_delta_file(path)
    check_base(delta, models)
    for word, vectors in delta.tokens.items():
        for encoder, vector in vectors.items():
            if not word.strip() or word.split() != [word] or encoder != "text_encoder" or vector.shape != (32,):
                raise UserError("refused by atomdiff.pipelines.placeholder_tokens")
    for tensors in delta.layers.values():
        assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in tensors.values())


def test_damaged_files_are_refused_or_are_what_they_say(originals, pipe, tmp_path):
    assert fuzz(range(160), originals, pipe, tmp_path / "x.atoms.safetensors") > 0


def test_many_damaged_files_are_refused_or_are_what_they_say(originals, pipe, tmp_path):
    assert fuzz(range(1000, 3100), originals, pipe, tmp_path / "x.atoms.safetensors") > 100


@pytest.fixture(scope="module")
def directory(pipe_template, tmp_path_factory):
    """A LoRA with a word, as PEFT and we write it: name of the file -> bytes."""
    pipe = copy.deepcopy(pipe_template)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], rank_pattern={"conv1": 3}), "made")
    add_placeholder_token(pipe, "ohwx")
    set_token_embedding(pipe, "ohwx", {"text_encoder": torch.ones(32)})
    folder = atomdiff.save_atoms(pipe, tmp_path_factory.mktemp("lora"), "made")
    return {file.name: file.read_bytes() for file in folder.glob("*.*")}


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


def fuzz_directories(seeds, directory, folder):
    for seed in seeds:
        rng, files, refused = random.Random(seed), dict(directory), True
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


def test_damaged_directories_are_refused(directory, tmp_path):
    fuzz_directories(range(60), directory, tmp_path)


def test_many_damaged_directories_are_refused(directory, tmp_path):
    fuzz_directories(range(1000, 1500), directory, tmp_path)


ALONE = """
import json, os, resource, sys, warnings
warnings.simplefilter("ignore")
import atomdiff
from atomdiff.utils.errors import UserError
from diffusers import StableDiffusionPipeline

base, folder, prefixes = sys.argv[1], sys.argv[2], (sys.argv[2], sys.prefix, sys.base_prefix, "/usr/lib", "/proc/")
pipe = StableDiffusionPipeline.from_pretrained(base)
for name in ("lora", "good.safetensors"):  # whatever is imported late is imported now
    atomdiff.load_atoms(pipe, os.path.join(folder, name), "x")
    atomdiff.unload_atoms(pipe)
seen, forbidden = [], ("os.", "subprocess.", "socket.", "pickle.", "marshal.", "ctypes.", "urllib.", "shutil.", "http.")
quiet = ("os.listdir", "os.scandir", "marshal.loads", "ctypes.addressof")

def watch(event, args):
    if event == "open" and not str(args[0]).startswith(prefixes) or "trap" in str(args)[:9999]:
        seen.append((event, str(args)[:200]))
    elif event.startswith(forbidden) and event not in quiet:
        seen.append((event, str(args)[:200]))

sys.addaudithook(watch)
room = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (room, room))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sorted(os.listdir(folder)):
    try:
        atomdiff.load_atoms(pipe, os.path.join(folder, name), "x")
        atomdiff.unload_atoms(pipe)
        print(json.dumps([name, None]))
    except UserError as error:
        print(json.dumps([name, str(error)]))
print(json.dumps(["grown by MB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10]))
print(json.dumps(["seen", seen]))
"""


def bombs(folder, originals):
    """Files that say little and ask for much; one too large to be kept in memory is made of a hole."""
    default, joint, sparse = (originals[name] for name in ("default", "joint", "sparse"))
    (folder / "spaces").write_bytes((10**8).to_bytes(8, "little") + b" " * 10**8)
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("/dev/zero")
    file = Written(default)
    start, size = len(file.data), 1 << 40
    file.more = [
        ("unet.conv_in.recursion_mix", {"dtype": "F16", "shape": [size // 2], "data_offsets": [start, start + size]})
    ]
    (folder / "hole").write_bytes(file.bytes())
    os.truncate(folder / "hole", (folder / "hole").stat().st_size + size)
    for name in ("lists", "names", "words"):
        file = Written(default)
        if name == "lists":
            file.set("base_fingerprint", "[" + "[]," * 1_000_000 + "0]")
        else:
            key = "unet.x{}.atom_delta" if name == "names" else "token.x{}"
            empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(file.data)] * 2}
            file.more = [(key.format(i), empty) for i in range(50_000)]
        (folder / name).write_bytes(file.bytes())
    for name, settings in {
        "atoms": {"num_atoms": 10**18, "basis": "sparse"},
        "block": {"channel_block": 10**9, "joint": True},
        "recursion": {"recursion": 10**12},
        "patterns": {"channel_block_pattern": {SLOW_PATTERNS[1]: 4}},
        "targets": {"target_modules": SLOW_PATTERNS[1], "exclude_modules": SLOW_PATTERNS[0]},
    }.items():
        file = Written(default)
        file.set("adapter_config", json.dumps(file.get("adapter_config") | settings))
        (folder / name).write_bytes(file.bytes())
    for name, original, settings, module, shape in (
        ("row", joint, {"channel_block": 32, "num_atoms": 1}, "unet.down_blocks.0.resnets.0.conv1", (1, 32 * 32 * 9)),
        ("code", sparse, {"num_atoms": 100_000}, "unet.conv_in", (100_000, 9)),
    ):
        tensors = {f"{module}.{kind}": torch.zeros(shape, dtype=torch.float16) for kind in ("atom_delta", "atom_basis")}
        file = Written(save(tensors, dict(Written(original).metadata)))
        file.set("adapter_config", json.dumps(file.get("adapter_config") | settings))
        file.set("base_fingerprint", json.dumps({module: [1] * shape[1]}))
        (folder / name).write_bytes(file.bytes())


def traps(folder, trap, originals, directory):
    """Concepts that name files, modules and programs wherever a text is read; none of them may be touched."""
    (trap / "trap.py").write_text("raise SystemExit(77)")
    for name in ("adapter_model.bin", "model.pt", "adapter_config.json", "config.json", "tokenizer.json"):
        (trap / name).write_bytes(pickle.dumps(_Trap()))
    file = Written(originals["default"])
    for name in ("base_model", "trigger_phrase", "modelspec.thumbnail", "__reduce__", "auto_map"):
        file.set(name, str(trap))
    file.set("training", json.dumps({"script": str(trap / "trap.py"), "base": str(trap)}))
    settings = file.get("adapter_config") | {"target_modules": [str(trap)], "layers_pattern": str(trap / "trap.py")}
    file.set("adapter_config", json.dumps(settings))
    (folder / "paths").write_bytes(file.bytes())
    (folder / "pickle").write_bytes(pickle.dumps(_Trap()))
    torch.save({"state_dict": {}, "trap": _Trap()}, folder / "checkpoint.ckpt")
    modules = {"auto_mapping": {"base_model_class": "trap", "parent_library": "trap"}}
    for name, settings in {
        "lora": {},
        "lora paths": {"base_model_name_or_path": str(trap), "revision": "../trap", **modules},
        "lora megatron": {"megatron_config": {"a": 1}, "megatron_core": "megatron.trap"},
        "lora corda": {"init_lora_weights": "corda", "corda_config": {"cache_file": str(trap / "model.pt")}},
        "lora slow": {"target_modules": SLOW_PATTERNS[1]},
        "xlora": {"peft_type": "XLORA", "adapters": {"a": str(trap)}, "hidden_size": 8},
        "shadow": {"peft_type": "SHADOW", "shadow_model": str(trap)},
        "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 1, "tokenizer_name_or_path": str(trap)}
        | {
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "x",
            "tokenizer_kwargs": {"trust_remote_code": True},
        },
    }.items():
        (folder / name).mkdir()
        kept = json.loads(directory["adapter_config.json"]) if name.startswith("lora") else {}
        files = directory | {"adapter_config.json": json.dumps(kept | settings).encode()}
        for file_name, data in files.items():
            (folder / name / file_name).write_bytes(data)
    (folder / "lora bin").mkdir()
    (folder / "lora bin" / "adapter_config.json").write_bytes(directory["adapter_config.json"])
    (folder / "lora bin" / "adapter_model.bin").write_bytes(pickle.dumps(_Trap()))


def test_nothing_is_opened_run_or_taken_for_a_file(originals, directory, tiny_pipe_folder, tmp_path):
    """In a process of its own, with a gigabyte to spare and two minutes' time for all of them."""
    folder, trap = tmp_path / "concepts", tmp_path / "trap"
    folder.mkdir()
    trap.mkdir()
    (folder / "good.safetensors").write_bytes(originals["default"])
    bombs(folder, originals)
    traps(folder, trap, originals, directory)
    command = [sys.executable, "-c", ALONE, str(tiny_pipe_folder), str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(atomdiff.__file__).parents[1]), str(trap)])}
    ended = subprocess.run(command, env=environment, cwd=trap, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = dict(map(json.loads, ended.stdout.splitlines()))
    assert found.pop("seen") == [] and found.pop("grown by MB") < 500
    loaded = sorted(name for name, error in found.items() if error is None)
    assert loaded == ["good.safetensors", "lora", "lora paths", "paths", "targets"]
    assert len(found) == 27, sorted(found)
