"""The page: its look, its wording around the tabs, and the limits it is served with."""

import gradio as gr
from attention_tab import build_attention
from chat_tab import EXAMPLES, build_chat
from imagine_tab import build_imagine
from libra_model import HERE, TINY_MODEL, load, move_to_zero_gpu
from tokenizer_tab import build_tokenizer
from uploads import MAX_FILE_SIZE
from wording import INTRODUCTION, TINY_NOTICE

CONCURRENCY = 4
"""Visitors whose requests run at the same time, a token each in turn; more wait in the queue."""

QUEUE_SIZE = 64
"""Requests that may wait; further visitors are told that it is busy."""

SESSIONS = 100
"""Visitors whose conversations are kept; then the one who has been away the longest is forgotten. Gradio keeps 10000, and a
third of a megabyte for each."""

KEEP_FILES = (600, 3600)
"""Every so many seconds, files older than so many seconds are deleted."""


def build_page() -> gr.Blocks:
    """
    The whole page, with the model loaded and the worked examples answered.

    Returns:
        `gr.Blocks`: to be launched with [`launch_options`].
    """
    with gr.Blocks(title="Libra", analytics_enabled=False, delete_cache=KEEP_FILES) as page:
        gr.Markdown(INTRODUCTION, elem_id="introduction")
        if load().name == TINY_MODEL:
            gr.Markdown(TINY_NOTICE, elem_id="notice")
        with gr.Tab("Chat"):
            build_chat()
        with gr.Tab("Codes"):
            build_tokenizer()
        with gr.Tab("Imagine"):
            build_imagine()
        with gr.Tab("Look inside"):
            build_attention()
    move_to_zero_gpu()
    return page.queue(max_size=QUEUE_SIZE, default_concurrency_limit=CONCURRENCY)


def launch_options() -> dict:
    """
    How the page is served: its look and its limits.

    Returns:
        `dict`: arguments of `gr.Blocks.launch`.
    """
    return {
        "theme": THEME,
        "css": CSS,
        "head": NARROW_MARGINS,
        "js": NAME_IMAGES,
        "max_file_size": MAX_FILE_SIZE,
        "state_session_capacity": SESSIONS,
        "allowed_paths": [str(EXAMPLES)],
        "footer_links": ["api", "settings"],
        "ssr_mode": False,  # needs Node.js
        "share": False,
        "show_error": False,
    }


THEME = gr.themes.Default(
    primary_hue="teal",
    secondary_hue="teal",
    neutral_hue="slate",
    radius_size="lg",
    font=["system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"],  # of the visitor: nothing is fetched
    font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
)

CSS = (HERE / "style.css").read_text(encoding="utf-8")

# Not in the style sheet: gradio puts the rules of that inside of the element this is about.
NARROW_MARGINS = (
    "<style>@media (max-width: 30rem) { .gradio-container > .main { padding: 0.75rem !important; } }</style>"
)

# Images in chats and examples come without a text for those who cannot see them; the name of the file is one.
NAME_IMAGES = """
() => {
  const name = () => document.querySelectorAll('img:not([alt]), img[alt=""]').forEach((image) => {
    const file = decodeURIComponent(image.src.split("/").pop()).replace(/\\.\\w+$/, "");
    if (!image.src.startsWith("data:") && file) image.alt = "Image " + file;
  });
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true, attributeFilter: ["src"] });
  name();
}
"""
