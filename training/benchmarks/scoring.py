"""What the task files of [`tasks/`](tasks) call: questions with the paper's prompts, and our metrics.

lmms-eval calls `doc_to_visual` and `doc_to_text` for each sample, `process_results` on its answer, and the aggregations on
what that returned for all samples. Numbers are in percent (MME: points).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from .metrics.choice_accuracy import option_letter
from .metrics.cider import cider_d, tokenize
from .metrics.circular_accuracy import circular_accuracy
from .metrics.exact_match import is_match
from .metrics.mme_score import PERCEPTION, mme_scores
from .metrics.pope_f1 import pope_scores
from .metrics.vqa_accuracy import vqa_score

Sample = dict[str, Any]

MMBENCH_TURN = 1_000_000
"""MMBench numbers the turns of a question's options `index`, `index + 1000000`, ..."""


def image(doc: Sample) -> list:
    """The one image of a sample."""
    return [doc["image"].convert("RGB")]


def question(doc: Sample, lmms_eval_specific_kwargs: dict[str, str]) -> str:
    """The question of a sample and, on a line of its own, `prompt`."""
    return f"{doc['question'].strip()}\n{lmms_eval_specific_kwargs['prompt']}"


def prompt(doc: Sample, lmms_eval_specific_kwargs: dict[str, str]) -> str:
    """`prompt` alone: what captions are asked for with."""
    return lmms_eval_specific_kwargs["prompt"]


def score_vqa(doc: Sample, results: Sequence[str]) -> dict[str, float]:
    """VQA score; `answers` of a sample are strings, or mappings with `answer`."""
    answers = [given["answer"] if isinstance(given, dict) else given for given in doc["answers"]]
    return {"vqa_accuracy": 100 * vqa_score(results[0], answers)}


def score_exact_match(doc: Sample, results: Sequence[str]) -> dict[str, float]:
    """Exact match with the `answer`."""
    return {"exact_match": 100.0 * is_match(results[0], doc["answer"])}


def score_pope(doc: Sample, results: Sequence[str]) -> dict[str, Sample]:
    """For the aggregations `pope_*`; the split of a sample is its `category`."""
    found = {"answer": results[0], "right": doc["answer"], "split": doc["category"]}
    return dict.fromkeys(("pope_f1", "pope_accuracy", "pope_yes_ratio"), found)


def pope_f1(items: Sequence[Sample]) -> float:
    """Mean F1 of the splits."""
    return _pope(items, "f1")


def pope_accuracy(items: Sequence[Sample]) -> float:
    """Mean accuracy of the splits."""
    return _pope(items, "accuracy")


def pope_yes_ratio(items: Sequence[Sample]) -> float:
    """Mean share of yes among the answers."""
    return _pope(items, "yes_ratio")


def _pope(items: Sequence[Sample], name: str) -> float:
    return 100 * pope_scores(*([item[key] for item in items] for key in ("answer", "right", "split")))[name]


def score_mme(doc: Sample, results: Sequence[str]) -> dict[str, Sample]:
    """For the aggregations `mme_*`; a sample counts for one of them."""
    part = "mme_perception" if doc["category"] in PERCEPTION else "mme_cognition"
    found = {"prediction": results[0], "right": doc["answer"], "subtask": doc["category"], "image": doc["question_id"]}
    return {part: found}


def mme_perception(items: Sequence[Sample]) -> float:
    """Sum of accuracy and accuracy+ of the subtasks of perception, at most 2000."""
    return _mme(items)["perception"]


def mme_cognition(items: Sequence[Sample]) -> float:
    """Sum of accuracy and accuracy+ of the subtasks of cognition, at most 800."""
    return _mme(items)["cognition"]


def _mme(items: Sequence[Sample]) -> dict[str, float]:
    items = _whole_pairs(items, lambda item: (item["subtask"], item["image"]))
    return mme_scores(*([item[key] for item in items] for key in ("prediction", "right", "subtask", "image")))


def score_caption(doc: Sample, results: Sequence[str]) -> dict[str, Sample]:
    """For the aggregation `cider`; references are in `caption`, `annotations_captions` or `sentences`."""
    references = next(doc[key] for key in ("caption", "annotations_captions", "sentences") if key in doc)
    return {"cider": {"caption": results[0], "references": list(references)}}


