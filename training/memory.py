"""Memory that training takes on each device, counted from the configuration: nothing is loaded and nothing is run.

    python -m training.memory                     # Libra-11B
    python -m training.memory --model LIBRA       # the sizes of another model
    python -m training.memory --devices 1 4 16

What is counted, in bytes a number, for parameters / gradients / the two moments of AdamW:

| recipe | trained | frozen |
|---|---|---|
| `pretrain`, the language model frozen | 4 / 4 / 8 | 2, as LLaMA-2 is stored |
| `sft`, everything trained | 4 / 4 / 8 | - |
| `lora` (rank 64 on both, see [`~training.adapters`]) | 4 / 4 / 8 | 2 |
| `qlora` | 2 / 2 / 2 + 8/256, what is trained whole 4 / 4 / 2 + 8/256 | 2, of 4 bits 1/2 + 1/64 + 4/16384 |

Weights in float32 are the optimizer's master weights. What an engine does with that is in [`held_by_device`], what
activations add in [`activation_bytes`].
"""

import argparse
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from libra_cli.quantization import NOT_QUANTIZED
from modeling_libra import LibraConfig, LibraForCausalLM
from modeling_libra.loss_libra import CHUNK_LOGITS
from processing.configuration_libra_image_tokenizer import LibraImageTokenizerConfig
from processing.modeling_libra_image_tokenizer import LibraImageTokenizer

from .adapters import TARGETS, TRAINED_WHOLE, AdapterArguments

RECIPES = ("pretrain", "sft", "lora", "qlora")
ENGINES = ("one GPU", "DDP", "FSDP2", "ZeRO-2", "ZeRO-3")
GB = 2**30

FOUR_BITS = 1 / 2 + 1 / 64 + 4 / 16384
"""Bytes of a number in NF4: half a byte, a byte for the scale of 64 of them, 4 bytes for the scale of 256 scales."""

MOMENTS, MOMENTS_8BIT = 8.0, 2 + 8 / 256
"""Bytes of both moments of a number: float32, or 8 bits with a float32 scale for 256 of them."""

DEEPSPEED_BUCKETS = 2 * 5 * 10**8 * 2
"""DeepSpeed's `reduce_bucket_size` and `allgather_bucket_size`, its defaults, of bfloat16 numbers."""

DEEPSPEED_LIVE = 10**9 * 2
"""DeepSpeed's `stage3_max_live_parameters`, its default, of bfloat16 numbers."""


