"""The figure of a report."""

import re

from atomdiff.training.report.curve import draw_curves, to_svg

LOG = [{"step": step, "loss": 1 / step} for step in (10, 20, 30)]
MEASURED = [
    {"step": step, "validation_loss": 0.5 - step / 100, "training_images_loss": 0.4, "base_drift": step / 1000}
    for step in (0, 15, 30)
]


def curves(axis):
    """The points of an axis's curves, with markers or not, by their label."""
    return {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines() if len(line.get_xdata()) == 3}


def test_all_that_was_measured_is_drawn_with_the_saved_step():
    loss, fixed, drift = draw_curves(LOG, MEASURED, saved_step=15).axes
    assert [*curves(loss).values()] == [[[line["step"], line["loss"]] for line in LOG]]
    assert curves(fixed) == {
        "held-out images": [[line["step"], line["validation_loss"]] for line in MEASURED],
        "training images": [[line["step"], 0.4] for line in MEASURED],
    }
    assert curves(drift) == {"base drift": [[line["step"], line["base_drift"]] for line in MEASURED]}
    for axis in (fixed, drift):
        (mark,) = [line for line in axis.get_lines() if len(line.get_xdata()) == 2]
        assert set(mark.get_xdata()) == {15}


def test_without_held_out_images_and_without_measurements_there_are_fewer_curves():
    unseen = [{name: value for name, value in line.items() if name != "validation_loss"} for line in MEASURED]
    assert [*curves(draw_curves(LOG, unseen, 30).axes[1])] == ["training images"]
    assert len(draw_curves(LOG, [], 30).axes) == 1


def test_the_svg_takes_the_colors_of_its_page_and_is_always_the_same():
    one, two = (to_svg(draw_curves(LOG, MEASURED, 30)) for _ in range(2))
    assert one == two and one.startswith("<svg") and one.rstrip().endswith("</svg>")
    assert "currentColor" in one and "<text" in one
    assert not re.search(r"#(7a7a7b|ffffff|000000)", one)
