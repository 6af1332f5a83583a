"""Many images: batches change nothing but the memory, which holds the result and the activations of one batch."""

import pytest
import torch
from transformers import AttentionInterface, CLIPVisionConfig, CLIPVisionModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from processing.modeling_libra_image_tokenizer import DECODE_BATCH_SIZE, ENCODE_BATCH_SIZE, LibraImageTokenizer
from processing.processing_libra import LibraProcessor
from tests.live_memory import LiveMemory
from tests.processing.conftest import TINY_CLIP, TINY_TOKENIZER, make_image_tokenizer


def make_pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def make_codes(count: int) -> torch.Tensor:
    return torch.randint(16, (count, 16, 2), generator=torch.Generator().manual_seed(1))


# ---- the same results ----


@pytest.fixture
def exact_tokenizer(image_tokenizer) -> LibraImageTokenizer:
    """In float64, as kernels round differently for other numbers of images (5e-6 in the decoder in float32)."""
    return image_tokenizer.double()


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_encoding_in_batches_is_encoding_at_once(exact_tokenizer, batch_size):
    pixel_values = make_pixels(5)
    expected = exact_tokenizer.encode(pixel_values, batch_size=5)
    codes, features = exact_tokenizer.encode(pixel_values, batch_size=batch_size)
    assert torch.equal(codes, expected.codes)
    torch.testing.assert_close(features, expected.features, atol=1e-12, rtol=0)
    assert torch.equal(exact_tokenizer.features(pixel_values, batch_size=batch_size), features)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_decoding_in_batches_is_decoding_at_once(exact_tokenizer, batch_size):
    codes = make_codes(5)
    pixels = exact_tokenizer.decode(codes, batch_size=batch_size)
    torch.testing.assert_close(pixels, exact_tokenizer.decode(codes, batch_size=5), atol=1e-12, rtol=0)


def test_more_images_than_the_default_batches(exact_tokenizer):
    pixel_values = make_pixels(ENCODE_BATCH_SIZE + 3)
    codes, features = exact_tokenizer.encode(pixel_values)
    pixels = exact_tokenizer.decode(codes)
    for index in (0, ENCODE_BATCH_SIZE - 1, ENCODE_BATCH_SIZE, ENCODE_BATCH_SIZE + 2):
        alone = exact_tokenizer.encode(pixel_values[index, None])
        assert torch.equal(alone.codes[0], codes[index])
        torch.testing.assert_close(alone.features[0], features[index], atol=1e-12, rtol=0)
        torch.testing.assert_close(exact_tokenizer.decode(alone.codes)[0], pixels[index], atol=1e-12, rtol=0)


@pytest.mark.parametrize("select_layers", [[3, 0, 1], [2, 2], [0], [4]])
def test_selected_layers_in_any_order(select_layers):
    torch.manual_seed(0)
    clip = CLIPVisionModel(CLIPVisionConfig(**TINY_CLIP)).eval()
    tokenizer = LibraImageTokenizer.from_clip(clip, **{**TINY_TOKENIZER, "select_layers": select_layers})
    states = clip(make_pixels(3), output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer][:, 1:] for layer in select_layers], dim=-1)
    torch.testing.assert_close(tokenizer.features(make_pixels(3), batch_size=2), expected, atol=1e-6, rtol=1e-6)


def test_no_images(image_tokenizer):
    codes, features = image_tokenizer.encode(make_pixels(0))
    assert (codes.shape, codes.dtype) == ((0, 16, 2), torch.int64)
    assert features.shape == (0, 16, 64)
    assert image_tokenizer.decode(codes).shape == (0, 3, 32, 32)


# ---- what runs ----


def test_clip_runs_no_deeper_than_the_deepest_selected_layer():
    tokenizer = make_image_tokenizer(select_layers=[3, 1])
    runs = []
    for depth, layer in enumerate(tokenizer.clip.encoder.layers, start=1):
        layer.register_forward_hook(lambda *_, depth=depth: runs.append(depth))
    tokenizer.encode(make_pixels(24), batch_size=4)
    assert runs == [1, 2, 3] * 6


def test_the_attention_that_was_asked_for_runs(image_tokenizer, tmp_path):
    calls = []

    def counting_attention(module, query, *args, **kwargs):
        calls.append(len(query))
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("counting", counting_attention)
    image_tokenizer.save_pretrained(tmp_path)
    tokenizer = LibraImageTokenizer.from_pretrained(tmp_path, attn_implementation="counting").eval()
    features = tokenizer.features(make_pixels(5), batch_size=2)
    assert calls == [2, 2, 2, 2, 2, 2, 1, 1, 1]  # three layers, three batches
    tokenizer.set_attn_implementation("eager")
    torch.testing.assert_close(tokenizer.features(make_pixels(5)), features, atol=1e-5, rtol=1e-5)
    assert len(calls) == 9