class Weight(NamedTuple):
    """
    A parameter, and what it takes on a device that holds all of it.

    Args:
        name (`str`): its name; of a LoRA pair that of the weight it updates, with `lora_A` or `lora_B`.
        shape (`tuple[int, ...]`): its shape.
        stored (`float`): bytes a number of the weights.
        trained (`bool`, *optional*, defaults to `False`): whether it has a gradient and moments.
        moments (`float`, *optional*, defaults to 8): bytes a number of both moments, if trained.
    """

    name: str
    shape: tuple[int, ...]
    stored: float
    trained: bool = False
    moments: float = MOMENTS

    @property
    def numbers(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


class Held(NamedTuple):
    """
    Bytes that one device holds between steps, and what the engine adds within one.

    Args:
        weights, gradients, moments (`float`): of parameters; float32 master weights beside 16-bit ones are moments.
        buffers (`float`): of the engine.
    """

    weights: float
    gradients: float
    moments: float
    buffers: float


def count_weights(config: LibraConfig, recipe: str, adapter: AdapterArguments | None = None) -> list[Weight]:
    """
    The parameters of a model and how a recipe holds them.

    Args:
        config ([`LibraConfig`]): of the model.
        recipe (`str`): one of `RECIPES`.
        adapter ([`AdapterArguments`], *optional*): of the LoRA recipes; by default that of the shipped ones.

    Returns:
        `list` of [`Weight`]
    """
    with torch.device("meta"):
        model = LibraForCausalLM(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if recipe == "sft":
        return [Weight(name, shape, 4, trained=True) for name, shape in shapes.items()]
    if recipe == "pretrain":
        return [
            Weight(name, shape, 4, trained=True) if "vision" in name else Weight(name, shape, 2)
            for name, shape in shapes.items()
        ]
    adapter = adapter or AdapterArguments(lora_target="both", load_in_4bit=recipe == "qlora")
    return [*_frozen(model, shapes, adapter), *_adapted(model, adapter), *_whole(shapes, adapter)]


def _frozen(model: nn.Module, shapes: dict[str, tuple[int, ...]], adapter: AdapterArguments) -> Iterable[Weight]:
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, shape in shapes.items():
        kept = any(re.match(rf"(.*\.)?{part}", name) for part in NOT_QUANTIZED)
        in_4bit = adapter.load_in_4bit and name in linear and not kept
        yield Weight(name, shape, FOUR_BITS if in_4bit else 2)


def _adapted(model: nn.Module, adapter: AdapterArguments) -> Iterable[Weight]:
    stored, moments = (2, MOMENTS_8BIT) if adapter.load_in_4bit else (4, MOMENTS)
    for name, module in model.named_modules():
        if re.fullmatch(TARGETS[str(adapter.lora_target)], name):
            out_features, in_features = module.weight.shape
            yield Weight(f"{name}.lora_A", (adapter.lora_rank, in_features), stored, True, moments)
            yield Weight(f"{name}.lora_B", (out_features, adapter.lora_rank), stored, True, moments)


def _whole(shapes: dict[str, tuple[int, ...]], adapter: AdapterArguments) -> Iterable[Weight]:
    """Copies of the modules that are trained whole; the originals stay."""
    moments = MOMENTS_8BIT if adapter.load_in_4bit else MOMENTS
    for name, shape in shapes.items():
        if any(f".{part}." in f".{name}" for part in TRAINED_WHOLE[str(adapter.lora_target)] or ()):
            yield Weight(f"{name} (trained copy)", shape, 4, True, moments)


def held_by_device(weights: list[Weight], engine: str, devices: int) -> Held | None:
    """
    What the device that holds most has, with n devices:

    - one GPU: everything, and within a step what autocast makes of trained float32 weights, 2 bytes a number. DDP: the
      same, and gradients once more in the buckets that are sent.
    - FSDP2: of each parameter `ceil(rows / n)` of its rows, with gradient and moments. Within a step the weights in
      bfloat16 of what is gathered: twice the largest layer (in use, and the next), its gradients, the heads, and all that
      is in no layer. 4-bit weights are not shared out by accelerate, so there is no FSDP2 of `qlora`.
    - ZeRO-2 (Rajbhandari et al., 2020): weights in bfloat16 on each; 1/n of gradients in bfloat16 and of float32 master
      weights with moments (12 bytes). ZeRO-3: 1/n of the weights as well. Buffers are DeepSpeed's defaults.

    Args:
        weights (`list` of [`Weight`]): from [`count_weights`].
        engine (`str`): one of `ENGINES`.
        devices (`int`): how many.

    Returns:
        [`Held`] or `None`: None if the engine does not hold such weights, or not on this number of devices.
    """
    trained = [weight for weight in weights if weight.trained]
    in_4bit = any(weight.stored < 1 for weight in weights)
    if (engine == "one GPU") != (devices == 1) or (in_4bit and engine not in ("one GPU", "DDP")):
        return None
    if engine in ("one GPU", "DDP"):
        gradients = sum(weight.numbers * weight.stored for weight in trained)
        cast = 2 * sum(weight.numbers for weight in trained if weight.stored == 4)
        return Held(
            sum(weight.numbers * weight.stored for weight in weights),
            gradients,
            sum(weight.numbers * weight.moments for weight in trained),
            cast + (gradients if engine == "DDP" else 0),
        )
    if engine == "FSDP2":
        share = {weight: math.ceil(weight.shape[0] / devices) * math.prod(weight.shape[1:]) for weight in weights}
        return Held(
            sum(share[weight] * weight.stored for weight in weights),
            sum(share[weight] * weight.stored for weight in trained),
            sum(share[weight] * weight.moments for weight in trained),
            _gathered(weights),
        )
    numbers, frozen = sum(w.numbers for w in trained), sum(w.numbers for w in weights if not w.trained)
    shared = devices if engine == "ZeRO-3" else 1
    buffers = DEEPSPEED_BUCKETS + (DEEPSPEED_LIVE if engine == "ZeRO-3" else 0)
    return Held(2 * (numbers + frozen) / shared, 2 * numbers / devices, 12 * numbers / devices, buffers)


def _gathered(weights: list[Weight]) -> float:
    """Bytes of gathered weights and their gradients within a step of FSDP2, see [`held_by_device`]."""
    layers: dict[str, list[Weight]] = {}
    rest = []
    for weight in weights:
        layer = re.search(r"(language|vision)_model\.layers\.\d+|vision_model\.embedding|embed_tokens", weight.name)
        if layer is None:
            rest.append(weight)
        else:
            layers.setdefault(layer.group(), []).append(weight)
    largest = max(sum(weight.numbers for weight in layer) for layer in layers.values())
    gradients = max(sum(weight.numbers for weight in layer if weight.trained) for layer in layers.values())
    return 2 * (2 * largest + gradients + sum(weight.numbers for weight in rest))


def activation_bytes(
    config: LibraConfig, text: int, vision: int, supervised: int, checkpointing: bool, language_trained: bool
) -> float:
    """
    An estimate of what forward keeps for backward on one device, in bfloat16. With D hidden and I intermediate size:

    - a layer keeps of a text row `14 D + 5 I` numbers, `10 D + 4 I` if the language model is frozen, and of an image row
      `15 D + 5 I` (measured on small models with torch's hooks on saved tensors, and rounded up);
    - with activation checkpointing a layer keeps `D` of each row, its input, and one layer at a time the rest;
    - the text head keeps logits, softmax and gradient in float32 of as many rows as it takes at a time.

    Args:
        config ([`LibraConfig`]): of the model.
        text, vision (`int`): tokens of each modality in a batch, BOI and EOI among the latter, without padding.
        supervised (`int`): text tokens that are supervised.
        checkpointing (`bool`): activation checkpointing.
        language_trained (`bool`): whether the language model is trained.

    Returns:
        `float`: bytes.
    """
    sizes = config.text_config
    hidden, inner, layers = sizes.hidden_size, sizes.intermediate_size, sizes.num_hidden_layers
    text_row = 14 * hidden + 5 * inner if language_trained else 10 * hidden + 4 * inner
    layer = text * text_row + vision * (15 * hidden + 5 * inner)
    kept = layers * (text + vision) * hidden + layer if checkpointing else layers * layer
    logits = min(supervised * sizes.vocab_size, CHUNK_LOGITS)
    return 2 * kept + 3 * 4 * logits


def image_tokenizer_bytes(config: LibraImageTokenizerConfig) -> int:
    """
    Args:
        config ([`LibraImageTokenizerConfig`]): of the image tokenizer.

    Returns:
        `int`: its float32 weights, whole on each device whatever the engine.
    """
    with torch.device("meta"):
        model = LibraImageTokenizer(config)
    return sum(4 * weight.numel() for weight in model.state_dict().values())


def memory_table(config: LibraConfig, tokenizer: LibraImageTokenizerConfig, devices: Iterable[int]) -> str:
    """
    What each recipe takes with each engine.

    Args:
        config ([`LibraConfig`]): of the model.
        tokenizer ([`LibraImageTokenizerConfig`]): of its image tokenizer.
        devices (`Iterable` of `int`): numbers of devices.

    Returns:
        `str`: a table in Markdown, in units of 2^30 bytes a device; `total` has the image tokenizer, not activations.
    """
    images = image_tokenizer_bytes(tokenizer)
    lines = [
        "| recipe | engine | GPUs | weights | gradients | moments | buffers | total |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        weights = count_weights(config, recipe)
        for engine in ENGINES:
            for number in devices:
                held = held_by_device(weights, engine, number)
                if held is not None:
                    cells = [f"{part / GB:.1f}" for part in (*held, sum(held) + images)]
                    lines.append(f"| {recipe} | {engine} | {number} | {' | '.join(cells)} |")
    return "\n".join(lines)


SAMPLES = {"pretrain": (20, 64), "sft": (2, 1470)}
"""Samples of a batch of the shipped recipes, and text tokens beside their one image: those of a caption, or up to 2048."""


def activation_table(config: LibraConfig) -> str:
    """
    What the batches of the shipped recipes add.

    Args:
        config ([`LibraConfig`]): of the model.

    Returns:
        `str`: a table in Markdown, in units of 2^30 bytes.
    """
    lines = ["| recipe | batch | activations | with checkpointing |", "|---|---|---|---|"]
    for recipe, (samples, text) in SAMPLES.items():
        tokens = samples * text, samples * (config.num_patches + 2), samples * text
        plain, checkpointed = (
            activation_bytes(config, *tokens, checkpointing, language_trained=recipe == "sft") / GB
            for checkpointing in (False, True)
        )
        batch = f"{samples} x ({config.num_patches + 2} image + {text} text tokens)"
        lines.append(f"| {recipe} | {batch} | {plain:.1f} | {checkpointed:.1f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Prints both tables; `arguments` are those of the command line."""
    parser = argparse.ArgumentParser(description="Memory of training, counted from the configuration.")
    parser.add_argument("--model", help="Folder or Hub repo of a Libra; by default the sizes of the 11B release.")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64], help="Numbers of devices.")
    options = parser.parse_args(arguments)
    config, tokenizer = LibraConfig(), LibraImageTokenizerConfig()
    if options.model is not None:
        config = LibraConfig.from_pretrained(options.model)
        tokenizer = LibraImageTokenizerConfig.from_pretrained(options.model, subfolder="image_tokenizer")
    numbers = sum(weight.numbers for weight in count_weights(config, "sft"))
    print(f"{numbers:,} parameters, and an image tokenizer of {image_tokenizer_bytes(tokenizer) / GB:.1f} GB.\n")
    print(f"{memory_table(config, tokenizer, options.devices)}\n\n{activation_table(config)}")


if __name__ == "__main__":
    main()
