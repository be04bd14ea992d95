"""PEFT tuners that change activations instead of weights (Mona, Conv-Adapter, Coeff-Tuning), also as one with atoms."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from atomdiff.activation_adapters.coeff_tuning import CoeffTuningConfig, CoeffTuningModel
from atomdiff.activation_adapters.combined import CombinedConfig, CombinedModel
from atomdiff.activation_adapters.conv_adapter.config import ConvAdapterConfig
from atomdiff.activation_adapters.conv_adapter.model import ConvAdapterModel
from atomdiff.activation_adapters.mona.config import MonaConfig
from atomdiff.activation_adapters.mona.model import MonaModel
from atomdiff.tuner.peft_type import add_member

__all__ = ["CoeffTuningConfig", "CombinedConfig", "ConvAdapterConfig", "MonaConfig"]

for _config, _model in (
    (MonaConfig, MonaModel),
    (ConvAdapterConfig, ConvAdapterModel),
    (CoeffTuningConfig, CoeffTuningModel),
    (CombinedConfig, CombinedModel),
):
    add_member(_config.METHOD)
    if _config.METHOD not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=_config.METHOD.lower(), config_cls=_config, model_cls=_model)
