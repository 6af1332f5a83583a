"""`libra bench`: its numbers are what they say. Nothing here depends on how long anything takes."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from libra_cli.bench import counts, figures
from libra_cli.bench.counts import Rows
from libra_cli.bench.figures import Figure, measure_figures
from libra_cli.bench.measure import WARM_UP_PAIRS, Run, Workload, better_run, cache_bytes, time_pairs
from libra_cli.bench.memory import LiveTensors
from libra_cli.bench.models import BOS, NEWLINE, build_libra, build_llama, build_prompt, libra_config, split_evenly
from libra_cli.bench.naive import largest_difference, naive_forward
from libra_cli.bench.report import format_table
from libra_cli.bench.settings import BARS, BenchSettings, Shape
from libra_cli.main import main
from modeling_libra import LibraConfig
from modeling_libra.cache_libra import CACHE_NAME

TINY = BenchSettings(
    shape=Shape(32, 48, 2),
    wide_shape=Shape(64, 48, 1),
    vocab_size=50,
    num_heads=4,
    feature_size=10,
    image_grid=2,
    num_tokens=16,
    memory_tokens=30,
    memory_images=3,
    threads=1,
    pairs=1,
    runs=2,
)
# Wide enough for the bridge to be a small part of the work, as it is at the sizes of the bars.
SMALL = replace(
    TINY, shape=Shape(512, 1376, 2), vocab_size=300, feature_size=128, image_grid=6, num_tokens=60, memory_tokens=120
)
ROWS = Rows(SMALL.num_tokens - SMALL.image_tokens, SMALL.image_tokens)
NEAR = 0.01
"""How far the model may be from its count: it may make bridge terms that nothing reads."""


@pytest.fixture(scope="module")
def libra():
    return build_libra(SMALL, SMALL.shape)


@pytest.fixture(scope="module")
def llama():
    return build_llama(SMALL, SMALL.shape)


@pytest.fixture(scope="module")
def image_prompt(libra):
    return build_prompt(libra.config, [5, ROWS.text - 5], seed=0)


@pytest.fixture(scope="module")
def text_ids(libra):
    return build_prompt(libra.config, [SMALL.num_tokens], seed=0).input_ids


def multiply_adds(run) -> tuple[int, int]:
    """
    Multiply-adds of `run`: in products with weights, and in attention over the whole square of positions. Attention is
    made to run as plain products, which the counter knows.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    by_operation = counter.get_flop_counts()["Global"]
    products = by_operation.pop(torch.ops.aten.bmm)
    assert set(by_operation) <= {torch.ops.aten.mm, torch.ops.aten.addmm}
    return sum(by_operation.values()) // 2, products // 2


@pytest.fixture(scope="module")
def rotary_products(llama) -> int:
    """Multiply-adds of the rotary embedding, once a forward: earlier transformers multiply positions as a matrix."""
    with FlopCounterMode(display=False) as counter:
        llama.model.rotary_emb(torch.zeros(1), torch.arange(SMALL.num_tokens)[None])
    return counter.get_total_flops() // 2


def causal_part(square: int) -> float:
    """What is on and under the diagonal."""
    return square * (SMALL.num_tokens + 1) / (2 * SMALL.num_tokens)


# Counts


def test_llama_forward_is_counted_exactly(llama, text_ids, libra, rotary_products):
    linear, attention = multiply_adds(torch.no_grad()(lambda: llama(text_ids, logits_to_keep=1)))
    one_attention = counts.causal_attention(libra.config, SMALL.num_tokens)
    assert causal_part(attention - rotary_products) == one_attention
    assert linear == counts.llama_forward(libra.config, SMALL.num_tokens) - one_attention


def test_llama_training_step_is_counted_exactly(llama, text_ids, libra, rotary_products):
    linear, attention = multiply_adds(lambda: llama(text_ids, labels=text_ids).loss.backward())
    llama.zero_grad()
    attentions = 3 * counts.causal_attention(libra.config, SMALL.num_tokens)
    assert causal_part(attention - rotary_products) == attentions
    assert linear == counts.llama_training_step(libra.config, SMALL.num_tokens) - attentions


