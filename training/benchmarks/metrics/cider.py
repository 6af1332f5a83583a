"""CIDEr-D (Vedantam et al. 2015) of captions, as coco-caption computes it: TF-IDF of n-grams up to 4, clipped, with a
Gaussian penalty on the difference in length, times 10. 1.0 here is the 100 of papers.

**Tokenizer.** coco-caption runs Stanford's PTBTokenizer in Java. [`tokenize`] does its work for captions with one regular
expression: lower case, contractions and possessives split (`do n't`, `man 's`), punctuation removed (but parentheses are
the words `-lrb-` and `-rrb-`, as there), hyphenated words, numbers and abbreviations of single letters kept whole. Rare
forms differ (abbreviations such as `mr.`, `cannot`, currency, emoticons). Pass `tokenized=True` for captions that the Java tokenizer has split: then scores are those of coco-caption.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

LONGEST = 4
SIGMA = 6.0

TOKEN = re.compile(
    r"""
    -[lr]rb-
    | (?:[a-z]\.){2,}                      # u.s.
    | \d+(?:[.,:/]\d+)*                    # 10:30, 1,000, 1/2
      (?:-?[a-z]+)*(?=[^a-z]|$)            # 3-d, 50th
    | [^\W\d_]+?(?=n't\b)                  # the do of don't
    | n't\b
    | '(?:s|re|ve|ll|d|m)\b
    | [^\W_]+(?:[-&/_][^\W_]+)*            # t-shirt, b&w
    | [$%#@&+=*]
    """,
    re.VERBOSE,
)


def tokenize(caption: str) -> str:
    """
    A caption in tokens.

    Args:
        caption (`str`): as it was written.

    Returns:
        `str`: its tokens, separated by spaces.
    """
    plain = caption.lower().replace("’", "'").replace("(", " -lrb- ").replace(")", " -rrb- ")
    return " ".join(TOKEN.findall(plain))


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """
    CIDEr-D of each caption. Words count as rare or common by how many images' references have them, so a score depends on
    the whole corpus, and that of a single image is 0.

    Args:
        candidates (`Sequence` of `str`): a caption an image, in tokens separated by spaces.
        references (`Sequence` of `Sequence` of `str`): the references of each image, likewise; at least one each.

    Returns:
        `np.ndarray` of shape `(images,)`, float64, in [0, 10].

    Raises:
        ValueError: if an image has no reference, or there are not as many candidates as images.
    """
    if len(candidates) != len(references):
        raise ValueError(f"Expected a caption an image, found {len(candidates)} captions of {len(references)} images.")
    empty = [place for place, captions in enumerate(references) if not captions]
    if empty:
        raise ValueError(f"Image {empty[0]} has no reference caption.")
    counted = [[_ngrams(caption) for caption in captions] for captions in references]
    seen_in = Counter(ngram for captions in counted for ngram in set().union(*captions))
    log_images = math.log(len(references)) if references else 0.0

    def weigh(counts: Counter) -> tuple[list[dict[tuple[str, ...], float]], np.ndarray, int]:
        """TF-IDF by length of n-gram, its norms, and the number of bigrams, which stands for the length."""
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for ngram, count in counts.items():
            vectors[len(ngram) - 1][ngram] = count * (log_images - math.log(max(1, seen_in[ngram])))
        norms = np.array([math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors])
        return vectors, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)

    scores = np.zeros(len(candidates))
    for image, captions in enumerate(counted):
        vectors, norms, length = weigh(_ngrams(candidates[image]))
        for other_vectors, other_norms, other_length in map(weigh, captions):
            products = np.array(
                [
                    sum(min(value, other.get(ngram, 0.0)) * other.get(ngram, 0.0) for ngram, value in vector.items())
                    for vector, other in zip(vectors, other_vectors)
                ]
            )
            scale = norms * other_norms
            similarity = np.divide(products, scale, out=np.zeros(LONGEST), where=scale > 0).mean()
            scores[image] += similarity * math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))
        scores[image] *= 10 / len(captions)
    return scores


def _ngrams(caption: str) -> Counter:
    words = caption.split()
    return Counter(
        tuple(words[start : start + length])
        for length in range(1, LONGEST + 1)
        for start in range(len(words) - length + 1)
    )


class Cider(evaluate.Metric):
    """`compute(predictions, references, tokenized=False)`: a caption and a list of references an image."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Vedantam et al. CIDEr: Consensus-based Image Description Evaluation. CVPR 2015.",
            inputs_description="predictions: str; references: list of str; tokenized: bool, whether both are in tokens.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], tokenized: bool = False
    ) -> dict[str, float]:
        if not tokenized:
            predictions = [tokenize(caption) for caption in predictions]
            references = [[tokenize(caption) for caption in captions] for captions in references]
        return {"cider": float(cider_d(predictions, references).mean())}
