import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from processing.lookup_free_quantization import LookupFreeQuantizer


def make_quantizer(dim=12, num_codebooks=2, codebook_size=16) -> LookupFreeQuantizer:
    torch.manual_seed(0)
    return LookupFreeQuantizer(dim, num_codebooks, codebook_size).eval()


@settings(max_examples=50)
@given(bits=st.integers(1, 10), num_codebooks=st.integers(1, 4), seed=st.integers(0, 2**20))
def test_codes_survive_the_round_trip_through_signs(bits, num_codebooks, seed):
    quantizer = LookupFreeQuantizer(dim=8, num_codebooks=num_codebooks, codebook_size=2**bits)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (2, 3, 3, num_codebooks), generator=generator)
    signs = quantizer.codes_to_signs(codes)
    assert set(signs.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(quantizer.signs_to_codes(signs), codes)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**20), scale=st.floats(1e-3, 1e3))
def test_quantized_vectors_are_those_of_their_codes(seed, scale):
    quantizer = make_quantizer()
    hidden = scale * torch.randn(2, 4, 4, 12, generator=torch.Generator().manual_seed(seed))
    quantized, codes, losses = quantizer(hidden)
    assert codes.shape == (2, 4, 4, 2)
    assert codes.dtype == torch.int64
    assert losses is None
    assert torch.equal(quantizer.codes_to_quantized(codes), quantized)


def test_most_significant_bit_comes_first_and_zero_is_no_bit():
    quantizer = make_quantizer()
    values = torch.tensor([[[0.1, -1, -1, 0.0], [-3, -3, 2, 5]]])  # (1, codebooks, bits)
    assert quantizer.signs_to_codes(values).tolist() == [[8, 3]]


def test_training_gives_the_same_values_and_passes_gradients_straight_through():
    quantizer = make_quantizer()
    hidden = torch.randn(1, 4, 4, 12, requires_grad=True)
    expected = quantizer(hidden)
    quantizer.train()
    quantized, codes, losses = quantizer(hidden)
    assert torch.equal(codes, expected.codes)
    torch.testing.assert_close(quantized, expected.quantized)
    assert losses is not None
    quantized.sum().backward()
    linear = quantizer.project_out.weight.sum(dim=0) @ quantizer.project_in.weight  # as if there were no rounding
    torch.testing.assert_close(hidden.grad, linear.expand_as(hidden))


def test_losses_are_those_of_the_definition():
    quantizer = make_quantizer(num_codebooks=1, codebook_size=4)
    hidden = 0.01 * torch.randn(5, 12)
    losses = quantizer(hidden, return_losses=True).losses
    values = quantizer.project_in(hidden)  # (5, bits)
    codebook = torch.tensor([[-1.0, -1], [-1, 1], [1, -1], [1, 1]])
    distance = -2 * values @ codebook.T  # (5, 4)
    probabilities = (-100 * distance).softmax(-1)

    def entropy(p):
        return -(p * p.clamp(min=1e-5).log()).sum(-1)

    torch.testing.assert_close(losses.per_sample_entropy, entropy(probabilities).mean())
    torch.testing.assert_close(losses.codebook_entropy, entropy(probabilities.mean(0)))
    torch.testing.assert_close(losses.commitment, ((values - values.sign()) ** 2).mean())


def test_losses_are_computed_in_training_and_on_request_only():
    quantizer = make_quantizer()
    hidden = torch.randn(2, 12)
    assert quantizer(hidden).losses is None
    assert quantizer(hidden, return_losses=True).losses is not None
    quantizer.train()
    assert quantizer(hidden).losses is not None
    assert quantizer(hidden, return_losses=False).losses is None


def test_there_is_nothing_to_learn_but_the_projections():
    assert set(make_quantizer().state_dict()) == {
        "project_in.weight",
        "project_in.bias",
        "project_out.weight",
        "project_out.bias",
    }


@pytest.mark.parametrize("size", [0, 1, 3, 500])
def test_codebook_size_must_be_a_power_of_two(size):
    with pytest.raises(ValueError, match=f"power of two, at least 2, got {size}"):
        LookupFreeQuantizer(8, 2, size)


@pytest.mark.parametrize("code", [-1, 16])
def test_codes_out_of_range_are_refused(code):
    with pytest.raises(ValueError, match=r"Codes must be in \[0, 16\)"):
        make_quantizer().codes_to_quantized(torch.tensor([[0, code]]))


def test_codes_need_one_entry_per_codebook():
    with pytest.raises(ValueError, match="must be the 2 codebooks"):
        make_quantizer().codes_to_quantized(torch.zeros(4, 3, dtype=torch.long))


def test_losses_are_exact_under_autocast():
    """Training in bfloat16 must not round the logits, which go to thousands."""
    torch.manual_seed(0)
    quantizer = LookupFreeQuantizer(16, 2, 512)
    hidden = torch.randn(32, 16)
    projected = quantizer.project_in(hidden).unflatten(-1, (2, 9))
    exact = quantizer._losses(projected, projected.sign())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = quantizer._losses(projected, projected.sign())
    for one, other in zip(exact, mixed, strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=0)
