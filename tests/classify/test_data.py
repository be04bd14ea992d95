import numpy as np
import pytest
import torch
from PIL import Image

from atomdiff.classify.data import Augmentation, ImageDataset, evaluation_batches, training_batches
from atomdiff.classify.splits import LabeledFiles, read_splits
from atomdiff.utils.errors import UserError


def write(folder, **counts):
    """An image folder; images of a class are its number in grey, and no two have one file's content."""
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.new("L", (8, 6), 40 * number + index).save(folder / name / f"{index:02d}.png")
    return folder


def split_of(folder, seed=0, validation=0.2, test=0.3):
    return read_splits(folder, validation, test, seed)


def parts(splits):
    return splits.train, splits.validation, splits.test


def test_the_split_is_stratified_and_disjoint_and_loses_nothing(tmp_path):
    splits = split_of(write(tmp_path, cat=20, dog=10))
    assert splits.classes == ("cat", "dog")
    assert [[part.labels.count(label) for label in (0, 1)] for part in parts(splits)] == [[10, 5], [4, 2], [6, 3]]
    files = [file for part in parts(splits) for file in part.files]
    assert sorted(files) == sorted(tmp_path.rglob("*.png")) and len(set(files)) == 30
    labels = [label for part in parts(splits) for label in part.labels]
    assert [file.parent.name == "dog" for file in files] == labels


def test_the_split_follows_from_the_seed_alone(tmp_path):
    write(tmp_path, cat=20, dog=10)
    assert split_of(tmp_path, seed=3) == split_of(tmp_path, seed=3)
    assert split_of(tmp_path, seed=3).test != split_of(tmp_path, seed=4).test
    before = split_of(tmp_path, seed=3)
    write(tmp_path, ant=10)
    after = split_of(tmp_path, seed=3)
    assert set(before.test.files) == {file for file in after.test.files if file.parent.name != "ant"}


def test_folders_of_splits_are_taken_as_they_are(tmp_path):
    write(tmp_path / "train", cat=4, dog=5)
    write(tmp_path / "val", dog=2)
    write(tmp_path / "test", cat=3)
    (tmp_path / ".cache").mkdir()
    splits = split_of(tmp_path)
    assert [len(part) for part in parts(splits)] == [9, 2, 3]
    assert splits.validation.labels == (1, 1) and splits.test.labels == (0, 0, 0)


def test_a_missing_validation_is_drawn_from_train_and_a_missing_test_stays_missing(tmp_path):
    write(tmp_path / "train", cat=10, dog=10)
    splits = split_of(tmp_path)
    assert (len(splits.train), len(splits.validation), splits.test) == (16, 4, None)


def test_a_test_share_of_zero_means_no_test(tmp_path):
    splits = split_of(write(tmp_path, cat=10, dog=10), test=0)
    assert (len(splits.train), len(splits.validation), splits.test) == (16, 4, None)


def test_a_class_may_begin_with_an_underscore_but_what_archives_leave_is_none(tmp_path):
    assert split_of(write(tmp_path, _other=5, bus=5, __MACOSX=5)).classes == ("_other", "bus")


def test_classes_of_one_name_in_two_forms_are_refused(tmp_path):
    folder = write(tmp_path, **{"caf\u00e9": 5, "cafe\u0301": 5, "tea": 5})
    with pytest.raises(UserError, match="are the same name in two forms of Unicode; put the images into one folder"):
        split_of(folder)


def test_a_class_may_be_called_train(tmp_path):
    assert split_of(write(tmp_path, bus=5, train=5)).classes == ("bus", "train")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({"cat": 5}, r"found 1 subfolders \(cat\); expected one for each of several classes"),
        ({}, r"found 0 subfolders \(none\)"),
        ({"cat": 5, "dog": 0}, "no image in dog; add some, or remove the folder"),
        ({"cat": 5, "dog": 2}, "dog: 2 images, 1 for test, 1 for validation: none is left"),
        ({"train/cat": 5, "train/dog": 5, "test/cat": 2, "test/cow": 2}, "test: cow not among the classes .*cat, dog"),
        ({"train/cat": 5, "train/dog": 5, "validation/cow": 2}, "validation: cow not among"),
        ({"train/cat": 5, "train/dog": 5, "validation/cat": 0}, "validation: no image in cat"),
        ({"train/cat": 5, "train/dog": 5, "test": 2}, "test: no subfolder in it; .* no folder test at all"),
        ({"cat": 5, "dog": 5, "dog/puppy": 2}, "dog/puppy: images are too deep inside .* directly in its folder"),
        ({"Train/cat": 5, "Train/dog": 5, "Test/cat": 5}, "Test/cat: images are too deep .* splits called train"),
        ({"train/cat": 5, "train/dog": 5, "holdout/cat": 2}, "holdout: not a split of the images"),
        ({"train/cat": 5, "train/dog": 5, "val/cat": 2, "validation/cat": 2}, "validation: not a split .* each once"),
    ],
)
def test_folders_that_do_not_look_so_are_user_errors(tmp_path, folders, message):
    for folder, count in folders.items():
        write(tmp_path, **{folder: count})
    with pytest.raises(UserError, match=message):
        split_of(tmp_path)


