"""Conv-Adapter against loops in NumPy, for every setting that a convolution can have."""

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

from atomdiff.activation_adapters import ConvAdapterConfig
from atomdiff.activation_adapters.conv_adapter import ConvAdapterLayer, ConvBranch
from tests.activation_adapters.methods import shake
from tests.tiny_models import make_unet

CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3, padding=1),
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(4, 6, (3, 1), padding=(2, 0), dilation=(2, 1)),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 4, 5, groups=4, padding=2, bias=False),
    "seven channels": nn.Conv2d(7, 2, 1),
}


def branch_in_loops(branch, base, x):
    """scale * pointwise(relu(grouped(x))), with zeros around the image."""
    kernel, point = branch.grouped.weight.detach().numpy(), branch.pointwise.weight.detach().numpy()[:, :, 0, 0]
    scale = branch.channel_scale.detach().numpy()
    (up, left), (stride_y, stride_x), (step_y, step_x) = base.padding, base.stride, base.dilation
    batch, channels, height, width = x.shape
    inside, of_group, rows, columns = kernel.shape
    high = (height + 2 * up - step_y * (rows - 1) - 1) // stride_y + 1
    wide = (width + 2 * left - step_x * (columns - 1) - 1) // stride_x + 1
    hidden = np.zeros((batch, inside, high, wide))
    for b, c, i, j in np.ndindex(*hidden.shape):
        for k, m, n in np.ndindex(of_group, rows, columns):
            y, z = i * stride_y - up + m * step_y, j * stride_x - left + n * step_x
            if 0 <= y < height and 0 <= z < width:
                hidden[b, c, i, j] += kernel[c, k, m, n] * x[b, c * (channels // inside) + k, y, z]
    hidden = np.maximum(hidden, 0)
    return np.stack([scale[o] * sum(point[o, c] * hidden[:, c] for c in range(inside)) for o in range(len(point))], 1)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_branch_computes_the_equation(name):
    base = CONVOLUTIONS[name].double()
    branch = ConvBranch(base, 2).double()
    for parameter in branch.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, base.in_channels, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(branch(x), torch.from_numpy(branch_in_loops(branch, base, x.numpy())))
    assert branch(x).shape == base(x).shape


@pytest.mark.parametrize(("channels", "reduction", "width"), [(8, 2, 4), (8, 3, 2), (7, 2, 1), (4, 8, 1), (3, 1, 3)])
def test_its_width_divides_the_channels(channels, reduction, width):
    assert ConvBranch(nn.Conv2d(channels, 5, 3), reduction).grouped.out_channels == width


@pytest.mark.parametrize("settings", [{"padding_mode": "reflect"}, {"padding_mode": "circular"}, {"padding": "same"}])
def test_it_pads_as_the_convolution_does(settings):
    base = nn.Conv2d(4, 6, 3, **{"padding": 1} | settings)
    assert ConvBranch(base, 2)(torch.randn(1, 4, 5, 6)).shape == (1, 6, 5, 6)
    assert ConvBranch(base, 2).grouped.padding_mode == base.padding_mode


def test_it_stands_beside_kernels_that_are_larger_than_a_pixel():
    unet = get_peft_model(make_unet(), ConvAdapterConfig())
    layers = [module for module in unet.modules() if isinstance(module, ConvAdapterLayer)]
    assert layers and all(layer.base_layer.kernel_size == (3, 3) for layer in layers)
    pointwise = get_peft_model(make_unet(), ConvAdapterConfig(target_modules=["conv_shortcut"]))
    assert any(isinstance(module, ConvAdapterLayer) for module in pointwise.modules())


def test_it_adds_to_the_output_of_the_convolution():
    net = nn.Sequential(nn.Conv2d(4, 6, 3))
    x = torch.randn(1, 4, 5, 5)
    plain = net(x)
    model = get_peft_model(net, ConvAdapterConfig(reduction=2))
    shake(model)
    branch = model.base_model.model[0].adapters["default"]
    torch.testing.assert_close(model(x), plain + branch(x))


def test_what_is_no_convolution_of_images_is_refused():
    for module in (nn.Linear(4, 4), nn.Conv1d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3)):
        with pytest.raises(TypeError, match=f"it is a {type(module).__name__}, expected a Conv2d"):
            get_peft_model(nn.Sequential(module), ConvAdapterConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="reduction=0: expected a whole number"):
        ConvAdapterConfig(reduction=0)
