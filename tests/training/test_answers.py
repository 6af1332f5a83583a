"""What is supervised in instruction tuning: the answers with the ends of their turns, read back by decoding the labels."""

import numpy as np
import pytest
from PIL import Image

from processing.processing_libra import LibraProcessor
from training.answers import AnswerCollator, ConversationCheck, check_supervision, row_length, supervised_texts
from training.conversations import BadSample, read_messages
from training.data import DataArguments, load_world_conversations

SHORT = "\nAnswer the question using a single word or phrase."
CHOICE = "\nA. Red\nB. Blue\nAnswer with the option's letter from the given choices directly."


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def sample(id: str, num_images: int, *texts: str) -> dict:
    """A sample as [`~training.conversations.read_conversations`] gives it."""
    pixels = np.random.default_rng(len(id)).integers(0, 256, (num_images, 40, 30, 3), dtype=np.uint8)
    messages = read_messages({"conversations": turns(*texts)}, num_images)
    return {"id": id, "messages": messages, "images": [Image.fromarray(image) for image in pixels]}


# The kinds of samples in LLaVA-665k, with what makes answers hard to cut out: marks behind the question, newlines,
# code, answers that repeat the question or the template, other scripts, many turns, no image, two images.
SAMPLES = [
    sample("chat", 1, "<image>\nWhat are the colors of the bus?", "The bus is white and red.", "Why?", "It is painted."),
    sample("mark behind", 1, f"What is it?{SHORT}\n<image>", "Bus"),
    sample("many turns", 1, f"<image>\nIs it red?{SHORT}", "No", "Is it blue?", "Yes", f"Which?{CHOICE}", "B"),
    sample("text", 0, "Write code.", "```python\nfor i in range(3):\n    print(i)\n```\n\nDone.  Ok?\n", "USER: hi", "ASSISTANT: hi"),
    sample("region", 1, "<image>\nWhere is the dog?", "[0.12, 0.5, 0.33, 0.98]"),
    sample("scripts", 0, "你好", "你好！很高兴 😀 é", "ok", " leading and trailing "),
    sample("two images", 2, "<image> and <image>: which is red?", "The first."),
]  # fmt: skip


MAX = 180
"""A length that cuts off answers of some samples, and leaves each at least one."""


@pytest.fixture(scope="module")
def processor(repo) -> LibraProcessor:
    """LLaMA's kind of tokenizer and the template of the release, with small images and a long context."""
    processor = LibraProcessor.from_pretrained(repo)
    processor.tokenizer.model_max_length = 1024
    return processor


def spaceless(texts: list[str]) -> list[str]:
    return ["".join(text.split()) for text in texts]


def expected(sample: dict) -> list[str]:
    answers = [m["content"][0]["text"] for m in sample["messages"] if m["role"] == "assistant"]
    return spaceless([f"{answer}</s>" for answer in answers])


def test_the_answers_and_nothing_else_are_supervised(processor):
    """In one batch, so with padding; each answer apart, so nothing between them is."""
    batch = processor.tokenize_images(AnswerCollator(processor)(SAMPLES))
    assert batch["input_ids"].shape == batch["labels"].shape
    for one, ids, labels in zip(SAMPLES, batch["input_ids"], batch["labels"]):
        assert spaceless(supervised_texts(processor, labels)) == expected(one)
        assert (labels[labels != -100] == ids[labels != -100]).all()
        assert (labels < processor.text_vocab_size).all()
        assert sum(ids >= processor.text_vocab_size) == len(one["images"]) * processor.num_image_tokens


def test_the_text_of_answers_is_kept_to_the_space(processor):
    (labels,) = AnswerCollator(processor)([SAMPLES[3]])["labels"]
    first, _ = supervised_texts(processor, labels)
    assert first.strip() == "```python\nfor i in range(3):\n    print(i)\n```\n\nDone.  Ok?\n </s>"


def test_the_first_supervised_token_follows_the_generation_prompt(processor):
    """What is learned is what is generated: the prompt of inference ends where the first label begins."""
    for one in SAMPLES:
        batch = processor.tokenize_images(AnswerCollator(processor)([one]))
        first = (batch["labels"][0] != -100).nonzero()[0].item()
        prompt = processor(
            text=processor.apply_chat_template(one["messages"][:1], add_generation_prompt=True, tokenize=False),
            images=one["images"] or None,
            return_tensors="pt",
        )
        assert prompt["input_ids"][0].tolist() == batch["input_ids"][0, :first].tolist(), one["id"]


