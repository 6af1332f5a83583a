"""Processor of Libra, the unified tokenizer of the paper: text and images in, one sequence of ids out, and back.

All ids are in one flat space. Text ids are in [0, V); the codes (c1, c2) of an image patch are the one id
V + c1 * codebook_size + c2; BOI and EOI, the ids after the last code, enclose the patches of an image. With
`num_codebooks` codebooks a code is read as a number of that many digits.
"""

import copy
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AddedToken, AutoTokenizer, PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .chat_template_libra import CHAT_TEMPLATE, IMAGE_TOKEN
from .image_processing_libra import LibraImageProcessor
from .modeling_libra_image_tokenizer import DECODE_BATCH_SIZE, LibraImageTokenizer

IMAGE_PLACE = re.compile(r"(\s*)" + re.escape(IMAGE_TOKEN))
"""A place for an image in text; the token swallows the white space before it."""

IMAGE_TOKENIZER_FOLDER = "image_tokenizer"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
NO_LENGTH_LIMIT = int(1e9)
"""Tokenizers without a limit say so with an absurdly large one."""


class LibraProcessor(ProcessorMixin):
    r"""
    Processor of Libra: an image processor, a text tokenizer and an image tokenizer behind one interface.

    Args:
        image_processor ([`LibraImageProcessor`]): Makes pixels of images.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer of the language model. Gets the token `<image>`, left padding, and a padding token if it has
            none (the unknown token, as in the release, or else the end-of-sequence token).
        image_tokenizer ([`LibraImageTokenizer`]):
            Makes codes and features of pixels, and pixels of codes. Move it to an accelerator with
            `processor.image_tokenizer.to(device)`.
        text_vocab_size (`int`, *optional*, defaults to the size of the tokenizer without `<image>`):
            V, the vocabulary size of the language model: the id of the first image code.
        chat_template (`str`, *optional*, defaults to the release's): Jinja chat template.
        caption_prompt (`str`, *optional*):
            What to ask a chat model for a caption. Without it images are captioned as in pretraining.

    Raises:
        `ValueError`: If the parts do not fit together; the message says which and how.

    Example:

    ```python
    >>> inputs = processor(text="<image>\nA photo of", images="photo.jpg", return_tensors="pt")
    >>> inputs = processor(text="A red circle.", generation_mode="image", return_tensors="pt")  # ends in BOI
    >>> processor.batch_decode(ids)  # an image reads as <image>
    >>> processor.post_process_multimodal_output(ids, generation_mode="image")  # PIL images
    ```
    """

    def __init__(
        self,
        image_processor,
        tokenizer,
        image_tokenizer,
        text_vocab_size=None,
        chat_template=None,
        caption_prompt=None,
    ):
        self.text_vocab_size = _prepare_tokenizer(tokenizer, text_vocab_size)
        self.image_token = IMAGE_TOKEN
        self.caption_prompt = caption_prompt
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.image_tokenizer = image_tokenizer
        expected = image_tokenizer.config.vision_config.image_size
        crop = dict(image_processor.crop_size)
        if crop != {"height": expected, "width": expected}:
            raise ValueError(
                f"The image tokenizer reads {expected} x {expected} pixels, but the image processor makes {crop}."
            )

    # ---- ids ----

    @property
    def image_token_id(self) -> int:
        """`int`: Id of `<image>` in the text tokenizer; never part of what the model sees."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    @property
    def codebook_size(self) -> int:
        """`int`: Entries of each codebook."""
        return self.image_tokenizer.config.codebook_size

    @property
    def num_codebooks(self) -> int:
        """`int`: Codes per patch."""
        return self.image_tokenizer.config.num_codebooks

    @property
    def image_grid(self) -> int:
        """`int`: Patches per side of an image."""
        return self.image_tokenizer.config.grid

    @property
    def num_image_tokens(self) -> int:
        """`int`: Ids an image takes: its patches, BOI and EOI."""
        return self.image_grid**2 + 2

    @property
    def boi_token_id(self) -> int:
        """`int`: Id that begins an image."""
        return self.text_vocab_size + self.codebook_size**self.num_codebooks

    @property
    def eoi_token_id(self) -> int:
        """`int`: Id that ends an image."""
        return self.boi_token_id + 1

    @property
    def model_input_names(self) -> list[str]:
        """`list[str]`: What the model takes from this processor."""
        return ["input_ids", "attention_mask", "image_features"]

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Flat ids (...) of codes (..., num_codebooks)."""
        digits = self.codebook_size ** torch.arange(self.num_codebooks - 1, -1, -1, device=codes.device)
        return self.text_vocab_size + (codes * digits).sum(dim=-1)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """Codes (..., num_codebooks) of flat ids (...) of image patches."""
        digits = self.codebook_size ** torch.arange(self.num_codebooks - 1, -1, -1, device=ids.device)
        return (ids - self.text_vocab_size)[..., None] // digits % self.codebook_size

    # ---- text and images in ----

    def __call__(
        self,
        images=None,
        text: str | list[str] | None = None,
        videos: None = None,
        audio: None = None,
        generation_mode: str = "text",
        tokenize_images: bool = True,
        image_rows: int | None = None,
        **kwargs,
    ) -> BatchFeature:
        r"""
        Ids and image features of text and images.

        Args:
            images (image, `list` of images or `list` of `list`s of images, *optional*):
                Whatever [`LibraImageProcessor`] reads. A nested list has one inner list, possibly empty, for each text;
                a flat list is distributed over the places in reading order.
            text (`str` or `list[str]`, *optional*):
                Texts with one `<image>` for each image. Without text, each image (each inner list of images) becomes
                a row `<image>\n`, the beginning of a caption in pretraining.
            videos (`None`): Not supported, here for callers that pass every modality.
            audio (`None`): Not supported, here for callers that pass every modality.
            generation_mode (`str`, *optional*, defaults to `"text"`):
                `"image"` appends BOI to every row: the model goes on with an image.
            tokenize_images (`bool`, *optional*, defaults to `True`):
                `False` stops at `pixel_values`: every code in `input_ids` is a placeholder until
                [`~LibraProcessor.tokenize_images`] is called on the batch.
            image_rows (`int`, *optional*):
                With `generation_mode="image"`, how many of the `image_grid` rows of patches are given: every row of ids
                ends in BOI and the codes of these, and the model completes the image (Section 4.3). `images` are those
                to complete, one for each text; the texts, if there are any, come before and hold no `<image>`. An image
                that is written has no features, so none are returned.
            kwargs: Options of the tokenizer (`padding`, `padding_side`, `truncation`, `max_length`, `return_tensors`,
                `add_special_tokens`, ...). `padding` defaults to `True` when `return_tensors` is set.

        Returns:
            `BatchFeature`:
                - **input_ids** (batch, length): flat ids, int64.
                - **attention_mask** (batch, length): 0 on padding.
                - **image_features** (images, patches, feature_size): float32, images in reading order over the batch.
                  Only if there are images.
                - **pixel_values** (images, 3, height, width): instead, with `tokenize_images=False`.

        Raises:
            `ValueError`: If images and places do not match, an image cannot be read, a row is longer than the context
                of the tokenizer, truncation would cut into an image, or `image_rows` does not fit the rest. The message
                names the row.
        """
        if videos is not None or audio is not None:
            raise ValueError("Libra reads text and images; pass neither `videos` nor `audio`.")
        if generation_mode not in ("text", "image"):
            raise ValueError(f"generation_mode must be 'text' or 'image', got {generation_mode!r}.")
        if image_rows is not None:
            if generation_mode != "image" or not tokenize_images:
                raise ValueError("image_rows needs generation_mode='image' and tokenize_images=True.")
            return self._begin_images(images, text, image_rows, kwargs)
        images, per_row = _flatten_images(images)
        rows = _make_rows(text, len(images), per_row)
        _check_places(rows, len(images), per_row)
        if generation_mode == "image":
            rows = [row.rstrip(" ") for row in rows]  # an image swallows the spaces before it
        kwargs = self._complete_options(rows, kwargs)
        batch = super().__call__(images=images or None, text=list(rows), **kwargs)
        self._check_images_are_whole(batch, rows)
        if generation_mode == "image":
            self._append_boi(batch)
        self._check_length(batch)
        codes = None
        if images and tokenize_images:
            codes, features = self._encode(batch.pop("pixel_values"))
            batch["image_features"] = features if torch.is_tensor(batch["input_ids"]) else features.cpu().numpy()
        self._fill_places(batch, rows, codes)
        if torch.is_tensor(batch.get("offset_mapping")):  # each is read to find a chat's answers: slow in tensors
            batch["offset_mapping"] = batch["offset_mapping"].tolist()
        return batch

    def tokenize_images(self, batch: dict[str, Any]) -> BatchFeature:
        """Turns the `pixel_values` of a batch made with `tokenize_images=False` into codes and features.

        Runs on the device of the image tokenizer, a few images at a time.

        Args:
            batch (`dict` or `BatchFeature`):
                Has the tensors `input_ids` (batch, length) and, if there are images, `pixel_values`
                (images, 3, height, width). If it has `labels`, the codes are filled in there too, except at -100.

        Returns:
            `BatchFeature`: A new batch with all codes in `input_ids`, and `image_features` instead of `pixel_values`.

        Raises:
            `ValueError`: If the images in `input_ids` are not as many as those in `pixel_values`.
        """
        batch = BatchFeature(dict(batch))
        if "pixel_values" not in batch:
            return batch
        pixel_values = batch.pop("pixel_values")
        input_ids = batch["input_ids"].clone()  # (batch, length)
        ends = (input_ids == self.eoi_token_id).nonzero().tolist()  # (row, position) of every EOI
        if len(ends) != len(pixel_values):
            raise ValueError(f"input_ids hold {len(ends)} images, but pixel_values {len(pixel_values)}.")
        labels = batch["labels"].clone() if "labels" in batch else None
        codes, features = self._encode(pixel_values)
        for ids, (row, end) in zip(self.codes_to_ids(codes).to(input_ids.device), ends):
            place = slice(end - len(ids), end)
            input_ids[row, place] = ids
            if labels is not None:
                labels[row, place] = torch.where(labels[row, place] == -100, -100, ids.to(labels.device))
        batch["input_ids"] = input_ids
        batch["image_features"] = features.to(input_ids.device)
        if labels is not None:
            batch["labels"] = labels
        return batch

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The `<image>` tokens that hold the places of an image's ids."""
        return IMAGE_TOKEN * self.num_image_tokens

    def get_text_with_replacements(self, text: list[str], images_replacements=(), *args, **kwargs):
        """Expands every `<image>`; one token more for every newline that it swallows, which is put back later."""
        newlines = [place.group(1).count("\n") for row in text for place in IMAGE_PLACE.finditer(row)]
        expanded = [IMAGE_TOKEN * count + image for count, image in zip(newlines, images_replacements)]
        return super().get_text_with_replacements(text, expanded, *args, **kwargs)

    def _check_special_mm_tokens(self, *args, **kwargs):
        """Left to `_check_images_are_whole`, which names the row."""

    def _complete_options(self, rows: list[str], kwargs: dict[str, Any]) -> dict[str, Any]:
        options = {**kwargs.get("text_kwargs", {}), **kwargs}
        if options.get("return_tensors") is not None and "padding" not in options:
            kwargs = {**kwargs, "padding": True}
        bos = self.tokenizer.bos_token
        if bos and options.get("add_special_tokens", True):
            have_bos = [row.startswith(bos) for row in rows]
            if any(have_bos) and not all(have_bos):
                raise ValueError(f"Rows {np.flatnonzero(have_bos).tolist()} begin with {bos!r}, the others do not.")
            if any(have_bos):  # a rendered chat template: the tokenizer must not add a second one
                kwargs = {**kwargs, "add_special_tokens": False}
        return kwargs

    def _check_images_are_whole(self, batch: BatchFeature, rows: list[str]):
        for index, (ids, row) in enumerate(zip(_as_lists(batch["input_ids"]), rows)):
            found, expected = ids.count(self.image_token_id), len(self._place_ids(row))
            if found != expected:
                raise ValueError(
                    f"Row {index}: truncation would cut into an image ({found} of {expected} image tokens left). "
                    f"Raise max_length, or do not truncate."
                )

    def _check_length(self, batch: BatchFeature):
        limit = self.tokenizer.model_max_length
        if limit > NO_LENGTH_LIMIT:
            return
        for index, row in enumerate(_as_lists(batch.get("attention_mask", batch["input_ids"]))):
            length = sum(row) if "attention_mask" in batch else len(row)
            if length > limit:
                raise ValueError(
                    f"Row {index} has {length} tokens, but the context of the model is {limit}. Shorten the text or "
                    f"use fewer images ({self.num_image_tokens} tokens each)."
                )

    def _begin_images(self, images, text, image_rows: int, kwargs: dict[str, Any]) -> BatchFeature:
        """Rows that end in the first rows of patches of an image: whole images, with the rest cut off."""
        if not 0 <= image_rows < self.image_grid:
            raise ValueError(
                f"image_rows is {image_rows}; an image has {self.image_grid} rows: 0 to all but one of them."
            )
        images, _ = _flatten_images(images)
        texts = [""] * len(images) if text is None else _make_rows(text, len(images), None)
        if len(texts) != len(images) or any(IMAGE_TOKEN in row for row in texts):
            raise ValueError(
                f"With image_rows every text has one image and no {IMAGE_TOKEN}; got {len(images)} images."
            )
        batch = self(images=images, text=[row + IMAGE_TOKEN for row in texts], **kwargs)
        rows = _as_lists(batch["input_ids"])
        if any(row[-1] != self.eoi_token_id for row in rows):
            raise ValueError("image_rows needs padding_side='left': every row must end in its image.")
        end = image_rows * self.image_grid + 1 - self.num_image_tokens  # negative: what is cut off
        given = {name: _as_lists(batch[name]) for name in ("input_ids", "attention_mask") if name in batch}
        return BatchFeature({name: _like([row[:end] for row in of], batch[name]) for name, of in given.items()})

    def _append_boi(self, batch: BatchFeature):
        masks = _as_lists(batch.get("attention_mask", []))
        if any(mask[-1] == 0 for mask in masks):
            raise ValueError("generation_mode='image' needs padding_side='left': every row must end in BOI.")
        ids = [[*row, self.boi_token_id] for row in _as_lists(batch["input_ids"])]
        batch["input_ids"] = _like(ids, batch["input_ids"])
        if masks:
            batch["attention_mask"] = _like([[*mask, 1] for mask in masks], batch["attention_mask"])

    def _place_ids(self, row: str, codes: list[list[int]] | None = None) -> list[int]:
        """What the `<image>` tokens of an expanded row stand for; `codes` has the patches of each of its images."""
        newline = self.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
        placeholder = [self.text_vocab_size] * self.image_grid**2
        ids: list[int] = []
        for index, place in enumerate(IMAGE_PLACE.finditer(row)):
            ids += [newline] * place.group(1).count("\n")
            ids += [self.boi_token_id, *(placeholder if codes is None else codes[index]), self.eoi_token_id]
        return ids

    def _fill_places(self, batch: BatchFeature, rows: list[str], codes: Tensor | None):
        """Replaces every `<image>` token by the id it stands for; its own id may be that of a code."""
        patches = None if codes is None else iter(self.codes_to_ids(codes).tolist())
        filled = []
        for ids, row in zip(_as_lists(batch["input_ids"]), rows):
            own = None if patches is None else [next(patches) for _ in IMAGE_PLACE.finditer(row)]
            places = iter(self._place_ids(row, own))
            filled.append([next(places) if id == self.image_token_id else id for id in ids])
        batch["input_ids"] = _like(filled, batch["input_ids"])

    def _encode(self, pixel_values) -> tuple[Tensor, Tensor]:
        """Codes (images, patches, codebooks) and float32 features (images, patches, width)."""
        if not torch.is_tensor(pixel_values):
            pixel_values = torch.from_numpy(np.stack(pixel_values))  # (images, 3, height, width)
        codes, features = self.image_tokenizer.encode(pixel_values)
        return codes, features.float()

    # ---- text and images out ----

    def decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str | list[str]:
        """Text of ids; every image, also one that is cut short, reads as `<image>`.

        Args:
            token_ids (`int`, `list[int]`, `np.ndarray` or `torch.Tensor`, or a batch of these): Flat ids.
            skip_special_tokens (`bool`, *optional*, defaults to `False`): Leave out BOS, EOS and padding.
            kwargs: Further options of the tokenizer's `decode`.

        Returns:
            `str`, or `list[str]` for a batch.

        Raises:
            `ValueError`: If an id is out of range; the message names it.
        """
        rows, is_batch = _rows_of(token_ids)
        texts = self.batch_decode(rows, skip_special_tokens=skip_special_tokens, **kwargs)
        return texts if is_batch else texts[0]

    def batch_decode(self, sequences, skip_special_tokens: bool = False, **kwargs) -> list[str]:
        """Texts of a batch of ids, see [`~LibraProcessor.decode`]."""
        return [
            self.tokenizer.decode(self._read_text(ids, row), skip_special_tokens=skip_special_tokens, **kwargs)
            for row, ids in enumerate(_rows_of(sequences)[0] if len(sequences) else [])
        ]

    def post_process_image_text_to_text(
        self, generated_outputs, skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:
        """Texts of generated ids, see [`~LibraProcessor.decode`]."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens: bool = True, generation_mode: str | None = None, **kwargs
    ) -> list[str] | list[Image.Image]:
        """What the model generated, as text or as images.

        Args:
            generated_outputs (`torch.Tensor`, `np.ndarray` or `list`): Flat ids, (length,) or (batch, length).
            skip_special_tokens (`bool`, *optional*, defaults to `True`): Leave out BOS, EOS and padding in text.
            generation_mode (`str`, *optional*, defaults to `"text"`): `"text"` or `"image"`.
            kwargs: Further options of the tokenizer's `decode`.

        Returns:
            `list[str]`, one text a row, or `list[PIL.Image.Image]`, every image of the ids in reading order. Rows that
            continue a prompt which ended in BOI may begin with the codes.

        Raises:
            `ValueError`: If in `"image"` mode a row has no image, or one that is cut short; the message names the row.
        """
        if generation_mode in (None, "text"):
            return self.post_process_image_text_to_text(generated_outputs, skip_special_tokens, **kwargs)
        if generation_mode != "image":
            raise ValueError(f"generation_mode must be 'text' or 'image', got {generation_mode!r}.")
        rows = _rows_of(generated_outputs)[0] if len(generated_outputs) else []
        ids = [image for row, row_ids in enumerate(rows) for image in self._read_images(row_ids, row)]
        images: list[Image.Image] = []
        if not ids:
            return images
        codes = self.ids_to_codes(torch.tensor(ids))  # (images, patches, codebooks)
        for batch in codes.split(DECODE_BATCH_SIZE):  # finished images take a quarter of the memory of their pixels
            images += self.image_processor.postprocess(self.image_tokenizer.decode(batch))
        return images

    def _segments(self, ids: list[int], row: int) -> list[list[int]]:
        """Cuts ids into runs: each text id on its own, each image (BOI, codes, EOI, as far as there) together."""
        runs: list[list[int]] = []
        in_image = False
        for id in ids:
            if not 0 <= id <= self.eoi_token_id:
                raise ValueError(f"Row {row}: {id} is no id of this model, expected 0 to {self.eoi_token_id} (EOI).")
            if in_image and id >= self.text_vocab_size and id != self.boi_token_id:
                runs[-1].append(id)
            else:
                runs.append([id])
            in_image = id >= self.text_vocab_size and id != self.eoi_token_id
        return runs

    def _read_text(self, ids: list[int], row: int) -> list[int]:
        return [run[0] if run[0] < self.text_vocab_size else self.image_token_id for run in self._segments(ids, row)]

    def _read_images(self, ids: list[int], row: int) -> list[list[int]]:
        images = [run for run in self._segments(ids, row) if run[0] >= self.text_vocab_size]
        if not images:
            raise ValueError(f"Row {row} holds no image. Generate from a prompt made with generation_mode='image'.")
        patches = [[id for id in run if id < self.boi_token_id] for run in images]
        for index, codes in enumerate(patches):
            if len(codes) != self.image_grid**2:
                raise ValueError(
                    f"Row {row}: image {index} has {len(codes)} codes, expected {self.image_grid**2}. "
                    f"Generate at least {self.num_image_tokens} new tokens."
                )
        return patches

    # ---- saving and loading ----

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Parts that the base class handles; the image tokenizer is a model and handled here."""
        return ["image_processor", "tokenizer"]

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        subfolder = kwargs.pop("subfolder", "")
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        path = pretrained_model_name_or_path
        image_tokenizer, image_tokenizer_folder = path, os.path.join(subfolder, IMAGE_TOKENIZER_FOLDER)
        if os.path.isdir(os.path.join(path, image_tokenizer_folder)):
            # Not as a subfolder: transformers up to 5.18 would take an adapter beside it for one of the image tokenizer.
            image_tokenizer, image_tokenizer_folder = os.path.join(path, image_tokenizer_folder), ""
        # A blank configuration: the tokenizer's own file names its class. Without one the model's would be loaded,
        # which asks to trust code that no tokenizer needs.
        tokenizer_options = {"config": PreTrainedConfig(), **kwargs}
        return [
            LibraImageProcessor.from_pretrained(path, subfolder=subfolder, **hub),
            AutoTokenizer.from_pretrained(path, subfolder=subfolder, **tokenizer_options),
            LibraImageTokenizer.from_pretrained(image_tokenizer, subfolder=image_tokenizer_folder, **hub),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Configuration of the processor; the image tokenizer has its own, in its folder."""
        bare = copy.copy(self)
        del bare.image_tokenizer  # the base class would copy its weights
        return super(LibraProcessor, bare).to_dict()

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Saves the processor, the tokenizer, the chat template, and the image tokenizer in `image_tokenizer/`.

        Args:
            save_directory (`str` or `os.PathLike`): Where to; created if it does not exist.
            push_to_hub (`bool`, *optional*, defaults to `False`): Whether to push as well.
            kwargs: Options of `push_to_hub`; `max_shard_size` for the weights of the image tokenizer.
        """
        shards = {"max_shard_size": kwargs.pop("max_shard_size")} if "max_shard_size" in kwargs else {}
        files = super().save_pretrained(save_directory)
        self.image_tokenizer.save_pretrained(os.path.join(save_directory, IMAGE_TOKENIZER_FOLDER), **shards)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files


def _prepare_tokenizer(tokenizer, text_vocab_size: int | None) -> int:
    """Gives a tokenizer what Libra needs, and returns the size of the text vocabulary."""
    vocabulary = tokenizer.get_vocab()
    known = vocabulary.pop(IMAGE_TOKEN, None)
    if text_vocab_size is None:
        if known is not None:
            raise ValueError(
                f"The tokenizer already has {IMAGE_TOKEN}: pass text_vocab_size, the model's vocabulary size."
            )
        text_vocab_size = max(vocabulary.values()) + 1
    if max(vocabulary.values()) >= text_vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {max(vocabulary.values())}, but text_vocab_size is {text_vocab_size}."
        )
    if known is None:
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, lstrip=True, normalized=False)])
    elif not tokenizer.added_tokens_decoder[known].lstrip:
        raise ValueError(f"The {IMAGE_TOKEN} token of the tokenizer must swallow the spaces before it (lstrip=True).")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    return text_vocab_size


