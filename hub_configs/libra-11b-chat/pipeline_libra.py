"""The image-to-text pipeline: images in, captions (or answers to one question) out.

A Hub repository of Libra names this class under `custom_pipelines` in its `config.json`, so that
`pipeline("image-to-text", model=..., trust_remote_code=True)` finds it.
"""

import os
from typing import Any

import torch
from transformers import Pipeline

DEFAULT_MAX_NEW_TOKENS = 256
"""Longest text where neither the caller nor `generation_config.json` sets a limit."""


class LibraImageToTextPipeline(Pipeline):
    """
    Captions images, or answers one question about each of them.

    Without a prompt the image is captioned as the repository's processor says: with the chat prompt
    `processor.caption_prompt` if it has one, otherwise in the layout of pretraining (begin of sequence, image, newline).

    Unless the caller or `generation_config.json` says otherwise, up to 256 tokens are generated.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> captioner = pipeline("image-to-text", model=path, trust_remote_code=True)
    >>> captioner("horse.png")
    [{'generated_text': 'horse'}]
    >>> captioner(["horse.png", "key.png"], batch_size=2, prompt="What is in the image?")
    ```"""

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError(
                "The image-to-text pipeline of Libra needs the processor: pass `processor=AutoProcessor.from_pretrained"
                "(path, trust_remote_code=True)`, or the path itself as `model`."
            )
        self.tokenizer.padding_side = "left"  # generation goes on at the right end of every row
        self.processor.image_tokenizer.to(self.device)

    def __call__(self, inputs: Any, **kwargs) -> list:
        """
        Args:
            inputs (`str`, `PIL.Image.Image`, or a `list` of these):
                A path, an http(s) URL, a base64 string or an image; or several.
            prompt (`str`, *optional*):
                Question about each image, asked in the chat template.
            max_new_tokens (`int`, *optional*):
                Most tokens to write.
            generate_kwargs (`dict`, *optional*):
                Passed to `generate()`.
            batch_size (`int`, *optional*, defaults to 1):
                Images per forward pass.

        Returns:
            `list` of `dict`: `[{"generated_text": ...}]`, one entry per returned sequence. For a list of images, a
            `list` of such lists.

        Raises:
            ValueError: for images that cannot be read, an empty list, or an empty prompt.
            TypeError: for inputs that are not images.
        """
        if isinstance(inputs, (list, tuple)):
            if not inputs:
                raise ValueError("The image-to-text pipeline got an empty list; pass at least one image.")
            inputs = list(inputs)
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, prompt=None, max_new_tokens=None, generate_kwargs=None):
        preprocess_params, forward_params = {}, {}
        if prompt is not None:
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(
                    f"prompt must be a question or an instruction, found {prompt!r}; leave it out to caption."
                )
            preprocess_params["prompt"] = prompt
        if generate_kwargs is not None:
            forward_params["generate_kwargs"] = dict(generate_kwargs)
        if max_new_tokens is not None:
            generate_kwargs = forward_params.setdefault("generate_kwargs", {})
            if "max_new_tokens" in generate_kwargs:
                raise ValueError("max_new_tokens is given twice, also in generate_kwargs; give it once.")
            generate_kwargs["max_new_tokens"] = max_new_tokens
        return preprocess_params, forward_params, {}

    def preprocess(self, image: Any, prompt: str | None = None) -> dict[str, torch.Tensor]:
        """
        Args:
            image (`str` or `PIL.Image.Image`): one image.
            prompt (`str`, *optional*, defaults to `processor.caption_prompt`): question about it.

        Returns:
            `dict`: `input_ids`, `attention_mask` of shape `(1, length)`, and `image_features` of shape
            `(1, patches, feature_size)`.
        """
        prompt = prompt if prompt is not None else self.processor.caption_prompt
        if prompt is None:
            return dict(self.processor(images=image, return_tensors="pt"))
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return dict(self.processor(text=text, images=image, add_special_tokens=False, return_tensors="pt"))

    def _forward(self, model_inputs, generate_kwargs=None):
        rows, prompt_length = model_inputs["input_ids"].shape
        options = self._generate_defaults() | (generate_kwargs or {}) | {"return_dict_in_generate": False}
        ids = self.model.generate(**model_inputs, **options)  # (rows * sequences, length)
        # One entry per image on the first dimension, which is where the pipeline takes a batch apart.
        return {"generated_ids": ids[:, prompt_length:].unflatten(0, (rows, -1))}

    def _generate_defaults(self) -> dict[str, Any]:
        """What the model's generation configuration leaves open."""
        settings = self.model.generation_config
        defaults = {}
        if settings.max_new_tokens is None:
            defaults["max_new_tokens"] = DEFAULT_MAX_NEW_TOKENS
        if settings.pad_token_id is None:
            defaults["pad_token_id"] = self.tokenizer.pad_token_id
        return defaults

    def postprocess(self, model_outputs: dict[str, torch.Tensor]) -> list[dict[str, str]]:
        """
        Args:
            model_outputs (`dict`): `generated_ids` of shape `(1, sequences, new tokens)`.

        Returns:
            `list` of `dict`: `{"generated_text": ...}` for each sequence.
        """
        texts = self.processor.batch_decode(model_outputs["generated_ids"].flatten(0, 1), skip_special_tokens=True)
        return [{"generated_text": text.strip()} for text in texts]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        Saves model and processor. The base class would save parts of the processor, from which it cannot be loaded.

        Args:
            save_directory (`str` or `os.PathLike`): where to.
            kwargs: passed to the model's `save_pretrained`.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


__all__ = ["LibraImageToTextPipeline"]
