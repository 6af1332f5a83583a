"""The `libra` command. Each verb parses its arguments here and calls one function of this package.

A verb is a function that takes the object of `add_subparsers` and sets `run` on its parser; it is listed in `VERBS`.
Imports of torch and transformers wait until a verb runs, so that `libra --help` answers at once.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from .bench.settings import BARS, BenchSettings, Shape

EXIT_USER_ERROR = 2
"""Exit code for wrong arguments, unreadable files and the like, as argparse has it."""


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs the command line.

    Args:
        argv (`Sequence` of `str`, *optional*, defaults to `sys.argv[1:]`): the arguments.

    Returns:
        `int`: the exit code: 0, or 2 with one line on stderr for what the user can mend.
    """
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except Exception as error:
        if args.traceback or not _is_user_error(error):
            raise
        print(f"libra: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 130
    return 0


def _is_user_error(error: Exception) -> bool:
    from huggingface_hub.errors import StrictDataclassError  # what configurations raise; not a ValueError

    return isinstance(error, (ValueError, OSError, StrictDataclassError))


def build_parser() -> argparse.ArgumentParser:
    """The parser with all verbs."""
    parser = argparse.ArgumentParser(prog="libra", description="Libra: language models that read and write images.")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_verb in VERBS:
        add_verb(commands)
    return parser


def _add_caption(commands) -> None:
    parser = commands.add_parser("caption", help="caption images, or ask one question about each")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="path or URL")
    _add_model_argument(parser)
    parser.add_argument("--prompt", help="a question about each image, instead of a caption")
    parser.add_argument("--max-new-tokens", type=_positive, default=64, help="longest text, in tokens (default: 64)")
    parser.add_argument("--batch-size", type=_positive, default=8, help="images at a time (default: 8)")
    parser.add_argument("--json", action="store_true", help='one JSON object a line: {"image": ..., "text": ...}')
    parser.set_defaults(run=_run_caption)


def _run_caption(args: argparse.Namespace) -> None:
    _quiet_transformers()
    from .caption import caption_images
    from .loading import default_model

    texts = caption_images(
        args.images, args.model or default_model(), args.prompt, args.max_new_tokens, args.batch_size
    )
    for image, text in zip(args.images, texts):
        print(json.dumps({"image": image, "text": text}, ensure_ascii=False) if args.json else f"{image}: {text}")


def _add_chat(commands) -> None:
    parser = commands.add_parser("chat", help="talk about images; type /help for its commands")
    parser.add_argument(
        "--image", action="append", default=[], help="path or URL of an image to begin with; repeatable"
    )
    _add_model_argument(parser)
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=256, help="longest answer, in tokens (default: 256)"
    )
    parser.set_defaults(run=_run_chat)


def _run_chat(args: argparse.Namespace) -> None:
    _quiet_transformers()
    from .chat import HELP, ChatSession, run_chat, typed_lines
    from .loading import default_model, load_libra, to_accelerator

    model, processor = to_accelerator(*load_libra(args.model or default_model()))
    session = ChatSession(model, processor, max_new_tokens=args.max_new_tokens)
    for image in args.image:
        session.add_image(image)
    if sys.stdin.isatty():
        print(HELP)
        run_chat(session, typed_lines(), sys.stdout)
    else:
        run_chat(session, sys.stdin, sys.stdout)


def _add_convert(commands) -> None:
    parser = commands.add_parser("convert", help="turn a folder of the authors' release into a repository of ours")
    parser.add_argument("src", metavar="SRC", help="folder with the released files")
    parser.add_argument("dst", metavar="DST", help="folder to write; must not exist, or be empty")
    parser.add_argument("--clip", help="folder or Hub id of CLIP-ViT-L/14-336, where the release lacks its weights")
    _add_repository_arguments(parser)
    parser.set_defaults(run=_run_convert)


def _run_convert(args: argparse.Namespace) -> None:
    from .convert import convert_release

    folder = convert_release(args.src, args.dst, args.clip, _read_card(args), args.caption_prompt)
    print(f"Wrote {folder}")


def _add_init(commands) -> None:
    parser = commands.add_parser("init", help="put a fresh vision system on a language model")
    parser.add_argument(
        "llm", metavar="LLM", help="folder or Hub id of a Llama, Mistral, Qwen2 or Qwen3 with tokenizer"
    )
    parser.add_argument(
        "clip", metavar="CLIP", help="folder or Hub id of a CLIP, a trained image tokenizer, or a Libra"
    )
    parser.add_argument("dst", metavar="DST", help="folder to write; must not exist, or be empty")
    parser.add_argument(
        "--select-layers",
        type=int,
        nargs="+",
        metavar="N",
        help="hidden states of the CLIP that are an image's features, 0 = embeddings (default: those at the relative "
        "depths of the paper's, which are 2 10 18 22 of 24)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the new parameters (default: 0)")
    parser.add_argument("--card", type=Path, help="Markdown file to use as the model card")
    parser.set_defaults(run=_run_init)


