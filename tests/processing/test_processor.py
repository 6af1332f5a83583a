import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from processing.processing_libra import LibraProcessor

PATCHES = 16
NEWLINE = 13


def to_released(processor, ids) -> torch.Tensor:
    """Ids in the layout of the release: (codebooks, batch, length), BOI and EOI entries 512 and 513 of each."""
    text = processor.text_vocab_size
    entries = processor.ids_to_codes(ids).permute(2, 0, 1) + text  # (codebooks, batch, length)
    entries = torch.where(ids < text, ids, entries)
    entries = torch.where(ids == processor.boi_token_id, text + 512, entries)
    return torch.where(ids == processor.eoi_token_id, text + 513, entries)


def chats(release) -> list[list[dict]]:
    return [
        [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": question}]}]
        for image, question in zip(release.images, release.questions)
    ]


# ---- the release ----


def test_chat_prompts_have_the_released_ids(processor, release):
    batch = processor.apply_chat_template(
        chats(release), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert set(batch) == {"input_ids", "attention_mask", "image_features"}
    assert torch.equal(batch["attention_mask"], release.tensors["attention_mask"])
    real = batch["attention_mask"].bool()
    assert torch.equal(to_released(processor, batch["input_ids"])[:, real], release.tensors["input_ids"][:, real])
    torch.testing.assert_close(batch["image_features"], release.tensors["clip_features"], atol=1e-4, rtol=0)


def test_rendered_prompts_are_the_released_ones_after_the_bos(processor, release):
    rendered = processor.apply_chat_template(chats(release), add_generation_prompt=True)
    assert rendered == [f"<s> {prompt}" for prompt in release.prompts_with_one_placeholder]


@pytest.mark.parametrize("nested", [True, False])
def test_prompts_may_be_given_as_text(processor, release, nested):
    images = [[image] for image in release.images] if nested else release.images
    written = processor(text=release.prompts_with_one_placeholder, images=images, return_tensors="pt")
    rendered = processor.apply_chat_template(chats(release), add_generation_prompt=True)
    from_rendered = processor(text=rendered, images=images, return_tensors="pt")
    real = release.tensors["attention_mask"].bool()
    for batch in (written, from_rendered):  # BOS exactly once
        assert torch.equal(to_released(processor, batch["input_ids"])[:, real], release.tensors["input_ids"][:, real])


def test_image_generation_prompt_has_the_released_ids(processor, release):
    batch = processor(text=release.t2i_prompt, generation_mode="image", return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert torch.equal(to_released(processor, batch["input_ids"]), release.tensors["t2i_input_ids"])


# ---- ids ----


def test_special_ids(processor):
    assert processor.text_vocab_size == 360
    assert processor.image_token_id == 360  # the same as the first code: replaced before anybody reads it
    assert (processor.boi_token_id, processor.eoi_token_id) == (360 + 512 * 512, 361 + 512 * 512)
    assert (processor.image_grid, processor.num_image_tokens) == (4, 18)
    assert (processor.codebook_size, processor.num_codebooks) == (512, 2)


@settings(max_examples=50)
@given(codes=st.lists(st.tuples(st.integers(0, 511), st.integers(0, 511)), min_size=1, max_size=8))
def test_ids_and_codes_are_one_to_one(codes):
    processor = LibraProcessor.__new__(LibraProcessor)
    processor.text_vocab_size = 1000
    processor.image_tokenizer = type(
        "Tokenizer", (), {"config": type("C", (), {"codebook_size": 512, "num_codebooks": 2})}
    )
    ids = processor.codes_to_ids(torch.tensor(codes))
    assert ids.tolist() == [1000 + first * 512 + second for first, second in codes]
    assert processor.ids_to_codes(ids).tolist() == [list(pair) for pair in codes]


def test_image_block_holds_the_codes_row_by_row(processor, release):
    ids = processor(text="<image>\n", images=release.images[0], return_tensors="pt")["input_ids"][0].tolist()
    codes = release.tensors["codes"][0].flatten(0, 1).tolist()
    flat = [360 + first * 512 + second for first, second in codes]
    assert ids == [1, processor.boi_token_id, *flat, processor.eoi_token_id, NEWLINE]


# ---- calls ----


def test_text_only(processor):
    batch = processor(text=["a", "a longer text"], return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"][0, 0] == 0  # padded on the left
    assert batch["input_ids"][1].tolist() == processor.tokenizer("a longer text")["input_ids"]


def test_images_only_are_ready_for_captions(processor, release):
    alone = processor(images=release.images[0], return_tensors="pt")
    written = processor(text="<image>\n", images=release.images[0], return_tensors="pt")
    assert torch.equal(alone["input_ids"], written["input_ids"])
    assert processor(images=release.images, return_tensors="pt")["input_ids"].shape == (2, 20)
    nested = processor(images=[release.images], return_tensors="pt")
    assert nested["input_ids"].shape == (1, 39)
    assert nested["image_features"].shape == (2, PATCHES, 64)


def test_nested_and_partly_empty_lists(processor, release):
    first, second = release.images
    text = ["two <image>\n and <image>\n", "none", "<image> one"]
    batch = processor(text=text, images=[[first, second], [], [first]], return_tensors="pt")
    assert batch["image_features"].shape == (3, PATCHES, 64)
    # Close, not equal: how a matrix product sums up a row depends on where the row stands in it.
    torch.testing.assert_close(batch["image_features"][0], batch["image_features"][2])
    assert (batch["input_ids"] == processor.boi_token_id).sum(dim=1).tolist() == [2, 0, 1]
    flat = processor(text=text, images=[first, second, first], return_tensors="pt")
    assert torch.equal(flat["input_ids"], batch["input_ids"])
    assert set(processor(text=["a", "b"], images=[[], []], return_tensors="pt")) == {"input_ids", "attention_mask"}


def test_newlines_between_images_are_kept(processor, release):
    ids = processor(text="<image>\n<image>\nx", images=release.images, return_tensors="pt")["input_ids"][0].tolist()
    boi, eoi = processor.boi_token_id, processor.eoi_token_id
    assert [ids[1], ids[18], ids[19], ids[20], ids[37], ids[38]] == [boi, eoi, NEWLINE, boi, eoi, NEWLINE]
    assert len(ids) == 40


@pytest.mark.parametrize("container", ["pt", "np", None])
def test_containers(processor, release, container):
    batch = processor(text=["a <image>\n b"], images=release.images[:1], return_tensors=container)
    expected = processor(text=["a <image>\n b"], images=release.images[:1], return_tensors="pt")
    kind = {"pt": torch.Tensor, "np": np.ndarray, None: list}[container]
    assert isinstance(batch["input_ids"], kind)
    assert np.array_equal(np.asarray(batch["input_ids"]), expected["input_ids"].numpy())
    assert np.array_equal(np.asarray(batch["image_features"]), expected["image_features"].numpy())


def test_tokenizing_the_images_later_gives_the_same(processor, release):
    text = ["a <image>\n b", "<image>\n<image>\n", "none"]
    images = [release.images[:1], release.images, []]
    expected = processor(text=text, images=images, return_tensors="pt")
    early = processor(text=text, images=images, return_tensors="pt", tokenize_images=False)
    assert set(early) == {"input_ids", "attention_mask", "pixel_values"}
    codes = (early["input_ids"] >= 360) & (early["input_ids"] < processor.boi_token_id)
    assert set(early["input_ids"][codes].tolist()) == {360}
    early["labels"] = torch.where(codes & (torch.arange(3)[:, None] == 1), early["input_ids"], -100)
    late = processor.tokenize_images(early)
    assert set(late) == {"input_ids", "attention_mask", "image_features", "labels"}
    assert "pixel_values" in early
    assert torch.equal(late["input_ids"], expected["input_ids"])
    assert torch.equal(late["image_features"], expected["image_features"])
    assert torch.equal(late["labels"][1][codes[1]], expected["input_ids"][1][codes[1]])
    assert (late["labels"][0] == -100).all()
    assert set(processor.tokenize_images(processor(text="x", return_tensors="pt"))) == {"input_ids", "attention_mask"}


def test_features_are_float32_whatever_the_image_tokenizer_is(processor, release):
    processor.image_tokenizer = copy.deepcopy(processor.image_tokenizer).to(torch.bfloat16)
    batch = processor(images=release.images[0], return_tensors="pt")
    assert batch["image_features"].dtype == torch.float32


def test_image_generation_in_batches_ends_in_boi(processor, release):
    batch = processor(
        text=["<image>\nlike this: ", "a"],
        images=[release.images[:1], []],
        generation_mode="image",
        return_tensors="pt",
    )
    assert batch["input_ids"][:, -1].tolist() == [processor.boi_token_id] * 2
    assert batch["attention_mask"].shape == batch["input_ids"].shape
    with pytest.raises(ValueError, match="needs padding_side='left'"):
        processor(text=["a", "b b b"], generation_mode="image", return_tensors="pt", padding_side="right")


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_prompt_of_an_image_to_complete(processor, release, rows):
    texts = ["", "a red circle "]
    whole = processor(images=release.images, return_tensors="pt")["input_ids"]  # (2, BOS, image, newline)
    empty = processor(text=texts, generation_mode="image", return_tensors="pt")
    begun = processor(text=texts, images=release.images, generation_mode="image", image_rows=rows, return_tensors="pt")
    assert set(begun) == {"input_ids", "attention_mask"}
    split = empty["input_ids"].shape[1]
    assert torch.equal(begun["input_ids"][:, :split], empty["input_ids"])
    assert torch.equal(begun["input_ids"][:, split:], whole[:, 2 : 2 + 4 * rows])
    assert torch.equal(begun["attention_mask"][:, :split], empty["attention_mask"])
    assert begun["attention_mask"][:, split:].all()
    alone = processor(images=release.images[1], generation_mode="image", image_rows=rows)
    assert alone["input_ids"] == [whole[1, : 2 + 4 * rows].tolist()]


def test_image_to_complete_that_does_not_fit(processor, release):
    image = release.images[0]
    for rows in (-1, 4):
        with pytest.raises(ValueError, match=f"image_rows is {rows}; an image has 4 rows"):
            processor(images=image, generation_mode="image", image_rows=rows)
    with pytest.raises(ValueError, match="needs generation_mode='image'"):
        processor(images=image, image_rows=1)
    with pytest.raises(ValueError, match="one image and no <image>; got 1 images"):
        processor(text=["a", "b"], images=image, generation_mode="image", image_rows=1)
    with pytest.raises(ValueError, match="one image and no <image>"):
        processor(text="<image>", images=image, generation_mode="image", image_rows=1)
    with pytest.raises(ValueError, match="needs padding_side='left'"):
        processor(
            text=["a", "b b b"], images=[image] * 2, generation_mode="image", image_rows=1,
            return_tensors="pt", padding_side="right",
        )  # fmt: skip


# ---- wrong calls ----


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("no place", 1, r"has 0 places for images \(<image>; by row: \[0\]\), but there are 1 images"),
        (["<image>", "<image>"], 1, r"has 2 places for images \(<image>; by row: \[1, 1\]\), but there are 1"),
        (["<image>"], 0, "has 1 places for images .*, but there are 0 images"),
        (["<image>", "b"], [0, 1], "Row 0 has 1 places for images .*, but 0 images"),
        (["<image>", "b"], [1, 2], "Row 1 has 0 places for images .*, but 2 images"),
        (["<image>", "b"], [1], "There are 2 texts, but 1 lists of images"),
        (None, 0, "Pass text, images, or both"),
        ([["a"]], 0, "text must be a string or a list of strings"),
        ([], 0, "text must be a string or a list of strings"),
    ],
)
def test_images_and_places_must_match(processor, text, images, message):
    image = Image.new("RGB", (8, 8))
    images = [image] * images if isinstance(images, int) else [[image] * count for count in images]
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=images or None, return_tensors="pt")


def test_other_wrong_calls(processor):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="mixes single images and lists of images"):
        processor(text=["<image>", "<image>"], images=[image, [image]])
    with pytest.raises(ValueError, match="neither `videos` nor `audio`"):
        processor(text="a", videos=[image])
    with pytest.raises(ValueError, match="generation_mode must be 'text' or 'image', got 'video'"):
        processor(text="a", generation_mode="video")
    with pytest.raises(ValueError, match=r"Rows \[1\] begin with '<s>'"):
        processor(text=["a", "<s> b"])
    with pytest.raises(ValueError, match=r"images\[1\]: the image has no pixels"):
        processor(text="<image><image>", images=[image, Image.new("RGB", (0, 3))])


