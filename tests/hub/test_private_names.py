"""Which API of other libraries we use beyond their public names, and that each of it is there in what is installed.

A new use must be entered here, so that it is a decision; an upgrade that takes a name away fails here first, by name.
`tests/hub/foreign_names.py` finds the uses: imports of what a library's top level does not offer, attributes with a leading
underscore, and such names of a library's classes that ours override. What a `getattr` finds by a string is not seen.
"""

import importlib
import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.hub.foreign_names import internal_imports, private_names

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"

VERSIONS = {"transformers": ">=5.18,<6", "trl": ">=1.16", "accelerate": ">=1.3", "torch": ">=2.6"}
"""The versions of each library that must have the names below; those of pyproject.toml."""

INTERNAL = {
    # transformers: building blocks of models, used by all models of transformers itself
    "transformers.activations.ACT2FN": "the LLM's activation by its name",
    "transformers.initialization": "the module: initialisation that leaves loaded weights alone",
    "transformers.initialization.no_init_weights": "benchmarks: random weights are drawn once, not twice",
    "transformers.masking_utils.create_masks_for_generate": "masks of text, for any attention and cache",
    "transformers.modeling_outputs.BaseModelOutputWithPast": "output of the model; tells what a cache is called",
    "transformers.modeling_outputs.CausalLMOutputWithPast": "output of the model with heads",
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS": "the attention that was chosen",
    "transformers.models.llama.modeling_llama.eager_attention_forward": "the attention without a kernel",
    "transformers.models.llama.modeling_llama.rotate_half": "benchmarks: RoPE of the naive model",
    "transformers.utils.ModelOutput": "output of the image tokenizer",
    "transformers.utils.generic.can_return_tuple": "return_dict=False",
    "transformers.utils.generic.merge_with_config_defaults": "arguments that default to the configuration",
    "transformers.utils.output_capturing.OutputRecorder": "what output_hidden_states and output_attentions collect",
    "transformers.utils.output_capturing.capture_outputs": "the collecting itself",
    # transformers: images, files
    "transformers.image_utils.OPENAI_CLIP_MEAN": "CLIP's colours",
    "transformers.image_utils.OPENAI_CLIP_STD": "CLIP's colours",
    "transformers.image_utils.load_image": "an image of a path or URL",
    "transformers.image_utils.PILImageResampling": "the resampling of CLIP",
    "transformers.dynamic_module_utils.get_relative_import_files": "which files a repository carries",
    "transformers.utils.SAFE_WEIGHTS_INDEX_NAME": "file name of an index",
    "transformers.utils.SAFE_WEIGHTS_NAME": "file name of weights",
    "transformers.utils.cached_file": "one file of a repository on the Hub",
    "transformers.utils.hub.get_checkpoint_shard_files": "the shards of a repository on the Hub",
    "transformers.utils.logging.tqdm": "a progress bar that can be turned off with those of transformers",
    # transformers: training
    "transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK": "the loggers of --report_to",
    "transformers.integrations.integration_utils.get_available_reporting_integrations": "those that are installed",
    "transformers.trainer.DEFAULT_PROGRESS_CALLBACK": "the progress bar that ours takes the place of",
    "transformers.trainer.TRAINER_STATE_NAME": "file name of a checkpoint's state",
    "transformers.trainer_utils.PREFIX_CHECKPOINT_DIR": "folder name of a checkpoint",
    "transformers.trainer_utils.rotate_checkpoints": "removing old checkpoints",
    "transformers.utils.strtobool": "a flag of the command line",
    # transformers: its server
    "transformers.cli.serving.utils.InferenceThread": "the thread that generates",
    "transformers.generation.streamers.BaseStreamer": "gets the ids as they are generated",
    # others
    "accelerate.data_loader.prepare_data_loader": "a stream that is split by us, not by the dispatcher",
    "accelerate.utils.gather_object": "numbers of all processes",
    "trl.chat_template_utils.has_generation_markers": "whether a template marks the answers",
}
"""What is imported from the inside of libraries -> what for."""

MODEL, GENERATION = "transformers.modeling_utils.PreTrainedModel", "transformers.generation.utils.GenerationMixin"
PIPELINE, TRAINER = "transformers.pipelines.base.Pipeline", "transformers.trainer.Trainer"
PROCESSOR = "transformers.processing_utils.ProcessorMixin"

