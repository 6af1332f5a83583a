"""What a user does with a repository, on a machine where this package is not installed.

    python tests/hub/fresh_process.py REPO OUTPUT --images IMAGE... [--save FOLDER]

Everything is loaded with the Auto classes and remote code. What comes out is written to `OUTPUT/report.json` and
`OUTPUT/tensors.safetensors`, for the tests to look at.
"""

import argparse
import importlib.abc
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

OUR_PACKAGES = {"modeling_libra", "processing", "training", "libra_cli", "tests"}


class NotInstalled(importlib.abc.MetaPathFinder):
    """Hides our packages, which an editable installation makes importable from everywhere."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in OUR_PACKAGES:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


QUESTIONS = (
    "What is in this image?",
    "how many shapes are there?\nanswer the question using a single word or phrase.",
)
TEXT_TO_IMAGE = "a red circle to the left of a blue square."
GREEDY = {"do_sample": False, "eos_token_id": None}
MODEL_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
PROCESSING_CLASSES = ("AutoConfig", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("repo")
    parser.add_argument("output", type=Path)
    parser.add_argument("--images", nargs=2, required=True)
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    sys.meta_path.insert(0, NotInstalled())
    torch.manual_seed(0)
    report, tensors = {}, {}

    loaded = {
        name: getattr(transformers, name).from_pretrained(args.repo, trust_remote_code=True)
        for name in (*MODEL_CLASSES, *PROCESSING_CLASSES)
    }
    report["classes"] = {name: type(thing).__name__ for name, thing in loaded.items()}
    report["modules"] = {name: type(thing).__module__ for name, thing in loaded.items()}
    image_tokenizer = transformers.AutoModel.from_pretrained(
        args.repo, subfolder="image_tokenizer", trust_remote_code=True
    )
    report["image_tokenizer"] = type(image_tokenizer).__name__

    model, processor = loaded["AutoModelForImageTextToText"], loaded["AutoProcessor"]
    report["auto_map"] = model.config.auto_map
    tensors |= answer_questions(model, processor, args.images)
    tensors |= draw(model, processor)
    tensors |= tokenize(processor, args.images)
    report["pipelines"] = run_pipelines(args.repo, args.images)

    if args.save:
        model.save_pretrained(args.save)
        processor.save_pretrained(args.save)
    args.output.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, args.output / "tensors.safetensors")
    (args.output / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def make_chat(image: str, question: str) -> list:
    return [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": question}]}]


def answer_questions(model, processor, images) -> dict:
    """Both questions of the reference files in one batch: inputs, logits, 16 greedy tokens."""
    chats = [make_chat(image, question) for image, question in zip(images, QUESTIONS)]
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        output = model(**inputs)
    generated = model.generate(**inputs, max_new_tokens=16, **GREEDY)
    return {**inputs, "logits": output.logits, "vision_logits": output.vision_logits, "generated": generated}


def draw(model, processor) -> dict:
    inputs = processor(text=TEXT_TO_IMAGE, generation_mode="image", return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=25, **GREEDY)
    (image,) = processor.post_process_multimodal_output(
        generated[:, : inputs["input_ids"].shape[1] + processor.num_image_tokens - 1], generation_mode="image"
    )
    size = torch.tensor(image.size)
    return {"t2i_input_ids": inputs["input_ids"], "t2i_generated": generated, "t2i_size": size}


def tokenize(processor, images) -> dict:
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    codes, features = processor.image_tokenizer.encode(pixel_values)
    reconstruction = processor.image_tokenizer.decode(codes)
    return {"pixel_values": pixel_values, "codes": codes, "clip_features": features, "reconstruction": reconstruction}


def run_pipelines(repo: str, images: list[str]) -> dict:
    from PIL import Image

    captioner = transformers.pipeline("image-to-text", model=repo, trust_remote_code=True)
    options = {"generate_kwargs": {"max_new_tokens": 8, **GREEDY}}
    opened = [Image.open(image) for image in images]
    chat = transformers.pipeline("image-text-to-text", model=repo, trust_remote_code=True)
    chats = [make_chat(image, question) for image, question in zip(images, QUESTIONS)]
    return {
        "class": type(captioner).__name__,
        "path": captioner(images[0], **options),
        "image": captioner(opened[0], **options),
        "list": captioner(opened, **options),
        "batch": captioner(images, batch_size=2, **options),
        "question": captioner(images[0], prompt=QUESTIONS[0], **options),
        "chat": chat(text=chats[0], return_full_text=False, **options),
        "chats": chat(text=chats, batch_size=2, return_full_text=False, **options),
    }


if __name__ == "__main__":
    main()
