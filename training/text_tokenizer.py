"""A small Llama-style tokenizer: SentencePiece BPE with byte fallback, in the file layout of the Llama releases."""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
"""The first three ids: unknown (also used for padding, as in the release), beginning, end."""


def train_sentencepiece(lines: Iterable[str], vocab_size: int) -> bytes:
    """
    Train a BPE model with Llama's settings.

    Args:
        lines (`Iterable[str]`): Text without line breaks, which are left to the byte tokens as in Llama.
        vocab_size (`int`): Number of tokens: 3 special ones, 256 bytes, and at least all the characters.

    Returns:
        `bytes`: The content of a `tokenizer.model`.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _merges(pieces: dict[str, float]) -> list[tuple[str, str]]:
    """Merges that give the same segmentation as the scores of SentencePiece, in the order they are applied."""
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    found = []
    for piece, score in pieces.items():
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in ranks and piece[i:] in ranks]
        found += [(-score, ranks[left], ranks[right], left, right) for left, right in splits]
    return [(left, right) for *_, left, right in sorted(found)]


def to_fast_tokenizer(model: bytes) -> Tokenizer:
    """
    The fast tokenizer equal to a SentencePiece model, structured as in the Llama releases.

    Args:
        model (`bytes`): The content of a `tokenizer.model`.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.get_piece_size())
    vocab = {processor.id_to_piece(i): i for i in ids}
    scored = {
        processor.id_to_piece(i): processor.get_score(i)
        for i in ids
        if not (processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i))
    }
    bpe = models.BPE(vocab=vocab, merges=_merges(scored), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def save_llama_tokenizer(model: bytes, folder: Path, max_length: int) -> PreTrainedTokenizerBase:
    """
    Write `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json`, and load them as users do.

    Args:
        model (`bytes`): The content of a `tokenizer.model`.
        folder (`Path`): Where to; it is created.
        max_length (`int`): Longest input of the language model.

    Returns:
        `PreTrainedTokenizerBase`: What `AutoTokenizer` makes of the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    to_fast_tokenizer(model).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": True,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": max_length,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return AutoTokenizer.from_pretrained(folder)
