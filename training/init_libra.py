"""A fresh Libra from a pretrained language model and a trained image tokenizer: where stage 1 (pretraining) starts.

The language model is taken over unchanged. The vision system is new: every low-rank pair starts with the spread of the
dense matrix it stands for, and the bridge's second factor starts at zero, so at step 0 text reads images through plain
keys and values.
"""

import os

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from modeling_libra import LibraConfig, LibraForCausalLM
from processing.image_processing_libra import LibraImageProcessor
from processing.modeling_libra_image_tokenizer import LibraImageTokenizer
from processing.processing_libra import LibraProcessor


def libra_from_language_model(
    language_model: PreTrainedModel, image_tokenizer: LibraImageTokenizer
) -> LibraForCausalLM:
    """
    Puts a fresh vision system on a language model.

    Args:
        language_model (`PreTrainedModel`): a causal language model with a `model` and an `lm_head`, of a family
            [`LibraConfig`] supports. Its weights are copied.
        image_tokenizer ([`LibraImageTokenizer`]): gives grid, codebooks and feature width.

    Returns:
        [`LibraForCausalLM`] in the dtype of the language model.

    Raises:
        ValueError: if the language model is of a family that Libra cannot route.
    """
    sizes = image_tokenizer.config
    config = LibraConfig(
        text_config=language_model.config.to_dict(),
        image_grid=sizes.grid,
        num_codebooks=sizes.num_codebooks,
        codebook_size=sizes.codebook_size,
        feature_size=sizes.feature_size,
        dtype=language_model.dtype,
    )
    model = LibraForCausalLM(config).to(language_model.dtype)
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    model.generation_config = language_model.generation_config
    return model


def init_libra(
    language_model: str | os.PathLike, image_tokenizer: str | os.PathLike
) -> tuple[LibraForCausalLM, LibraProcessor]:
    """
    Builds model and processor from two folders (or Hub repos).

    Args:
        language_model (`str` or `os.PathLike`): a plain causal language model with its tokenizer.
        image_tokenizer (`str` or `os.PathLike`): a [`LibraImageTokenizer`] with its image processor.

    Returns:
        `tuple` of [`LibraForCausalLM`] and [`LibraProcessor`].
    """
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    vision = LibraImageTokenizer.from_pretrained(image_tokenizer)
    text_model = AutoModelForCausalLM.from_pretrained(language_model)
    tokenizer.model_max_length = text_model.config.max_position_embeddings  # longer prompts are refused, not cut
    processor = LibraProcessor(
        image_processor=LibraImageProcessor.from_pretrained(image_tokenizer),
        tokenizer=tokenizer,
        image_tokenizer=vision,
        text_vocab_size=text_model.config.vocab_size,
    )
    return libra_from_language_model(text_model, vision), processor