def _run_init(args: argparse.Namespace) -> None:
    _quiet_transformers()
    from .init import has_trained_image_tokenizer, init_repo

    fields = {} if args.select_layers is None else {"select_layers": args.select_layers}
    print(f"Wrote {init_repo(args.llm, args.clip, args.dst, args.seed, _read_card(args), **fields)}")
    if not has_trained_image_tokenizer(args.clip):
        print(
            "Its image tokenizer is untrained. Before pretraining, train one (python -m training.train_image_tokenizer) "
            "and give its folder in place of the CLIP.",
            file=sys.stderr,
        )


def _add_export(commands) -> None:
    parser = commands.add_parser("export", help="write a repository that loads from the Hub without this package")
    parser.add_argument("src", metavar="DIR", help="folder with model and processor, as save_pretrained writes them")
    parser.add_argument("dst", metavar="DST", help="folder to write; must not exist, or be empty")
    _add_repository_arguments(parser)
    parser.add_argument(
        "--weights-dtype",
        choices=("float32", "float16", "bfloat16"),
        help="dtype the weights are stored in; they load in the dtype of config.json (default: that of the model)",
    )
    parser.set_defaults(run=_run_export)


def _run_export(args: argparse.Namespace) -> None:
    import torch

    from .export import export_folder

    dtype = getattr(torch, args.weights_dtype) if args.weights_dtype else None
    print(f"Wrote {export_folder(args.src, args.dst, _read_card(args), dtype, args.caption_prompt)}")


def _add_update_code(commands) -> None:
    parser = commands.add_parser("update-code", help="bring the code of an exported repository up to date, in place")
    parser.add_argument("folder", metavar="DIR", help="the repository; weights and settings stay as they are")
    parser.set_defaults(run=_run_update_code)


def _run_update_code(args: argparse.Namespace) -> None:
    from .export import write_code

    write_code(args.folder)
    print(f"Updated {args.folder}")


TRAINING_STAGES = {
    "clip": "training.train_clip",
    "llm": "training.train_llm",
    "tokenizer": "training.train_image_tokenizer",
    "pretrain": "training.pretrain",
    "sft": "training.sft",
}
"""The module behind each stage of `libra train`."""


def _add_train(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train: the image tokenizer, pretraining, instruction tuning",
        description="Runs one stage of training; `libra train STAGE --help` lists its options. On several devices: "
        "`accelerate launch -m training.pretrain`, with the same options.",
    )
    parser.add_argument("stage", choices=tuple(TRAINING_STAGES), help="what to train")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of the stage, such as --config FILE")
    parser.set_defaults(run=_run_train)


def _run_train(args: argparse.Namespace) -> None:
    missing = [name for name in ("datasets", "trl", "peft", "torchmetrics") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"Training needs packages that are not installed: {', '.join(missing)}. Run: pip install 'libra-vlm[train]'"
        )
    import_module(TRAINING_STAGES[args.stage]).main(args.options)


def _add_bench(commands) -> None:
    parser = commands.add_parser("bench", help="measure time and memory beside the bare language model")
    default = BenchSettings()
    parser.add_argument("--only", nargs="+", choices=tuple(BARS), metavar="FIGURE", help=f"of: {', '.join(BARS)}")
    parser.add_argument("--json", metavar="FILE", help="file for all measurements")
    for name, text in (
        ("runs", "runs of each timed figure; the better one counts"),
        ("pairs", "timings of each side in a run"),
        ("threads", "threads torch computes with"),
        ("num-tokens", "tokens of the prompt, one image included"),
        ("memory-tokens", "tokens of the prompt whose peak memory is measured"),
        ("memory-images", "images in it"),
        ("vocab-size", "text vocabulary"),
        ("num-heads", "attention heads"),
        ("feature-size", "width of the CLIP features"),
        ("image-grid", "patches along one side of an image"),
    ):
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=_positive, default=value, help=f"{text} (default: {value})")
    for name, text in (("shape", "the language model"), ("wide-shape", "that of the figure prefill-wide")):
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}",
            type=_shape,
            default=value,
            metavar="DxIxLAYERS",
            help=f"hidden size, inner size and layers of {text} (default: {value})",
        )
    parser.add_argument("--seed", type=int, default=default.seed, help="of weights and prompts (default: %(default)s)")
    parser.set_defaults(run=_run_bench)


def _run_bench(args: argparse.Namespace) -> None:
    settings = BenchSettings(**{field.name: getattr(args, field.name) for field in fields(BenchSettings)})
    _quiet_transformers()
    from .bench.report import run_benchmark

    print(run_benchmark(settings, args.only, args.json))


def _add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder or Hub id (default: $LIBRA_MODEL, or the libra-tiny of this checkout)")


def _add_repository_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--card", type=Path, help="Markdown file to use as the model card")
    parser.add_argument("--caption-prompt", help="what the image-to-text pipeline asks a chat model for a caption")


def _read_card(args: argparse.Namespace) -> str | None:
    return args.card.read_text(encoding="utf-8") if args.card else None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


def _shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _quiet_transformers() -> None:
    """Keeps progress bars and advice out of the output, unless the user asks transformers for them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()


VERBS = (_add_caption, _add_chat, _add_convert, _add_init, _add_export, _add_update_code, _add_train, _add_bench)

if __name__ == "__main__":
    sys.exit(main())
