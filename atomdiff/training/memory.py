"""Memory of a UNet in training: attention, gradient checkpointing, and quantization of its frozen Linear layers."""

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from atomdiff.training.config.memory import MemoryConfig
from atomdiff.utils.errors import UserError


def save_memory(config: MemoryConfig, unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    """Set up the attention, checkpointing and quantization of a UNet, which has its adapter already.

    Quantized layers compute in `dtype`.

    Raises:
        UserError: There is no Linear layer to quantize.
    """
    if config.load_in_8bit or config.load_in_4bit:
        bits = 8 if config.load_in_8bit else 4
        if not quantize(unet, bits, dtype):
            found = "the UNet has no frozen Linear layer without an adapter"
            raise UserError(f"load_in_{bits}bit=True: {found}; train fewer layers, or leave it out")
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.plain_attention:
        unet.set_attn_processor(AttnProcessor())
    if config.enable_attention_slicing:
        unet.set_attention_slice("auto")
    if config.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()


def quantize(model: nn.Module, bits: int, dtype: torch.dtype) -> int:
    """Quantize the weights of frozen Linear layers to 8 or 4 bits, by bitsandbytes; gradients pass through them.

    Layers with an adapter stay as they are: it adds to their full-precision weights. The others take, compute in and
    give `dtype`.

    8 bits: Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv 2208.07339, with
    the columns of inputs above 6 in full precision. 4 bits: NF4 of Dettmers et al., "QLoRA: Efficient Finetuning of
    Quantized LLMs", arXiv 2305.14314.

    Returns:
        How many layers were quantized.
    """
    changed = 0
    for name, module in list(model.named_children()):
        if isinstance(module, BaseTunerLayer):
            continue
        if type(module) is nn.Linear and not module.weight.requires_grad:
            setattr(model, name, _quantized(module, bits, dtype))
            changed += 1
        else:
            changed += quantize(module, bits, dtype)
    return changed


def _quantized(linear: nn.Linear, bits: int, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    sizes, weight = (linear.in_features, linear.out_features), linear.weight.data.cpu()
    if bits == 8:
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, device="meta")
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.LinearNF4(*sizes, compute_dtype=dtype, device="meta")
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
        # or generating images would repack the weights, and training could not go on
        layer.support_avx512bf16_for_cpu = False
    layer.bias = linear.bias
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))  # as autocast does for Linear layers
    quantized: nn.Module = layer.to(linear.weight.device).train(linear.training)  # moving it packs the weight
    return quantized
