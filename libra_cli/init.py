"""A fresh Libra from a plain language model and a CLIP: where pretraining starts.

The language model is taken over unchanged, so text in and text out is its own, bit for bit. The vision system is new:
see [`~modeling_libra.routing_libra.LowRankLinear`] for how it starts. Configurations, tokenizer, newline and CLIP are
checked before the language model is opened, and its names and shapes before any of its weights is read.
"""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from modeling_libra import LibraConfig, LibraForCausalLM
from modeling_libra.configuration_libra import SUPPORTED_TEXT_MODELS
from modeling_libra.vision_system_libra import fresh_vision_system
from processing.chat_template_libra import IMAGE_TOKEN
from processing.configuration_libra_image_tokenizer import LibraImageTokenizerConfig
from processing.image_processing_libra import LibraImageProcessor
from processing.modeling_libra_image_tokenizer import LibraImageTokenizer
from processing.processing_libra import LibraProcessor

from .cards import model_card
from .export import IMAGE_TOKENIZER_FOLDER, check_destination, export_repo
from .loading import check_loaded, check_path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
CLIP_MODELS = ("clip", "clip_vision_model")
TRAINED_MODELS = (LibraImageTokenizerConfig.model_type, LibraConfig.model_type)
FREE_FIELDS = ("expert_down_ratio", "bridge_rank", "use_bridge", "use_expert", "use_continuous_features")
"""Fields of a [`LibraConfig`] that are free; the others follow from language model and image tokenizer."""

DESCRIPTION = (
    'A fresh Libra (Xu et al., "Libra: Building Decoupled Vision System on Large Language Models", ICML 2024): a '
    "language model with a vision system that is still to be trained. It writes text as its language model does, and "
    "cannot see yet."
)


