"""The subjects of DreamBench++, each a single image with prompts of its own.

Peng et al., "DreamBench++: A Human-Aligned Benchmark for Personalized Image Generation", arXiv 2406.16855.
"""

from __future__ import annotations

import re
from pathlib import Path

from atomdiff.data.image_files import list_images
from atomdiff.evaluate.protocol import SUBJECT, Prompt, ProtocolSubject
from atomdiff.utils.errors import UserError
from atomdiff.utils.text_files import read_text
from atomdiff.utils.untrusted import list_some


def read_subject(name: str, data_dir: Path) -> ProtocolSubject:
    """Find a subject in the folder that the authors publish.

    It has `images/KIND/NUMBER.jpg` beside `captions/KIND/NUMBER.txt`, whose first line is the class and the others
    prompts that name it.

    Args:
        name: KIND_NUMBER, or as the authors write it: with `live_subject_` before it and the class behind it.
        data_dir: the folder.

    Raises:
        UserError: it has no such subject, or no captions of it.
    """
    folder = data_dir / "images"
    kinds = [kind for kind in sorted(folder.iterdir()) if kind.is_dir()] if folder.is_dir() else []
    images = {f"{kind.name}_{file.stem}": file for kind in kinds for file in list_images(kind)}
    if not images:
        raise UserError(f"{data_dir}: found no images/KIND/NUMBER.jpg; expected the folder data of DreamBench++")
    number = next((key for key in images if re.fullmatch(rf"(live_subject_)?{re.escape(key)}(_.*)?", name)), None)
    if number is None:
        raise UserError(f"the concept {name!r}: expected the name of a subject; found {list_some(list(images))}")
    image = images[number]
    captions = data_dir / "captions" / image.parent.name / f"{image.stem}.txt"
    class_name, *prompts = [line.strip() for line in read_text(captions).splitlines() if line.strip()] or [""]
    if not prompts:
        raise UserError(f"{captions}: expected the class in the first line, and prompts below it")
    with_subject = tuple(Prompt(_with_subject(prompt, class_name)) for prompt in prompts)
    return ProtocolSubject(name, class_name.lower(), with_subject, (image,), image.parent.name, tuple(prompts))


def _with_subject(caption: str, class_name: str) -> str:
    """Put `{subject}` where a caption first names the class; one that does not name it begins with `{subject}`.

    What is named again may be another individual: "a kitten beside another kitten".
    """
    caption = caption.replace("{", "(").replace("}", ")")
    word = rf"(?<![\w-]){re.escape(class_name)}(?![\w-])"
    named, count = re.subn(word, SUBJECT, caption, count=1, flags=re.IGNORECASE)
    return named if count else f"{SUBJECT}, {caption}"
