"""Samples with weights of their own, by mixed patches: equal to each sample's own weight, for every geometry."""

import pytest
import torch
from torch import nn

from atomdiff import AtomConfig
from atomdiff.atoms import im2col
from atomdiff.tuner.layer import AtomLayer
from atomdiff.tuner.mixed_batch import BatchLayout

GEOMETRIES = {
    "plain": ({"kernel_size": 3, "padding": 1}, True),
    "stride": ({"kernel_size": 3, "padding": 1, "stride": 2}, True),
    "rectangular and dilated": ({"kernel_size": (3, 1), "padding": (2, 0), "dilation": (2, 1)}, True),
    "no bias": ({"kernel_size": (2, 5), "bias": False}, True),
    "reflecting": ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, False),
    "grouped": ({"kernel_size": 3, "groups": 2}, False),
    "padded by name": ({"kernel_size": 3, "padding": "same"}, False),
}


BLOCKS = {"kernels": (1, 1), "channels": (4, 4), "some have channels": (1, 4), "blocks of two sizes": (4, 2)}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@torch.no_grad()
def test_each_sample_is_as_it_would_be_alone(geometry, blocks, dtype, tolerance, monkeypatch):
    settings, by_im2col = GEOMETRIES[geometry]
    by_im2col = by_im2col and blocks != "blocks of two sizes"
    monkeypatch.setattr("atomdiff.atoms.batched._PART_BYTES", 30_000)
    calls = []
    convolve = im2col.convolve
    monkeypatch.setattr(im2col, "convolve", lambda *args: calls.append(args) or convolve(*args))
    torch.manual_seed(0)
    layer = AtomLayer(nn.Conv2d(4, 200, **settings).to(dtype))
    for name, block in zip(("a", "b"), BLOCKS[blocks], strict=True):
        layer.update_layer(name, AtomConfig(channel_block=block), "conv")
        for kind in ("atom_delta", "channel_delta"):
            if name in layer.tensors(kind):
                layer.tensors(kind)[name].normal_(0, 0.3)
    layer.set_adapter(["a", "b"])
    x = torch.randn(2 * 3 * 2, 4, 6, 7, dtype=dtype)  # two groups, three samples, two images each
    samples = [{"a": 1.0}, {}, {"a": 0.5, "b": 2.0}]
    layer.mix(BatchLayout(3, images=2), samples)
    together = layer(x)
    layer.mixed_batch = None
    assert bool(calls) is by_im2col
    for index, image in enumerate(x):
        for name in ("a", "b"):
            layer.set_scale(name, samples[index // 2 % 3].get(name, 0.0))
        torch.testing.assert_close(together[index], layer(image[None])[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("block", [1, 4])
def test_gradients_flow_through_mixed_patches(block):
    torch.manual_seed(0)
    layer = AtomLayer(nn.Conv2d(4, 200, 3).double())
    layer.update_layer("a", AtomConfig(channel_block=block), "conv")
    for parameter in (layer.tensors("atom_delta"), layer.tensors("channel_delta")):
        for delta in parameter.values():
            delta.data.normal_(0, 0.3)
    layer.set_adapter(["a"])
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64, requires_grad=True)
    layer.mix(BatchLayout(2), [{"a": 1.0}, {}])
    together = torch.autograd.grad(layer(x).square().sum(), [x, layer.base_layer.weight])
    layer.mixed_batch = None
    apart = layer(x[:1]).square().sum() + layer.base_layer(x[1:]).square().sum()
    for one, other in zip(together, torch.autograd.grad(apart, [x, layer.base_layer.weight]), strict=True):
        torch.testing.assert_close(one, other)


def test_many_positions_and_few_channels_take_a_weight_for_each_sample():
    layer = AtomLayer(nn.Conv2d(4, 8, 3))
    layer.update_layer("a", AtomConfig(channel_block=1), "conv")
    layer.mix(BatchLayout(2), [{"a": 1.0}, {}])
    updates = layer.mixed_batch.updates
    assert im2col.im2col_is_cheaper(layer.base_layer, updates, positions=7)
    assert not im2col.im2col_is_cheaper(layer.base_layer, updates, positions=8)
    with pytest.raises(ValueError, match="a tensor of 3 in a mixed batch of 2 samples"):
        layer(torch.zeros(3, 4, 8, 8))