def init_libra(
    language_model: str | os.PathLike,
    clip: str | os.PathLike,
    seed: int = 0,
    vision_fields: dict[str, Any] | None = None,
    **tokenizer_fields: Any,
) -> tuple[LibraForCausalLM, LibraProcessor]:
    """
    Puts a fresh vision system on a language model.

    Args:
        language_model (`str` or `os.PathLike`):
            Folder or Hub id of a plain causal language model with its tokenizer: Llama, Mistral, Qwen2 or Qwen3, in
            safetensors, not quantized. Its dtype is the model's.
        clip (`str` or `os.PathLike`):
            Folder or Hub id of a CLIP (whole, or its vision encoder) with its image processor: a fresh image tokenizer
            is put around it, which must be trained before pretraining. Or of a trained image tokenizer, or of a Libra,
            whose image tokenizer is then used as it is.
        seed (`int`, *optional*, defaults to 0):
            Of the new parameters. The caller's random state is left alone.
        vision_fields (`dict`, *optional*):
            Fields of the [`LibraConfig`] that are free, such as `bridge_rank`; by default those of the release.
        tokenizer_fields:
            Fields of a fresh image tokenizer, such as `select_layers`; by default those of the release, in proportion to
            the CLIP (see [`~LibraImageTokenizerConfig.for_clip`]).

    Returns:
        `tuple` of [`LibraForCausalLM`] in evaluation mode and [`LibraProcessor`].

    Raises:
        ValueError: if one of the parts cannot be used; the message says which, why, and what is expected.
        OSError: if files are missing, or the Hub cannot be reached.
    """
    vision_fields = vision_fields or {}
    unknown = sorted(vision_fields.keys() - set(FREE_FIELDS))
    if unknown:
        raise ValueError(f"{', '.join(unknown)} cannot be chosen for a vision system: only {', '.join(FREE_FIELDS)}.")
    text_config = read_text_config(language_model)
    tokenizer = load_text_tokenizer(language_model, text_config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        image_processor, image_tokenizer = load_image_tokenizer(clip, **tokenizer_fields)
        processor = LibraProcessor(image_processor, tokenizer, image_tokenizer, text_config.vocab_size)
        sizes = image_tokenizer.config
        config = LibraConfig(
            text_config=text_config,
            image_grid=sizes.grid,
            num_codebooks=sizes.num_codebooks,
            codebook_size=sizes.codebook_size,
            feature_size=sizes.feature_size,
            newline_token_id=find_newline(processor),
            dtype=text_config.dtype,
            **vision_fields,
        )
        return fresh_vision_system(language_model, config), processor


def init_repo(
    language_model: str | os.PathLike,
    clip: str | os.PathLike,
    dst: str | os.PathLike,
    seed: int = 0,
    card: str | None = None,
    **tokenizer_fields: Any,
) -> Path:
    """
    Writes a fresh Libra as a complete repository for the Hub.

    Args:
        language_model, clip, seed, tokenizer_fields: as in [`init_libra`].
        dst (`str` or `os.PathLike`): a folder that does not exist yet, or is empty.
        card (`str`, *optional*): the model card; by default a minimal one.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: if `dst` is in use, and as in [`init_libra`]. Nothing is left behind then.
        OSError: as in [`init_libra`].
    """
    check_destination(dst)
    model, processor = init_libra(language_model, clip, seed, **tokenizer_fields)
    if card is None:
        on_hub = [str(part) for part in (language_model, clip) if not Path(part).exists()]
        card = model_card(Path(dst).resolve().name, DESCRIPTION, **({"base_model": on_hub} if on_hub else {}))
    return export_repo(model, processor, dst, card)


def read_text_config(language_model: str | os.PathLike) -> PreTrainedConfig:
    """
    The configuration of a language model that Libra can be put on.

    Args:
        language_model (`str` or `os.PathLike`): folder or Hub id.

    Returns:
        `PreTrainedConfig`

    Raises:
        ValueError: if it is of another family, or quantized.
        OSError: if it has no configuration.
    """
    kind = _model_type(language_model)
    if kind not in SUPPORTED_TEXT_MODELS:
        raise ValueError(
            f"{language_model} is of model type {kind!r}; a plain language model of type "
            f"{', '.join(SUPPORTED_TEXT_MODELS)} is expected."
        )
    text_config = AutoConfig.from_pretrained(language_model)
    if getattr(text_config, "quantization_config", None) is not None:
        raise ValueError(f"{language_model} is quantized; use the repository with its full weights.")
    text_config.name_or_path = ""  # where it was read from is not part of the new model
    text_config.use_cache = True  # transformers' Trainer leaves False in what it has trained
    return text_config


def load_text_tokenizer(language_model: str | os.PathLike, text_config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a language model, with the context of the model as its limit and without a chat template of its own:
    the processor brings Libra's.

    Args:
        language_model (`str` or `os.PathLike`): folder or Hub id.
        text_config (`PreTrainedConfig`): of the same model.

    Returns:
        `PreTrainedTokenizerBase`

    Raises:
        ValueError: if there is none, or none that ends a text.
    """
    if not any(
        cached_file(language_model, name, _raise_exceptions_for_missing_entries=False) for name in TOKENIZER_FILES
    ):
        raise ValueError(f"{language_model} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}.")
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    if getattr(tokenizer, "legacy", False):  # would put a space before the newline after an image; text is read alike
        tokenizer = AutoTokenizer.from_pretrained(language_model, legacy=False)
    if tokenizer.eos_token is None:
        raise ValueError(
            f"The tokenizer of {language_model} has no end-of-sequence token, which ends every caption and answer. Set "
            "eos_token in its tokenizer_config.json."
        )
    tokenizer.model_max_length = text_config.max_position_embeddings  # longer prompts are refused, not cut
    tokenizer.chat_template = None
    return tokenizer


def load_image_tokenizer(clip: str | os.PathLike, **fields: Any) -> tuple[LibraImageProcessor, LibraImageTokenizer]:
    """
    A fresh image tokenizer around a CLIP, or a trained one.

    Args:
        clip (`str` or `os.PathLike`): folder or Hub id of a CLIP, of an image tokenizer, or of a Libra.
        fields: fields of a fresh image tokenizer.

    Returns:
        `tuple` of [`LibraImageProcessor`] and [`LibraImageTokenizer`] in evaluation mode.

    Raises:
        ValueError: if it is none of them, its weights are not whole, its images are not a square of whole patches, or
            `fields` would change a trained one.
        OSError: if files are missing.
    """
    kind = _model_type(clip)
    if kind not in (*CLIP_MODELS, *TRAINED_MODELS):
        raise ValueError(
            f"{clip} is of model type {kind!r}; a CLIP ({', '.join(CLIP_MODELS)}) or a trained image tokenizer "
            f"({', '.join(TRAINED_MODELS)}) is expected."
        )
    try:
        image_processor = LibraImageProcessor.from_pretrained(clip)
    except OSError as error:
        raise OSError(f"{clip} has no image processor (preprocessor_config.json): {error}") from error
    if kind in CLIP_MODELS:
        return image_processor, _fresh_image_tokenizer(clip, **fields)
    if fields:
        raise ValueError(f"{', '.join(fields)} cannot be chosen: the image tokenizer of {clip} is trained already.")
    subfolder = IMAGE_TOKENIZER_FOLDER if kind == LibraConfig.model_type else ""
    model, report = LibraImageTokenizer.from_pretrained(clip, subfolder=subfolder, output_loading_info=True)
    check_loaded(clip, report)
    return image_processor, model


def _fresh_image_tokenizer(clip: str | os.PathLike, **fields: Any) -> LibraImageTokenizer:
    LibraImageTokenizerConfig.for_clip(CLIPVisionConfig.from_pretrained(clip).to_dict(), **fields)  # checks the sizes
    encoder, report = CLIPVisionModel.from_pretrained(clip, output_loading_info=True)
    check_loaded(clip, report, may_hold_more=True)  # a whole CLIP has a text encoder besides
    return LibraImageTokenizer.from_clip(encoder, **fields).eval()


def has_trained_image_tokenizer(clip: str | os.PathLike) -> bool:
    """Whether a folder or Hub repo brings an image tokenizer, and is not a CLIP alone."""
    return _model_type(clip) in TRAINED_MODELS


def find_newline(processor: LibraProcessor) -> int:
    """
    The id of the newline that follows every image: Libra forces it there, and prompts must have the same one.

    Args:
        processor ([`LibraProcessor`]): its tokenizer is asked.

    Returns:
        `int`: a text id.

    Raises:
        ValueError: if a newline after an image is not one token of its own.
    """
    tokenizer = processor.tokenizer
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]  # last: Llama's puts a space before
    for text in ("\n", "\nA", f"\n{tokenizer.eos_token}"):
        ids = tokenizer(IMAGE_TOKEN + text, add_special_tokens=False)["input_ids"]
        after = ids[ids.index(processor.image_token_id) + 1 :]
        if after[0] != newline or tokenizer.decode([newline]) != "\n" or (text == "\n" and len(after) > 1):
            raise ValueError(
                f"The tokenizer reads {IMAGE_TOKEN + text!r} as an image and {tokenizer.convert_ids_to_tokens(after)}. "
                "Libra forces a newline after every image, which must be one token of its own: use a language model "
                "whose tokenizer has one, as those of Llama and Qwen."
            )
    return newline


def _model_type(path: str | os.PathLike) -> str | None:
    """What the configuration of a folder or Hub repo says it is."""
    check_path(path)
    try:
        return PreTrainedConfig.get_config_dict(path)[0].get("model_type")
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error}") from error