def test_naive_form_is_counted_exactly(libra, image_prompt, rotary_products):
    linear, attention = multiply_adds(torch.no_grad()(lambda: naive_forward(libra, *image_prompt)))
    two_attentions = 2 * counts.causal_attention(libra.config, SMALL.num_tokens)
    assert causal_part(attention - rotary_products) == two_attentions
    assert linear == counts.naive_forward(libra.config, ROWS) - two_attentions


@pytest.mark.parametrize("kind", ["image", "text"])
def test_libra_prefill_is_counted(libra, image_prompt, text_ids, kind):
    rows = ROWS if kind == "image" else Rows(SMALL.num_tokens, 0)
    inputs = image_prompt._asdict() if kind == "image" else {"input_ids": text_ids}
    linear, _ = multiply_adds(torch.no_grad()(lambda: libra(**inputs, use_cache=True, logits_to_keep=1)))
    counted = counts.libra_forward(libra.config, rows) - counts.causal_attention(libra.config, SMALL.num_tokens)
    assert linear == pytest.approx(counted, rel=NEAR)


def test_libra_pretraining_step_is_counted():
    libra = build_libra(SMALL, SMALL.shape).train()
    for name, parameter in libra.named_parameters():
        parameter.requires_grad_("vision" in name)
    ids, features = build_prompt(libra.config, [1, ROWS.text - 1], seed=0)
    linear, _ = multiply_adds(lambda: libra(input_ids=ids, image_features=features, labels=ids).loss.backward())
    counted = counts.libra_pretraining_step(libra.config, ROWS.vision, ROWS.text - 1)
    counted -= 3 * counts.causal_attention(libra.config, SMALL.num_tokens)
    assert linear == pytest.approx(counted, rel=0.04)  # BOS, and what is before the first trained weight, may come back


def test_expert_at_full_size():
    config = LibraConfig()
    assert counts.expert_layer(config) / counts.language_layer(config) == pytest.approx(0.653, abs=0.001)


def test_a_row_costs_one_multiply_add_a_weight(libra, llama):
    layers = SMALL.shape.num_layers
    matrices = sum(p.numel() for p in llama.model.layers.parameters() if p.ndim == 2)
    assert layers * counts.language_layer(libra.config) == matrices
    matrices = sum(p.numel() for p in libra.model.vision_model.layers.parameters() if p.ndim == 2)
    per_row = counts.expert_layer(libra.config) + 2 * counts.bridge_layer(libra.config)  # a row meets half the bridge
    assert layers * per_row == matrices
    assert counts.vision_heads(libra.config) == sum(p.numel() for p in libra.vision_lm_head.parameters())


def test_bytes_of_the_step_and_of_the_caches(libra, llama, text_ids, image_prompt):
    ours, bare, naive = counts.cache_floor(libra.config, SMALL.num_tokens)
    cache = llama(text_ids, use_cache=True, logits_to_keep=1)[CACHE_NAME]
    assert cache_bytes(cache) == bare
    assert cache_bytes(naive_forward(libra, *image_prompt)[1]) == naive
    assert ours == bare + SMALL.num_tokens * SMALL.shape.num_layers * 2 * libra.config.bridge_rank * 4
    read = sum(p.numel() for p in llama.parameters() if p.ndim == 2) - llama.model.embed_tokens.weight.numel()
    assert counts.step_floor(libra.config, SMALL.num_tokens)[1] == 4 * read + bare


@torch.no_grad()
def test_memory_of_the_bare_prefill_is_counted(llama, text_ids, libra):
    with LiveTensors() as live:
        llama(text_ids, use_cache=True, logits_to_keep=1)
    _, bare = counts.prefill_memory_floor(libra.config, Rows(SMALL.num_tokens, 0))
    assert live.peak == pytest.approx(bare, rel=0.01)  # positions and such


# The naive form


def test_naive_form_equals_the_model(libra, image_prompt, text_ids):
    assert largest_difference(libra, *image_prompt, step_id=5) < 1e-5
    assert largest_difference(libra, text_ids, None, step_id=5) < 1e-5


