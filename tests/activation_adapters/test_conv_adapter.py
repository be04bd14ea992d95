"""Conv-Adapter against loops in NumPy, for every setting that a convolution can have."""

import copy
from functools import partial
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from peft import get_peft_model
from torch import nn

from atomdiff.activation_adapters import ConvAdapterConfig
from atomdiff.activation_adapters.conv_adapter.blocks import find_residual_block
from atomdiff.activation_adapters.conv_adapter.layer import ConvAdapterLayer, ConvBranch, ConvShape
from atomdiff.tuner.adapter_state import activate
from atomdiff.tuner.attach import delete_adapter
from atomdiff.tuner.inject import inject
from tests.activation_adapters.methods import METHODS, call, make_model, shake, trained
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
    branch = ConvBranch(ConvShape.of(base), 2).double()
    for parameter in branch.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, base.in_channels, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(branch(x), torch.from_numpy(branch_in_loops(branch, base, x.numpy())))
    assert branch(x).shape == base(x).shape


@pytest.mark.parametrize(("channels", "reduction", "width"), [(8, 2, 4), (8, 3, 2), (7, 2, 1), (4, 8, 1), (3, 1, 3)])
def test_its_width_divides_the_channels(channels, reduction, width):
    assert ConvBranch(ConvShape.of(nn.Conv2d(channels, 5, 3)), reduction).grouped.out_channels == width


@pytest.mark.parametrize("settings", [{"padding_mode": "reflect"}, {"padding_mode": "circular"}, {"padding": "same"}])
def test_it_pads_as_the_convolution_does(settings):
    base = nn.Conv2d(4, 6, 3, **{"padding": 1} | settings)
    branch = ConvBranch(ConvShape.of(base), 2)
    assert branch(torch.randn(1, 4, 5, 6)).shape == (1, 6, 5, 6)
    assert branch.grouped.padding_mode == base.padding_mode


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


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in CONVOLUTIONS if name != "seven channels"])
def test_a_sequential_branch_computes_the_equation_of_the_output(name):
    base = copy.deepcopy(CONVOLUTIONS[name]).double()
    x = torch.randn(2, base.in_channels, 6, 8, dtype=torch.float64)
    plain = base(x)
    net = get_peft_model(nn.Sequential(base), ConvAdapterConfig(reduction=2, placement="conv_sequential")).double()
    assert torch.equal(net(x), plain)
    shake(net)
    branch = net.base_model.model[0].adapters["default"]
    rows, columns = base.kernel_size
    (up, down), (left, right) = (
        divmod(step * (size - 1), 2) for step, size in zip(base.dilation, (rows, columns), strict=True)
    )
    assert not down and not right  # kernels are odd, so that zeros are the same on both sides
    beside = SimpleNamespace(padding=(up, left), stride=(1, 1), dilation=base.dilation)
    torch.testing.assert_close(net(x), plain + torch.from_numpy(branch_in_loops(branch, beside, plain.numpy())))


def _blocks(model):
    return [module for module in model.modules() if find_residual_block(module)]


def _inputs(model, blocks):
    """What the blocks of a model were given and gave."""
    seen = []
    hooks = [block.register_forward_hook(lambda *call: seen.append(call)) for block in blocks]
    call(model)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("way", ["parallel", "sequential"])