def cider(items: Sequence[Sample]) -> float:
    """Mean CIDEr-D, with our tokenizer."""
    captions = [tokenize(item["caption"]) for item in items]
    references = [[tokenize(text) for text in item["references"]] for item in items]
    return 100 * float(cider_d(captions, references).mean())


def score_scienceqa(doc: Sample, results: Sequence[str]) -> dict[str, float]:
    """Accuracy; `choices` of a sample are texts, `answer` the number of the right one."""
    letter = option_letter(results[0], doc["choices"])
    return {"accuracy": 100.0 * (letter == chr(ord("A") + doc["answer"]))}


def with_image(dataset: Any) -> Any:
    """SEED without its questions about videos."""
    return dataset.filter(lambda kind: kind == "image", input_columns="data_type")


def score_seed(doc: Sample, results: Sequence[str]) -> dict[str, float]:
    """Accuracy; options are in `choice_a` to `choice_d`."""
    letter = option_letter(results[0], [doc[f"choice_{letter}"] for letter in "abcd"])
    return {"accuracy": 100.0 * (letter == doc["answer"].strip().upper())}


def mmbench_question(doc: Sample, lmms_eval_specific_kwargs: dict[str, str]) -> str:
    """Hint if there is one, question, options and `prompt`, each on a line of its own."""
    hint = [] if _is_absent(doc["hint"]) else [doc["hint"]]
    options = [f"{letter}. {doc[letter]}" for letter in "ABCDE" if not _is_absent(doc.get(letter))]
    return "\n".join([*hint, doc["question"], *options, lmms_eval_specific_kwargs["prompt"]])


def score_mmbench(doc: Sample, results: Sequence[str]) -> dict[str, Any]:
    """For the aggregation `mmbench_circular`, and plain `accuracy`; options are in `A` to `E`, absent ones `nan`."""
    letters = [letter for letter in "ABCDE" if not _is_absent(doc.get(letter))]
    right = option_letter(results[0], [str(doc[letter]) for letter in letters]) == doc["answer"].strip().upper()
    return {
        "mmbench_circular": {"right": right, "question": int(doc["index"]) % MMBENCH_TURN},
        "accuracy": 100.0 * right,
    }


def _is_absent(option: Any) -> bool:
    return option is None or option in ("", "nan") or (isinstance(option, float) and math.isnan(option))


def mmbench_circular(items: Sequence[Sample]) -> float:
    """Circular accuracy."""
    return 100 * circular_accuracy([item["right"] for item in items], [item["question"] for item in items])


def score_mmvp(doc: Sample, results: Sequence[str]) -> dict[str, Any]:
    """For the aggregation `mmvp_pairs`, and plain `accuracy`; questions `Index` 1 and 2 are a pair, 3 and 4, and so on."""
    options = re.split(r"\([ab]\)", doc["Options"])[1:]  # "(a) Open (b) Closed"
    right = option_letter(results[0], options or 2) == option_letter(doc["Correct Answer"], 2)
    return {"mmvp_pairs": {"right": right, "pair": (int(doc["Index"]) - 1) // 2}, "accuracy": 100.0 * right}


def mmvp_pairs(items: Sequence[Sample]) -> float:
    """Share of pairs both of whose questions are answered right."""
    items = _whole_pairs(items, lambda item: item["pair"])
    return 100 * circular_accuracy([item["right"] for item in items], [item["pair"] for item in items])


def _whole_pairs(items: Sequence[Sample], pair_of: Callable[[Sample], Any]) -> list[Sample]:
    """The items whose pair is complete; `--limit` may cut one in two."""
    sizes = Counter(map(pair_of, items))
    whole = [item for item in items if sizes[pair_of(item)] != 1]
    if len(whole) < len(items):
        print(f"{len(items) - len(whole)} questions are left out of the score: the other of their pair was not asked.")
    return whole


def mmvet_score(items: Sequence[Sample]) -> float:
    """
    Mean of the judge's scores.

    Raises:
        RuntimeError: if the judge did not answer; lmms-eval itself counts such answers as wrong.
    """
    failed = sum(not item["eval_model"] for item in items)
    if failed:
        raise RuntimeError(f"The judge gave no score for {failed} of {len(items)} answers; run again when it answers.")
    return 100 * sum(item["score"] for item in items) / len(items)