def test_images_without_placeholders_are_refused_later_too(processor, release):
    batch = processor(images=release.images, return_tensors="pt", tokenize_images=False)
    batch["pixel_values"] = batch["pixel_values"][:1]
    with pytest.raises(ValueError, match="input_ids hold 2 images, but pixel_values 1"):
        processor.tokenize_images(batch)


def test_a_prompt_longer_than_the_context_is_refused(processor, release):
    processor.tokenizer.model_max_length = 24
    processor(text="<image>\nabc", images=release.images[:1])
    message = "Row 1 has 35 tokens, but the context of the model is 24"
    with pytest.raises(ValueError, match=message):
        processor(text=["a", "<image>\n" + "1 " * 7 + "2"], images=release.images[:1])


def test_truncation_never_cuts_an_image(processor, release):
    call = {"text": ["short", "abc <image>\n" + "1" * 50], "images": release.images[:1], "truncation": True}
    whole = processor(**call, max_length=30, padding=True, return_tensors="pt")
    assert whole["input_ids"].shape == (2, 30)
    with pytest.raises(ValueError, match=r"Row 1: truncation would cut into an image \(\d+ of 18 image tokens left\)"):
        processor(**call, max_length=15)


# ---- chats ----


def conversation(*turns) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def test_a_chat_may_ask_for_an_image(processor, release):
    batch = processor.apply_chat_template(
        conversation(("user", "Draw a cat.")),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"generation_mode": "image"},
    )
    assert processor.decode(batch["input_ids"][0]).endswith("USER: Draw a cat. ASSISTANT:<image>")
    assert batch["input_ids"][0, -1] == processor.boi_token_id


