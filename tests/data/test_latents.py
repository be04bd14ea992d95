import dataclasses

import pytest
import torch
from PIL import Image

from atomdiff.data.crops import Crop, make_crops
from atomdiff.data.latents import LatentEncoder, concatenate
from atomdiff.utils.errors import UserError
from atomdiff.utils.tensor_cache import DiskCache

COLORS = ("teal", "white", "black")


def crop_of(color, mask=None, size=(32, 32)):
    return Crop(Image.new("RGB", size, color), mask, (64, 96, 0, 8, 32, 32))


@pytest.fixture
def encoder(tiny_pipe, tmp_path):
    return LatentEncoder(tiny_pipe.vae, 2, DiskCache(tmp_path / "cache"))


def test_cached_latents_are_those_of_the_vae(encoder, tiny_pipe):
    vae = tiny_pipe.vae
    cache = concatenate([encoder([crop_of("teal"), crop_of("white")]), encoder([crop_of("black")])])
    assert (len(cache), cache.starts, cache.weights) == (2, (0, 2, 3), None)
    for row, color in enumerate(COLORS):
        with torch.no_grad():
            expected = vae.encode(tiny_pipe.image_processor.preprocess(crop_of(color).image)).latent_dist
        scale = vae.config.scaling_factor
        torch.testing.assert_close(cache.mean[row], expected.mean[0] * scale, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(cache.std[row], expected.std[0] * scale, atol=1e-5, rtol=1e-4)
    assert cache.time_ids.tolist() == [[64, 96, 0, 8, 32, 32]] * 3


def test_a_second_encoder_reads_the_same_bytes_without_the_vae(encoder, tiny_pipe, monkeypatch):
    seen = [crop_of(color) for color in COLORS]
    first = encoder(seen)
    monkeypatch.setattr(type(tiny_pipe.vae), "encode", None)
    second = LatentEncoder(tiny_pipe.vae, 2, encoder.cache)(seen)
    assert torch.equal(first.mean, second.mean) and torch.equal(first.std, second.std)


@pytest.mark.parametrize("change", ["a pixel", "the size", "the order", "the VAE", "the batch size"])
def test_other_views_and_vaes_are_encoded_anew(encoder, tiny_pipe, change):
    encoder([crop_of("teal"), crop_of("white"), crop_of("black")])
    changed = [crop_of("teal"), crop_of("white"), crop_of("black")]
    if change == "a pixel":
        changed[0].image.putpixel((5, 5), (0, 0, 1))
    if change == "the size":
        changed = [crop_of(color, size=(64, 16)) for color in COLORS]
    if change == "the order":
        changed.reverse()
    if change == "the VAE":
        tiny_pipe.vae.encoder.conv_in.bias.data += 1
    batch_size = 3 if change == "the batch size" else 2
    LatentEncoder(tiny_pipe.vae, batch_size, encoder.cache)(changed)
    assert len(list(encoder.cache.folder.iterdir())) == 2


def test_masks_become_weights(tiny_pipe, tmp_path):
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    found = LatentEncoder(tiny_pipe.vae, 2, DiskCache(tmp_path), 0.5)([crop_of("teal", mask), crop_of("white")])
    expected = torch.full((8, 8), 0.5)
    expected[:, :4] = 1
    assert found.weights.shape == (2, 1, 8, 8)
    assert torch.equal(found.weights[0, 0], expected) and torch.equal(found.weights[1], torch.ones(1, 8, 8))


def test_latents_that_are_not_finite_are_refused_and_not_kept(encoder, tiny_pipe):
    tiny_pipe.vae.quant_conv.bias.data[0] = torch.nan
    with pytest.raises(UserError, match="VAE gives latents that are not finite in torch.float32"):
        encoder([crop_of("teal")])
    assert not encoder.cache.folder.exists()


def test_draws_vary_over_views_and_noise_and_follow_the_generator(encoder):
    cache = encoder([crop_of("black"), crop_of("white")])
    latents = cache.sample([0] * 64, torch.Generator().manual_seed(0)).latents
    assert torch.equal(latents, cache.sample([0] * 64, torch.Generator().manual_seed(0)).latents)
    distance = (latents[:, None] - cache.mean).flatten(2).norm(dim=2)  # (64, 2)
    share = (distance[:, 0] < distance[:, 1]).float().mean()
    assert 0.2 < share < 0.8
    noise = (latents - cache.mean[distance.argmin(dim=1)]) / cache.std[distance.argmin(dim=1)]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_what_belongs_to_a_view_is_drawn_with_it(tiny_pipe, tmp_path):
    wide = Image.effect_noise((96, 32), 90)
    mask = Image.linear_gradient("L").rotate(90).resize((96, 32))  # every column another light
    encoder = LatentEncoder(tiny_pipe.vae, 4, DiskCache(tmp_path), 0.0)
    cut = make_crops(wide.convert("RGB"), (32, 32), center_crop=False, random_flip=True, mask=mask)
    cache = dataclasses.replace(encoder(cut), std=torch.zeros(()).expand(6, 4, 8, 8))
    sampled = cache.sample([0] * 32, torch.Generator().manual_seed(1))
    rows = (sampled.latents[:, None] - cache.mean).flatten(2).norm(dim=2).argmin(dim=1)
    assert len(rows.unique()) == 6
    assert torch.equal(sampled.time_ids, cache.time_ids[rows])
    assert torch.equal(sampled.weights, cache.weights[rows])
