"""Save pipelines in folders that transformers 4 opens as well as 5, and that other programs make checkpoints of."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from atomdiff.pipelines.overrides import without_overrides

_PREFIX = "text_model."
_NEVER_IN_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))  # bytes; a byte-level vocabulary writes them as these characters


def save_portable(pipe: Any, folder: Path) -> dict[str, str]:
    """Save a pipeline, without adapters, in a folder.

    transformers 5 writes neither `vocab.json` and `merges.txt`, nor the level `text_model` of a text encoder's keys, by
    which transformers 4, ComfyUI and scripts that make a checkpoint of a folder find them; and other names of classes.
    Placeholder tokens that were added to a tokenizer get ids that no text uses, so that embedding tables keep their
    size, as programs expect it of a checkpoint. The pipeline is unchanged afterwards.

    Returns:
        Text encoder -> why its embedding table is longer than that of the base, if it is.
    """
    moved: dict[str, dict[str, int]] = {}
    longer = {}
    with ExitStack() as stack:
        for name in [name for name in pipe.components if name.startswith("tokenizer")]:
            tokenizer = pipe.components[name]
            encoder = pipe.components.get(name.replace("tokenizer", "text_encoder"))
            added = _added_tokens(tokenizer) if encoder is not None and hasattr(tokenizer, "backend_tokenizer") else []
            if not added or encoder.get_input_embeddings().num_embeddings != len(tokenizer):
                continue
            free = _unused_ids(tokenizer)
            if len(added) > len(free):
                longer[name.replace("tokenizer", "text_encoder")] = (
                    f"{len(added)} words, and a place for {len(free)} in its vocabulary"
                )
                continue
            moved[name] = dict(zip(added, free, strict=False))
            stack.enter_context(_embeddings_moved(encoder, tokenizer, moved[name]))
        stack.enter_context(without_overrides(pipe.components.values()))
        pipe.save_pretrained(folder)
    for name, part in pipe.components.items():
        if name.startswith("tokenizer") and (folder / name / "tokenizer.json").is_file():
            _write_vocabulary(folder / name, moved.get(name, {}))
        elif name.startswith("text_encoder") and type(part).__name__ == "CLIPTextModel":
            for file in (folder / name).glob("*.safetensors*"):
                _prefix_keys(file)
    _name_classes(folder / "model_index.json")
    return longer


def _added_tokens(tokenizer: Any) -> list[str]:
    """Return the tokens that were added behind the vocabulary, in the order of their ids."""
    added = tokenizer.added_tokens_decoder
    return [added[number].content for number in sorted(added) if number >= tokenizer.vocab_size]


def _unused_ids(tokenizer: Any) -> list[int]:
    """Return the ids of a byte-level vocabulary that no text uses: bytes that UTF-8 lacks, also at a word's end."""
    known = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    return [known[key] for byte in _NEVER_IN_UTF8 for key in (chr(byte), f"{chr(byte)}</w>") if key in known]


@contextmanager
def _embeddings_moved(encoder: nn.Module, tokenizer: Any, ids: dict[str, int]) -> Iterator[None]:
    """Move the embeddings of added tokens to other ids, and cut the table off, for the time of a `with` block."""
    table: Any = encoder.get_input_embeddings()  # type: ignore[operator]
    config: Any = encoder.config
    full, sizes = table.weight.data, (table.num_embeddings, config.vocab_size)
    rows = full[: tokenizer.vocab_size].clone()
    rows[list(ids.values())] = full[tokenizer.convert_tokens_to_ids(list(ids))]
    try:
        table.weight.data, table.num_embeddings, config.vocab_size = rows, len(rows), len(rows)
        yield
    finally:
        table.weight.data, (table.num_embeddings, config.vocab_size) = full, sizes


def _write_vocabulary(folder: Path, ids: dict[str, int]) -> None:
    """Write a tokenizer's vocabulary as transformers 4 reads it, with added tokens at these ids."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    model, added = content["model"], content["added_tokens"]
    moved = {number: token for token, number in ids.items()}
    model["vocab"] = {moved.get(number, token): number for token, number in model["vocab"].items()}
    for entry in added:
        entry["id"] = ids.get(entry["content"], entry["id"])
    added.sort(key=lambda entry: entry["id"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    _write_json(file, content)
    _write_json(folder / "vocab.json", model["vocab"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8", newline="\n")
    settings = folder / "tokenizer_config.json"
    decoder = {str(entry["id"]): {key: entry[key] for key in entry if key != "id"} for entry in added}
    _write_json(settings, json.loads(settings.read_text(encoding="utf-8")) | {"added_tokens_decoder": decoder})


def _prefix_keys(file: Path) -> None:
    """Put `text_model.` before the keys of a safetensors file, or of the index of several, unless it is there."""

    def prefixed(keys: dict[str, Any]) -> dict[str, Any]:
        return {key if key.startswith((_PREFIX, "__")) else _PREFIX + key: value for key, value in keys.items()}

    if file.suffix == ".json":
        index = json.loads(file.read_text(encoding="utf-8"))
        _write_json(file, index | {"weight_map": prefixed(index["weight_map"])})
        return
    partial = file.with_name(f"{file.name}.partial")
    with file.open("rb") as source, partial.open("wb") as goal:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        text = json.dumps(prefixed(header), separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        goal.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, goal, 1 << 20)
    partial.replace(file)


def _name_classes(index: Path) -> None:
    """Name classes of transformers as both versions do: CLIPImageProcessor, not the one behind it on this machine."""
    content = json.loads(index.read_text(encoding="utf-8"))
    for name, value in content.items():
        if isinstance(value, list) and value[0] == "transformers":
            content[name] = [value[0], re.sub("(?<=ImageProcessor)(Pil|Fast)$", "", value[1])]
    _write_json(index, content)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
