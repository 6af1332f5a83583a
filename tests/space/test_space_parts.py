"""The parts of the Space that need neither model nor page."""

import ctypes
import sys
import threading
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from chat_tab import Chat
from conversation import REFUSED, read_history
from hypothesis import given
from hypothesis import strategies as st
from libra_model import Turns, give_memory_back
from looking import split_words
from pictures import code_color, code_map, heat, hide_patches, picture
from PIL import Image
from uploads import MAX_PIXELS, MAX_SIDE, VisitorError, open_image


def test_turns_are_given_in_the_order_of_asking():
    turns, order, asked = Turns(), [], []

    def visitor(name):
        asked.append(name)
        with turns:
            order.append(name)
            turns.step_aside()
            order.append(name)

    with turns:
        threads = []
        for name in range(3):
            threads.append(threading.Thread(target=visitor, args=[name]))
            threads[-1].start()
            while len(turns._waiting) < name + 1:  # asks before the next one does
                pass
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 0, 1, 2]


def test_one_turn_at_a_time():
    turns, inside, most = Turns(), [], []

    def visitor():
        for _ in range(200):
            with turns:
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=visitor) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 800
    assert max(most) == 1


@given(st.lists(st.sampled_from([" a", "b", " ", "\n", "ab", " b"]), max_size=8))
def test_words_of_an_answer(tokens):
    prefixes = ["".join(tokens[: k + 1]) for k in range(len(tokens))]
    words = split_words(prefixes)
    assert [word for word, _ in words] == "".join(tokens).split()
    covered = [token for _, places in words for token in places]
    assert covered == list(range(len(tokens)))[len(tokens) - len(covered) :]  # all but white space before the first


@pytest.mark.parametrize("size", [2, 16, 512])
def test_every_code_has_a_color_of_its_own(size):
    colors = {code_color(code, size) for code in range(size)}
    assert len(colors) == size
    assert all(0 <= channel <= 255 for color in colors for channel in color)


def test_code_map_names_every_code():
    codes = [0, 511, 17, 300]
    svg = code_map(codes, 512, 'a "map"')
    assert all(f": code {code}</title>" in svg for code in codes)
    assert 'aria-label="a &quot;map&quot;"' in svg


def test_alt_texts_are_escaped():
    html = picture(Image.new("RGB", (2, 2)), '"><script>alert(1)</script>')
    assert "<script>" not in html


def test_hidden_patches_and_heat():
    image = Image.new("RGB", (8, 8), (200, 0, 0))
    hidden = np.asarray(hide_patches(image, np.array([True, False, False, False])))
    assert (hidden[4:, 4:] == (200, 0, 0)).all()
    assert not (hidden[:4, :4] == (200, 0, 0)).all(axis=-1).any()
    warm = np.asarray(heat(image, np.array([1.0, 0.0, 0.0, 0.0]), 1.0)).astype(int)
    assert warm[0, 0].sum() > warm[7, 7].sum()
    assert warm[7, 7].std() == 0  # grey where nothing looks


def test_what_was_refused_never_reaches_the_model():
    refused = {"role": "assistant", "content": [{"type": "text", "text": "no"}], "metadata": {"title": REFUSED}}
    history = [
        {"role": "user", "content": [{"path": "a.png"}, "first"]},
        {"role": "assistant", "content": ["one"], "metadata": None},
        {"role": "user", "content": [{"type": "text", "text": "bad <image>"}]},
        refused,
        {"role": "user", "content": [{"type": "file", "file": {"path": "b.png"}}, {"type": "text", "text": "second"}]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "bad again"},
        refused,
    ]
    turns = read_history(history)
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant"]
    assert turns[0]["content"] == [{"type": "image", "path": "a.png"}, {"type": "text", "text": "first"}]
    assert turns[2]["content"] == [{"type": "image", "path": "b.png"}, {"type": "text", "text": "second"}]


@given(st.sampled_from(["L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]), st.integers(1, 40), st.integers(1, 2500))
def test_images_of_any_kind_open_small_and_rgb(tmp_path_factory, mode, width, height):
    path = tmp_path_factory.mktemp("images") / ("image.tiff" if mode == "CMYK" else "image.png")
    Image.new(mode, (width, height)).save(path)
    image = open_image(path)
    assert image.mode == "RGB"
    assert max(image.size) == min(max(width, height), MAX_SIDE)


def test_transparent_is_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "image.png")
    assert open_image(tmp_path / "image.png").getpixel((0, 0)) == (255, 255, 255)


def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch):
    side = int(MAX_PIXELS**0.5) + 1
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(VisitorError, match=f"bomb.png has {side} x {side} pixels"):
        open_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("content", "told"), [(b"hello", "not an image"), (b"", "not an image"), (None, "no longer here")]
)
def test_what_is_no_image_is_explained(tmp_path, content, told):
    path = tmp_path / "file.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VisitorError, match=told):
        open_image(path)


def test_a_half_image_is_explained(tmp_path):
    path = tmp_path / "half.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(VisitorError, match="broken or cut short"):
        open_image(path)


def test_gradio_has_the_events_that_the_chat_changes():
    def answer(message, history):
        yield "words"

    with gr.Blocks() as page:
        chat = Chat(answer, multimodal=True)
    events = list(page.fns.values())
    assert sum(event.outputs[-1:] == [chat.cleared] for event in events) == 3  # asked, retried, cleared
    frees = [event.fn() for event in events if getattr(event.fn, "func", None) is gr.update]
    assert frees == [gr.update(interactive=True)]  # the box, after an answer, and does not empty it

    copies = [chat.chatbot_state, chat.chatbot_value]
    ended = [event for event in events if event.inputs[:1] == [chat.chatbot] and event.outputs[:2] == copies]
    assert len(ended) >= 4  # asked, retried, undone, cleared
    for event in ended:
        assert event.inputs == [chat.chatbot, chat.cleared]
        assert event.fn(["words"], True) == ([], [], [])
        assert event.fn(["words"], False) == (["words"], ["words"], gr.skip())


@pytest.mark.skipif(
    not (sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")), reason="only glibc gives memory back"
)
def test_free_memory_is_given_back():
    """128 MB in blocks of 64 KB, of which the last one is still in use."""

    def resident() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [libc.malloc(ctypes.c_size_t(2**16)) for _ in range(2000)]
    for block in blocks:
        ctypes.memset(block, 1, 2**16)
    for block in blocks[:-1]:
        libc.free(block)
    before = resident()
    give_memory_back()
    assert before - resident() > 100
    libc.free(blocks[-1])
