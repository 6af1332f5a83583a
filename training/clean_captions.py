"""Cleaning of captions from the web, and telling those that say nothing about their image.

Off by default: the paper does not say that its captions were cleaned.
"""

import html
import re
import unicodedata

URL = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
TAG = re.compile(r"</?[A-Za-z][^<>]*>|<!--.*?-->", re.DOTALL)
PERSON = re.compile(r"<PERSON>", re.IGNORECASE)
"""What CC12M writes in place of every name."""

FILE_NAME = re.compile(r"\S*\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic)", re.IGNORECASE)
CAMERA_NAME = re.compile(r"(?:img|dsc[nf]?|pict?|image|photo|screenshot|p?\d)[-_ ]?\d[\d_() -]*", re.IGNORECASE)
"""What cameras and uploads call their files: IMG_1234, DSC00012, 20190304_101112."""

WORD = re.compile(r"[぀-ヿ㐀-䶿一-鿿가-힣]|[^\W_぀-ヿ㐀-䶿一-鿿가-힣]+(?:['’-][^\W_]+)*")
"""A word, or one character of a script that writes without spaces."""


def clean_caption(text: str) -> str:
    """
    A caption without what is not language. Cleaning it again changes nothing.

    HTML entities are read, tags and URLs dropped, control and zero-width characters dropped, Unicode composed (NFC),
    white space collapsed. CC12M's `<PERSON>` becomes "person".

    Args:
        text (`str`): as found.

    Returns:
        `str`: one line, perhaps empty.
    """
    while (cleaned := _clean_once(text)) != text:  # what a tag or an entity hid may be another
        text = cleaned
    return text


def _clean_once(text: str) -> str:
    text = PERSON.sub("person", html.unescape(text))
    text = URL.sub(" ", TAG.sub(" ", text))
    text = unicodedata.normalize("NFC", text)
    text = "".join(character for character in text if character.isspace() or not _is_invisible(character))
    return " ".join(text.split())


def _is_invisible(character: str) -> bool:
    """Control, format (zero width, direction), surrogate and unassigned characters; emoji keep their joiner."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Cn") and character != "\u200d"


def caption_fault(text: str, min_words: int, max_words: int) -> str | None:
    """
    What is wrong with a cleaned caption.

    Args:
        text (`str`): as [`clean_caption`] returns it.
        min_words, max_words (`int`): bounds, inclusive. A character of Chinese, Japanese or Korean counts as a word.

    Returns:
        `str` or `None`: `"caption is a file name"`, `"caption has too few words"`, `"caption has too many words"`,
        `"caption is mostly not letters"`, `"caption repeats one word"`; None for a caption to learn from.
    """
    if FILE_NAME.fullmatch(text) or CAMERA_NAME.fullmatch(text):
        return "caption is a file name"
    words = WORD.findall(text)
    if len(words) < min_words:
        return "caption has too few words"
    if len(words) > max_words:
        return "caption has too many words"
    letters = sum(character.isalpha() or unicodedata.combining(character) > 0 for character in text)
    if 2 * letters < len(text.replace(" ", "")):
        return "caption is mostly not letters"
    if len(words) > 3 and len({word.lower() for word in words}) == 1:
        return "caption repeats one word"
    return None
