"""What is read of LLaVA's json and of datasets with messages and images, and what is said to samples that are wrong."""

import json

import pytest
from datasets import Dataset, load_dataset
from PIL import Image

from training.conversations import BadSample, ConversationArguments, read_conversations, read_messages, text_of

COLOURS = {"coco/red.png": (255, 0, 0), "vg/blue.png": (0, 0, 255)}


def turns(*texts: str) -> list[dict]:
    """Turns of a conversation in LLaVA's form."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def messages(*texts: str) -> list[dict]:
    """The same in the Hub's form."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# As published: the mark before or after the question, several turns, numbers as ids, samples without an image.
LLAVA = [
    {"id": "000000033471", "image": "coco/red.png",
     "conversations": turns("<image>\nWhat colour is it?", "Red.", "Sure?", "Yes.")},
    {"id": 2354786, "image": "vg/blue.png", "conversations": turns("And this one?\n<image>", "Blue.")},
    {"id": "wgByO4Y_0", "model": "", "conversations": turns("Write a haiku.", "No.")},
]  # fmt: skip


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for name, colour in COLOURS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(folder / name)
    return folder


@pytest.fixture
def read(tmp_path, images):
    """Writes samples to a json file and reads them."""

    def run(samples: list[dict], name: str = "data.json", **options):
        lines = "\n".join(map(json.dumps, samples))
        (tmp_path / name).write_text(json.dumps(samples) if name.endswith(".json") else lines)
        options = {"image_folder": str(images)} | options
        return read_conversations(str(tmp_path / name), ConversationArguments(**options))

    return run


def shape(sample: dict) -> list[tuple]:
    """A sample in short: role, and places of images and texts, of each message."""
    return [
        (message["role"], *(part["text"] if part["type"] == "text" else "IMAGE" for part in message["content"]))
        for message in sample["messages"]
    ]


def colours(sample: dict) -> list[tuple]:
    return [image.getpixel((0, 0)) for image in sample["images"]]


def assert_is_llava(dataset):
    first, second, third = (dataset[i] for i in range(3))
    assert shape(first) == [
        ("user", "IMAGE", "What colour is it?"), ("assistant", "Red."), ("user", "Sure?"), ("assistant", "Yes.")
    ]  # fmt: skip
    assert shape(second) == [("user", "IMAGE", "And this one?"), ("assistant", "Blue.")]
    assert shape(third) == [("user", "Write a haiku."), ("assistant", "No.")]
    assert [colours(sample) for sample in (first, second, third)] == [[(255, 0, 0)], [(0, 0, 255)], []]
    assert first["id"] == "000000033471"


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_as_published(read, name):
    assert_is_llava(read(LLAVA, name))


def test_the_images_are_beside_the_file_without_a_folder(read, images):
    (images / "data.json").write_text(json.dumps(LLAVA))
    assert_is_llava(read_conversations(str(images / "data.json"), ConversationArguments()))


def test_several_marks_keep_their_places():
    conversation = {"conversations": turns("First <image> then <image>, which?", "The second.")}
    assert shape({"messages": read_messages(conversation, 2)})[0] == (
        "user",
        "First",
        "IMAGE",
        "then",
        "IMAGE",
        ", which?",
    )


def test_marks_in_later_turns(read):
    sample = {"image": [*COLOURS], "conversations": turns("<image>\nThis?", "Red.", "<image>\nAnd this?", "Blue.")}
    (only,) = read([sample])
    assert shape(only)[2] == ("user", "IMAGE", "And this?")
    assert colours(only) == [*COLOURS.values()]