def test_all_unreadable_images_are_named_at_once(tmp_path):
    write(tmp_path, cat=12, dog=12)
    for name in ("cat/00.png", "dog/03.png"):
        (tmp_path / name).write_text("no image")
    with pytest.raises(UserError, match="cannot be read: .*cat/00.png.*dog/03.png|cannot be read: .*dog.*cat"):
        split_of(tmp_path)


class Plain:
    """A processor that only scales."""

    def __call__(self, image, return_tensors):
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
        return {"pixel_values": pixels[None]}


def test_images_of_any_mode_come_upright_in_rgb(tmp_path):
    grey = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    grey.save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (8, 6), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("I;16", (8, 6), 65535).save(tmp_path / "deep.png")
    files = tuple(tmp_path / name for name in ("turned.jpg", "clear.png", "deep.png"))
    images = ImageDataset(LabeledFiles(files, (0, 1, 2)), Plain())
    assert images[0, 0][0].shape == (3, 8, 6)
    assert images[1, 0][0].min() == 1 and images[2, 0][0].min() == 1


def labeled(tmp_path):
    return split_of(write(tmp_path, cat=6, dog=6), validation=0.1, test=0).train


def test_training_sees_every_picture_once_an_epoch_and_processes_share_it(tmp_path):
    images = ImageDataset(labeled(tmp_path), Plain())
    seen = {}
    for rank in (0, 1):
        for step, (pixels, labels) in enumerate(training_batches(images, 1, 10, (rank, 2))):
            grey = round(pixels[0, 0, 0, 0].item() * 255)
            assert labels.item() == (grey >= 40)
            seen[2 * step + rank] = grey
    in_order = [seen[position] for position in range(20)]
    assert len(set(in_order[:10])) == 10 and set(in_order[:10]) == set(in_order[10:])
    assert in_order[:10] != in_order[10:]


def test_evaluation_sees_every_picture_once(tmp_path):
    images = ImageDataset(labeled(tmp_path), Plain())
    seen = [label for rank in (0, 1, 2) for _, labels in evaluation_batches(images, 2, (rank, 3)) for label in labels]
    assert sorted(seen) == sorted(images.images.labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_stay_of_different_sizes_are_a_user_error(tmp_path, workers):
    images = labeled(tmp_path)
    Image.new("RGB", (9, 6)).save(images.files[0])
    with pytest.raises(UserError, match=r"as \(3, 6, 8\) and \(3, 6, 9\); expected one size"):
        list(evaluation_batches(ImageDataset(images, Plain()), 64, num_workers=workers))


def test_augmentation_mirrors_half_and_cuts_within_the_picture():
    x, y = np.meshgrid(np.arange(40), np.arange(30))
    image = Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))
    generator = torch.Generator().manual_seed(0)
    cuts = [np.asarray(Augmentation(True, 0.25)(image, generator)).astype(int) for _ in range(200)]
    mirrored = sum(cut[0, 0, 0] > cut[0, -1, 0] for cut in cuts)
    areas = [cut.shape[0] * cut.shape[1] / 1200 for cut in cuts]
    assert 70 < mirrored < 130
    assert 0.2 < min(areas) < 0.35 and 0.9 < max(areas) <= 1 and abs(np.mean(areas) - 0.625) < 0.05
    assert all(abs(cut.shape[1] / cut.shape[0] - 4 / 3) < 0.1 for cut in cuts)
    assert {cut[..., 1].min() for cut in cuts} >= {0, 1, 2, 3} and max(cut[..., 1].max() for cut in cuts) == 29
    unchanged = Augmentation(False, 1.0)(image, generator)
    assert np.array_equal(np.asarray(unchanged), np.asarray(image))


@pytest.mark.slow
def test_a_position_of_the_stream_always_gives_the_same_picture(tmp_path):
    images = labeled(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)).save(images.files[0])
    varied = ImageDataset(images, Plain(), Augmentation(True, 0.3), seed=5)
    assert torch.equal(varied[0, 7][0], varied[0, 7][0])
    others = [varied[0, position][0] for position in range(8)]
    assert any(other.shape != others[7].shape or not torch.equal(other, others[7]) for other in others[:7])
