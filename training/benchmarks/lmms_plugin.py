"""The entry point by which lmms-eval finds Libra (group `lmms_eval.models`).

Apart from the model, and importing nothing at the top: lmms-eval loads it in the middle of its own import.
"""

from typing import Any


def manifest() -> Any:
    """
    What the entry point gives.

    Returns:
        `ModelManifest`: says that `libra` is [`~training.benchmarks.lmms_model.LibraLmms`].
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="libra", chat_class_path="training.benchmarks.lmms_model.LibraLmms")
