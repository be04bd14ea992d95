"""Prompt fidelity by an encoder of texts: how well images show what their prompts say.

Ruiz et al., "DreamBooth", arXiv 2208.12242, section 4.2 (CLIP-T).
"""

from __future__ import annotations

from torch import Tensor

from atomdiff.evaluate.encoders import TextEncoder
from atomdiff.evaluate.similarity import cosines
from atomdiff.evaluate.suite import Evaluation


def prompt_match(evaluation: Evaluation) -> dict[str, Tensor] | None:
    """Return the cosine of each image of the subject and its prompt, `base` and `concept`; higher is better.

    The prompts name the class alone: no encoder knows a trigger word.

    Returns:
        Values (prompts, images) from -1 to 1; None: the encoder embeds no texts.
    """
    encoder, suite = evaluation.encoder, evaluation.suite
    if not isinstance(encoder, TextEncoder):
        return None
    texts = encoder.embed_texts(suite.class_prompts).repeat_interleave(suite.images_per_prompt, 0)
    return {
        name: evaluation.by_prompt(cosines(evaluation.embeddings(name, "subject"), texts).diagonal())
        for name in ("base", "concept")
    }