def _flatten_images(images) -> tuple[list, list[int] | None]:
    """All images in reading order, and how many each row has if the list is nested."""
    if images is None:
        return [], None
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        return list(images), None
    if not isinstance(images, (list, tuple)):
        return [images], None
    nested = [isinstance(entry, (list, tuple)) or entry is None for entry in images]
    if not any(nested):
        return list(images), None
    if not all(nested):
        raise ValueError("images mixes single images and lists of images; pass one list for each text.")
    rows = [list(entry or []) for entry in images]
    return [image for row in rows for image in row], [len(row) for row in rows]


def _make_rows(text, num_images: int, per_row: list[int] | None) -> list[str]:
    if text is None:
        if num_images == 0:
            raise ValueError("Pass text, images, or both.")
        return [(IMAGE_TOKEN + "\n") * count for count in per_row or [1] * num_images]
    rows = [text] if isinstance(text, str) else text
    if not isinstance(rows, (list, tuple)) or not rows or not all(isinstance(row, str) for row in rows):
        raise ValueError(f"text must be a string or a list of strings, got {type(text).__name__}: {text!r:.100}.")
    for index, row in enumerate(rows):
        try:
            row.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Row {index}: the text holds {row[error.start]!r}, half of a letter. Was it read from bytes that are no "
                "UTF-8? Decode them first."
            ) from error
    return list(rows)


