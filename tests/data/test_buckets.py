import itertools

import pytest

from atomdiff.data.buckets import automatic_buckets, bucket_sizes, nearest_bucket, parse_buckets
from atomdiff.utils.errors import UserError


def test_buckets_are_written_as_in_diffusers_scripts():
    assert parse_buckets("672,1568;688,1504") == ((672, 1568), (688, 1504))
    assert parse_buckets("32,32;32,48;32,32") == ((32, 32), (32, 48))
    assert parse_buckets(" auto ") is None
    assert bucket_sizes("512, 768; 768,512", 512, 64) == ((512, 768), (768, 512))
    assert bucket_sizes(None, 512, 64) == ((512, 512),)


@pytest.mark.parametrize("text", ["", "512", "512x768", "512,768;", "512,768,3", "0,64", "-64,64", "automatic"])
def test_other_texts_are_refused(text):
    with pytest.raises(UserError, match='aspect_ratio_buckets=.*expected "auto", or "height,width'):
        parse_buckets(text)


def test_sides_that_the_base_cannot_halve_are_refused():
    with pytest.raises(UserError, match="multiples of 64; found 500,768;768,500"):
        bucket_sizes("500,768;512,512;768,500", 512, 64)


def test_automatic_buckets_of_stable_diffusion():
    """Those that sd-scripts gives for 512x512, bucket_reso_steps 64, min_bucket_reso 256 and max_bucket_reso 1024."""
    wide = {(256, width) for width in (832, 896, 960, 1024)} | {(320, 704), (320, 768), (384, 640), (448, 576)}
    assert set(automatic_buckets(512, 64)) == wide | {(512, 512)} | {(width, height) for height, width in wide}


@pytest.mark.parametrize(("side", "unit"), [(32, 8), (512, 64), (768, 64), (1024, 32), (64, 64)])
def test_automatic_buckets_are_as_large_as_may_be(side, unit):
    found = automatic_buckets(side, unit)
    assert (side, side) in found and len(set(found)) == len(found)
    for height, width in found:
        assert height % unit == width % unit == 0 and (width, height) in found
        assert side / 2 <= min(height, width) and max(height, width) <= 2 * side
        assert side * side - unit * max(height, width) < height * width <= side * side


def test_the_nearest_bucket_is_nearest_as_a_factor():
    buckets = ((512, 512), (512, 768), (768, 512), (256, 1024))
    for height, width in itertools.product(range(100, 1000, 90), repeat=2):
        chosen = nearest_bucket((height, width), buckets)
        factors = {h / w / (height / width) for h, w in buckets}
        assert max(chosen[0] / chosen[1] / (height / width), chosen[1] / chosen[0] * (height / width)) == pytest.approx(
            min(max(factor, 1 / factor) for factor in factors)
        )
    assert nearest_bucket((30, 40), buckets) == (512, 768)
    assert nearest_bucket((100, 100), ((256, 256), (512, 512))) == (512, 512)
    assert nearest_bucket((300, 200), buckets) == (768, 512)