def test_conversations_of_several_turns(processor, release):
    messages = conversation(("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "See you."))
    rendered = processor.apply_chat_template(messages)
    assert rendered == (f"<s> {release.system} USER: Hi ASSISTANT: Hello. </s>USER: Bye ASSISTANT: See you. </s>")
    own = processor.apply_chat_template([{"role": "system", "content": "Be short."}, *messages[:1]])
    assert own == "<s> Be short. USER: Hi "
    silent = processor.apply_chat_template(conversation(("system", ""), ("user", "Hi")), add_generation_prompt=True)
    assert silent == "<s> USER: Hi ASSISTANT:"


def test_images_in_any_turn(processor, release):
    image = {"type": "image", "image": Image.open(release.images[0])}
    messages = conversation(
        ("user", [image, image, {"type": "text", "text": "same?"}]),
        ("assistant", [{"type": "text", "text": "yes"}]),
        ("user", [{"type": "text", "text": "and"}, image]),
    )
    rendered = processor.apply_chat_template(messages)
    assert rendered.endswith("USER: <image>\n<image>\nsame? ASSISTANT: yes </s>USER: and<image>\n ")
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert batch["image_features"].shape == (3, PATCHES, 64)


def test_unknown_roles_and_parts_are_refused(processor):
    with pytest.raises(Exception, match="message 1 is from 'tool'"):
        processor.apply_chat_template(conversation(("user", "a"), ("tool", "b")))
    with pytest.raises(Exception, match="message 1 is from 'system'"):
        processor.apply_chat_template(conversation(("user", "a"), ("system", "b")))
    with pytest.raises(Exception, match="must be of type 'text' or 'image', got 'video'"):
        processor.apply_chat_template(conversation(("user", [{"type": "video"}])))


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_assistant_masks_cover_the_answers_and_their_end(processor, release, padding_side):
    image = {"type": "image", "path": release.images[0]}
    long = conversation(
        ("user", [image, image, {"type": "text", "text": "what?"}]),
        ("assistant", "A horse."),
        ("user", [{"type": "text", "text": "and this? "}, image]),
        ("assistant", "猫"),
    )
    short = conversation(("user", "Hi"), ("assistant", "Hello"))
    batch = processor.apply_chat_template(
        [long, short],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": padding_side},
    )
    assert set(batch) == {"input_ids", "attention_mask", "image_features", "assistant_masks"}
    masks = torch.as_tensor(batch["assistant_masks"]).bool()
    answers = [processor.decode(ids[mask]) for ids, mask in zip(batch["input_ids"], masks)]
    assert answers == ["A horse. </s> 猫 </s>", "Hello </s>"]
    # what the model is to write after the prompt is exactly what is masked
    prompt = processor.apply_chat_template(long[:1], add_generation_prompt=True, tokenize=True, return_dict=True)
    row = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
    mask = masks[0][batch["attention_mask"][0].bool()].tolist()
    length = len(prompt["input_ids"][0])
    assert row[:length] == prompt["input_ids"][0]
    assert mask[:length] == [False] * length
    assert mask[length]


def test_collators_of_trl_see_the_answers_only(processor, release):
    image = Image.open(release.images[0])
    asked = [{"role": "user", "content": "what?"}], [{"role": "user", "content": "hi"}]
    answered = [{"role": "assistant", "content": "a horse"}], [{"role": "assistant", "content": "ho"}]
    images = [image], []
    chats = [{"images": i, "messages": a + b} for i, a, b in zip(images, asked, answered)]
    pairs = [{"images": i, "prompt": a, "completion": b} for i, a, b in zip(images, asked, answered)]
    by_chat = DataCollatorForVisionLanguageModeling(processor, max_length=256, assistant_only_loss=True)(chats)
    by_pair = DataCollatorForVisionLanguageModeling(processor, max_length=256, completion_only_loss=True)(pairs)
    for batch in (by_chat, by_pair):
        assert batch["image_features"].shape == (1, PATCHES, 64)
        labels = [row[row != -100] for row in batch["labels"]]
        assert [processor.decode(row).strip() for row in labels] == ["a horse </s>", "ho </s>"]
    for row in range(2):
        ids = [batch["input_ids"][row][batch["attention_mask"][row].bool()] for batch in (by_chat, by_pair)]
        assert torch.equal(*ids)
        assert (ids[0] == 1).sum() == 1  # BOS exactly once


def test_call_shape_of_trl(processor, release):
    texts = [f"<s> USER: <image>\n{question} ASSISTANT: yes </s>" for question in ("a?", "a longer one?")]
    images = [[Image.open(image)] for image in release.images]
    options = {"videos": None, "audio": None, "padding": True, "padding_side": "right", "pad_to_multiple_of": 8}
    batch = processor(
        text=texts,
        images=images,
        truncation=True,
        max_length=64,
        add_special_tokens=False,
        return_tensors="pt",
        **options,
    )
    assert batch["input_ids"].shape[1] % 8 == 0
    assert batch["input_ids"][:, 0].tolist() == [1, 1]
    assert batch["attention_mask"][0, -1] == 0


# ---- output ----


def test_decoding_reads_images_as_one_token(processor, release):
    batch = processor(text=["abc <image>\nwhat </s>", "d"], images=release.images[:1], return_tensors="pt")
    texts = processor.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert [text.strip() for text in texts] == ["abc<image>\nwhat", "d"]
    assert processor.decode(batch["input_ids"][0]) == processor.decode(batch["input_ids"].tolist())[0]
    assert processor.post_process_image_text_to_text(batch["input_ids"]) == texts
    assert processor.post_process_multimodal_output(batch["input_ids"]) == texts


def test_unfinished_and_neighboring_images_read_as_images(processor):
    boi, eoi, code = processor.boi_token_id, processor.eoi_token_id, 400
    assert processor.decode([boi]) == "<image>"
    assert processor.decode([boi, code, code]) == "<image>"
    assert processor.decode([code, code, eoi, NEWLINE]) == "<image>\n"
    assert processor.decode([boi, code, eoi, boi, code, eoi]) == "<image><image>"
    assert processor.decode([boi, code, boi, code]) == "<image><image>"
    assert processor.decode(360) == "<image>"  # the first code


@pytest.mark.parametrize("wrong", [-100, -1, 362 + 512 * 512])
def test_ids_out_of_range_are_refused(processor, wrong):
    with pytest.raises(ValueError, match=f"Row 1: {wrong} is no id of this model, expected 0 to 262505"):
        processor.batch_decode([[1], [wrong]])


def test_generated_images(processor, release):
    generated = processor(images=[[release.images[0]], release.images[::-1]], return_tensors="pt")
    images = processor.post_process_multimodal_output(generated["input_ids"], generation_mode="image")
    assert [image.size for image in images] == [(32, 32)] * 3
    expected = processor.image_processor.postprocess(release.tensors["reconstruction"])
    for image, wanted in zip(images, [expected[0], expected[1], expected[0]]):
        difference = np.asarray(image).astype(int) - np.asarray(wanted)
        assert np.abs(difference).max() <= 1
    continued = generated["input_ids"][:1, -18:]  # without the prompt that ended in BOI
    again = processor.post_process_multimodal_output(continued, generation_mode="image")
    assert np.abs(np.asarray(again[0]).astype(int) - np.asarray(images[0])).max() <= 1


def test_images_that_are_not_there_are_refused(processor):
    boi, code = processor.boi_token_id, 400
    rows = [[boi] + [code] * 16, [1, boi] + [code] * 3]
    with pytest.raises(ValueError, match=r"Row 1: image 0 has 3 codes, expected 16\. Generate at least 18"):
        processor.post_process_multimodal_output(rows, generation_mode="image")
    with pytest.raises(ValueError, match="Row 0 holds no image"):
        processor.post_process_multimodal_output([[1, 5]], generation_mode="image")
    with pytest.raises(ValueError, match="got 'audio'"):
        processor.post_process_multimodal_output([[1, 5]], generation_mode="audio")


# ---- making one ----


def test_parts_that_do_not_fit_are_refused(release):
    parts = release.image_processor, AutoTokenizer.from_pretrained(release.folder), release.image_tokenizer
    with pytest.raises(ValueError, match="ids up to 359, but text_vocab_size is 300"):
        LibraProcessor(*parts, text_vocab_size=300)
    LibraProcessor(*parts)
    with pytest.raises(ValueError, match="already has <image>: pass text_vocab_size"):
        LibraProcessor(*parts)
    small = type(release.image_processor)(crop_size={"height": 16, "width": 16})
    with pytest.raises(ValueError, match="reads 32 x 32 pixels, but the image processor makes"):
        LibraProcessor(small, parts[1], parts[2], text_vocab_size=360)
    plain = AutoTokenizer.from_pretrained(release.folder)
    plain.add_tokens(["<image>"])
    with pytest.raises(ValueError, match="must swallow the spaces before it"):
        LibraProcessor(parts[0], plain, parts[2], text_vocab_size=360)


def test_a_vocabulary_larger_than_the_tokenizer(release):
    tokenizer = AutoTokenizer.from_pretrained(release.folder)
    processor = LibraProcessor(release.image_processor, tokenizer, release.image_tokenizer, text_vocab_size=384)
    ids = processor(text="<image>\n", images=release.images[:1], return_tensors="pt")["input_ids"][0]
    assert processor.image_token_id == 360
    assert ids[1] == processor.boi_token_id == 384 + 512 * 512
    assert processor.decode(ids, skip_special_tokens=True) == "<image>\n"


def test_halves_of_letters_are_refused(processor):
    """What a terminal makes of bytes that are no UTF-8."""
    with pytest.raises(ValueError, match=r"Row 1: the text holds .*half of a letter"):
        processor(text=["fine", "caf\udce9"])
