"""Puts a repository on the Hub: everything is looked at first, nothing is sent without being told to.

What is refused is what a reader of the repository would suffer from (weights that do not load, old code, no card) and what
its owner would (secrets, pickles, files from elsewhere).
"""

import glob
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from modeling_libra import LibraConfig
from processing.configuration_libra_image_tokenizer import LibraImageTokenizerConfig
from processing.modeling_libra_image_tokenizer import LibraImageTokenizer

from .export import AUTO_MAPS, CONFIGURATIONS, IMAGE_TOKENIZER_FOLDER, code_references, remote_code_files
from .loading import check_configuration, check_model, check_parts_fit, load_processor
from .weights import check_fit, not_finite, promised_weights, read_json, some

LARGEST_FILE = 20 * 10**9
"""Bytes of a file above which the Hub advises to split it; 50 GB is the most it takes."""

NOT_PUSHED = (".git", ".cache", "__pycache__", ".DS_Store")
"""Files and folders that other programs leave behind; they stay here."""

PICKLES = (
    *(".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pt2", ".pth"),
    *(".h5", ".hdf5", ".keras", ".npy", ".npz"),  # need not be pickles, but can hold them
)
"""Endings of files that can run code when they are read."""

PICKLE_MAGIC = re.compile(rb"\x80[\x02-\x05]|\x93NUMPY|\x89HDF\r\n")
"""How such files begin, whatever their names; what torch and NumPy put several into is a zip archive."""

UNFINISHED = re.compile(r"\.(incomplete|lock|part|partial|tmp)$|\.partial-\d+$")
"""Names of files and folders that something was still writing."""

SECRET_NAMES = re.compile(
    r"^\.env|^\.netrc$|^\.git-credentials$|^\.pypirc$|^id_(rsa|dsa|ecdsa|ed25519)$|\.(pem|key|p12|pfx)$"
    r"|^(hf_)?tokens?(\.(txt|json))?$|^stored_tokens$|^(secrets?|credentials?)(\.(json|ya?ml|toml|txt|ini))?$",
    re.IGNORECASE,
)
"""Names of files that hold secrets."""

