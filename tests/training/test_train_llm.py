"""The language model stage: tokenizer, packing, a short run."""

import json

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.text_tokenizer import save_llama_tokenizer, train_sentencepiece
from training.train_llm import PackedText, encode_document, main, read_documents, tokenizer_lines
from training.world.corpus import TextWorld

TINY = """
model_config: {vocab_size: 640, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
train_documents: 400
eval_documents: 20
tokenizer_documents: 400
block_size: 64
eval_prompts: 4
max_steps: 2
per_device_train_batch_size: 2
save_steps: 1
save_total_limit: 1
report_to: none
use_cpu: true
disable_tqdm: true
"""


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_llama_tokenizer(train_sentencepiece(tokenizer_lines(TextWorld("train", 600), 600), 700), folder, 128)
    return folder


def test_fast_tokenizer_equals_sentencepiece(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    lines = [*tokenizer_lines(TextWorld("validation", 100), 100), "Unseen: Ünïcödé 龍 🙂  two  spaces", "12 345"]
    for line in lines:
        assert tokenizer(line, add_special_tokens=False)["input_ids"] == reference.encode(line), line
        assert tokenizer.decode(tokenizer(line)["input_ids"], skip_special_tokens=True) == line


def test_ids_are_those_of_a_llama(tokenizer_folder, golden):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert type(tokenizer).__name__ == "LlamaTokenizer"
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<0x0A>"]) == [0, 1, 2, 13]
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (0, "left")
    assert tokenizer("\n", add_special_tokens=False)["input_ids"][-1] == 13
    assert encode_document("\nhorse</s>", tokenizer)[:2] == [1, 13]
    assert encode_document("horse</s>", tokenizer)[0] == 1

    ours = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    released = json.loads((golden / "official_checkpoint" / "checkpoint" / "tokenizer.json").read_text())
    assert ours.keys() == released.keys()
    for key in ours.keys() - {"model"}:
        assert ours[key] == released[key], key


def test_packing_loses_only_the_last_block(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    documents = TextWorld("train", 20)
    ids = [i for index in range(20) for i in encode_document(documents[index], tokenizer)]
    packed = PackedText(documents, tokenizer, 50)
    assert len(packed) == len(ids) // 50
    assert torch.cat([packed[i]["input_ids"] for i in range(len(packed))]).tolist() == ids[: len(packed) * 50]
    with pytest.raises(ValueError, match="less than a block of 100000"):
        PackedText(documents, tokenizer, 100_000)


def test_two_steps_and_going_on(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(TINY)
    out = tmp_path / "out"
    metrics = main(["--config", str(config), "--output_dir", str(out)])
    assert metrics["eval_loss"] > 0
    assert 0 <= metrics["answers_all"] <= 1
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, 2)
    assert len(AutoTokenizer.from_pretrained(out)) == model.config.vocab_size == 640
    main(["--config", str(config), "--output_dir", str(out), "--max_steps", "3"])
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


def test_documents_of_a_file(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(TINY)
    text = tmp_path / "documents.txt"
    text.write_text("\n".join(TextWorld("train", 300)[i].replace("\n", " ").replace("</s>", "") for i in range(300)))
    metrics = main(
        ["--config", str(config), "--output_dir", str(tmp_path / "out"), "--dataset", str(text), "--max_steps", "1"]
    )
    assert set(metrics) == {"eval_loss"}
    from training.train_llm import LlmArguments

    with pytest.raises(FileNotFoundError, match=r"missing\.txt is not a file"):
        read_documents(LlmArguments(dataset=str(tmp_path / "missing.txt")))
