"""The model: configuration, routed language-vision decoder, generation of text and images."""

from .configuration_libra import LibraConfig
from .modeling_libra import LibraForCausalLM, LibraModel, LibraPreTrainedModel

__all__ = ["LibraConfig", "LibraForCausalLM", "LibraModel", "LibraPreTrainedModel"]
