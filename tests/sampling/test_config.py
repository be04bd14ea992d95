"""The options of a sampling job are checked before anything is loaded."""

from dataclasses import replace

import pytest

from atomdiff.utils.errors import UserError


def test_prompts_come_from_arguments_and_file_once_each(config, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# mugs\na red mug\n\n  a robot  \r\n#\nштора\n  # the end\n".encode())
    config = replace(config, prompts_file=str(path))
    assert config.read_prompts() == ["a red mug", "a blue cat", "a robot", "штора"]
    path.write_bytes(b"#1 mug\n")
    assert config.read_prompts()[2:] == ["#1 mug"]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="prompts.txt: not text in UTF-16"):
        config.read_prompts()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"library": "none"}, "library=.none.: found nothing there"),
        ({"weights": ({"block": {"down": "x"}},), "concepts": ("a",)}, "found the adapter weight"),
        ({"weights": (float("nan"),), "concepts": ("a",)}, "found the adapter weight"),
        ({"negative_prompt": "blurry <lora:x:1>"}, "remove the tag"),
        ({"prompts_file": "none.txt"}, "none.txt"),
        ({"weights": (1.0,)}, "1 weights for 0 concepts"),
        ({"trigger_words": ("a", "b")}, "2 trigger_words for 0 concepts"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (-1,)}, "seeds"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"sample_batch_size": 0}, "sample_batch_size=0"),
        ({"height": 0}, "height=0: expected a number of at least 8 and at most 8192"),
        ({"height": 500, "width": 64}, "height=500: expected a multiple of 8"),
        ({"width": 10**6}, "width=1000000: expected a number"),
        ({"seeds": (2**64,)}, "seeds"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001: expected a number"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    ],
)
def test_wrong_fields_are_named(config, change, message):
    with pytest.raises(UserError, match=message):
        replace(config, **change)
