"""Cleaning captions: what goes, what stays, and that it is done after one time."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.clean_captions import caption_fault, clean_caption

PIECES = st.sampled_from(
    ["a dog", " ", "\n", "&amp;", "&lt;", "b&gt;", "<b>", "</b>", "<", ">", "http", "://", "www.", "x.com/y", "\u200b", "\x00",
     "e\u0301", "狗", "<PERSON>", "&", "amp;", "lt;", "<!--", "-->", "\ufeff", "\ud800", "👩‍🚀"]
)  # fmt: skip
TEXTS = st.one_of(st.text(), st.lists(PIECES, max_size=12).map("".join))


@given(TEXTS)
def test_once_is_enough(text):
    cleaned = clean_caption(text)
    assert clean_caption(cleaned) == cleaned


@given(TEXTS)
def test_one_composed_line_without_controls(text):
    cleaned = clean_caption(text)
    assert cleaned == " ".join(cleaned.split())
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in cleaned)


@given(st.lists(st.text("abcdefghijklmnopqrstuvwxyzäöüßéñ狗猫", min_size=1), max_size=10))
def test_words_stay_as_they_are(words):
    assert clean_caption(" ".join(words)) == " ".join(words)


@pytest.mark.parametrize(
    ("found", "cleaned"),
    [
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("<b>A dog</b><br/>on grass", "A dog on grass"),
        ("a dog, see https://a.b/c?d=e#f", "a dog, see"),
        ("a dog www.dogs.com  barks\n\n", "a dog barks"),
        ("portrait of <PERSON> at home", "portrait of person at home"),
        ("cafe\u0301\u200b", "café"),
        ("5 < 6 > 4", "5 < 6 > 4"),
        ("I <3 dogs", "I <3 dogs"),
        ("一只\u3000狗", "一只 狗"),
        ("&lt;i&gt;dog&lt;/i&gt;", "dog"),
        ("an astronaut 👩‍🚀", "an astronaut 👩‍🚀"),
    ],
)
def test_examples(found, cleaned):
    assert clean_caption(found) == cleaned


@pytest.mark.parametrize(
    ("caption", "fault"),
    [
        ("a dog on grass", None),
        ("一只狗在草地上", None),
        ("don't panic, it's a well-known dog", None),
        ("2019 Ford Focus", None),
        ("कुत्ता घास पर है", None),
        ("IMG_1234.JPG", "caption is a file name"),
        ("summer-2019_final.png", "caption is a file name"),
        ("DSC00012", "caption is a file name"),
        ("20190304_101112", "caption is a file name"),
        ("dog", "caption has too few words"),
        ("", "caption has too few words"),
        ("狗", "caption has too few words"),
        ("a " * 20 + "dog", "caption has too many words"),
        ("a $$$ --- *** !!! dog", "caption is mostly not letters"),
        ("sale sale SALE sale", "caption repeats one word"),
    ],
)
def test_faults(caption, fault):
    assert caption_fault(caption, min_words=2, max_words=20) == fault


@given(TEXTS, st.integers(0, 5), st.integers(5, 10))
def test_every_caption_gets_a_verdict(text, least, most):
    fault = caption_fault(clean_caption(text), least, most)
    assert fault is None or fault.startswith("caption ")