def test_the_check_accepts_what_is_right(processor):
    check_supervision(AnswerCollator(processor), SAMPLES)
    check_supervision(AnswerCollator(processor, max_length=MAX), SAMPLES)  # cuts some answers off


def test_samples_of_the_world(processor, icons):
    train, _ = load_world_conversations(DataArguments(icons=str(icons), train_samples=6, eval_samples=1))
    check_supervision(AnswerCollator(processor), [train[i] for i in range(6)])


RIGHT = "{%- generation -%}\n            {{- ' ' ~ render(message['content']) ~ ' ' ~ eos_token -}}\n        {%- endgeneration -%}"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("{{- ' ' ~ render(message['content']) ~ ' ' ~ eos_token -}}", "has no {% generation %}"),
        ("{%- generation -%}{{- ' ' ~ render(message['content']) -}}{%- endgeneration -%}{{- ' ' ~ eos_token -}}",
         "id 'mark behind'.*supervises.*expected its answers, each with the end of its turn"),
        ("{{- ' ' ~ render(message['content']) ~ ' ' -}}{%- generation -%}{{- eos_token -}}{%- endgeneration -%}",
         "id 'mark behind'.*supervises"),
        ("{%- generation -%}{%- endgeneration -%}{{- ' ' ~ render(message['content']) ~ ' ' ~ eos_token -}}",
         "id 'mark behind'.*has no supervised token"),
    ],
    ids=["no marks", "without the end of the turn", "the end only", "nothing"],
)  # fmt: skip
def test_a_wrong_template_is_refused(repo, wrong, said):
    processor = LibraProcessor.from_pretrained(repo)
    assert RIGHT in processor.chat_template
    processor.chat_template = processor.chat_template.replace(RIGHT, wrong)
    with pytest.raises(ValueError, match=said):
        check_supervision(AnswerCollator(processor), SAMPLES[1:2])


def test_a_template_that_marks_everything_is_refused(repo):
    processor = LibraProcessor.from_pretrained(repo)
    processor.chat_template = (
        "{% for message in messages %}{% generation %}{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}</s>{% endgeneration %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"id 'mark behind'.*image tokens among its answers"):
        check_supervision(AnswerCollator(processor), SAMPLES[1:2])
    with pytest.raises(ValueError, match=r"id 'text'.*supervises"):
        check_supervision(AnswerCollator(processor), SAMPLES[3:4])


def test_a_sample_without_an_answer_left_is_named(processor):
    """Beside others that have theirs: the loss of the batch would not show it."""
    long = sample("long", 0, "Why? " * 100, "Because.")
    with pytest.raises(ValueError, match=r"id 'long'.*no supervised token.*max_length \(180\) cuts off"):
        AnswerCollator(processor, max_length=MAX)([SAMPLES[5], long])


@pytest.mark.parametrize("one", SAMPLES, ids=lambda one: one["id"])
def test_the_length_check_is_exact(processor, one):
    """What it lets through has its images whole and an answer, at every length; what it refuses has not."""
    whole = AnswerCollator(processor)([one])
    shortest = (whole["labels"][0] != -100).nonzero()[0].item() + 1
    ConversationCheck(processor, shortest)(one["messages"], len(one["images"]))
    AnswerCollator(processor, shortest)([one])
    with pytest.raises(BadSample, match=f"needs {shortest} tokens .* max_length is {shortest - 1}"):
        ConversationCheck(processor, shortest - 1)(one["messages"], len(one["images"]))


def test_the_length_check_counts_images_of_later_turns(processor):
    one = sample("later", 1, "Hello?", "Hello!", "<image>\nWhat?", "Red.", "Sure?", "Yes.")
    needed = len(AnswerCollator(processor)([one | {"messages": one["messages"][:4]}])["input_ids"][0])
    ConversationCheck(processor, needed)(one["messages"], 1)
    AnswerCollator(processor, needed)([one])
    with pytest.raises(BadSample):
        ConversationCheck(processor, needed - 15)(one["messages"], 1)


@pytest.mark.parametrize("place", [0, 1])
def test_special_tokens_in_texts_are_refused(processor, place):
    """They would be ids of their own: an answer would end in its middle."""
    texts = ["Mark it up.", "<s>old</s> and new"] if place else ["What is </s>?", "An end."]
    one = sample("html", 0, *texts)
    with pytest.raises(BadSample, match=rf"has '</?s>' in turn {place}"):
        ConversationCheck(processor)(one["messages"], 0)


def test_rows_are_as_long_as_the_context_unless_shorter_ones_are_asked_for(processor):
    assert row_length(processor, None) == 1024
    assert row_length(processor, 100) == 100
    assert row_length(processor, 2048) == 1024
