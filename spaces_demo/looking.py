"""Where an answer looks: what the last tab shows, as numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from conversation import check_text, prepare, room_for
from libra_model import TURNS, IdStreamer, load, stream
from uploads import VisitorError


class Look(NamedTuple):
    """
    An answer, and where each of its words looks.

    Attributes:
        words (`list[str]`): of the answer.
        maps (`np.ndarray` of shape `(words, layers, patches)`): attention, the mean of the heads; sums of at most 1.
        cross_layer (`list[float]`): difference of each layer to the next one, of the whole answer.
        inner_layer (`list[float]`): difference of the heads of each layer.
    """

    words: list[str]
    maps: np.ndarray
    cross_layer: list[float]
    inner_layer: list[float]


def look(image: str | None, question: str, max_new_tokens: int = 32) -> Look:
    """
    Asks a question about an image and measures where the answer looks.

    Args:
        image (`str`, *optional*): path of the image.
        question (`str`): the question.
        max_new_tokens (`int`, *optional*, defaults to 32): longest answer.

    Returns:
        [`Look`]

    Raises:
        VisitorError: if the image cannot be read, there is no question, or no answer.
    """
    if not question.strip():
        raise VisitorError("Type a question about the image.")
    check_text(question)
    if image is None:
        raise VisitorError("There is no image yet. Upload one, paste one, or pick an example.")
    content = [{"type": "image", "path": image}, {"type": "text", "text": question}]
    inputs = prepare([{"role": "user", "content": content}])
    limit = min(max_new_tokens, room_for(inputs["input_ids"].shape[1]))
    libra = load()
    ids = [int(step) for step in stream(IdStreamer(), **inputs, do_sample=False, max_new_tokens=limit)]
    ids = [id for id in ids if id not in libra.processor.tokenizer.all_special_ids]
    words = split_words([libra.processor.decode(ids[: k + 1]) for k in range(len(ids))])
    if not words:
        raise VisitorError("The model said nothing to this. Try another question.")
    with TURNS:  # it changes how attention is computed, and back
        maps = libra.model.attend_to_image(**inputs, answer_ids=ids)  # (tokens, layers, heads, patches)
    per_token = maps.mean(dim=2).cpu().numpy()
    return Look(
        [word for word, _ in words],
        np.stack([per_token[list(tokens)].mean(axis=0) for _, tokens in words]),
        libra.model.cross_layer_difference(maps).mean(dim=0).tolist(),
        libra.model.inner_layer_difference(maps).mean(dim=0).tolist(),
    )


def split_words(prefixes: Sequence[str]) -> list[tuple[str, range]]:
    """
    The words of a text that grows by a token at a time.

    Args:
        prefixes (`Sequence` of `str`): the text after each token.

    Returns:
        `list` of `(str, range)`: each word, and the tokens that wrote it; tokens of white space go with the word before.
    """
    words: list[tuple[str, range]] = []
    before = ""
    for token, text in enumerate(prefixes):
        added = text[len(before) :]
        begins = not before.strip() or before[-1].isspace() or added[:1].isspace()
        if added.strip() and (begins or not words):
            words.append((added.strip(), range(token, token + 1)))
        elif words:
            word, tokens = words[-1]
            words[-1] = word + added.strip(), range(tokens.start, token + 1)
        before = text
    return words
