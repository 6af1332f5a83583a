"""The one model of the Space: where it comes from, and who may use it when.

Nothing but transformers' Auto classes: the code of Libra comes with the model's own repository.
"""

import ctypes
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

try:
    import spaces  # ZeroGPU; it must come before torch
except ImportError:
    spaces = None

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

MODEL_VARIABLE = "LIBRA_MODEL"
"""Environment variable that names the model: a folder, or the id of a repository on the Hub."""

TINY_MODEL = "libra-tiny"
HERE = Path(__file__).resolve().parent


class Libra(NamedTuple):
    """
    A loaded model.

    Attributes:
        model (`PreTrainedModel`): in evaluation mode, on the accelerator if there is one.
        processor (`ProcessorMixin`): its processor, the image tokenizer on the same device.
        name (`str`): what to call it on the page.
    """

    model: Any
    processor: Any
    name: str


def gpu(function):
    """
    What the page calls in place of `function`: on ZeroGPU `spaces.GPU` of it, which asks for the GPU; elsewhere itself.
    Only requests may ask for it. So functions stay as they are, for the worked examples, and events get `gpu(function)`.
    """
    return function if spaces is None else spaces.GPU(function)


def model_path() -> str:
    """
    Which model to show.

    Returns:
        `str`: `$LIBRA_MODEL`, or the folder of libra-tiny: beside the files of the Space, or that of the checkout.

    Raises:
        ValueError: if the variable is not set and libra-tiny is in neither place.
    """
    named = os.environ.get(MODEL_VARIABLE)
    if named:
        return named
    places = [HERE / TINY_MODEL, HERE.parent / "hub_configs" / TINY_MODEL]
    for place in places:
        if (place / "config.json").is_file():
            return str(place)
    raise ValueError(
        f"No model: {TINY_MODEL} is neither {places[0]} nor {places[1]}. Set {MODEL_VARIABLE} to the folder or the Hub id "
        "of a Libra."
    )


@lru_cache(maxsize=1)
def load() -> Libra:
    """
    The model of the Space, loaded at the first call and kept.

    Raises:
        ValueError, OSError: if there is none, or it cannot be loaded.
    """
    path = model_path()
    model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    processor.tokenizer.model_max_length = int(1e30)  # the page checks lengths itself, and explains
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        model.to(device)
        processor.image_tokenizer.to(device)
    return Libra(model, processor, Path(path).name)


def move_to_zero_gpu() -> None:
    """
    On ZeroGPU, moves the model to the GPU that requests will get; elsewhere nothing. To be called when the page is built:
    before a request there is no GPU but only a stand-in, in `torch.cuda`, which can hold a model and not run it.
    """
    if spaces is not None and torch.cuda.is_available() and not torch.accelerator.is_available():
        load().model.to("cuda")
        load().processor.image_tokenizer.to("cuda")


def give_memory_back() -> None:
    """
    Has the C library return to the system what it holds of memory that is free, where it can (glibc): left alone, it keeps
    what the largest requests needed at once, scattered, and grows.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class Turns:
    """
    A lock that is handed on in the order of asking, so that visitors share the model fairly: whoever generates steps
    aside after every token, and waits behind those who waited already.

    Example:

    ```python
    >>> with turns:
    ...     turns.step_aside()
    ```"""

    def __init__(self):
        self._guard = threading.Lock()
        self._is_taken = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> "Turns":
        gate = threading.Lock()
        with self._guard:
            if not self._is_taken:
                self._is_taken = True
                return self
            gate.acquire()
            self._waiting.append(gate)
        gate.acquire()  # opened by whoever hands the turn on
        return self

    def __exit__(self, *exception) -> None:
        self._hand_on()
        give_memory_back()

    def _hand_on(self) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()  # stays taken: now by the next one
            else:
                self._is_taken = False

    def step_aside(self) -> None:
        """Lets everybody who waits have a turn first. To be called by the one whose turn it is."""
        self._hand_on()
        self.__enter__()


TURNS = Turns()
"""Whose turn it is to use the model."""


class StepCriteria(StoppingCriteria):
    """
    After every step of `generate()`: lets others have a turn, and stops if nobody reads any more.

    Args:
        stop (`threading.Event`): set when generation is to end.
    """

    def __init__(self, stop: threading.Event):
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(rows, length)`): all ids so far.
            scores (`torch.FloatTensor`): not looked at.

        Returns:
            `torch.BoolTensor` of shape `(rows,)`: whether each row is done.
        """
        TURNS.step_aside()
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)


class IdStreamer(BaseStreamer):
    """
    Hands on the new ids of each step, of all rows at once.

    Example:

    ```python
    >>> for ids in IdStreamer():  # (rows,), while model.generate(..., streamer=...) runs in another thread
    ...     ids
    ```"""

    def __init__(self):
        self._ids: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Takes the ids of a step, `(rows,)`; the first call brings the prompt, which is left out."""
        if not self._is_prompt:
            self._ids.put(value)
        self._is_prompt = False

    def end(self) -> None:
        """Ends the iteration."""
        self._ids.put(None)

    def __iter__(self) -> Iterator[torch.Tensor]:
        while (ids := self._ids.get()) is not None:
            yield ids


def stream(streamer, **kwargs: Any) -> Iterator[Any]:
    """
    What a streamer yields while `model.generate(**kwargs)` runs, in turns with other visitors.

    Closing the iterator (the visitor pressed stop, or left) ends generation after the step it is in.

    Args:
        streamer (`BaseStreamer` that is an iterator): gets the ids.
        kwargs: inputs and options of `generate()`.

    Yields:
        whatever the streamer does.

    Raises:
        Exception: whatever `generate()` raises.
    """
    stop = threading.Event()
    failures: list[Exception] = []

    def generate() -> None:
        with TURNS:
            try:
                criteria = StoppingCriteriaList([StepCriteria(stop)])
                load().model.generate(**kwargs, streamer=streamer, stopping_criteria=criteria)
            except Exception as error:  # handed to the thread that reads
                failures.append(error)
                streamer.end()

    thread = threading.Thread(target=generate, name="generate")
    thread.start()
    try:
        yield from streamer
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]
