"""The figures: each a ratio of Libra to a baseline, with its counted floor and its bar."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from modeling_libra import LibraForCausalLM
from modeling_libra.cache_libra import CACHE_NAME

from . import counts
from .counts import Rows
from .measure import Run, Workload, better_run, cache_bytes, time_pairs
from .memory import measure_prefill_memory
from .models import Prompt, build_libra, build_llama, build_prompt, libra_config
from .naive import largest_difference, naive_forward
from .settings import BARS, BenchSettings, Shape

NAIVE_TOLERANCE = 1e-3
"""Largest difference of a logit between the model and the naive form; both are float32 and of the order of 1."""


@dataclass(frozen=True)
class Figure:
    """
    One measured ratio.

    Args:
        name (`str`): a key of `BARS`.
        title (`str`): what was measured.
        baseline (`str`): what it was measured against.
        unit (`str`): `"seconds"` or `"bytes"`.
        runs (`tuple` of [`Run`]): the measurements.
        floor (`float`): ratio of the counted work, see `counts`.
        bar (`float` or `None`): largest ratio allowed.
        details (`dict`): further numbers worth keeping.
    """

    name: str
    title: str
    baseline: str
    unit: str
    runs: tuple[Run, ...]
    floor: float
    bar: float | None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Run:
        """[`Run`]: the one that counts."""
        return better_run(self.runs)

    @property
    def ratio(self) -> float:
        """`float`: of the better run."""
        return self.best.ratio


def measure_figures(settings: BenchSettings, names: Sequence[str] | None = None) -> list[Figure]:
    """
    Measures figures one after the other; progress goes to stderr.

    Args:
        settings ([`BenchSettings`]): sizes and repetitions.
        names (`Sequence` of `str`, *optional*): keys of `BARS`; all of them when absent.

    Returns:
        `list` of [`Figure`], in the order of `BARS`.

    Raises:
        ValueError: for a name that is none of them.
    """
    unknown = sorted(set(names or ()) - set(BARS))
    if unknown:
        raise ValueError(f"There is no figure {', '.join(unknown)}; choose from {', '.join(BARS)}.")
    chosen = [name for name in BARS if names is None or name in names]
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    figures = []
    try:
        for number, name in enumerate(chosen, start=1):
            print(f"[{number}/{len(chosen)}] {name} ...", end=" ", file=sys.stderr, flush=True)
            figures.append(_MEASURES[name](settings))
            print(f"{figures[-1].ratio:.3f}", file=sys.stderr, flush=True)
    finally:
        torch.set_num_threads(threads)
        _build_pair.cache_clear()
    return figures


@dataclass(frozen=True)
class _Pair:
    """Libra and the bare language model of the same dimensions."""

    libra: Any
    llama: Any


@lru_cache(maxsize=1)  # figures of one shape share their models; two shapes never live together
def _build_pair(settings: BenchSettings, shape: Shape) -> _Pair:
    return _Pair(build_libra(settings, shape), build_llama(settings, shape))


def _time(settings: BenchSettings, ours: Workload, baseline: Workload) -> tuple[Run, ...]:
    return tuple(time_pairs(ours, baseline, settings.pairs) for _ in range(settings.runs))


def _rows(settings: BenchSettings) -> Rows:
    return Rows(settings.num_tokens - settings.image_tokens, settings.image_tokens)


def _image_prompt(settings: BenchSettings, config) -> Prompt:
    """The image in the middle of the text."""
    text = _rows(settings).text
    return build_prompt(config, [text // 2, text - text // 2], settings.seed)


def _text_prompt(settings: BenchSettings, config) -> Prompt:
    return build_prompt(config, [settings.num_tokens], settings.seed)


@torch.no_grad()
def _prefill(model: nn.Module, prompt: Prompt):
    """A forward that fills a fresh cache and gives the last row's logits, as `generate()` begins."""
    features = {} if prompt.image_features is None else {"image_features": prompt.image_features}
    return model(input_ids=prompt.input_ids, use_cache=True, logits_to_keep=1, **features)