def test_messages_with_images(read):
    """Strings, whose images come first, and parts; paths of images in a list."""
    parts = [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": "what?"}]
    samples = [
        {"messages": messages("What is it?", "Red."), "images": ["coco/red.png"]},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts},
                      {"role": "assistant", "content": [{"type": "text", "text": "Blue."}]}], "images": ["vg/blue.png"]},
        {"messages": messages("Hello?", "Hello!")},
    ]  # fmt: skip
    dataset = read(samples)
    assert [shape(sample) for sample in dataset] == [
        [("user", "IMAGE", "What is it?"), ("assistant", "Red.")],
        [("system", "Be brief."), ("user", "Look: ", "IMAGE", "what?"), ("assistant", "Blue.")],
        [("user", "Hello?"), ("assistant", "Hello!")],
    ]
    assert [colours(sample) for sample in dataset] == [[(255, 0, 0)], [(0, 0, 255)], []]


def encoded(images) -> list[dict]:
    return [{"bytes": (images / name).read_bytes(), "path": None} for name in COLOURS]


@pytest.mark.parametrize("column", ["images", "image"])
@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_a_dataset_of_the_hubs_form(tmp_path, images, column, kind):
    """With its images inside, as parquet files have them; text-only samples have an empty list, or nothing."""
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    red, blue = encoded(images)
    content = [messages("What is it?", "Red."), messages("And it?", "Blue."), messages("Hello?", "Hello!")]
    own = [[red], [blue], []] if column == "images" else [red, blue, None]
    feature = List(ImageFeature()) if column == "images" else ImageFeature()
    role = {"role": Value("string"), "content": Value("string")}
    table = Dataset.from_dict(
        {"messages": content, column: own}, features=Features({"messages": [role], column: feature})
    )
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "train.parquet")
    source = tmp_path / "data" / "train.parquet" if kind == "parquet" else tmp_path / "data"
    dataset = read_conversations(str(source), ConversationArguments())
    assert [shape(sample)[0][1] for sample in dataset] == ["IMAGE", "IMAGE", "Hello?"]
    assert [colours(sample) for sample in dataset] == [[(255, 0, 0)], [(0, 0, 255)], []]


def test_llavas_form_in_a_dataset_of_the_hub(tmp_path, images):
    """Turns by human and gpt in a table, images as paths: what `load_dataset` makes of LLaVA's json."""
    rows = [{"id": "a", "image": "coco/red.png", "conversations": turns("<image>\nWhat?", "Red.")}]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_dataset(str(tmp_path / "data"), split="train").column_names == ["id", "image", "conversations"]
    (sample,) = read_conversations(str(tmp_path / "data"), ConversationArguments(image_folder=str(images)))
    assert shape(sample) == [("user", "IMAGE", "What?"), ("assistant", "Red.")]
    assert colours(sample) == [(255, 0, 0)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conversations": turns("What colour?", "Red.")}, "has 0 places for images, but 1 images"),
        ({"conversations": turns("<image><image>", "Red.")}, "has 2 places for images, but 1 images"),
        ({"image": None}, "has 1 places for images, but 0 images"),
        ({"image": "coco/green.png"}, "names the image coco/green.png, which is not in"),
        ({"conversations": [{"from": "bard", "value": "<image>"}]}, "has turn 0 by 'bard', not by one of human, gpt"),
        ({"conversations": turns("<image>", "Red.")[::-1]}, "has turn 0 by the assistant where the user's should be"),
        ({"conversations": turns("<image>", "Red.", "Sure?")}, "ends in a question without an answer"),
        ({"conversations": turns("<image>")}, "has no answer"),
        ({"conversations": []}, "has no turns"),
        ({"conversations": turns("<image>", " ")}, "has an empty answer in turn 1"),
        ({"conversations": turns("What?", "<image>")}, "has an image in turn 1, which is the assistant's"),
        ({"conversations": turns("<image>", None)}, "has turn 1 whose content is None"),
        ({"conversations": ["<image>", "Red."]}, "has turns that are no list of roles and texts"),
        ({"conversations": turns("<image>", ["Red."])}, "has turn 1 whose content is ['Red.']"),
        ({"image": {"path": "coco/red.png"}}, "names an image by {'path': 'coco/red.png'}, which is no path"),
    ],
)
def test_a_wrong_sample_is_named(read, change, said):
    with pytest.raises(ValueError, match=r"1 of the 3 samples of .* cannot be used") as error:
        read([LLAVA[0], LLAVA[1] | change, LLAVA[2]])
    assert f"Sample 1 (id '2354786') {said}" in str(error.value)
    assert "max_skipped (now 0)" in str(error.value)


