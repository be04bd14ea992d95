import pytest
from PIL import Image

from atomdiff.training.contact_sheet import extend_contact_sheet


@pytest.mark.slow
def test_the_sheet_grows_and_forgets_rows_of_a_run_that_was_stopped(tmp_path):
    def add(step, colour):
        extend_contact_sheet(tmp_path, step, [Image.new("RGB", (32, 32), colour)] * 2, ["one", "two"])
        return Image.open(tmp_path / "contact_sheet.png")

    def shows(sheet, colour):
        return any(pixel == colour for _, pixel in sheet.convert("RGB").getcolors(1 << 24))

    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    first = add(0, red)
    second = add(10, green)
    assert second.height > first.height and shows(second, red) and shows(second, green)
    third = add(20, blue)
    again = add(10, blue)
    assert again.size == second.size != third.size
    assert shows(again, red) and shows(again, blue) and not shows(again, green)
    assert len(list((tmp_path / "validation").iterdir())) == 4


@pytest.mark.slow
def test_the_sheet_takes_rows_of_other_lengths_and_pictures_that_cannot_be_read(tmp_path):
    def add(step, prompts):
        extend_contact_sheet(tmp_path, step, [Image.new("RGB", (32, 32), (step, 0, 0))] * len(prompts), prompts)
        return Image.open(tmp_path / "contact_sheet.png")

    def shows(sheet, step):
        return any(pixel == (step, 0, 0) for _, pixel in sheet.convert("RGB").getcolors(1 << 24))

    narrow = add(50, ["one"])
    wide = add(100, ["one", "two"])
    assert wide.width > narrow.width
    assert add(150, ["one"]).width >= wide.width
    folder = tmp_path / "validation"
    (folder / "step-000050-00.png").write_bytes(b"")
    (folder / "step-000100-00.png").write_bytes((folder / "step-000100-00.png").read_bytes()[:40])
    (folder / "step-mine.png").write_bytes(b"")
    (folder / "step-000300-00.png").mkdir()
    with pytest.warns(UserWarning, match=r"step-000(050|100)-00.png: cannot be read .* stays empty"):
        sheet = add(200, ["one", "two"])
    assert not shows(sheet, 50) and all(shows(sheet, step) for step in (100, 150, 200))
    assert (folder / "step-mine.png").exists()