def _prefill_figure(name: str, settings: BenchSettings, shape: Shape) -> Figure:
    pair = _build_pair(settings, shape)
    config = pair.libra.config
    image, text = _image_prompt(settings, config), _text_prompt(settings, config)
    runs = _time(settings, Workload(lambda: _prefill(pair.libra, image)), Workload(lambda: _prefill(pair.llama, text)))
    floor = counts.libra_forward(config, _rows(settings)) / counts.llama_forward(config, settings.num_tokens)
    title = f"prefill of {settings.num_tokens} tokens, one image, {shape}"
    return Figure(name, title, "bare LLM", "seconds", runs, floor, settings.bar(name))


def _measure_prefill(settings: BenchSettings) -> Figure:
    return _prefill_figure("prefill", settings, settings.shape)


def _measure_wide_prefill(settings: BenchSettings) -> Figure:
    return _prefill_figure("prefill-wide", settings, settings.wide_shape)


def _step_workload(model: nn.Module, prompt: Prompt) -> Workload:
    """One text token after the prompt; the cache is cropped back each time."""
    cache = _prefill(model, prompt)[CACHE_NAME]
    step = torch.tensor([[5]])

    @torch.no_grad()
    def run():
        return model(input_ids=step, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)

    return Workload(run, reset=lambda: cache.crop(-1))


def _measure_decode(settings: BenchSettings) -> Figure:
    pair = _build_pair(settings, settings.shape)
    config = pair.libra.config
    ours = _step_workload(pair.libra, _image_prompt(settings, config))
    runs = _time(settings, ours, _step_workload(pair.llama, _text_prompt(settings, config)))
    libra, llama, _ = counts.step_floor(config, settings.num_tokens)
    title = f"decoding step after {settings.num_tokens} tokens, {settings.shape}"
    return Figure("decode", title, "bare LLM", "seconds", runs, libra / llama, settings.bar("decode"))


def _measure_cache(settings: BenchSettings) -> Figure:
    pair = _build_pair(settings, settings.shape)
    config = pair.libra.config
    ours = cache_bytes(_prefill(pair.libra, _image_prompt(settings, config))[CACHE_NAME])
    bare = cache_bytes(_prefill(pair.llama, _text_prompt(settings, config))[CACHE_NAME])
    libra, llama, _ = counts.cache_floor(config, settings.num_tokens)
    title = f"cache of {settings.num_tokens} tokens, {settings.shape}"
    return Figure("cache", title, "bare LLM", "bytes", (Run((ours,), (bare,)),), libra / llama, settings.bar("cache"))


def _measure_memory(settings: BenchSettings) -> Figure:
    ours, bare = measure_prefill_memory(settings)
    config = libra_config(settings, settings.shape)
    vision = settings.memory_images * settings.image_tokens
    libra, llama = counts.prefill_memory_floor(config, Rows(settings.memory_tokens - vision, vision))
    details: dict[str, Any] = {"resident": {"ours": ours.resident, "baseline": bare.resident, "ratio": None}}
    if ours.resident is not None and bare.resident:
        details["resident"]["ratio"] = ours.resident / bare.resident
    images = f"{settings.memory_images} images"
    title = f"peak memory of a prefill of {settings.memory_tokens} tokens, {images}, {settings.shape}"
    run, floor = Run((ours.tensors,), (bare.tensors,)), libra / llama
    return Figure("memory", title, "bare LLM", "bytes", (run,), floor, settings.bar("memory"), details)


