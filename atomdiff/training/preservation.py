"""Output preservation: a concept changes nothing for prompts without its trigger word, and no class images are needed.

Each step also predicts the noise for the class word in place of the trigger word, or for the empty prompt, with and
without the adapter, and trains the first prediction to equal the second. It is the "differential output preservation"
and "blank prompt preservation" of ai-toolkit, https://github.com/ostris/ai-toolkit; the idea of keeping a network's
answers: Li, Hoiem, "Learning without Forgetting", arXiv 1606.09282, section 3.
"""

from collections.abc import Sequence

from atomdiff.pipelines.prompt_syntax import has_word, replace_words
from atomdiff.training.config import Subject
from atomdiff.utils.articles import add_article
from atomdiff.utils.choices import Preservation
from atomdiff.utils.errors import UserError

_OTHER_PROMPTS = ("a photo of a dog in the snow", "a photo of a house on the beach")


def preservation_prompt(preservation: Preservation, subjects: Sequence[Subject], prompt: str) -> str:
    """Return the prompt whose prediction stays, for the prompt of an instance image.

    With "class", every subject's trigger word, with or without its class name, becomes the class name, with an article
    where a name has none: "a photo of sks owl" becomes "a photo of an owl".

    Raises:
        UserError: The prompt would have to change and to stay: it has no trigger word, or a class name has one.
    """
    preserved = "" if preservation == "blank" else _with_classes(subjects, prompt)
    words = [subject.trigger_word for subject in subjects]
    if preserved == prompt:
        expected = f"expected {' or '.join(map(repr, words))} in it, since prompts without it stay as they are"
        other = "; or choose 'blank'" if preservation == "class" else ""
        raise UserError(f"preservation={preservation!r}: found the prompt {prompt!r}: {expected}{other}")
    if left := [word for word in words if has_word(preserved, word)]:
        found = f"with the class in place of the trigger word, {prompt!r} is {preserved!r}, which has {left[0]!r} in it"
        raise UserError(f"preservation='class': {found}; choose a trigger word that is in no class_name, or 'blank'")
    return preserved


def other_prompts(subjects: Sequence[Subject]) -> tuple[str, ...]:
    """Return prompts without a trigger word, for which a concept should change nothing.

    They are those of the class, of at most four subjects, the empty one, and two of other things.
    """
    classes = [subject.fill(subject.class_prompt) for subject in subjects if subject.class_name][:4]
    prompts = dict.fromkeys([*classes, "", *_OTHER_PROMPTS])
    return tuple(text for text in prompts if not any(has_word(text, subject.trigger_word) for subject in subjects))


def _with_classes(subjects: Sequence[Subject], prompt: str) -> str:
    for subject in subjects:
        phrases = dict.fromkeys((f"{subject.trigger_word} {subject.class_name}", subject.trigger_word), "{class_name}")
        prompt = subject.fill(add_article(replace_words(prompt, phrases)))
    return prompt