def test_naive_form_needs_every_weight_of_the_bridge(libra, image_prompt):
    """The comparison would see a bridge that is left out."""
    attention = libra.model.vision_model.layers[1].self_attn
    for name in ("k_bridge_on_language", "k_bridge_on_vision", "v_bridge_on_language", "v_bridge_on_vision"):
        weight = getattr(attention, name).B.weight
        before, _ = naive_forward(libra, *image_prompt)
        with torch.no_grad():
            kept = weight.clone()
            weight.zero_()
            after, _ = naive_forward(libra, *image_prompt)
            weight.copy_(kept)
        assert not torch.equal(before, after)


def test_figures_refuse_a_naive_form_that_differs(monkeypatch):
    monkeypatch.setattr(figures, "largest_difference", lambda *args, **kwargs: float("nan"))
    with pytest.raises(RuntimeError, match="differ by nan"):
        measure_figures(TINY, ["naive-cache"])


# Measuring


def test_ratio_is_that_of_the_medians():
    run = Run(ours=(1.0, 9.0, 2.0), baseline=(4.0, 4.0, 100.0))
    assert run.ratio == 0.5
    worse = Run(ours=(3.0, 3.0, 3.0), baseline=(4.0, 4.0, 4.0))
    assert better_run([worse, run]) is run
    assert Figure("decode", "", "bare LLM", "seconds", (worse, run), 1.0, None).ratio == 0.5


def test_pairs_take_turns_without_the_garbage_collector():
    events, collector = [], set()

    def workload(name):
        def run():
            collector.add(gc.isenabled())
            events.append(name)

        return Workload(run, reset=lambda: events.append(f"{name} reset"))

    run = time_pairs(workload("ours"), workload("baseline"), pairs=3)
    assert events == ["ours", "ours reset", "baseline", "baseline reset"] * (WARM_UP_PAIRS + 3)
    assert len(run.ours) == len(run.baseline) == 3
    assert gc.isenabled()
    assert False in collector


def test_garbage_collector_comes_back_after_an_error():
    calls = iter(range(WARM_UP_PAIRS))
    with pytest.raises(StopIteration):
        time_pairs(Workload(lambda: next(calls)), Workload(lambda: None), pairs=1)
    assert gc.isenabled()


def test_cache_bytes_count_storages_once_and_in_full():
    whole = torch.zeros(10, 3)

    class Layer:
        def __init__(self):
            self.keys = whole[:2]
            self.values = {"plain": whole, "latents": [torch.zeros(4, dtype=torch.float16)]}
            self.owner = self  # must not go round in circles

    assert cache_bytes([Layer(), (whole,)]) == 120 + 8


def test_live_tensors_count_what_is_alive():
    before = torch.zeros(100)
    with LiveTensors() as live:
        view = before[10:] + 0  # 360 bytes
        assert live.peak == 360
        del view
        first = torch.zeros(50)  # 200 bytes
        second = first * 2  # 200 bytes
        assert live.peak == 400
        alias = second.view(5, 10)
        del second
        third = torch.zeros(25)  # 100 bytes; the storage of `second` lives on
        assert live.peak == 500
        before.add_(1)
        assert live.peak == 500
    assert alias.sum() + third.sum() == 0


def test_live_tensors_keep_nothing_alive():
    with LiveTensors() as live:
        gone = weakref.ref(torch.zeros(1000).untyped_storage())
        torch.zeros(10)
    assert gone() is None
    assert live.peak == 4000


# Prompts


def test_prompt():
    config = build_libra(TINY, TINY.shape).config
    ids, features = build_prompt(config, [2, 3, 1], seed=0)
    patches = config.num_patches
    image = [config.boi_token_id, *[-1] * patches, config.eoi_token_id]
    ids = ids[0].tolist()
    is_code = [config.text_vocab_size <= i < config.boi_token_id for i in ids]
    assert [-1 if code else i for code, i in zip(is_code, ids)] == [
        *[BOS, ids[1], *image], *[NEWLINE, *ids[patches + 5 : patches + 7], *image], NEWLINE,
    ]  # fmt: skip
    assert features.shape == (2, patches, config.feature_size)
    assert build_prompt(config, [4], seed=0).image_features is None


def test_split_evenly():
    assert split_evenly(628, 7) == [90] * 5 + [89] * 2


# The command