@pytest.mark.parametrize("name", ["unet", "resnet", "resnet, bottlenecks", "convnext", "convnext v2"])
def test_branches_go_with_whole_blocks(name, way):
    base = make_model(name)
    convolutions = {id(block): 7 if "convnext" in name else 3 for block in _blocks(base)}
    model = trained(f"conv_adapter, residual_{way}", base)
    seen = _inputs(model, _blocks(base))
    assert len(seen) == len(convolutions) > 1
    for block, (x, *others), output in seen:
        branch = block.conv_branch.adapters["default"]
        kernel = branch.grouped.kernel_size[0]
        assert kernel == convolutions[id(block)]
        total = _before_activation(block, x, *others)
        taken, stride = (total, 1) if way == "sequential" else (x, x.shape[-1] // total.shape[-1])
        beside = SimpleNamespace(padding=(kernel // 2,) * 2, stride=(stride,) * 2, dilation=(1, 1))
        added = torch.from_numpy(branch_in_loops(branch, beside, taken.numpy())).float()
        activation = torch.relu if "resnet" in name else torch.nn.Identity()
        torch.testing.assert_close(output, activation(total + added), atol=1e-4, rtol=0)
        assert added.abs().max() > 1e-4


def _before_activation(block, x, *others):
    """The sum of a block's branches without adapters."""
    if hasattr(block, "shortcut"):
        return block.layer(x) + block.shortcut(x)
    return type(block).without_slots.forward(block, x, *others)


@pytest.mark.parametrize("other", ["mona", "conv_adapter, residual_parallel"])
def test_several_adapters_of_a_block_add_up_in_any_order(other):
    outputs, names = [], ["conv_adapter, residual_sequential", other]
    for order in (names, names[::-1]):
        model = make_model("resnet")
        plain = call(model)
        for name in order:
            torch.manual_seed(len(name))
            inject(model, METHODS[name](), name)
            shake(model, name, seed=len(name))
        for active in (*([name] for name in names), names):
            activate(model, active)
            outputs.append(call(model))
        for name in order:
            delete_adapter(model, name)
        assert torch.equal(call(model), plain)
    for one, again in zip(outputs[:3], outputs[3:], strict=True):
        torch.testing.assert_close(one, again, atol=1e-5, rtol=0)
    assert min((one - other).abs().max() for one, other in combinations([plain, *outputs[:3]], 2)) > 1e-3


def test_excluded_blocks_have_no_branch():
    config = partial(ConvAdapterConfig, placement="residual_parallel")
    everywhere = get_peft_model(make_unet(), config()).base_model.model
    some = get_peft_model(make_unet(), config(exclude_modules=r".*up_blocks.*|mid_block.resnets.0.conv_branch"))
    paths = {path for path, module in everywhere.named_modules() if isinstance(module, ConvAdapterLayer)}
    left = {path for path, module in some.base_model.model.named_modules() if isinstance(module, ConvAdapterLayer)}
    assert left == {path for path in paths if "up_blocks" not in path and path != "mid_block.resnets.0.conv_branch"}


def test_placements_and_targets_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="placement='beside': expected one of 'conv_parallel', 'conv_sequential', "):
        ConvAdapterConfig(placement="beside")
    for placement, target in (("residual_parallel", "conv"), ("conv_sequential", "blocks")):
        with pytest.raises(ValueError, match=f"target_modules='{target}': with placement='{placement}' expected '"):
            ConvAdapterConfig(placement=placement, target_modules=target)
    blocks = partial(ConvAdapterConfig, placement="residual_sequential")
    assert blocks().target_modules == "blocks" and ConvAdapterConfig().target_modules == "conv"
    with pytest.raises(TypeError, match="it is a Conv2d, expected one of ResnetBlock2D, ResNetBasicLayer"):
        get_peft_model(make_unet(), blocks(target_modules=["conv1"]))
    resampled = nn.Sequential(ResnetBlock2D(in_channels=8, temb_channels=None, groups=4, down=True))
    with pytest.raises(TypeError, match="it changes the size of its input"):
        get_peft_model(resampled, blocks(target_modules=["0"]))


def test_what_is_no_convolution_of_images_is_refused():
    for module in (nn.Linear(4, 4), nn.Conv1d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3)):
        with pytest.raises(TypeError, match=f"it is a {type(module).__name__}, expected a Conv2d"):
            get_peft_model(nn.Sequential(module), ConvAdapterConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="reduction=0: expected a whole number"):
        ConvAdapterConfig(reduction=0)
