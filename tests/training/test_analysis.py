"""What a Libra writes and where it looks: samples, completions, likelihoods, reconstructions, figures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from libra_cli.loading import load_libra
from tests.modeling.toys import make_image, make_model
from training.analysis import diversity
from training.analysis.attention import answer_ids, draw_attention, look_at_image
from training.analysis.looks import label_models
from training.analysis.panels import Curve, Panel, check_output, draw_panels
from training.analysis.reconstructing import reconstruct_images
from training.analysis.sampling import sample_codes
from training.analysis.writing import code_likelihood, complete_images, draw_images


@pytest.fixture(scope="module")
def toy(repo):
    """The converted toy release: 4 x 4 patches, 2 codebooks of 512."""
    return load_libra(repo)


@pytest.fixture(scope="module")
def image():
    numbers = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    return Image.fromarray(numbers)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"top_k": 20}, {"top_p": 0.6}, {"top_k": 10, "top_p": 0.7}, {"temperature": 0.5}]
)
def test_codes_have_the_distribution_of_generate(options):
    model = make_model()
    config = model.config
    prompt = torch.tensor([[1, 5, *make_image(config, 0)[:2]]])
    step = model.generate(
        prompt, max_new_tokens=1, do_sample=True, output_scores=True, return_dict_in_generate=True,
        **{"top_k": 0, "top_p": 1.0, "temperature": 1.0} | options,
    )  # fmt: skip
    codes = slice(config.text_vocab_size, config.text_vocab_size + config.num_image_codes)
    expected = step.scores[0][0].softmax(dim=-1)[codes]
    with torch.no_grad():
        logits = model(prompt).vision_logits[-1:, :, : config.codebook_size]
    drawn = sample_codes(logits.repeat(20_000, 1, 1), generator=torch.Generator().manual_seed(0), **options)
    counts = torch.bincount(drawn[:, 0] * config.codebook_size + drawn[:, 1], minlength=config.num_image_codes)
    assert (counts[expected == 0] == 0).all()
    torch.testing.assert_close(counts / 20_000, expected, atol=0.015, rtol=0)  # four standard deviations


def test_completion_keeps_the_rows_that_are_given(toy, image, monkeypatch):
    model, processor = toy
    decoded = []
    monkeypatch.setattr(
        processor, "post_process_multimodal_output", lambda ids, generation_mode: decoded.append(ids) or list(ids)
    )
    complete_images(model, processor, [image, image.rotate(90)], 2, samples=3, seed=1)
    (ids,) = decoded
    given = processor(images=[image, image.rotate(90)], generation_mode="image", image_rows=2, return_tensors="pt")
    assert ids.shape == (6, 16)
    assert torch.equal(ids[:, :8], given["input_ids"][:, -8:].repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in ids.tolist()}) == 6


def test_a_cold_completion_is_the_greedy_one(toy, image):
    model, processor = toy
    ((cold,),) = complete_images(model, processor, [image], 1, caption="a cat", temperature=1e-6)
    prompt = processor(text="a cat", images=image, generation_mode="image", image_rows=1, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=13, do_sample=False)
    (greedy,) = processor.post_process_multimodal_output(ids, generation_mode="image")
    assert cold.tobytes() == greedy.tobytes()


def test_drawings_by_prompt(toy):
    model, processor = toy
    drawn = draw_images(model, processor, ["a", "b"], samples=2, seed=3, top_k=5)
    assert [len(of_prompt) for of_prompt in drawn] == [2, 2]
    again = draw_images(model, processor, ["a", "b"], samples=2, seed=3, top_k=5)
    assert [[one.tobytes() for one in of] for of in again] == [[one.tobytes() for one in of] for of in drawn]
    for options, message in (({"temperature": 0}, "temperature"), ({"top_k": -1}, "top_k"), ({"top_p": 0}, "top_p")):
        with pytest.raises(ValueError, match=message):
            draw_images(model, processor, ["a"], **options)


def test_likelihood_is_minus_the_loss_of_the_codes(toy, image):
    model, processor = toy
    found = code_likelihood(model, processor, [image, image.rotate(90)], caption="a cat")
    assert found.shape == (2, 2, 4, 4)
    ids = processor(text=["a cat<image>"] * 2, images=[image, image.rotate(90)], return_tensors="pt")["input_ids"]
    labels = torch.where((ids >= processor.text_vocab_size) & (ids < processor.boi_token_id), ids, -100)
    with torch.no_grad():
        losses = model(ids, labels=labels).codebook_losses
    torch.testing.assert_close(found.mean(dim=(0, 2, 3)), -losses, atol=1e-5, rtol=0)


def test_reconstructions(toy, image):
    _, processor = toy
    grey = Image.new("RGB", (32, 32), (128, 128, 128))
    first, second = reconstruct_images(processor, [image, grey])
    assert first.codes.shape == (2, 4, 4)
    ids = processor(images=image, return_tensors="pt")["input_ids"][0, 2:-2]
    assert torch.equal(processor.ids_to_codes(ids).T.reshape(2, 4, 4), first.codes)
    error = np.abs(np.asarray(second.reconstruction, dtype=float) - 128).mean(axis=2) / 255
    np.testing.assert_allclose(second.error, error, atol=0.005)
    assert second.plain_psnr > 50 > second.psnr


def test_looks_and_their_figure(toy, image, tmp_path):
    model, processor = toy
    own = look_at_image(model, processor, image, "What is it?", max_new_tokens=4)
    assert own.maps.shape[1:] == (
        model.config.text_config.num_hidden_layers,
        model.config.text_config.num_attention_heads,
        16,
    )
    assert len(own.tokens) == len(own.maps)
    forced = look_at_image(model, processor, image, answer="cat")
    assert forced.answer == "cat"
    torch.testing.assert_close(forced.cross_layer, model.cross_layer_difference(forced.maps).mean(dim=0))
    for name in ("two.png", "two.svg"):
        draw_attention({"a": own, "b": forced}, {"a": 4, "b": 4}, tmp_path / name, "a question")
        assert (tmp_path / name).stat().st_size > 5000


def test_figures_refuse_what_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.png or \.svg"):
        check_output(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match="no folder"):
        check_output(tmp_path / "absent" / "a.png")
    values = np.linspace(0, 1, 16).reshape(4, 4)
    draw_panels([("row", [Panel("a", values=values, unit="nats")])], tmp_path / "a.png", "title")
    lightness = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    assert len(np.unique(lightness)) > 16  # in grey the values still differ
    assert Curve("a", [1.0]).half_widths is None


def test_labels_of_models(repo, tmp_path):
    assert label_models([f"a={repo}", f"b={repo}"]) == {"a": str(repo), "b": str(repo)}
    for labelled, message in (
        (["a"], "Expected LABEL=MODEL"), ([f"a={repo}"] * 2, "two models"), ([f"a={tmp_path}"], "config.json"),
        ([f"{i}={repo}" for i in range(6)], "at most 5"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            label_models(labelled)


def test_diversity_of_two_models(repo, icons, tmp_path, capsys):
    output = tmp_path / "diversity.png"
    diversity.main(
        [f"a={repo}", f"b={repo}", "--samples", "3", "--concepts", "3", "--icons", str(icons), "--output", str(output)]
    )
    found = json.loads(output.with_suffix(".json").read_text())
    assert found["a"] == found["b"]
    assert found["a"]["samples"] == 3
    assert len(found["a"]["cross_layer"]["mean"]) == len(found["a"]["inner_layer"]["mean"]) - 1 > 0
    assert all(0 < value <= 1 for value in found["a"]["inner_layer"]["mean"])
    assert output.is_file()
    assert "a: cross_layer 0." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        diversity.main([f"a={repo}", "--samples", "1", "--output", str(output)])


def test_answers_to_compare_on_are_written_as_in_training():
    """In pretraining a caption follows the image without a space, in a conversation its question with one."""
    _, processor = load_libra("hub_configs/libra-tiny")
    picture = Image.new("RGB", (96, 96))
    prompt, whole = (
        processor(images=picture, text=f"<image>\n{text}", return_tensors="pt")["input_ids"][0]
        for text in ("", "horse")
    )
    assert torch.equal(answer_ids(processor, "horse", None), whole[len(prompt) :])
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "horse"}]
    ids = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")["input_ids"][0]
    told = answer_ids(processor, "horse", "What?")
    assert " ".join(map(str, told.tolist())) in " ".join(map(str, ids.tolist()))
