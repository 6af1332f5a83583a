"""LoRA and QLoRA: tuning a few numbers beside frozen weights, on the language model, on the vision system, or on both.

What LoRA is put on, by `lora_target`:

| target | low-rank updates on | trained whole |
|---|---|---|
| `language` | q, k, v, o, gate, up, down of the language model | nothing |
| `vision` | both halves of the expert's low-rank maps (3.3) | bridge, hybrid embedding (3.2) |
| `both` | both | bridge, hybrid embedding |

The bridge has rank 8 itself: an update of rank 16 would have more numbers than it. The hybrid embedding is where codes
and features become image tokens, with tables that LoRA would not shrink (514 rows). The vision heads are left alone:
answers are text, so nothing would reach them; nor is the language head adapted, which TRL reads past any adapter.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainingArguments

from libra_cli.quantization import quantization_config

LANGUAGE_LAYERS = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
EXPERT = r"model\.vision_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.[AB]"

TARGETS = {"language": LANGUAGE_LAYERS, "vision": EXPERT, "both": f"{LANGUAGE_LAYERS}|{EXPERT}"}
"""Names of the modules that LoRA is put on, as regular expressions."""

BRIDGES = ["k_bridge_on_vision", "k_bridge_on_language", "v_bridge_on_vision", "v_bridge_on_language"]

TRAINED_WHOLE = {"language": None, "vision": [*BRIDGES, "vision_model.embedding"]}
TRAINED_WHOLE["both"] = TRAINED_WHOLE["vision"]
"""Names of the modules that are trained whole, and saved with the adapter."""


@dataclass
class AdapterArguments:
    """
    Whether to tune with LoRA.

    Args:
        lora_target (`str`, *optional*): `"language"`, `"vision"` or `"both"`; without it all weights are trained.
        lora_rank (`int`, *optional*, defaults to 64): rank of the updates.
        lora_alpha (`int`, *optional*, defaults to 128): updates are scaled by this over the rank.
        lora_dropout (`float`, *optional*, defaults to 0.0): of what the updates read.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            QLoRA: the frozen weights are held in 4 bits (NF4, double quantization) with bitsandbytes.

    Raises:
        ValueError: for a target there is not, numbers out of range, or 4 bits without LoRA.
    """

    lora_target: str | None = field(default=None, metadata={"help": "language, vision or both; none: all weights."})
    lora_rank: int = field(default=64, metadata={"help": "Rank of the updates."})
    lora_alpha: int = field(default=128, metadata={"help": "Updates are scaled by this over the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of what the updates read."})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: frozen weights in 4 bits."})

    def __post_init__(self):
        if self.lora_target not in (None, *TARGETS):
            raise ValueError(f"lora_target is {self.lora_target!r}; choose of {', '.join(TARGETS)}, or leave it out.")
        if self.lora_rank < 1 or self.lora_alpha < 1 or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_rank ({self.lora_rank}) and lora_alpha ({self.lora_alpha}) must be at least 1, lora_dropout "
                f"({self.lora_dropout}) in [0, 1)."
            )
        if self.load_in_4bit and self.lora_target is None:
            raise ValueError(
                "load_in_4bit needs lora_target: weights of 4 bits cannot be trained, only updates to them."
            )

    def check_packages(self, args: TrainingArguments) -> None:
        """
        Refuses QLoRA where it cannot run, before anything is loaded.

        Args:
            args (`TrainingArguments`): of the run.

        Raises:
            ValueError: if bitsandbytes is not installed, or there is no GPU and `use_cpu` is not set.
        """
        if not self.load_in_4bit:
            return
        if find_spec("bitsandbytes") is None:
            raise ValueError(
                "load_in_4bit needs bitsandbytes, which is not installed. Run: pip install 'libra-vlm[qlora]'"
            )
        if args.device.type == "cpu" and not args.use_cpu:
            raise ValueError(
                "load_in_4bit needs a GPU, and torch finds none. On a CPU bitsandbytes is slow; set use_cpu: true if "
                "that is meant, for a small model."
            )

    def loading_options(self, args: TrainingArguments) -> dict[str, Any]:
        """
        In what form the model is loaded.

        Args:
            args (`TrainingArguments`): of the run.

        Returns:
            `dict`: options of `from_pretrained`. Weights that are trained are float32, whatever the checkpoint's dtype
            (under `bf16` the Trainer computes in bfloat16): an update of 2e-5 is lost in the 8 bits of a bfloat16 weight.
            Frozen ones are bfloat16 under `bf16`, or 4 bits.
        """
        if self.lora_target is None or not args.bf16:
            dtype = torch.float32
        else:
            dtype = torch.bfloat16
        if not self.load_in_4bit:
            return {"dtype": dtype}
        quantization = quantization_config("nf4", dtype)
        return {"dtype": dtype, "quantization_config": quantization, "device_map": {"": args.device}}

    def peft_config(self) -> LoraConfig | None:
        """The `LoraConfig` for TRL, or None without LoRA."""
        if self.lora_target is None:
            return None
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=TARGETS[self.lora_target],
            modules_to_save=TRAINED_WHOLE[self.lora_target],
        )