def _training_workload(model: nn.Module, inputs: dict[str, Any]) -> Workload:
    """Forward, backward and a step of AdamW (the Trainer's, fused) over what is trainable."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True)

    def run():
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Workload(run)


def _pretraining_inputs(settings: BenchSettings, config) -> dict[str, Any]:
    """BOS, image, newline, caption. The loss itself leaves out what pretraining never supervises."""
    prompt = build_prompt(config, [1, _rows(settings).text - 1], settings.seed)
    return {"input_ids": prompt.input_ids, "image_features": prompt.image_features, "labels": prompt.input_ids}


def _measure_pretrain(settings: BenchSettings) -> Figure:
    _build_pair.cache_clear()  # training changes weights and holds gradients: models of its own, and no others beside
    libra, llama = build_libra(settings, settings.shape).train(), build_llama(settings, settings.shape).train()
    for name, parameter in libra.named_parameters():
        parameter.requires_grad_("vision" in name)
    ids = _text_prompt(settings, libra.config).input_ids
    ours = _training_workload(libra, _pretraining_inputs(settings, libra.config))
    runs = _time(settings, ours, _training_workload(llama, {"input_ids": ids, "labels": ids}))
    rows = _rows(settings)
    work = counts.libra_pretraining_step(libra.config, rows.vision, rows.text - 1)
    floor = work / counts.llama_training_step(libra.config, settings.num_tokens)
    details = {"trained_parameters": {"ours": _trained(libra), "baseline": _trained(llama)}}
    title = f"pretraining step on {settings.num_tokens} tokens, LLM frozen, {settings.shape}"
    baseline = "bare LLM, trained in full"
    return Figure("pretrain", title, baseline, "seconds", runs, floor, settings.bar("pretrain"), details)


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _measure_text(settings: BenchSettings) -> Figure:
    pair = _build_pair(settings, settings.shape)
    text = _text_prompt(settings, pair.libra.config)
    runs = _time(settings, Workload(lambda: _prefill(pair.libra, text)), Workload(lambda: _prefill(pair.llama, text)))
    work = counts.libra_forward(pair.libra.config, Rows(settings.num_tokens, 0))
    floor = work / counts.llama_forward(pair.libra.config, settings.num_tokens)
    title = f"prefill of {settings.num_tokens} tokens of text, {settings.shape}"
    return Figure("text", title, "bare LLM", "seconds", runs, floor, settings.bar("text"))


def _checked_libra(settings: BenchSettings) -> tuple[LibraForCausalLM, Prompt]:
    """The model and the prompt of the naive figures, once the naive form gives what the model gives."""
    libra = _build_pair(settings, settings.shape).libra
    prompt = _image_prompt(settings, libra.config)
    difference = largest_difference(libra, *prompt, step_id=5)
    if not difference <= NAIVE_TOLERANCE:  # so written that NaN is refused
        raise RuntimeError(
            f"The naive form and the model differ by {difference:.2g} in a logit, more than {NAIVE_TOLERANCE}; timing "
            "them against each other would mean nothing. One of the two is wrong."
        )
    return libra, prompt


def _measure_naive_prefill(settings: BenchSettings) -> Figure:
    libra, prompt = _checked_libra(settings)
    naive = torch.no_grad()(lambda: naive_forward(libra, *prompt))
    runs = _time(settings, Workload(lambda: _prefill(libra, prompt)), Workload(naive))
    floor = counts.libra_forward(libra.config, _rows(settings)) / counts.naive_forward(libra.config, _rows(settings))
    title = f"prefill of {settings.num_tokens} tokens, one image, {settings.shape}"
    return Figure("naive-prefill", title, "naive form", "seconds", runs, floor, settings.bar("naive-prefill"))


def _measure_naive_decode(settings: BenchSettings) -> Figure:
    libra, prompt = _checked_libra(settings)
    with torch.no_grad():
        _, cache = naive_forward(libra, *prompt)
    step = torch.tensor([[5]])
    naive = torch.no_grad()(lambda: naive_forward(libra, step, cache=cache))  # returns a new cache: nothing to crop
    runs = _time(settings, _step_workload(libra, prompt), Workload(naive))
    ours, _, both_views = counts.step_floor(libra.config, settings.num_tokens)
    title = f"decoding step after {settings.num_tokens} tokens, {settings.shape}"
    return Figure("naive-decode", title, "naive form", "seconds", runs, ours / both_views, settings.bar("naive-decode"))


def _measure_naive_cache(settings: BenchSettings) -> Figure:
    libra, prompt = _checked_libra(settings)
    with torch.no_grad():
        _, cache = naive_forward(libra, *prompt)
    run = Run((cache_bytes(_prefill(libra, prompt)[CACHE_NAME]),), (cache_bytes(cache),))
    ours, _, both_views = counts.cache_floor(libra.config, settings.num_tokens)
    title = f"cache of {settings.num_tokens} tokens, {settings.shape}"
    return Figure("naive-cache", title, "naive form", "bytes", (run,), ours / both_views, settings.bar("naive-cache"))


_MEASURES: dict[str, Callable[[BenchSettings], Figure]] = {
    "prefill": _measure_prefill,
    "prefill-wide": _measure_wide_prefill,
    "decode": _measure_decode,
    "cache": _measure_cache,
    "memory": _measure_memory,
    "pretrain": _measure_pretrain,
    "text": _measure_text,
    "naive-prefill": _measure_naive_prefill,
    "naive-decode": _measure_naive_decode,
    "naive-cache": _measure_naive_cache,
}