SECRETS = {
    "a token of the Hugging Face Hub": re.compile(rb"\bhf_[A-Za-z0-9]{30,}"),
    "an API key": re.compile(rb"\bsk-[A-Za-z0-9_-]{32,}"),
    "a GitHub token": re.compile(rb"\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_[A-Za-z0-9_]{40,}"),
    "an AWS key": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
"""What secrets look like inside of text files."""

TEXT_LIMIT = 10 * 2**20
"""Bytes up to which a file is searched for secrets."""

LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
""".split()  # noqa: SIM905
"""What the Hub takes for a license (its own answer to a wrong one, 2026); others are `other`, with `license_name`."""

TASKS = (
    "any-to-any",
    "image-text-to-text",
    "image-to-text",
    "text-generation",
    "text-to-image",
    "visual-question-answering",
)
"""Tasks of the Hub that a Libra can be shown under."""

CARD_METADATA = ("license", "library_name", "pipeline_tag")
"""What a card must say in its metadata: the Hub needs it to show and run the model."""


class RepoFile(NamedTuple):
    """A file that would be pushed.

    Args:
        name (`str`): its path in the repository.
        size (`int`): its bytes.
    """

    name: str
    size: int


class PushPlan(NamedTuple):
    """
    What a push would do.

    Args:
        repo_id (`str`): the repository on the Hub.
        folder (`Path`): the folder to push.
        files (`list` of [`RepoFile`]): what is sent, by name.
        left_out (`list` of `str`): what stays here, see `NOT_PUSHED`.
        problems (`list` of `str`): why it is refused; empty if it is not.
    """

    repo_id: str
    folder: Path
    files: list[RepoFile]
    left_out: list[str]
    problems: list[str]

    def __str__(self) -> str:
        lines = [f"{size_text(file.size):>10}  {file.name}" for file in self.files]
        lines += [f"  not sent  {name}" for name in self.left_out]
        total = sum(file.size for file in self.files)
        return "\n".join([*lines, f"{size_text(total):>10}  {len(self.files)} files, from {self.folder}"])


def plan_push(repo_id: str, folder: str | os.PathLike) -> PushPlan:
    """
    Looks at a folder as [`push`] would, and sends nothing.

    Args:
        repo_id (`str`): the repository, `organization/name` or `name`.
        folder (`str` or `os.PathLike`): what `libra export`, `convert` or `init` wrote.

    Returns:
        [`PushPlan`]

    Raises:
        ValueError: if there is no such folder, or the name is none that the Hub takes.
    """
    validate_repo_id(repo_id)
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r} to push.")
    everything = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    sent: list[Path] = []
    left_out: list[Path] = []
    for path in everything:
        (left_out if set(path.relative_to(folder).parts) & set(NOT_PUSHED) else sent).append(path)
    files = [RepoFile(_name(path, folder), path.stat().st_size if path.exists() else 0) for path in sent]
    return PushPlan(repo_id, folder, files, [_name(path, folder) for path in left_out], find_problems(folder, sent))


def push(plan: PushPlan, private: bool = False, token: str | None = None) -> str:
    """
    Sends what a plan lists, and creates the repository if there is none. An interrupted push is resumed by calling this
    again: files that are there already are not sent twice.

    Args:
        plan ([`PushPlan`]): from [`plan_push`].
        private (`bool`, *optional*, defaults to `False`): of a repository that does not exist yet.
        token (`str`, *optional*): of the Hub; by default that of `hf auth login` or `$HF_TOKEN`.

    Returns:
        `str`: the address of the commit.

    Raises:
        ValueError: if the plan has problems, or the Hub refuses the card.
        OSError: if the Hub cannot be reached or refuses.
    """
    check_plan(plan)
    api = HfApi(token=token)
    repo_id = api.create_repo(plan.repo_id, private=private, exist_ok=True).repo_id
    try:
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=plan.folder,
            allow_patterns=[glob.escape(file.name) for file in plan.files],
            commit_message="Upload a Libra model",
        )
    except RuntimeError as error:  # the client's own, for a file that did not arrive
        raise OSError(f"{error} ({error.__cause__}) Push again: what has arrived is not sent twice.") from error
    return commit.commit_url


def check_plan(plan: PushPlan) -> None:
    """
    Refuses a plan with problems.

    Raises:
        ValueError: naming all of them.
    """
    if plan.problems:
        raise ValueError(f"{plan.folder} cannot be pushed: {'; '.join(plan.problems)}")


def find_problems(folder: Path, files: list[Path]) -> list[str]:
    """
    Everything that speaks against pushing a folder.

    Args:
        folder (`Path`): the folder.
        files (`list` of `Path`): what of it would be sent.

    Returns:
        `list` of `str`: a sentence for each problem.
    """
    problems = [*_problems_of_files(folder, files), *_problems_of_card(folder), *_problems_of_code(folder, files)]
    broken = _problems_of_loading(folder, _check_configurations)
    broken = broken or _problems_of_loading(folder, _check_model, _check_image_tokenizer, _check_processor)
    return problems + (broken or _problems_of_numbers(folder))


def _problems_of_files(folder: Path, files: list[Path]) -> Iterator[str]:
    if UNFINISHED.search(folder.resolve().name):
        yield f"{folder} is what an interrupted command left; run the command again."
    for path in files:
        name = _name(path, folder)
        if not path.resolve().is_relative_to(folder.resolve()):
            yield f"{name} is a link to a file outside of the folder; put the file itself there."
        elif UNFINISHED.search(name):
            yield f"{name} looks unfinished; remove it, or finish what wrote it."
        elif SECRET_NAMES.search(path.name):
            yield f"{name} looks like a file of secrets; move it elsewhere."
        elif path.suffix.lower() in PICKLES or _begins_as_pickle(path):
            yield (
                f"{name} is a pickle or can hold one, which runs code when it is read; save safetensors (libra export does) "
                "and remove it."
            )
        elif path.stat().st_size > LARGEST_FILE:
            yield (
                f"{name} has {size_text(path.stat().st_size)}, more than the {size_text(LARGEST_FILE)} the Hub advises "
                "for a file; export the weights again with --max-shard-size 5GB."
            )
        elif path.stat().st_size <= TEXT_LIMIT and path.suffix != ".safetensors":
            content = path.read_bytes()
            yield from (f"{name} holds {what}; remove it." for what, like in SECRETS.items() if like.search(content))


def _begins_as_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    if path.suffix == ".safetensors" and head.endswith(b"{"):  # after a length, whose bytes can look like anything
        return False
    if not head.startswith(b"PK\x03\x04"):
        return PICKLE_MAGIC.match(head) is not None
    try:
        with zipfile.ZipFile(path) as archive:
            return any(Path(name).suffix.lower() in PICKLES for name in archive.namelist())
    except zipfile.BadZipFile:
        return True  # nobody can tell what is in it


def _problems_of_card(folder: Path) -> Iterator[str]:
    card = folder / "README.md"
    if not card.is_file():
        yield "README.md, the model card, is missing; give libra export one with --card."
        return
    try:
        data = cast(ModelCardData, ModelCard(card.read_text(encoding="utf-8")).data)
    except Exception as error:  # whatever the YAML parser raises
        yield f"README.md cannot be read as a model card ({error})."
        return
    metadata = data.to_dict()
    lacking = [name for name in CARD_METADATA if not metadata.get(name)]
    if lacking:
        yield f"README.md, the model card, lacks {', '.join(lacking)} in the metadata on its top."
    yield from (f"README.md, the model card, has {problem}." for problem in _problems_of_metadata(data))


def _problems_of_metadata(data: ModelCardData) -> Iterator[str]:
    """What the Hub would refuse, or show wrongly. It looks at more, but only once a card has been sent."""
    for license in _entries(data.license):
        if license not in LICENSES:
            yield f"license {license!r}, which the Hub does not know; say `other`, and license_name"
    if data.pipeline_tag and data.pipeline_tag not in TASKS:
        yield f"pipeline_tag {data.pipeline_tag!r}; expected one of {', '.join(TASKS)}"
    for name in ("base_model", "datasets"):
        for entry in _entries(getattr(data, name)):
            try:
                validate_repo_id(entry)
            except ValueError as error:
                yield f"{name} {entry!r} ({error})"
    for result in data.eval_results or []:
        if isinstance(result.metric_value, bool) or not isinstance(result.metric_value, (int, float)):
            yield f"the value {result.metric_value!r} of the metric {result.metric_type}, which is no number"


def _entries(value: object) -> list:
    if not value:
        return []
    return value if isinstance(value, list) else [value]


def _problems_of_code(folder: Path, files: list[Path]) -> Iterator[str]:
    current = {file.name: file.read_bytes() for file in remote_code_files()}
    found = {_name(file, folder): file.read_bytes() for file in files if file.suffix == ".py" and file.is_file()}
    differing = [name for name in current if current[name] != found.get(name)]
    if differing:
        yield f"the code is not that of this version ({some(differing)}); run: libra update-code {folder}"
    foreign = found.keys() - current.keys()
    if foreign:
        yield f"it holds code that is not of this version of Libra: {some(foreign)}; remove it."


def _check_configurations(folder: Path) -> None:
    absent = [name for name in CONFIGURATIONS if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"it is not a whole Libra repository, it has no {', '.join(absent)}; run libra export.")
    for name in CONFIGURATIONS:
        read_json(folder / name)
    _check_references(folder)
    check_configuration(folder)


def _check_references(folder: Path) -> None:
    """Compares what names code with what `libra export` writes; the Auto classes run whatever stands there."""
    for path in sorted(folder.rglob("*config.json")):
        name = _name(path, folder)
        found, expected = code_references(read_json(path)), AUTO_MAPS.get(name, {})
        differing = [way for way in found.keys() | expected.keys() if found.get(way) != expected.get(way)]
        if differing:
            raise ValueError(
                f"its {name} names other code than this version's, or none, in {some(differing)}; remove what is not "
                f"yours and run: libra update-code {folder}"
            )


def _check_model(folder: Path) -> None:
    check_model(folder)
    unnamed = {file.name for file in folder.glob("*.safetensors")} - set(promised_weights(folder))
    if unnamed:
        raise ValueError(f"it holds weights that no index names, left from another export: {some(unnamed)}.")


def _check_image_tokenizer(folder: Path) -> None:
    part = folder / IMAGE_TOKENIZER_FOLDER
    with torch.device("meta"):
        model = LibraImageTokenizer(LibraImageTokenizerConfig.from_pretrained(part))
    check_fit(part, model)


def _check_processor(folder: Path) -> None:
    check_parts_fit(LibraConfig.from_pretrained(folder), load_processor(folder))


def _problems_of_numbers(folder: Path) -> list[str]:
    names = not_finite(folder)  # loading the processor has looked at those of the image tokenizer
    return [f"weights hold NaN or infinite numbers: {some(names)}."] if names else []


def _problems_of_loading(folder: Path, *checks: Callable[[Path], None]) -> list[str]:
    """What checks raise. Libraries raise anything at all on broken files; here that is the finding, and it is reported."""
    problems = []
    for check in checks:
        try:
            check(folder)
        except Exception as error:
            problems.append(" ".join(str(error).split()))
    return problems


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def size_text(size: int) -> str:
    """Bytes in the units of the Hub, powers of 1000."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"