def _check_places(rows: list[str], num_images: int, per_row: list[int] | None):
    places = [row.count(IMAGE_TOKEN) for row in rows]
    if per_row is None:
        if sum(places) != num_images:
            raise ValueError(
                f"The text has {sum(places)} places for images ({IMAGE_TOKEN}; by row: {places}), but there are "
                f"{num_images} images."
            )
        return
    if len(per_row) != len(rows):
        raise ValueError(f"There are {len(rows)} texts, but {len(per_row)} lists of images.")
    for index, (expected, found) in enumerate(zip(places, per_row)):
        if expected != found:
            raise ValueError(f"Row {index} has {expected} places for images ({IMAGE_TOKEN}), but {found} images.")


def _as_lists(rows) -> list[list[int]]:
    return rows if isinstance(rows, list) else rows.tolist()


def _like(rows: list[list[int]], template):
    """Rows in the container of `template`: a tensor, an array or a list."""
    if torch.is_tensor(template):
        return torch.tensor(rows, dtype=template.dtype, device=template.device)
    return np.array(rows, dtype=template.dtype) if isinstance(template, np.ndarray) else rows


def _rows_of(token_ids) -> tuple[list[list[int]], bool]:
    """Ids as a list of rows, and whether they were a batch."""
    if isinstance(token_ids, (Tensor, np.ndarray)):
        if token_ids.ndim == 2 and len(token_ids) == 0:
            return [], True
        token_ids = token_ids.tolist()
    if isinstance(token_ids, int):
        return [[token_ids]], False
    rows: list[Any] = [row.tolist() if isinstance(row, (Tensor, np.ndarray, np.integer)) else row for row in token_ids]
    is_batch = bool(rows) and isinstance(rows[0], (list, tuple))
    return (rows, True) if is_batch else ([rows], False)


__all__ = ["LibraProcessor"]
