"""The first tab: talk about images."""

from collections.abc import Iterator
from functools import partial
from inspect import iscoroutinefunction
from typing import Any

import gradio as gr
from conversation import REFUSED, SHORT_ANSWER, ask
from gradio.context import get_blocks_context
from libra_model import HERE, gpu
from uploads import VisitorError
from wording import SECTION

EXAMPLES = HERE / "examples"
QUESTIONS = [
    ("airplane.png", "What is in the image?"),
    ("strawberry.png", "How many objects are there?"),
    ("horse.png", "What is in the image?"),
    ("key.png", "Is there a key in the image?"),
]
"""Images of `examples/` and a question about each, for one click."""

WORKED_EXAMPLE = [("airplane.png", "What is in the image?"), (None, "How many objects are there?")]
"""What is asked when the Space starts, so that the first screen shows a conversation the model really had."""

EXPLANATION = f"""
Below is a conversation this model has just had: go on with it, or clear it. Several images are fine, in any turn.
How text and images meet: [section 3.3 of the paper]({SECTION.format("S3.SS3")}).
"""

ALT_TEXTS = {
    "airplane.png": "Drawing of an airplane",
    "strawberry.png": "Drawing of a strawberry",
    "horse.png": "Drawing of a brown horse",
    "key.png": "Drawing of a key",
}


def answer(
    message: dict[str, Any],
    history: list[dict[str, Any]],
    short: bool = True,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 64,
) -> Iterator[str | gr.ChatMessage]:
    """
    Answers one message of a chat.

    Args:
        message (`dict`): `text` and `files` (paths of images).
        history (`list[dict]`): the messages before it.
        short (`bool`, *optional*, defaults to `True`): whether to ask for a single word or phrase.
        temperature (`float`, *optional*, defaults to 0): 0 for the likeliest words; more for variety.
        top_p (`float`, *optional*, defaults to 1): samples from the likeliest words that make up this much.
        max_new_tokens (`int`, *optional*, defaults to 64): longest answer, in tokens.

    Yields:
        `str`, the answer so far; or a `gr.ChatMessage` that explains what is wrong with the message.
    """
    text = message.get("text") or ""
    if short and text.strip():
        text = f"{text.strip()}\n{SHORT_ANSWER}"
    try:
        # Retried messages have their files as gradio's descriptions of them, new ones as paths.
        files = [file if isinstance(file, str) else file["path"] for file in message.get("files") or []]
        yield from ask(text, files, history, temperature, top_p, max_new_tokens)
    except VisitorError as error:
        yield gr.ChatMessage(content=str(error), metadata={"title": REFUSED})


def worked_example() -> Any:
    """
    A conversation with the model, had when this is called.

    Returns:
        `list[dict]`: messages for a `gr.Chatbot`.
    """
    history: list[dict[str, Any]] = []
    for image, question in WORKED_EXAMPLE:
        files = [] if image is None else [str(EXAMPLES / image)]
        *_, last = answer({"text": question, "files": files}, history)
        shown = [{"path": path, "alt_text": ALT_TEXTS[str(image)]} for path in files]
        history.append({"role": "user", "content": [*shown, question]})
        history.append({"role": "assistant", "content": [last]})
    return history


class Chat(gr.ChatInterface):
    """
    A chat in which what a visitor does while an answer ends stands: cleared, it stops the answer, and nothing of it comes back
    (gradio's own puts it back, on the page and into what the model reads); a question that is taken back stays in the text box
    (gradio's own empties the box once more); and what is retried is what the page shows (gradio's own looks at a copy that
    may not have the last answer yet).

    The events of an answer have no public names, so this hooks into where gradio makes them.
    """

    def _setup_events(self) -> None:
        self.cleared = gr.State(False)  # since the last question
        super()._setup_events()
        copies = [self.chatbot_state, self.chatbot_value]
        begun = ([self.textbox, self.saved_input], [self.chatbot_state, self.saved_input])  # asked, retried
        for event in get_blocks_context().fns.values():
            if event.outputs in begun:
                event.fn = partial(_not_cleared, event.fn)
                event.inputs = [self.chatbot if block is self.chatbot_state else block for block in event.inputs]
                event.outputs = [*event.outputs, self.cleared]
            elif event.inputs == [self.chatbot] and event.outputs == copies:  # the answer is complete, or was stopped
                event.fn = _copies
                event.inputs, event.outputs = [self.chatbot, self.cleared], [*copies, self.chatbot]
            elif event.outputs == [self.textbox] and self._empties_box(event):  # which the question itself did before
                event.fn = partial(gr.update, interactive=True)

    def _empties_box(self, event: Any) -> bool:
        """Whether an event that takes nothing frees the text box for the next question and empties it."""
        if event.fn is None or event.inputs or iscoroutinefunction(event.fn):
            return False
        return event.fn() == gr.update(value=None, interactive=True)

    def _setup_stop_events(self, event_triggers: Any, events_to_cancel: Any, after_success: Any) -> None:
        super()._setup_stop_events(event_triggers, events_to_cancel, after_success)
        self.chatbot.clear(
            lambda: ([], [], [], True),
            None,
            [self.chatbot, self.chatbot_state, self.chatbot_value, self.cleared],
            cancels=events_to_cancel,
            queue=False,
            api_visibility="undocumented",
        )


def _not_cleared(fn: Any, *inputs: Any) -> tuple:
    """What the first event of a question gives, and that the chat was not cleared since."""
    return *fn(*inputs), False


def _copies(shown: list[Any], cleared: bool) -> tuple[Any, Any, Any]:
    """The server's two copies of the chat, and the chat itself, empty if words came to it after it was cleared."""
    return ([], [], []) if cleared else (shown, shown, gr.skip())


def build_chat() -> None:
    """Puts the chat into the tab that is open."""
    gr.Markdown(EXPLANATION)
    chatbot = gr.Chatbot(
        worked_example(),
        label="Conversation",
        show_label=False,
        elem_id="conversation",
        height=500,  # the worked example fits
        layout="bubble",
        buttons=[],
        group_consecutive_messages=False,
        placeholder="Add an image and ask about it.",
    )
    textbox = gr.MultimodalTextbox(
        file_types=["image"],
        file_count="multiple",
        sources=["upload"],
        placeholder="Ask about the image, or add one: button, paste or drop",
        label="Your message",
        elem_id="message",
        stop_btn=True,
    )
    Chat(
        gpu(answer),
        multimodal=True,
        chatbot=chatbot,
        textbox=textbox,
        additional_inputs=answer_options(),
        additional_inputs_accordion=gr.Accordion("How to answer", open=False, render=False),
        api_name="chat",
        concurrency_limit=None,
        fill_height=False,
    )
    gr.Examples(
        [{"text": question, "files": [str(EXAMPLES / image)]} for image, question in QUESTIONS],
        textbox,
        label="Try one of these and press Enter",
    )


def answer_options() -> list[Any]:
    """The controls of [`answer`], in its order; not on the page yet."""
    return [
        gr.Checkbox(True, label="Ask for a short answer", info=f"Adds: {SHORT_ANSWER}", render=False),
        gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0: the likeliest words. More: variety.", render=False),
        gr.Slider(
            0.05, 1, 1, step=0.05, label="Top-p", info="Below 1 the unlikeliest words are left out.", render=False
        ),
        gr.Slider(1, 256, 64, step=1, label="Longest answer", info="In tokens, pieces of words.", render=False),
    ]
