"""Reading the flat ids: image blocks are found, broken ones are refused by name, codes map to codebook entries."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_libra.conversion_libra import convert_ids
from modeling_libra.image_blocks_libra import check_image_blocks, codebook_entries, find_image_blocks
from tests.modeling.toys import NEWLINE, make_config, make_features, make_image, make_rows, pad

CONFIG = make_config()
CODE, BOI, EOI = CONFIG.text_vocab_size, CONFIG.boi_token_id, CONFIG.eoi_token_id
IMAGE = make_image(CONFIG)


def to_released(ids: torch.Tensor, config) -> torch.Tensor:
    """Flat ids `(batch, length)` in the released format `(codebooks, batch, length)`."""
    is_vision = ids >= config.text_vocab_size
    entries = codebook_entries(ids.where(is_vision, config.text_vocab_size), config) + config.text_vocab_size
    return torch.where(is_vision[..., None], entries, ids[..., None]).movedim(-1, 0)


def test_blocks_of_a_batch():
    input_ids, _ = pad(make_rows(CONFIG))
    blocks = find_image_blocks(input_ids, CONFIG)
    assert blocks.images_per_row.tolist() == [2, 0, 1]
    is_code = (input_ids >= CODE) & (input_ids < BOI)
    assert torch.equal(blocks.featured, is_code)
    row = input_ids[2].tolist()
    begin = row.index(BOI)
    assert blocks.offsets[2].tolist() == [-1] * begin + list(range(len(row) - begin))


def test_an_open_image_has_no_features():
    blocks = find_image_blocks(torch.tensor([[1, *IMAGE, NEWLINE, *IMAGE[:-1]]]), CONFIG)
    assert blocks.images_per_row.tolist() == [1]
    assert blocks.featured.sum() == CONFIG.num_patches


@pytest.mark.parametrize(
    "row",
    [
        [1, 2, 3],
        IMAGE,
        [1, *IMAGE, NEWLINE, 5],
        [1, *IMAGE, *IMAGE],
        *[[1, *IMAGE[:cut]] for cut in range(1, len(IMAGE))],
    ],
    ids=str,
)
def test_well_formed_rows(row):
    check_image_blocks(torch.tensor([[0] * len(row), row]), CONFIG)


@pytest.mark.parametrize(
    ("row", "place", "found"),
    [
        pytest.param([1, BOI, CODE, CODE, 5], 4, 5, id="cut short by text"),
        pytest.param([1, BOI, CODE, CODE, EOI], 4, EOI, id="cut short by EOI"),
        pytest.param([1, *IMAGE[:-1], CODE + 3], 6, CODE + 3, id="too long"),
        pytest.param([1, *IMAGE[:-1], NEWLINE], 6, NEWLINE, id="EOI missing"),
        pytest.param([1, BOI, CODE, BOI, *IMAGE[1:]], 3, BOI, id="nested BOI"),
        pytest.param([1, EOI, 5], 1, EOI, id="EOI without an image"),
        pytest.param([1, *IMAGE, EOI], 7, EOI, id="two EOI"),
        pytest.param([1, CODE + 2, 5], 1, CODE + 2, id="code without an image"),
        pytest.param([1, *IMAGE, CODE], 7, CODE, id="code after an image"),
    ],
)
def test_broken_rows(row, place, found):
    message = (
        rf"Row 1 of input_ids .* position {place}: found id {found}, .*BOI \({BOI}\), exactly 4 codes .*EOI \({EOI}\)"
    )
    with pytest.raises(ValueError, match=message):
        check_image_blocks(torch.tensor([[7] * len(row), row]), CONFIG)


@pytest.mark.parametrize("bad", [-100, -1, CONFIG.total_vocab_size])
def test_ids_out_of_range(bad):
    with pytest.raises(ValueError, match=rf"Row 1 of input_ids has id {bad} at position 2; .*\[0, 88\)"):
        check_image_blocks(torch.tensor([[1, 2, 3], [1, 2, bad]]), CONFIG)


def test_empty_ids():
    with pytest.raises(ValueError, match=r"input_ids is empty: its shape is \(2, 0\)"):
        check_image_blocks(torch.zeros(2, 0, dtype=torch.long), CONFIG)


@pytest.mark.parametrize("cut", range(1, len(IMAGE)))
def test_a_continuation_may_begin_inside_an_image(cut):
    rest = torch.tensor([[*IMAGE[cut:], NEWLINE, 5, *IMAGE]])
    check_image_blocks(rest, CONFIG, continues=True)
    with pytest.raises(ValueError, match=r"Row 0 .* position 0"):
        check_image_blocks(rest, CONFIG)


@pytest.mark.parametrize(
    ("row", "place"),
    [
        pytest.param([*[CODE] * 5, EOI], 4, id="more codes than an image has"),
        pytest.param([CODE, EOI, EOI], 2, id="two EOI"),
        pytest.param([CODE, 5, CODE], 2, id="code after text"),
        pytest.param([5, EOI], 1, id="EOI after text"),
        pytest.param([CODE, EOI, BOI, CODE, EOI], 4, id="next image cut short"),
    ],
)
def test_broken_continuations(row, place):
    with pytest.raises(ValueError, match=rf"Row 0 .* position {place}"):
        check_image_blocks(torch.tensor([row]), CONFIG, continues=True)


@pytest.mark.parametrize(("codebooks", "size"), [(1, 7), (2, 6), (3, 4)])
def test_codebook_entries(codebooks, size):
    config = make_config(num_codebooks=codebooks, codebook_size=size, text={"hidden_size": 36, "head_dim": 8})
    ids = torch.arange(config.text_vocab_size, config.total_vocab_size)
    expected = [*itertools.product(range(size), repeat=codebooks), (size,) * codebooks, (size + 1,) * codebooks]
    assert codebook_entries(ids, config).tolist() == [list(entries) for entries in expected]


@given(st.lists(st.integers(0, CONFIG.total_vocab_size - 1), min_size=1, max_size=20))
def test_released_ids_and_back(ids):
    flat = torch.tensor([ids])
    assert torch.equal(convert_ids(to_released(flat, CONFIG), CONFIG), flat)


def test_released_labels_keep_their_blanks():
    labels = torch.tensor([[-100, -100, 7], [3, CONFIG.text_vocab_size + 8, EOI]])
    assert torch.equal(convert_ids(to_released(labels, CONFIG), CONFIG), labels)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_wrong_number_of_features(toy_model, count):
    input_ids, mask = pad(make_rows(CONFIG))
    message = rf"image_features holds {count} images.*holds 3 whole .*row 0: 2, row 1: 0, row 2: 1"
    with pytest.raises(ValueError, match=message):
        toy_model(input_ids=input_ids, attention_mask=mask, image_features=make_features(CONFIG, count))


def test_features_for_text(toy_model):
    with pytest.raises(ValueError, match=r"image_features holds 1 images.*holds 0 whole"):
        toy_model(input_ids=torch.tensor([[1, 5]]), image_features=make_features(CONFIG, 1))


@pytest.mark.parametrize("shape", [(4, 10), (1, 5, 10), (1, 4, 9), (1, 1, 4, 10)])
def test_wrong_shape_of_features(toy_model, shape):
    with pytest.raises(ValueError, match=rf"shape \({', '.join(map(str, shape))}\); expected \(images, 4, 10\)"):
        toy_model(input_ids=torch.tensor([[1, *IMAGE]]), image_features=torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("image", "row"), [(0, 0), (1, 0), (2, 2)])
def test_features_that_are_not_finite(toy_model, value, image, row):
    input_ids, mask = pad(make_rows(CONFIG))
    features = make_features(CONFIG, 3)
    features[image, 1, 2] = value
    with pytest.raises(ValueError, match=rf"image {image} \(row {row} of input_ids\) holds NaN or infinite"):
        toy_model(input_ids=input_ids, attention_mask=mask, image_features=features)


def test_the_model_checks_its_ids(toy_model):
    with pytest.raises(ValueError, match="Row 0 of input_ids has a broken image block at position 2"):
        toy_model(input_ids=torch.tensor([[1, BOI, 5]]))


def test_input_ids_are_needed(toy_model):
    with pytest.raises(ValueError, match="needs input_ids"):
        toy_model()


@pytest.mark.parametrize("name", ["inputs_embeds", "pixel_values"])
def test_what_the_model_does_not_read_is_refused(toy_model, name):
    """Left unread, the placeholders of a batch that is not tokenized yet would be taken for its images."""
    with pytest.raises(ValueError, match=r"needs input_ids, not|processor\.tokenize_images"):
        toy_model(input_ids=torch.tensor([[1, 5]]), **{name: torch.zeros(1, 2, 8)})