def test_hidden_states_are_computed_when_asked_for_and_pass_gradients(image_tokenizer):
    pixel_values = make_pixels(2).requires_grad_()
    runs = []
    image_tokenizer.clip.encoder.layers[2].register_forward_hook(lambda *_: runs.append(3))
    states = image_tokenizer.clip_hidden_states(pixel_values)
    next(states)
    second = next(states)
    assert second.shape == (2, 17, 32)
    second.square().mean().backward()
    assert pixel_values.grad.abs().sum() > 0
    assert len([*states]) == 2
    assert runs == [3]


# ---- refusals, before anything runs ----


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_sizes_below_one_are_refused(image_tokenizer, batch_size):
    for method, inputs in (
        (image_tokenizer.features, make_pixels(1)),
        (image_tokenizer.encode, make_pixels(1)),
        (image_tokenizer.decode, make_codes(1)),
    ):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
            method(inputs, batch_size=batch_size)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_broken_last_image_is_refused_before_the_first_one_runs(image_tokenizer, value):
    pixel_values = make_pixels(4)
    pixel_values[3, 1, 2, 3] = float(value)
    image_tokenizer.clip.register_forward_pre_hook(lambda *_: pytest.fail("CLIP ran"))
    image_tokenizer.clip.embeddings.register_forward_pre_hook(lambda *_: pytest.fail("CLIP ran"))
    with pytest.raises(ValueError, match=r"images \[3\] contain NaN or infinite"):
        image_tokenizer.encode(pixel_values, batch_size=1)


def test_a_wrong_code_of_the_last_image_is_refused_before_the_first_one_runs(image_tokenizer):
    codes = make_codes(4)
    codes[3, 0, 0] = 16
    image_tokenizer.decoder.register_forward_pre_hook(lambda *_: pytest.fail("the decoder ran"))
    with pytest.raises(ValueError, match=r"must be in \[0, 16\), got values from \d+ to 16"):
        image_tokenizer.decode(codes, batch_size=1)


# ---- memory ----


def measure(function, *inputs, **options) -> tuple[int, int]:
    """Bytes of the result, and the most bytes that were alive beside a result of that size."""
    with LiveMemory() as memory:
        result = function(*inputs, **options)
        size = memory.live
    expected = [result] if torch.is_tensor(result) else result
    assert size == sum(tensor.untyped_storage().nbytes() for tensor in expected)  # nothing else is left
    return size, memory.peak - size


@pytest.mark.parametrize(
    ("method", "inputs"), [("features", make_pixels), ("encode", make_pixels), ("decode", make_codes)]
)
def test_memory_is_the_result_and_one_batch(image_tokenizer, method, inputs):
    function = getattr(image_tokenizer, method)
    size_of_4, beside_4 = measure(function, inputs(4), batch_size=4)
    size_of_24, beside_24 = measure(function, inputs(24), batch_size=4)
    assert size_of_24 == 6 * size_of_4
    assert beside_24 <= beside_4
    _, at_once = measure(function, inputs(24), batch_size=24)
    assert at_once > 5 * beside_4  # the count sees activations


def test_memory_of_encoding_does_not_depend_on_the_depth_of_clip():
    clip_config = {**TINY_CLIP, "num_hidden_layers": 12}
    besides = []
    for depth in (3, 12):
        clip = CLIPVisionModel(CLIPVisionConfig(**clip_config)).eval()
        tokenizer = LibraImageTokenizer.from_clip(clip, **{**TINY_TOKENIZER, "select_layers": [1, depth]})
        besides.append(measure(tokenizer.encode, make_pixels(4))[1])
    assert besides[0] == besides[1]


def image_rows(processor: LibraProcessor, count: int) -> torch.Tensor:
    """Ids (count, patches + 2) of images whose codes are all the first one."""
    ids = torch.full((count, processor.num_image_tokens), processor.text_vocab_size)
    ids[:, 0], ids[:, -1] = processor.boi_token_id, processor.eoi_token_id
    return ids


def test_the_processor_tokenizes_batch_by_batch(processor):
    def beside_the_features(count: int) -> int:
        size = processor.image_tokenizer.config.vision_config.image_size
        batch = {"input_ids": image_rows(processor, count), "pixel_values": torch.zeros(count, 3, size, size)}
        with LiveMemory() as memory:
            features = processor.tokenize_images(batch)["image_features"]
        assert len(features) == count
        return memory.peak - features.nbytes

    # what grows are ids, codes and the flags of the range checks
    assert beside_the_features(4 * ENCODE_BATCH_SIZE) < 1.1 * beside_the_features(ENCODE_BATCH_SIZE)


def test_the_processor_draws_batch_by_batch(processor):
    def peak(count: int) -> int:
        with LiveMemory() as memory:
            images = processor.post_process_multimodal_output(image_rows(processor, count), generation_mode="image")
        assert len(images) == count
        return memory.peak

    # not even the pixels of all images live at once
    assert peak(4 * DECODE_BATCH_SIZE) < 1.05 * peak(DECODE_BATCH_SIZE)
