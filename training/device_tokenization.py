"""What TRL's trainers need for Libra: images tokenized on the device, a gathered head, adapters that say their base."""

from pathlib import Path
from typing import Any

from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer

from libra_cli.adapters import QUANTIZATION_CONFIG
from processing.processing_libra import LibraProcessor


class DeviceTokenization(Trainer):
    """
    To be listed before a trainer of TRL's. Its batches have `pixel_values`; here they become codes and features.

    Args:
        model ([`LibraForCausalLM`]): is tuned.
        processing_class ([`LibraProcessor`]): its image tokenizer is moved to the device of the model.
        kwargs: as in TRL's trainer.
    """

    def __init__(self, model: PreTrainedModel, processing_class: LibraProcessor, **kwargs):
        super().__init__(model=model, processing_class=processing_class, **kwargs)
        processing_class.image_tokenizer.to(self.args.device).eval()
        for name, parameter in self.model.named_parameters():
            if "modules_to_save" in name:  # copies in the dtype of the frozen weights, in which small updates are lost
                parameter.data = parameter.data.float()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return dict(self.processing_class.tokenize_images(super()._prepare_inputs(inputs)))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        TRL's loss. TRL reads the weight of the language head past the head's forward, where FSDP2 would gather it, and
        then gathers it itself, in a way that leaves each process with the gradient of its own rows; so it is gathered
        before.
        """
        head = self.model.get_output_embeddings()
        if isinstance(head, FSDPModule):
            head.unshard()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saves model or adapter and processor; with QLoRA also in what form the base model was held."""
        super()._save(output_dir, state_dict)
        quantization = getattr(self.model.config, "quantization_config", None)
        if quantization is not None:
            quantization.to_json_file(Path(output_dir or self.args.output_dir) / QUANTIZATION_CONFIG)
