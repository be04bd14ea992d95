"""Output preservation: a concept changes nothing for prompts without its trigger word, and no class images are needed.

Each step also predicts the noise for the class word in place of the trigger word, or for the empty prompt, with and
without the adapter, and trains the first prediction to equal the second. It is the "differential output preservation"
and "blank prompt preservation" of ai-toolkit, https://github.com/ostris/ai-toolkit; the idea of keeping a network's
answers: Li, Hoiem, "Learning without Forgetting", arXiv 1606.09282, section 3.
"""

from collections.abc import Sequence

from atomdiff.pipelines.prompt_syntax import replace_words
from atomdiff.training.config import Subject
from atomdiff.utils.articles import add_article
from atomdiff.utils.choices import Preservation
from atomdiff.utils.errors import UserError


def preservation_prompt(preservation: Preservation, subjects: Sequence[Subject], prompt: str) -> str:
    """Return the prompt whose prediction stays, for the prompt of an instance image.

    With "class", every subject's trigger word, with or without its class name, becomes the class name, with an article
    where a name has none: "a photo of sks owl" becomes "a photo of an owl".

    Raises:
        UserError: The prompt has no trigger word, so that it would have to change and to stay.
    """
    if preservation == "blank":
        return ""
    preserved = prompt
    for subject in subjects:
        phrases = dict.fromkeys((f"{subject.trigger_word} {subject.class_name}", subject.trigger_word), "{class_name}")
        preserved = subject.fill(add_article(replace_words(preserved, phrases)))
    if preserved == prompt:
        words = " or ".join(repr(subject.trigger_word) for subject in subjects)
        expected = f"expected {words} in it, since prompts without it stay as they are"
        raise UserError(f"preservation='class': found the prompt {prompt!r}: {expected}; or choose 'blank'")
    return preserved
