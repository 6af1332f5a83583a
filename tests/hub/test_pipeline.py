"""The image-to-text pipeline with the installed classes: options, batches, several sequences, mistakes."""

import pytest
from PIL import Image

from libra_cli.loading import load_libra
from modeling_libra.pipeline_libra import DEFAULT_MAX_NEW_TOKENS, LibraImageToTextPipeline

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def loaded(repo):
    return load_libra(repo)


@pytest.fixture
def captioner(loaded) -> LibraImageToTextPipeline:
    model, processor = loaded
    return LibraImageToTextPipeline(model=model, processor=processor, device=-1)


@pytest.fixture
def images(golden) -> list[Image.Image]:
    return [Image.open(golden / "official_checkpoint" / f"image_{i}.png") for i in range(2)]


def test_class_is_found_on_the_model(loaded):
    assert loaded[0].pipeline_class is LibraImageToTextPipeline


def test_batches_of_any_size_answer_alike(captioner, images):
    inputs = [*images, images[0]]
    one_by_one = [captioner(image, generate_kwargs=GREEDY) for image in inputs]
    for size in (1, 2, 3):
        assert captioner(inputs, batch_size=size, generate_kwargs=GREEDY) == one_by_one
    assert list(captioner((image for image in inputs), batch_size=2, generate_kwargs=GREEDY)) == one_by_one


def test_padding_side_of_the_tokenizer_does_not_matter(captioner, images):
    expected = captioner(images, generate_kwargs=GREEDY, prompt="Is it?")
    captioner.tokenizer.padding_side = "right"
    again = LibraImageToTextPipeline(model=captioner.model, processor=captioner.processor, device=-1)
    assert again(images, batch_size=2, generate_kwargs=GREEDY, prompt="Is it?") == expected


def test_several_sequences_an_image(captioner, images):
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2}
    single = [captioner(image, generate_kwargs=options) for image in images]
    assert [len(sequences) for sequences in single] == [2, 2]
    assert captioner(images, batch_size=2, generate_kwargs=options) == single


def test_options_at_construction(loaded, images):
    model, processor = loaded
    asking = LibraImageToTextPipeline(
        model=model, processor=processor, device=-1, prompt="What is it?", generate_kwargs=GREEDY, batch_size=2
    )
    captioner = LibraImageToTextPipeline(model=model, processor=processor, device=-1)
    assert asking(images) == captioner(images, prompt="What is it?", generate_kwargs=GREEDY)
    assert asking(images) != asking(images, prompt="Where is it?")


def test_length_limit(captioner, images, monkeypatch):
    lengths = []
    generate = captioner.model.generate

    def spy(**kwargs):
        lengths.append(kwargs.get("max_new_tokens"))
        return generate(**{**kwargs, "max_new_tokens": 1})

    monkeypatch.setattr(captioner.model, "generate", spy)
    captioner(images[0])
    captioner(images[0], max_new_tokens=7)
    monkeypatch.setattr(captioner.model.generation_config, "max_new_tokens", 9)
    captioner(images[0])
    assert lengths == [DEFAULT_MAX_NEW_TOKENS, 7, None]  # None: the generation configuration's own 9 holds


def test_caption_prompt_of_the_processor(captioner, images, monkeypatch):
    asked = captioner(images[0], prompt="What is it?", generate_kwargs=GREEDY)
    plain = captioner(images[0], generate_kwargs=GREEDY)
    monkeypatch.setattr(captioner.processor, "caption_prompt", "What is it?")
    assert captioner(images[0], generate_kwargs=GREEDY) == asked != plain


def test_saved_pipeline_loads_again(captioner, images, tmp_path):
    captioner.save_pretrained(tmp_path)
    model, processor = load_libra(tmp_path)
    again = LibraImageToTextPipeline(model=model, processor=processor, device=-1)
    assert again(images, generate_kwargs=GREEDY) == captioner(images, generate_kwargs=GREEDY)


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        ([], {}, ValueError, "empty list"),
        (3, {}, TypeError, "got int"),
        ("absent.png", {}, ValueError, r"absent\.png"),
        (Image.new("RGB", (1, 1)), {"prompt": " "}, ValueError, "prompt must be"),
        (Image.new("RGB", (1, 1)), {"max_new_tokens": 2, "generate_kwargs": GREEDY}, ValueError, "twice"),
        (Image.new("RGB", (1, 1)), {"nonsense": 1}, TypeError, "nonsense"),
    ],
)
def test_mistakes(captioner, inputs, options, error, message):
    with pytest.raises(error, match=message):
        captioner(inputs, **options)


def test_processor_is_needed(loaded):
    with pytest.raises(ValueError, match="needs the processor"):
        LibraImageToTextPipeline(model=loaded[0], tokenizer=loaded[1].tokenizer)