def test_missing_images_are_counted_before_anything_is_read(read, images):
    (images / "vg" / "blue.png").unlink()
    with pytest.raises(ValueError, match=r"40 of the 42 samples .* \(40 image missing\)\. Sample 0 ") as error:
        read([LLAVA[1]] * 40 + [LLAVA[0], LLAVA[2]])
    assert str(error.value).count("vg/blue.png") == 5


def test_bad_samples_are_left_out_and_counted_if_asked(read, capsys):
    dataset = read([LLAVA[0], LLAVA[1] | {"image": "gone.png"}, *LLAVA, {"id": 4}], max_skipped=0.4)
    assert_is_llava([dataset[i] for i in (1, 2, 3)])
    assert len(dataset) == 4
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("2 of the 6 samples of ")
    assert line.endswith("They are left out.")
    assert "(1 image missing, 1 no answer)" in line
    assert "Sample 1 (id '2354786')" in line


def test_bad_samples_of_a_table_are_left_out_too(tmp_path, capsys):
    rows = [{"messages": messages("a", "b")}, {"messages": messages("a")}, {"messages": messages("c", "d")}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = read_conversations(str(tmp_path), ConversationArguments(max_skipped=0.5))
    assert [text_of(sample["messages"][1]) for sample in dataset] == ["b", "d"]
    assert "1 of the 3 samples" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"Sample 1 has no answer"):
        read_conversations(str(tmp_path), ConversationArguments())


def test_more_than_the_share_that_may_be_left_out_is_an_error(read):
    """A wrong image folder must not leave a run with the samples of text alone."""
    with pytest.raises(ValueError, match=r"2 of the 3 samples .* \(2 image missing\)"):
        read(LLAVA, image_folder=".", max_skipped=0.5)
    with pytest.raises(ValueError, match=r"max_skipped must be in \[0, 1\), found 1"):
        ConversationArguments(max_skipped=1)


def test_a_further_check_counts_as_well(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([{"messages": messages("a", "b")}]))

    def refuse(messages, num_images):
        raise BadSample("too long", "is too long")

    with pytest.raises(ValueError, match=r"\(1 too long\)\. Sample 0 is too long"):
        read_conversations(str(tmp_path / "data.json"), ConversationArguments(), refuse)


def test_an_image_that_cannot_be_read_names_its_sample(read, images):
    (images / "coco" / "red.png").write_text("no image")
    dataset = read(LLAVA)
    with pytest.raises(ValueError, match=r"id '000000033471'.*coco/red.png cannot be read"):
        dataset[0]


def test_images_are_read_as_the_processor_reads_them(read, images):
    """Upright, and transparency on white: what is trained on is what is asked about."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (8, 4)).save(images / "phone.jpg", exif=exif)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(images / "logo.png")
    ask = turns("<image>\nWhat?", "This.")
    phone, logo = read([{"image": name, "conversations": ask} for name in ("phone.jpg", "logo.png")])
    assert phone["images"][0].size == (4, 8)
    assert logo["images"][0].getpixel((0, 0)) == (255, 255, 255)


def test_wrong_files_are_refused(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="no file"):
        read_conversations(str(tmp_path / "gone.json"), ConversationArguments())
    with pytest.raises(FileNotFoundError, match="image_folder"):
        read(LLAVA, image_folder=str(tmp_path / "gone"))
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(ValueError, match=r"broken.json is not valid json"):
        read_conversations(str(tmp_path / "broken.json"), ConversationArguments())
    with pytest.raises(ValueError, match=r"have the fields \['text'\]; expected `conversations`"):
        read([{"text": "a"}])
    with pytest.raises(ValueError, match=r"must hold a list of samples"):
        read([])
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"lacks the column `messages`; it has \['text'\]"):
        read_conversations(str(tmp_path / "table"), ConversationArguments())
