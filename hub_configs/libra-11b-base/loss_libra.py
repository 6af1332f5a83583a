"""The unified next-token loss over both modalities (Section 3.4)."""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .image_blocks_libra import codebook_entries

CHUNK_LOGITS = 2**25
"""
Logits of one head that are alive at a time: 128 MB in float32, and as much again for their softmax and for its
gradient. The rows of a chunk are this over the logits of a row: 1048 rows of a vocabulary of 32000. Fewer rows would
make the products of the head less efficient, more would only take more memory.
"""


def libra_loss(
    hidden_states: torch.Tensor,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None,
    predict_text: Callable,
    predict_codes: Callable,
    config,
    num_items_in_batch: torch.Tensor | int | None = None,
    packed_positions: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """
    Next-token cross entropy: on a text target of the language head, on a vision target the mean of the codebooks'
    terms; averaged over all supervised tokens of both modalities together.

    The heads run on supervised rows only, `CHUNK_LOGITS` logits at a time, so the memory does not grow with vocabulary
    times length; see [`summed_cross_entropy`].

    Never supervised, whatever their labels: BOI, the newline after an image (EOI predicts nothing), padding, and the
    token after left padding or another packed sequence (BOS).

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, length, hidden)`): normed, as the heads read them.
        input_ids (`torch.LongTensor` of shape `(batch, length)`): flat ids.
        labels (`torch.LongTensor` of shape `(batch, length)`): flat ids, or -100 where nothing is supervised.
        attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 on padding.
        predict_text (`Callable`): from `(rows, hidden)` to `(rows, V)`.
        predict_codes (`Callable`): from `(rows, hidden)` to `(rows, num_codebooks, codebook_size + 2)`.
        config ([`LibraConfig`]): names V, BOI and EOI.
        num_items_in_batch (`int`, *optional*): divides the sum instead of the number of supervised tokens.
        packed_positions (`torch.LongTensor` of shape `(batch, length)`, *optional*): positions of packed sequences, which
            begin where they do not go on counting.

    Returns:
        `dict` with `loss`, `text_loss` and `vision_loss`, scalars in float32, and `codebook_losses` of shape
        `(num_codebooks,)`, whose mean is `vision_loss`; all but `loss` are means over the targets of their modality, 0
        where there is none.

    Raises:
        ValueError: for labels of the wrong shape or range, labels that supervise nothing (where nothing else divides the
            sum), and labels that no head can
            predict (text inside an image, a code in the text), naming the row.
    """
    target = _supervised_targets(input_ids, labels, attention_mask, config)
    if packed_positions is not None:
        target = target.masked_fill(packed_positions.diff(dim=1) != 1, -100)
    if not num_items_in_batch and not (target != -100).any():  # one of many accumulated batches may have none
        raise ValueError(
            "labels supervise no token of the batch (all are -100, BOI, padding or the newline after an image); the "
            "loss would be 0 / 0. Check the chat template, the masking and max_length."
        )
    hidden_states = hidden_states[:, :-1].flatten(0, 1)
    supervised = target >= 0
    is_vision = target >= config.text_vocab_size
    text_rows = (supervised & ~is_vision).flatten().nonzero().squeeze(1)
    vision_rows = (supervised & is_vision).flatten().nonzero().squeeze(1)

    text_sum = summed_cross_entropy(
        predict_text,
        hidden_states.index_select(0, text_rows),  # (text targets, hidden)
        target.flatten()[text_rows],  # (text targets,)
        config.text_vocab_size,
    )
    codes_sum = summed_cross_entropy(
        predict_codes,
        hidden_states.index_select(0, vision_rows),  # (vision targets, hidden)
        codebook_entries(target.flatten()[vision_rows], config),  # (vision targets, num_codebooks)
        config.num_codebooks * (config.codebook_size + 2),
    )
    vision_sum = codes_sum.mean()

    count = len(text_rows) + len(vision_rows) if num_items_in_batch is None else num_items_in_batch
    return {
        "loss": (text_sum + vision_sum) / count,
        "text_loss": text_sum.detach() / max(len(text_rows), 1),
        "vision_loss": vision_sum.detach() / max(len(vision_rows), 1),
        "codebook_losses": codes_sum.detach() / max(len(vision_rows), 1),
    }


def summed_cross_entropy(
    head: Callable, rows: torch.Tensor, targets: torch.Tensor, logits_per_row: int
) -> torch.Tensor:
    """
    The cross entropy of a head, summed over its rows, with the logits of one chunk of rows alive at a time.

    A chunk's logits are freed once they are summed up, and computed again in backward: one more forward pass of the
    head on its rows. The last chunk's are kept, for backward begins with them. So rows that fit in one chunk cost
    nothing extra, and without gradients nothing is computed twice.

    Args:
        head (`Callable`): from `(rows, hidden)` to `(rows, classes)` or `(rows, codebooks, classes)`. It is called at
            least once, with no row if there is none: DDP waits for its parameters.
        rows (`torch.Tensor` of shape `(rows, hidden)`): what the head reads.
        targets (`torch.LongTensor` of shape `(rows,)` or `(rows, codebooks)`): the class of each prediction.
        logits_per_row (`int`): what the head makes of a row: classes, times codebooks.

    Returns:
        `torch.Tensor` of shape `()`, or `(codebooks,)` for targets of several codebooks: in float32; 0 without rows.
    """
    chunk_rows = max(1, CHUNK_LOGITS // logits_per_row)
    *chunks, last = zip(rows.split(chunk_rows), targets.split(chunk_rows))
    if torch.is_grad_enabled():
        sums = [checkpoint(_chunk_cross_entropy, head, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        sums = [_chunk_cross_entropy(head, *chunk) for chunk in chunks]
    return torch.stack([*sums, _chunk_cross_entropy(head, *last)]).sum(0)


def _chunk_cross_entropy(head, rows, targets):
    """The summed cross entropy of a head on a few rows, in float32: `()`, or `(codebooks,)`."""
    logits = head(rows).float().flatten(0, -2)  # (rows * codebooks, classes)
    return F.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape).sum(0)


def _supervised_targets(input_ids, labels, attention_mask, config):
    """The target of each token but the last, `(batch, length - 1)`, -100 where nothing is supervised."""
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}; they must agree."
        )
    source, target = input_ids[:, :-1], labels[:, 1:]
    outside = (target != -100) & ((target < 0) | (target >= config.total_vocab_size))
    _refuse(outside, target, f"labels must be -100 or in [0, {config.total_vocab_size})")

    target = target.masked_fill(target == config.boi_token_id, -100)
    target = target.masked_fill((source == config.eoi_token_id) & (target < config.text_vocab_size), -100)
    if attention_mask is not None and attention_mask.ndim == 2:
        padded = attention_mask[:, -input_ids.shape[1] :] == 0  # it covers the cache as well
        # After left padding the first real token, BOS, has nothing to be predicted from.
        target = target.masked_fill(padded[:, 1:] | padded[:, :-1], -100)

    source_is_vision = (source >= config.text_vocab_size) & (source != config.eoi_token_id)
    mismatch = (target != -100) & (source_is_vision != (target >= config.text_vocab_size))
    expected = "a token inside an image predicts a code or EOI, any other token text. Are labels shifted already?"
    _refuse(mismatch, target, expected)
    return target


def _refuse(wrong, target, expected):
    if wrong.any():
        row, place = wrong.nonzero()[0].tolist()
        raise ValueError(f"Row {row} of labels has {target[row, place]} at position {place + 1}; {expected}")
