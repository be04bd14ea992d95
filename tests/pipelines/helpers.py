"""What the tests of pipelines share: adapters with random numbers, images of them, and all that a pipeline holds."""

import torch
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from atomdiff.pipelines.models import pipeline_models
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding, tokens_in
from atomdiff.tuner import AtomConfig
from tests.helpers import add_adapter, assert_unchanged, snapshot

METHODS = {
    "atoms": lambda: AtomConfig(channel_block=4),
    "dct atoms": lambda: AtomConfig(channel_block=2, basis="dct", target_modules="attention"),
    "joint atoms": lambda: AtomConfig(channel_block=2, joint=True, num_atoms=4),
    "recursive atoms": lambda: AtomConfig(recursion=2, basis="dct", target_modules=["conv1", "to_v"]),
    "sparse atoms": lambda: AtomConfig(basis="sparse", channel_block=1, num_atoms=12, target_modules=["conv_in"]),
    "lora": lambda: LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"]),
    "loha": lambda: LoHaConfig(r=2, target_modules=["to_k", "conv2"]),
    "oft": lambda: OFTConfig(r=2, oft_block_size=0, target_modules=["to_q", "to_v"]),
    "ia3": lambda: IA3Config(target_modules=["to_k", "to_v"], feedforward_modules=[]),
}
"""One adapter of every variant of atoms, and of other PEFT methods, that are written to a file."""

_SOME = ["conv_in", "conv1", "conv_shortcut", "proj_in", "net.2", "to_k", "q_proj", "fc1"]
VARIANTS = {
    "spatial": AtomConfig(channel_block=1, num_atoms=6),
    "separable": AtomConfig(channel_block=4, target_modules=_SOME),
    "joint": AtomConfig(channel_block=2, joint=True, target_modules=["conv1", "conv_in"]),
    "recursive": AtomConfig(channel_block=1, recursion=2, target_modules=["conv1", "conv_out"]),
    "sparse": AtomConfig(channel_block=2, basis="sparse", num_atoms=12, target_modules=["conv_in", "conv_out"]),
    "dct": AtomConfig(channel_block=8, basis="dct", target_modules="attention"),
    "shared": AtomConfig(channel_block=2, basis="dct", share="kind", target_modules=["conv1", "conv2", "to_v"]),
}
"""One adapter of every variant of atoms, all of which the fixture `pipe` has, by these names."""


def train(pipe, method="atoms", name="default", word=None, seed=0, parts=("unet",)):
    """Add an adapter that differs at random from its start, and a word, as a training run leaves them."""
    for part in parts:
        config = METHODS[method]()
        if part == "text_encoder":
            config.target_modules = ["q_proj", "v_proj"]
        add_adapter(pipe, name, config, [part], seed, scale=0.05)
    if word:
        add_placeholder_token(pipe, word)
        vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
        set_token_embedding(pipe, word, {"text_encoder": vector})


def noise(count=1, seed=1):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def predict_repeated(pipe, count=1, timestep=500):
    """What the UNet makes of the same noise and text states, so many times."""
    text = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2))
    inputs = noise().to(pipe.unet.dtype).expand(count, -1, -1, -1), text.to(pipe.unet.dtype).expand(count, -1, -1)
    with torch.no_grad():
        return pipe.unet(inputs[0], torch.as_tensor(timestep), inputs[1]).sample


def bits(pipe):
    """All that is in the models' state dicts."""
    models = pipeline_models(pipe)
    return {f"{part}.{key}": value.clone() for part, m in models.items() for key, value in m.state_dict().items()}


def base_bits(pipe):
    """Parameters and buffers of the base, by the names that they have without adapters."""
    tensors = {key.replace(".base_layer", ""): value for key, value in bits(pipe).items()}
    return {key: value for key, value in tensors.items() if "atom_" not in key and "lora_" not in key}


def assert_same_bits(now, before):
    assert now.keys() == before.keys()
    changed = [key for key, value in before.items() if now[key].dtype != value.dtype or not _same(now[key], value)]
    assert changed == []


def _same(one, other):
    return torch.equal(*(each.contiguous().view(-1).view(torch.uint8) for each in (one, other)))


def pipeline_state(pipe):
    """All that can be seen of a pipeline, to the bit."""
    models = pipeline_models(pipe).items()
    layers = [(part, layer) for part, model in models for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    return snapshot(pipe), {
        "trainable": {part: [parameter.requires_grad for parameter in model.parameters()] for part, model in models},
        "layers": [
            (part, m.active_adapters, m.disable_adapters, list(m.merged_adapters), dict(getattr(m, "scaling", {})))
            for part, m in layers
        ],
        "adapters": pipe.get_list_adapters(),
        "words": list(tokens_in(pipe)),
        "tokenizer": id(pipe.tokenizer),
    }


def assert_same_state(pipe, before):
    assert_unchanged(pipe, before[0])
    assert pipeline_state(pipe)[1] == before[1]


def generate(pipe, prompts="a photo of a mug", latents=None, **options):
    """The latents of images after two guided steps."""
    latents = noise() if latents is None else latents.clone()
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"} | options
    return pipe(prompts, latents=latents.to(pipe.unet.dtype), **options).images


def addresses(pipe):
    """Where parameters lie; the embedding table moves with the words that come."""
    parameters = [*pipe.unet.parameters(), *pipe.text_encoder.encoder.parameters()]
    return [(id(parameter), parameter.data_ptr()) for parameter in parameters]
