import pytest
from diffusers import DDPMScheduler

from atomdiff.training.fingerprint import base_keys, differences


def parts_that_differ(one, two):
    return {part for part in one.keys() | two.keys() if one.get(part) != two.get(part)}


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("unet", lambda pipe: pipe.unet.conv_in.bias.data[0].add_(1e-3)),
        ("text_encoder", lambda pipe: pipe.text_encoder.get_input_embeddings().weight.data[7, 3].mul_(1.01)),
        ("vae", lambda pipe: pipe.vae.decoder.conv_out.weight.data[0, 0, 0, 0].add_(1e-3)),
        ("vae", lambda pipe: pipe.vae.register_to_config(scaling_factor=0.5)),
        ("scheduler", lambda pipe: pipe.scheduler.register_to_config(prediction_type="epsilon")),
        ("scheduler", lambda pipe: setattr(pipe, "scheduler", DDPMScheduler.from_config(pipe.scheduler.config))),
    ],
)
def test_every_part_that_images_depend_on_is_told_from_others(part, change, tiny_pipe):
    before = base_keys(tiny_pipe)
    assert before.keys() == {"unet", "text_encoder", "vae", "scheduler"}
    change(tiny_pipe)
    assert parts_that_differ(before, base_keys(tiny_pipe)) == {part}


def test_where_a_base_lies_and_what_libraries_add_changes_nothing(tiny_pipe, tmp_path):
    before = base_keys(tiny_pipe)
    tiny_pipe.save_pretrained(tmp_path)
    again = type(tiny_pipe).from_pretrained(tmp_path)
    again.scheduler.register_to_config(some_new_option=False)
    again.vae.register_to_config(some_new_option=True)
    assert base_keys(again) == before


def test_both_text_encoders_count(tiny_xl_pipe):
    before = base_keys(tiny_xl_pipe)
    next(tiny_xl_pipe.text_encoder_2.parameters()).data.add_(1e-3)
    assert parts_that_differ(before, base_keys(tiny_xl_pipe)) == {"text_encoder_2"}


def test_held_out_images_may_be_added_or_left_out_but_not_exchanged():
    plain = {"base": {}, "instance_images": [["a.png", "1", "2", ""]], "class_images": []}
    one, other = (plain | {"held_out_images": [[name, name, "2", ""]]} for name in ("b.png", "c.png"))
    for then, now in ((plain, one), (one, plain), (one, one)):
        assert differences(then, now) == []
    assert differences(one, other) == ["other held out images (gone: b.png; new: c.png)"]