ARGUMENTS = [
    "bench", "--shape", "32x48x2", "--wide-shape", "64x48x1", "--vocab-size", "50", "--num-heads", "4",
    "--feature-size", "10", "--image-grid", "2", "--num-tokens", "16", "--memory-tokens", "30",
    "--memory-images", "3", "--threads", "1", "--pairs", "1", "--runs", "2",
]  # fmt: skip


def test_command(tmp_path, capsys):
    threads = torch.get_num_threads()
    path = tmp_path / "bench.json"
    assert main([*ARGUMENTS, "--json", str(path)]) == 0
    assert torch.get_num_threads() == threads
    report = json.loads(path.read_text(encoding="utf-8"))
    assert set(report) == {"date", "machine", "versions", "settings", "figures"}
    assert set(report["machine"]) == {"cpu", "cores", "ram_bytes", "system"}
    assert set(report["versions"]) == {"python", "torch", "transformers"}
    settings = report["settings"]
    assert {name: settings[name] for name in TINY.to_dict()} == TINY.to_dict()
    assert settings["dtype"] == "float32"

    assert [figure["name"] for figure in report["figures"]] == list(BARS)
    for figure in report["figures"]:
        runs = 2 if figure["unit"] == "seconds" else 1
        assert len(figure["runs"]) == runs
        assert figure["ratio"] == min(run["ratio"] for run in figure["runs"])
        assert figure["ratio"] == figure["ours"] / figure["baseline"]
        assert all(number > 0 for run in figure["runs"] for number in (*run["ours"], *run["baseline"]))
        assert 0 < figure["floor"] < 1.5
        assert figure["bar"] is None  # other sizes than those of the bars
    memory, pretrain = (report["figures"][list(BARS).index(name)] for name in ("memory", "pretrain"))
    config = libra_config(TINY, TINY.shape)
    _, counted = counts.prefill_memory_floor(config, Rows(TINY.memory_tokens, 0))
    assert memory["baseline"] == pytest.approx(counted, rel=0.05)
    assert set(memory["details"]["resident"]) == {"ours", "baseline", "ratio"}
    trained = pretrain["details"]["trained_parameters"]
    assert trained["ours"] == sum(
        parameter.numel() for name, parameter in build_libra(TINY, TINY.shape).named_parameters() if "vision" in name
    )
    assert trained["baseline"] == sum(parameter.numel() for parameter in build_llama(TINY, TINY.shape).parameters())

    table = capsys.readouterr().out
    assert all(figure["title"] in table for figure in report["figures"])
    assert "The naive form over Libra: prefill" in table


def test_only_some_figures(capsys):
    assert main([*ARGUMENTS, "--only", "naive-cache", "cache"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n| cache of") == 2
    assert "[1/2] cache ..." in captured.err


def test_every_figure_has_a_measure():
    assert list(figures._MEASURES) == list(BARS)


def test_bars_hold_for_the_default_sizes():
    assert BenchSettings(pairs=1, runs=1, seed=3).bar("prefill") == BARS["prefill"]
    assert BenchSettings(num_tokens=700).bar("prefill") is None


def test_table_marks_missed_bars():
    met = Figure("decode", "step", "bare LLM", "seconds", (Run((0.001,), (0.002,)),), 0.4, 1.05)
    missed = replace(met, name="text", title="text", runs=(Run((0.003,), (0.002,)),), bar=1.02)
    lines = format_table([met, missed]).splitlines()
    assert lines[2] == "| step | 1.0 ms | bare LLM | 2.0 ms | 0.500 | 0.400 | 1.05 |"
    assert lines[3].endswith("| 1.500 | 0.400 | 1.02 (missed) |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-tokens", "8"], "needs at least 9"),
        (["--memory-tokens", "21"], "needs at least 22"),
        (["--num-heads", "5"], "multiple of 10"),
        (["--json", "absent/bench.json"], "absent/bench.json cannot be written"),
    ],
)
def test_sizes_that_do_not_fit(arguments, message, capsys):
    assert main([*ARGUMENTS, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [["--shape", "32x48"], ["--shape", "32x0x2"], ["--only", "speed"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        main([*ARGUMENTS, *arguments])
    assert "usage: libra bench" in capsys.readouterr().err


def test_unknown_figure():
    with pytest.raises(ValueError, match="no figure speed"):
        measure_figures(TINY, ["speed"])
