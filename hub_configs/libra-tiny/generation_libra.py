"""What Libra adds to `generate()`: images among the ids, and the grammar of an image.

One `generate()` writes text and images. After a vision token the scores are over the flat ids, and the joint
distribution over the codes is the product of the heads, so temperature, top-k and top-p mean what they say.
"""

import copy
from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessor,
    SequenceBiasLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.masking_utils import create_masks_for_generate

from .cache_libra import CACHE_NAME
from .image_blocks_libra import find_image_blocks

OF_ONE_WIDTH = (
    SequenceBiasLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
)
"""Processors that write to ids of the prompt, images among them, and so need scores over all ids at every step."""


def joint_code_logits(vision_logits: torch.Tensor, config) -> torch.Tensor:
    """
    Log-probabilities of the heads, summed to scores over the vision ids.

    Args:
        vision_logits (`torch.Tensor` of shape `(rows, num_codebooks, codebook_size + 2)`): of the heads.
        config ([`LibraConfig`]): names the codebooks.

    Returns:
        `torch.Tensor` of shape `(rows, codebook_size ** num_codebooks + 2)`: code `id1 * codebook_size + id2` has
        `log p1(id1) + log p2(id2)`; the last two are BOI and EOI.
    """
    log_probs = vision_logits.log_softmax(dim=-1)
    codes, markers = log_probs.split([config.codebook_size, 2], dim=-1)
    joint = codes[:, 0]
    for k in range(1, config.num_codebooks):
        joint = (joint[:, :, None] + codes[:, k, None, :]).flatten(1)
    return torch.cat([joint, markers.sum(dim=1)], dim=-1)


def cut_between_images(input_ids: torch.Tensor, chunk_size: int, past_length: int, config) -> list[int]:
    """
    Where to cut a prompt so that no image of any row is cut.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): flat ids.
        chunk_size (`int`): tokens of a chunk; more where an image would be cut.
        past_length (`int`): tokens that are in the cache already.
        config ([`LibraConfig`]): names the ids and the number of patches.

    Returns:
        `list[int]`: the ends of the chunks, the length of the prompt last.
    """
    offsets = find_image_blocks(input_ids, config).offsets
    inside = (offsets >= 0) & (offsets <= config.num_patches)  # the next token belongs to the same image
    is_cut = (~inside.any(dim=0)).tolist()
    ends, begin = [], past_length
    for end in range(past_length + 1, input_ids.shape[1]):
        if end - begin >= chunk_size and is_cut[end - 1]:
            ends.append(end)
            begin = end
    return [*ends, input_ids.shape[1]]


