"""Reading the flat id sequence: where its images are, whether they are whole, which codes they hold.

An image block is BOI, `num_patches` codes row by row, EOI. A row may end inside a block (an image that is being
generated), and, when it continues a cached sequence, begin inside one.
"""

from typing import NamedTuple

import torch


class ImageBlocks(NamedTuple):
    """Where the images of a batch are.

    Args:
        offsets (`torch.LongTensor` of shape `(batch, length)`):
            Tokens since the last BOI: 0 at BOI, 1 to `num_patches` at the codes, `num_patches + 1` at EOI, more in the
            text after it. -1 before the first BOI of the row.
        featured (`torch.BoolTensor` of shape `(batch, length)`):
            The codes of whole images. `image_features` belong to these, in reading order.
        images_per_row (`torch.LongTensor` of shape `(batch,)`):
            Whole images of each row.
    """

    offsets: torch.Tensor
    featured: torch.Tensor
    images_per_row: torch.Tensor


def find_image_blocks(input_ids: torch.Tensor, config) -> ImageBlocks:
    """
    Locates the image blocks of a batch. Assumes they are well formed; [`check_image_blocks`] makes sure.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): flat ids.
        config ([`LibraConfig`]): names V, BOI, EOI and the number of patches.

    Returns:
        [`ImageBlocks`]
    """
    length = input_ids.shape[1]
    positions = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    is_boi = input_ids == config.boi_token_id
    is_eoi = input_ids == config.eoi_token_id
    begin = torch.where(is_boi, positions, -1).cummax(dim=1).values  # the last BOI at or before each place
    far = length + config.num_patches + 2  # no EOI follows: too far from any BOI of the row to end its image
    end = torch.where(is_eoi, positions, far).flip(1).cummin(dim=1).values.flip(1)  # the next EOI, likewise
    offsets = torch.where(begin >= 0, positions - begin, -1)
    in_whole = (begin >= 0) & (end - begin == config.num_patches + 1)
    featured = in_whole & (offsets >= 1) & (offsets <= config.num_patches)
    return ImageBlocks(offsets, featured, images_per_row=(in_whole & is_boi).sum(dim=1))


def check_ids(input_ids: torch.Tensor, config) -> None:
    """
    Refuses ids that are none of the model's.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): flat ids.
        config ([`LibraConfig`]): names their range.

    Raises:
        ValueError: naming the row, the place and the id.
    """
    outside = (input_ids < 0) | (input_ids >= config.total_vocab_size)
    if outside.any():
        row, place = outside.nonzero()[0].tolist()
        raise ValueError(
            f"Row {row} of input_ids has id {input_ids[row, place]} at position {place}; ids must be in "
            f"[0, {config.total_vocab_size}): {config.text_vocab_size} text ids, {config.num_image_codes} image codes, "
            "BOI and EOI. Was it made by another model's processor?"
        )


def check_image_blocks(
    input_ids: torch.Tensor, config, continues: bool = False, open_tokens: torch.Tensor | None = None
) -> None:
    """
    Refuses id sequences that no processor makes, before they cost a forward pass.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): flat ids.
        config ([`LibraConfig`]): names V, BOI, EOI and the number of patches.
        continues (`bool`, *optional*, defaults to `False`):
            Whether the rows continue a cached sequence, and so may begin inside an image.
        open_tokens (`torch.LongTensor` of shape `(batch,)`, *optional*):
            How many tokens of an image that is not finished each row of the cache ends in, BOI among them; 0 in text. Where
            it is not known, the rows may begin with any rest of an image.

    Raises:
        ValueError: for ids out of range, codes or EOI outside of an image, images cut short or too long. The message
            names the row, what was found and what was expected. An image still open at the end of a row is allowed.
    """
    if input_ids.numel() == 0:
        raise ValueError(f"input_ids is empty: its shape is {tuple(input_ids.shape)}.")
    check_ids(input_ids, config)
    patches = config.num_patches
    is_eoi = input_ids == config.eoi_token_id
    is_code = (input_ids >= config.text_vocab_size) & (input_ids < config.boi_token_id)
    offsets = find_image_blocks(input_ids, config).offsets
    before = torch.full_like(offsets[:, :1], -1)
    if open_tokens is not None:
        before = open_tokens[:, None].to(offsets) - 1  # (batch, 1), the offset of the last token of the cache
        places = torch.arange(1, offsets.shape[1] + 1, device=offsets.device)
        offsets = torch.where((offsets < 0) & (before >= 0), before + places, offsets)
    previous = torch.cat([before, offsets[:, :-1]], dim=1)  # of what came before; BOI resets offsets
    expects_code = (previous >= 0) & (previous < patches)
    expects_eoi = previous == patches
    wrong = (expects_code != is_code) | (expects_eoi != is_eoi)
    if continues and open_tokens is None:
        before_first_boi = offsets < 0
        wrong &= ~(before_first_boi & _may_continue(is_code, is_eoi, patches))
    if wrong.any():
        row, place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"Row {row} of input_ids has a broken image block at position {place}: found id {input_ids[row, place]}, "
            f"but an image is BOI ({config.boi_token_id}), exactly {patches} codes in [{config.text_vocab_size}, "
            f"{config.boi_token_id}) and EOI ({config.eoi_token_id}). Was the row truncated inside an image, or the "
            "processor made for another image size?"
        )