PRIVATE = {
    # what transformers asks of every model class
    "_can_compile_fullgraph": (MODEL, "text decoding compiles as one graph"),
    "_can_record_outputs": (MODEL, "which modules give hidden states and attentions"),
    "_init_weights": (MODEL, "initialisation of new weights"),
    "_no_split_modules": (MODEL, "what device_map may not take apart"),
    "_skip_keys_device_placement": (MODEL, "the cache stays where its layers are"),
    "_supports_attention_backend": (MODEL, "attention by its interface"),
    "_supports_flash_attn": (MODEL, "flash attention"),
    "_supports_flex_attn": (MODEL, "flex attention"),
    "_supports_sdpa": (MODEL, "torch's attention"),
    "_tied_weights_keys": (MODEL, "which weights are one"),
    "_attn_implementation": ("transformers.configuration_utils.PreTrainedConfig", "which attention was chosen"),
    # generate(): its hooks, in which images matter
    "_assisted_decoding": (GENERATION, "refused: a draft may cross between text and image"),
    "_expand_inputs_for_generation": (GENERATION, "beams and sequences repeat a row's images with the row"),
    "_get_logits_processor": (GENERATION, "the grammar of an image"),
    "_prefill": (GENERATION, "prefill in chunks keeps images whole"),
    # processor, pipeline
    "_check_special_mm_tokens": (PROCESSOR, "left to a check of ours that names the row"),
    "_get_arguments_from_pretrained": (PROCESSOR, "the image tokenizer, a model, is loaded too"),
    "_forward": (PIPELINE, "one of the four methods of a pipeline"),
    "_sanitize_parameters": (PIPELINE, "one of the four methods of a pipeline"),
    "_load_feature_extractor": (PIPELINE, "what a pipeline loads"),
    "_load_image_processor": (PIPELINE, "what a pipeline loads"),
    "_load_processor": (PIPELINE, "what a pipeline loads"),
    "_load_tokenizer": (PIPELINE, "what a pipeline loads"),
    "_load_video_processor": (PIPELINE, "what a pipeline loads"),
    # training
    "_load_optimizer_and_scheduler": (TRAINER, "the discriminator's optimizer goes on too"),
    "_save_optimizer_and_scheduler": (TRAINER, "the discriminator's optimizer is saved too"),
    "_prepare_inputs": (TRAINER, "pixels become codes on the device"),
    "_save": (TRAINER, "the processor is saved with an adapter"),
    "_save_checkpoint": (TRAINER, "the place in a stream is saved with a checkpoint"),
    "_train_batch_size": (TRAINER, "samples of a step"),
    "_assert_async": ("torch", "images in a compiled model are an error without looking at the ids"),
}
"""Private name -> the class (or module) of a library that has it, and what for."""


def requirements() -> dict[str, SpecifierSet]:
    """All of pyproject.toml: the quoted entries of its lists. (tomllib is not in Python 3.10.)"""
    entries = re.findall(r'^ *"([a-zA-Z0-9_-]+[<>=~].*?)"', PYPROJECT.read_text(encoding="utf-8"), re.MULTILINE)
    return {requirement.name: requirement.specifier for requirement in map(Requirement, entries)}


def find(path: str):
    """The module, class or function of a dotted name."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


def test_all_uses_are_entered():
    imports, names = internal_imports(), private_names()
    new = {name: users for name, users in (imports | names).items() if name not in {**INTERNAL, **PRIVATE}}
    assert new == {}, "used, but not entered in this file"
    gone = [name for name in INTERNAL if name not in imports] + [name for name in PRIVATE if name not in names]
    assert gone == [], "entered, but no longer used"


@pytest.mark.parametrize("path", INTERNAL)
def test_what_is_imported_is_there(path):
    assert find(path) is not None


@pytest.mark.parametrize("name", PRIVATE)
def test_private_names_are_there(name):
    owner = find(PRIVATE[name][0])
    if isinstance(owner, type) and not hasattr(owner, name):
        assert f"self.{name} = " in inspect.getsource(owner)  # set by __init__
    else:
        assert hasattr(owner, name)


def test_versions_are_those_of_the_package():
    owners = {path.split(".")[0] for path in [*INTERNAL, *(owner for owner, _ in PRIVATE.values())]}
    assert owners == VERSIONS.keys()
    for library, versions in VERSIONS.items():
        assert requirements()[library] == SpecifierSet(versions)
        assert version(library) in SpecifierSet(versions)