class LibraImageGrammar(LogitsProcessor):
    """
    Keeps generated images whole: only codes inside an image, EOI exactly at its end, the newline after it.

    Args:
        config ([`LibraConfig`]): names the ids and the number of patches.
        wide (`bool`, *optional*, defaults to `False`):
            Whether scores of text are widened to the flat ids, for processors that need one width at all steps.
        first ([`LibraImageGrammar`], *optional*):
            That of the same step before all other processors. Where they have forbidden every code of an image (a forced
            EOS, for instance), its scores count.
    """

    def __init__(self, config, wide: bool = False, first: "LibraImageGrammar | None" = None):
        self.config = config
        self.wide = wide
        self.first = first
        self.scores: torch.Tensor | None = None  # what it gave last

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(rows, length)`): all ids so far.
            scores (`torch.FloatTensor` of shape `(rows, V)` or `(rows, V + codes + 2)`): of the next id.

        Returns:
            `torch.FloatTensor`: the scores, `-inf` for ids that cannot follow.
        """
        config = self.config
        last = input_ids[:, -1]
        if scores.shape[-1] == config.text_vocab_size:  # every row is in text
            vision_ids = config.total_vocab_size - config.text_vocab_size
            return F.pad(scores, (0, vision_ids), value=float("-inf")) if self.wide else scores
        since_boi = find_image_blocks(input_ids, config).offsets[:, -1]
        wants_code = (since_boi >= 0) & (since_boi < config.num_patches)
        ids = torch.arange(scores.shape[-1], device=scores.device)
        is_code = (ids >= config.text_vocab_size) & (ids < config.boi_token_id)
        scores = scores.masked_fill(wants_code[:, None] & ~is_code, float("-inf"))
        if self.first is not None and self.first.scores is not None:
            nothing_left = wants_code & scores.isneginf().all(dim=1)
            scores = torch.where(nothing_left[:, None], self.first.scores, scores)
        scores = self._force(scores, since_boi == config.num_patches, config.eoi_token_id)
        self.scores = self._force(scores, last == config.eoi_token_id, config.newline_token_id)
        return self.scores

    @staticmethod
    def _force(scores, rows, token_id):
        forced = torch.full_like(scores, float("-inf"))
        forced[:, token_id] = 0
        return torch.where(rows[:, None], forced, scores)


class LibraGenerationMixin:
    """The hooks of `generate()` in which images matter. To be listed before the other bases of a model."""

    config: Any  # [`LibraConfig`], of the model

    def _get_logits_processor(self, *args, **kwargs):
        processors = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        if any(isinstance(p, UnbatchedClassifierFreeGuidanceLogitsProcessor) for p in processors):
            raise ValueError(
                "Libra has no guidance (guidance_scale): the scores of text and of images differ in width. Generate "
                "without it; temperature and top_p sharpen images as well."
            )
        # First, so that temperature, top-k and top-p act on what can follow; last, because others (no_repeat_ngram_size)
        # may have forbidden a forced EOI or newline.
        first = LibraImageGrammar(self.config, wide=any(isinstance(p, OF_ONE_WIDTH) for p in processors))
        processors.insert(0, first)
        processors.append(LibraImageGrammar(self.config, first.wide, first))
        return processors

    def compute_transition_scores(self, sequences, scores, beam_indices=None, normalize_logits=False):
        """
        The scores of the generated ids, of text and of images, whose scores differ in width.

        Args:
            sequences (`torch.LongTensor` of shape `(rows, length)`): what `generate()` returned.
            scores (`tuple` of `torch.FloatTensor`): its scores, one for each step, `(rows * beams, ids)`.
            beam_indices (`torch.LongTensor` of shape `(rows, steps)`, *optional*):
                Of beam search: the beam each id is from, negative after the end of a row.
            normalize_logits (`bool`, *optional*, defaults to `False`): whether to make log-probabilities of the scores.

        Returns:
            `torch.FloatTensor` of shape `(rows, steps)`: 0 after the end of a row of beam search.
        """
        if beam_indices is None:
            beam_indices = torch.arange(len(scores[0]), device=sequences.device)[:, None].expand(-1, len(scores))
        has_ended = beam_indices < 0
        steps = int((~has_ended).sum(dim=1).max())
        chosen = []
        for k, ids in enumerate(sequences[:, -steps:].T):
            step = scores[k].log_softmax(dim=-1) if normalize_logits else scores[k]
            chosen.append(step[beam_indices[:, k].clamp(min=0), ids])  # (rows,)
        return torch.stack(chosen, dim=1).masked_fill(has_ended[:, :steps], 0)

    def create_masks_for_generate(self, config, inputs_embeds, attention_mask, **kwargs):
        """Of a step with a static cache. Several tokens may hold images, whose attention makes masks of its own."""
        if inputs_embeds.shape[1] > 1:
            return attention_mask
        return create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs)

    def get_compiled_call(self, compile_config):
        """The compiled forward for steps of text; steps that see image tokens run as they are."""
        compiled = super().get_compiled_call(compile_config)  # type: ignore[misc]

        def call(input_ids, **kwargs):
            writes_text = input_ids.shape[1] == 1 and not (input_ids >= self.config.text_vocab_size).any()
            return (compiled if writes_text else self)(input_ids=input_ids, **kwargs)  # type: ignore[operator]

        return call

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """Prefill in chunks keeps images whole: they go in with their features."""
        features, cache = model_kwargs.get("image_features"), model_kwargs.get(CACHE_NAME)
        if generation_config.prefill_chunk_size is None or features is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)  # type: ignore[misc]
        if cache is None:
            raise ValueError("prefill_chunk_size needs a cache: leave use_cache on.")
        mask = model_kwargs.get("attention_mask")
        if mask is None:  # dropped when it is all ones
            mask = torch.ones_like(input_ids)
        prompt_images = find_image_blocks(input_ids, self.config).images_per_row
        per_row = features.split(model_kwargs.get("prompt_images", prompt_images).tolist())
        unchunked = copy.copy(generation_config)
        unchunked.prefill_chunk_size = None
        past_length = int(cache.get_seq_length())
        for end in cut_between_images(input_ids, generation_config.prefill_chunk_size, past_length, self.config):
            images = find_image_blocks(input_ids[:, :end], self.config).images_per_row
            chunk_kwargs = {**model_kwargs, "attention_mask": mask[:, :end], "prompt_images": images}
            chunk_kwargs["image_features"] = torch.cat([row[:count] for row, count in zip(per_row, images)])
            if model_kwargs.get("position_ids") is not None:
                chunk_kwargs["position_ids"] = model_kwargs["position_ids"][..., :end]
            outputs = super()._prefill(input_ids[:, :end], unchunked, chunk_kwargs, is_first_iteration)  # type: ignore[misc]
        return outputs

    def _assisted_decoding(self, *args, **kwargs):
        raise ValueError(
            "Libra has no assisted generation (assistant_model, prompt_lookup_num_tokens): a draft of several tokens may "
            "cross between text and image, whose scores differ in width. Generate without it."
        )

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs: Any
    ):
        """Repeats a row's images with the row: `image_features` has images, not rows, on its first dimension."""
        features = model_kwargs.pop("image_features", None)
        images = find_image_blocks(input_ids, self.config).images_per_row
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if features is not None:
            if images.sum() != len(features):
                raise ValueError(
                    f"image_features holds {len(features)} images, but input_ids holds {images.tolist()} whole image "
                    "blocks in its rows. Pass one entry per image, in reading order over the batch, or none at all."
                )
            per_row = features.split(images.tolist())
            model_kwargs["image_features"] = torch.cat([row for row in per_row for _ in range(expand_size)])
            model_kwargs["prompt_images"] = images.repeat_interleave(expand_size)
        return input_ids, model_kwargs

    def prepare_inputs_for_generation(self, input_ids, image_features=None, prompt_images=None, **kwargs):
        """
        Adds to the usual inputs of a step the features of the images the step sees.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): all ids so far.
            image_features (`torch.Tensor` of shape `(images, patches, feature_size)`, *optional*): of the prompt.
            prompt_images (`torch.LongTensor` of shape `(batch,)`, *optional*): how many of them each row has.
            kwargs: as in `GenerationMixin`.

        Returns:
            `dict`: the arguments of `forward`.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]
        has_images = (inputs["input_ids"] >= self.config.text_vocab_size).any()
        if has_images:
            inputs["attention_mask"] = kwargs.get("attention_mask")  # 2D, not what is made of it for a static cache
        length = inputs["input_ids"].shape[1]
        if image_features is None or length == 1:
            return inputs
        offsets, _, all_images = find_image_blocks(input_ids, self.config)
        cut = (offsets[:, -length] > 0) & (offsets[:, -length] <= self.config.num_patches + 1)
        if cut.any():
            raise ValueError(
                f"The cache ends inside an image of rows {cut.nonzero().flatten().tolist()}, whose image_features would be "
                "lost. Crop it to before the image, or pass a cache that holds all of it."
            )
        if length < self.config.num_patches + 2:
            return inputs  # a step that short sees no whole image
        seen_images = find_image_blocks(inputs["input_ids"], self.config).images_per_row
        if seen_images.sum() == 0:
            return inputs
        if prompt_images is None:
            prompt_images = all_images
        rows = []
        for row, prompt, total, seen in zip(
            image_features.split(prompt_images.tolist()), prompt_images, all_images, seen_images
        ):
            generated = row.new_zeros(int(total - prompt), *row.shape[1:])  # images written here have no features
            rows.append(torch.cat([row, generated])[int(total - seen) :])
        inputs["image_features"] = torch.cat(rows)
        return inputs
