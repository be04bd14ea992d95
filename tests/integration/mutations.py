"""Ways to damage a concept file, and to make one that says what no writer would.

A mutation is a function (bytes of a valid file, random numbers) -> other bytes. REFUSED ones never give a file that
loads, VALID ones always do, EITHER may give one.
"""

import gzip
import json
import os
import pickle

import torch
from safetensors.torch import load, save

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
    """A safetensors file taken apart, whose header may say what no writer would: a key twice, any JSON, lies."""

    def __init__(self, data):
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        self.metadata = list(header.pop("__metadata__", {}).items())
        self.tensors = list(header.items())
        self.data = data[8 + size :]
        self.more = []  # further entries of the header

    def key(self, rng, start="unet."):
        """The index of a random tensor."""
        return rng.choice([i for i, (key, _) in enumerate(self.tensors) if key.startswith(start)])

    def set(self, name, text):
        """Give a field of the metadata another text (None: take it away)."""
        self.metadata = [(k, v) for k, v in self.metadata if k != name] + ([] if text is None else [(name, text)])

    def get(self, name):
        return json.loads(dict(self.metadata)[name])

    def to_bytes(self):
        header = _object([("__metadata__", _Json(_object(self.metadata))), *self.tensors, *self.more]).encode()
        return len(header).to_bytes(8, "little") + header + self.data


class _Json(str):
    """Text that is JSON already."""


def _object(pairs):
    return "{" + ",".join(f"{json.dumps(k)}:{v if isinstance(v, _Json) else json.dumps(v)}" for k, v in pairs) + "}"


REFUSED, VALID, EITHER = [], [], []


def mutation(kind):
    return lambda function: kind.append(function) or function


def taken_apart(function):
    def mutate(data, rng):
        file = Written(data)
        function(file, rng)
        return file.to_bytes()

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
    index = file.key(rng)
    key, info = file.tensors[index]
    if rng.random() < 0.5:
        del info[rng.choice(sorted(info))]
    else:
        file.tensors[index] = (key, rng.choice([None, [], "x", 5, NAN, [info], {}]))


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
    index = file.key(rng)
    key, info = file.tensors[index]
    module, _, kind = key.rpartition(".")
    names = (
        "../../x /etc/passwd . unet unet.__class__ unet..conv_in unet.conv_in.weight unet.conv_in.base_layer".split()
    )
    names += "unet.nowhere pipe.unet.conv_in ünet.conv_in token scheduler.x tokenizer.y text_encoder.z %s{0}".split()
    names += ["", "unet.conv_in\0", "unet.\x1b[2Jconv_in", "\u202eunet.conv_in", "x" * 100_000]
    other = f"{rng.choice(names)}.{kind}"
    if rng.random() < 0.3:
        other = f"{module}.{rng.choice(['weight', 'lora_A', '__class__', 'atom_delta.x', '', 'ATOM_DELTA', '0'])}"
    file.tensors[index] = (other, info)
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
    "pruned": [1, "yes", None, [], DEEP],
    "share": ["all", "kind", 1, True, [], DEEP],
    "share_count": [0, -1, 1.5, "4", True, None, [4]],
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
    words = "<|endoftext|> <|startoftext|> a A photo ö 日本 𝔞 ﬁ ## ! . ' ../../x __class__ </w> a</w> x.y".split()
    words += ["token.token", '"', "\0", "\x1b[2J", "\u200b", "e\u0301", "\u202e", "x" * 100, "🤖" * 20]
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
    inside = [0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) - 1]
    ends = [*inside, rng.randrange(len(data)), rng.randrange(header)]
    more = [b"\0", b" ", data, rng.randbytes(5), b"\0" * 4096]
    return data[: rng.choice(ends)] if rng.random() < 0.7 else data + rng.choice(more)


@mutation(REFUSED)
def wrong_header_length(data, rng):
    size = int.from_bytes(data[:8], "little")
    lengths = [0, 1, 2, size - 1, size + 1, len(data) - 8, len(data), len(data) + 1]
    lengths += [2**31, 2**32, 2**63, 2**64 - 1, 10**8]
    return rng.choice(lengths).to_bytes(8, "little") + data[8:]


@mutation(REFUSED)
def something_else(data, rng):
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    contents = [b"", b"\0" * 100, b"hello\n", header, gzip.compress(data, 1), pickle.dumps(Trap()), rng.randbytes(1000)]
    texts = [b"{}", b"[]", b"null", b'"x"', b"NaN", b"{" * 50_000, b"[" * 50_000, b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}"]
    for text in texts:
        contents.append(len(text).to_bytes(8, "little") + text)
    return rng.choice(contents)


class Trap:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (77,)
