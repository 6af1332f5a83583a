"""The model: configuration, routed language-vision decoder, generation of text and images."""

from .configuration_libra import LibraConfig
from .modeling_libra import LibraForCausalLM, LibraModel, LibraPreTrainedModel
from .vision_system_libra import load_vision_system, replace_vision_system, save_vision_system

__all__ = [
    "LibraConfig",
    "LibraForCausalLM",
    "LibraModel",
    "LibraPreTrainedModel",
    "load_vision_system",
    "replace_vision_system",
    "save_vision_system",
]