def _may_continue(is_code: torch.Tensor, is_eoi: torch.Tensor, patches: int) -> torch.Tensor:
    """Tokens that can be the rest of an image begun earlier: at most `patches` leading codes, then at most one EOI."""
    leading_codes = is_code.long().cummin(dim=1).values  # 1 while every token so far is a code
    leading_before = torch.nn.functional.pad(leading_codes, (1, 0), value=1)[:, :-1]
    fits = leading_codes.cumsum(dim=1) <= patches
    return (leading_codes.bool() | (leading_before.bool() & is_eoi)) & fits


def check_image_features(image_features: torch.Tensor, blocks: ImageBlocks, config) -> None:
    """
    Checks that the features are those of the images in the ids.

    Args:
        image_features (`torch.FloatTensor` of shape `(images, patches, feature_size)`):
            Features of all whole images of the batch in reading order.
        blocks ([`ImageBlocks`]): the images found in the ids.
        config ([`LibraConfig`]): names patches and feature size.

    Raises:
        ValueError: for a wrong shape, a wrong number of images, or features that are not finite.
    """
    expected = (config.num_patches, config.feature_size)
    if image_features.ndim != 3 or tuple(image_features.shape[1:]) != expected:
        raise ValueError(
            f"image_features has shape {tuple(image_features.shape)}; expected (images, {expected[0]}, {expected[1]}): "
            "patches and feature width of the model's configuration."
        )
    found = blocks.images_per_row.tolist()
    if sum(found) != image_features.shape[0]:
        rows = ", ".join(f"row {row}: {count}" for row, count in enumerate(found))
        raise ValueError(
            f"image_features holds {image_features.shape[0]} images, but input_ids holds {sum(found)} whole image "
            f"blocks ({rows}). Pass one entry per image, in reading order over the batch, or none at all."
        )
    if not image_features.sum(dtype=torch.float32).isfinite():  # one pass; looked at closely only when it fails
        finite = image_features.isfinite().flatten(1).all(dim=1)
        if finite.all():
            return
        image = int((~finite).nonzero()[0])
        row = int((blocks.images_per_row.cumsum(0) > image).nonzero()[0])
        raise ValueError(
            f"image_features of image {image} (row {row} of input_ids) holds NaN or infinite values; expected finite "
            "CLIP features. Check the image, and the dtype the image tokenizer runs in."
        )


def codebook_entries(vision_ids: torch.Tensor, config) -> torch.Tensor:
    """
    Entries of the codebooks' tables that make up vision ids (Section 3.2).

    Args:
        vision_ids (`torch.LongTensor` of shape `(...)`): flat ids of image codes, BOI or EOI.
        config ([`LibraConfig`]): names V and the codebooks.

    Returns:
        `torch.LongTensor` of shape `(..., num_codebooks)`, in `[0, codebook_size + 2)`: the code of each codebook, and
        `codebook_size` for BOI, `codebook_size + 1` for EOI in all of them.
    """
    code = vision_ids - config.text_vocab_size
    powers = [config.codebook_size**k for k in reversed(range(config.num_codebooks))]
    entries = torch.stack([code // power % config.codebook_size for power in powers], dim=-1)
    marker = config.codebook_size + (code - config.num_image_codes)  # BOI -> size, EOI -> size + 1
    return torch.where((code >= config.num_image_codes)[..., None], marker[..., None], entries)
