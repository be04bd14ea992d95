"""Silence what other libraries print and nobody can act on; called by programs, never by the library itself."""

import warnings

_LIBRARIES = r"(accelerate|diffusers|huggingface_hub|peft|torch|transformers)\b"


def quiet_libraries() -> None:
    """Leave of the libraries' messages only errors, no loading bars, and of their warnings none.

    Call it before the first diffusers pipeline is imported: that import is what complains about the absent torchvision.
    Warnings of others appear as one line.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (transformers_logging, diffusers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=_LIBRARIES)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
