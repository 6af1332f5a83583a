"""Memory that answering takes, counted from the configuration: nothing is loaded and nothing is run.

    python -m training.inference_memory                     # Libra-11B
    python -m training.inference_memory --model LIBRA       # the sizes of another model

What is counted, for one row of a batch whose prompt fills the context but for what is written:

- weights, of what [`~libra_cli.quantization.NOT_QUANTIZED`] does not name in 8 bits (and a 16-bit scale for each row) or
  4 bits, of all else in the dtype of the column;
- the image tokenizer in float32, as the processor loads it, whole;
- the cache: keys and values of the language view, and `2 * bridge_rank` latents, for each token and layer, and 8 bytes for
  each token;
- an estimate of the peak of a prefill beside the cache: residual, normed input, three inner activations of the MLP for each
  token. Quantized matrices are turned into 16 bits one at a time: the largest is added.
"""

import argparse
import re
from collections.abc import Iterable

import torch

from libra_cli.quantization import NOT_QUANTIZED
from modeling_libra import LibraConfig, LibraForCausalLM
from processing.configuration_libra_image_tokenizer import LibraImageTokenizerConfig

from .memory import FOUR_BITS, image_tokenizer_bytes

FORMS = {"float32": 4, "bfloat16": 2, "int8": 2, "nf4": 2}
"""Forms of weights, and bytes of a number that is not quantized, of the cache and of activations."""

CONTEXTS = (1024, 2048)


def weight_bytes(config: LibraConfig, form: str) -> float:
    """
    Bytes of the weights.

    Args:
        config ([`LibraConfig`]): of the model.
        form (`str`): one of `FORMS`.

    Returns:
        `float`
    """
    plain = FORMS[form]
    total = 0.0
    for name, weight in _weights(config):
        if form in ("float32", "bfloat16") or not _is_quantized(name):
            total += plain * weight.numel()
        elif form == "int8":
            total += weight.numel() + plain * weight.shape[0]
        else:
            total += FOUR_BITS * weight.numel()
    return total


def cache_bytes(config: LibraConfig, form: str, tokens: int) -> int:
    """
    Bytes of the cache of one row.

    Args:
        config ([`LibraConfig`]): of the model.
        form (`str`): one of `FORMS`.
        tokens (`int`): in the cache, of either modality.

    Returns:
        `int`
    """
    sizes = config.text_config
    width = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
    kinds = len(set(getattr(sizes, "layer_types", None) or ["full"]))
    a_layer = 2 * (sizes.num_key_value_heads * width + config.bridge_rank)
    return tokens * (FORMS[form] * sizes.num_hidden_layers * a_layer + 2 * 4 * kinds)


def prefill_bytes(config: LibraConfig, form: str, tokens: int) -> int:
    """
    An estimate of what a prefill of one row holds beside weights and cache at its peak.

    Args:
        config ([`LibraConfig`]): of the model.
        form (`str`): one of `FORMS`.
        tokens (`int`): of the prompt.

    Returns:
        `int`: bytes.
    """
    sizes = config.text_config
    activations = FORMS[form] * tokens * (2 * sizes.hidden_size + 3 * sizes.intermediate_size)
    quantized = (weight.numel() for name, weight in _weights(config) if _is_quantized(name))
    return activations + (2 * max(quantized) if form in ("int8", "nf4") else 0)


def _weights(config: LibraConfig) -> Iterable[tuple[str, torch.Tensor]]:
    with torch.device("meta"):
        return list(LibraForCausalLM(config).named_parameters())


def _is_quantized(name: str) -> bool:
    """Whether a parameter is the weight of a linear map of a layer that no pattern names."""
    kept = any(re.match(rf"(?:{part})(\.|$)", name) for part in NOT_QUANTIZED)
    return ".layers." in name and name.endswith(("_proj.weight", "_proj.A.weight", "_proj.B.weight")) and not kept


def inference_table(config: LibraConfig, tokenizer: LibraImageTokenizerConfig, contexts: Iterable[int]) -> str:
    """
    What answering takes.

    Args:
        config ([`LibraConfig`]): of the model.
        tokenizer ([`LibraImageTokenizerConfig`]): of its image tokenizer.
        contexts (`Iterable` of `int`): tokens of a row, images included.

    Returns:
        `str`: a table in Markdown, in units of 10^9 bytes, as model cards have them.
    """
    images = image_tokenizer_bytes(tokenizer)
    lines = [
        "| weights | context | weights | image tokenizer | cache | prefill | total |",
        "|---|---|---|---|---|---|---|",
    ]
    for form in FORMS:
        weights = weight_bytes(config, form)
        for tokens in contexts:
            parts = [weights, images, cache_bytes(config, form, tokens), prefill_bytes(config, form, tokens)]
            cells = " | ".join(f"{part / 1e9:.2f}" for part in (*parts, sum(parts)))
            lines.append(f"| {form} | {tokens} | {cells} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table; `arguments` are those of the command line."""
    parser = argparse.ArgumentParser(description="Memory of answering, counted from the configuration.")
    parser.add_argument("--model", help="Folder or Hub repo of a Libra; by default the sizes of the 11B release.")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="Tokens of a row, images included.")
    options = parser.parse_args(arguments)
    config, tokenizer = LibraConfig(), LibraImageTokenizerConfig()
    if options.model is not None:
        config = LibraConfig.from_pretrained(options.model)
        tokenizer = LibraImageTokenizerConfig.from_pretrained(options.model, subfolder="image_tokenizer")
    print(inference_table(config, tokenizer, options.contexts))


if __name__ == "__main__":
    main()
