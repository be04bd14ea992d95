"""LoRA files of other programs with random parameters, in every form, and the weights that they make."""

import torch
from safetensors.torch import save_file

import atomdiff
from atomdiff.export.kohya import layer_name
from atomdiff.pipelines.models import pipeline_models
from tests.helpers import assert_unchanged, snapshot

LAYERS = {
    "unet": [
        "conv_in",
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.0.downsamplers.0.conv",
        "mid_block.attentions.0.proj_in",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q",
        "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    ],
    "text_encoder": ["encoder.layers.0.self_attn.q_proj"],
    "text_encoder_2": ["text_model.encoder.layers.1.mlp.fc1"],
}


def rand(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 10


def lora(shape, number):
    rank, alpha = 2 + number % 2, 1.0 + number
    up, down = rand(shape[0], rank), rand(rank, *shape[1:])
    tensors = {"lora_up.weight": up.reshape(*up.shape, *[1] * (len(shape) - 2)), "lora_down.weight": down}
    delta = alpha / rank * torch.einsum("or,r...->o...", up, down)
    return {**tensors, "alpha": torch.tensor(alpha)}, delta


def locon_tucker(shape, number):
    if len(shape) == 2 or shape[2] == 1:
        return lora(shape, number)
    up, mid, down = rand(shape[0], 3), rand(3, 2, *shape[2:]), rand(2, shape[1])
    delta = 4.0 / 2 * torch.einsum("oa,abkl,bi->oikl", up, mid, down)
    tensors = {"lora_up.weight": up[..., None, None], "lora_down.weight": down[..., None, None], "lora_mid.weight": mid}
    return {**tensors, "alpha": torch.tensor(4.0)}, delta


def loha(shape, number):
    size = shape[1:].numel()
    a, b, c, d = rand(shape[0], 2), rand(2, size), rand(shape[0], 2) + 1, rand(2, size)
    delta = 0.5 * (a @ b * (c @ d)).reshape(shape)
    return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(1.0)}, delta


def loha_tucker(shape, number):
    if len(shape) == 2 or shape[2] == 1:
        return loha(shape, number)
    tensors, delta = {"alpha": torch.tensor(1.0)}, torch.full(shape, 0.5)
    for side in ("1", "2"):
        core, a, b = rand(2, 2, *shape[2:]) + 1, rand(2, shape[0]), rand(2, shape[1])
        tensors |= {f"hada_t{side}": core, f"hada_w{side}_a": a, f"hada_w{side}_b": b}
        delta = delta * torch.einsum("ijkl,jr,ip->prkl", core, b, a)
    return tensors, delta


def lokr(shape, number):
    left, right = (2, 2) if shape[1] % 2 == 0 else (2, 1)
    first, a = rand(left, right), rand(shape[0] // left, 3)
    b = rand(3, shape[1:].numel() // right)
    second = (a @ b).reshape(shape[0] // left, shape[1] // right, *shape[2:])
    first_wide = first.reshape(left, right, *[1] * (len(shape) - 2))
    is_whole = number % 2 == 0
    factors = {"lokr_w2": second} if is_whole else {"lokr_w2_a": a, "lokr_w2_b": b}
    delta = torch.kron(first_wide, second) * (1 if is_whole else 6.0 / 3)
    return {"lokr_w1": first, **factors, "alpha": torch.tensor(6.0)}, delta


def lokr_tucker(shape, number):
    if len(shape) == 2 or shape[2] == 1:
        return lokr(shape, number)
    right = 2 if shape[1] % 2 == 0 else 1
    first, core, a, b = rand(2, right), rand(3, 3, *shape[2:]), rand(3, shape[0] // 2), rand(3, shape[1] // right)
    second = torch.einsum("ijkl,ip,jr->prkl", core, a, b).contiguous()
    tensors = {"lokr_w1": first, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(6.0)}
    return tensors, 2 * torch.kron(first[..., None, None], second)


def diff(shape, number):
    delta = rand(*shape)
    return {"diff": delta}, delta


FORMS = {f.__name__: f for f in (lora, locon_tucker, loha, loha_tucker, lokr, lokr_tucker, diff)}


def write_lora(pipe, path, form, name_of=layer_name):
    """Write a file with random parameters; return (component, module) -> the weight that it makes."""
    tensors, expected = {}, {}
    for component, model in pipeline_models(pipe).items():
        for number, module in enumerate(LAYERS.get(component, ())):
            weight = model.get_submodule(module).weight
            of_layer, delta = form(weight.shape, number)
            name = name_of(pipe, component, module)
            tensors |= {f"{name}.{kind}": tensor.contiguous() for kind, tensor in of_layer.items()}
            expected[component, module] = weight.detach() + delta
    save_file(tensors, path)
    return expected


def assert_loads(pipe, path, expected, **options):
    """Assert that a file makes these weights, and that the pipeline is as before once it is unloaded."""
    before = snapshot(pipe)
    name = atomdiff.load_atoms(pipe, path, **options)
    atomdiff.set_active(pipe, name)
    for (component, module), weight in expected.items():
        found = getattr(pipe, component).get_submodule(module).get_base_layer().weight
        assert (found - weight).abs().max() < 2e-6, module
    atomdiff.set_active(pipe, {})
    atomdiff.unload_atoms(pipe)
    assert_unchanged(pipe, before)
