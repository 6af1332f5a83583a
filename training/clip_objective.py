"""The objective of the small CLIP: contrast of images, *and of the regions in them*, with texts.

Libra reads CLIP's patches, not its class token. So besides the usual contrast of whole images (class token) with their
captions, the mean of the patches under an object is contrasted with the object's name, and a linear map of it predicts
what a frozen teacher sees in the object's clean drawing. Each of these patches alone is compared with the names, too: what is
looked for by its name is looked for patch by patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional as F
from transformers import CLIPModel, PreTrainedTokenizerFast

NUM_REGIONS = 5
"""Regions of an image: all of it, and its four quarters in reading order."""

NOTHING = "nothing"
"""Name of an empty region."""

_IGNORED = -1  # target of a region that is not contrasted


def train_text_tokenizer(texts: Sequence[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """
    A small lower-case BPE tokenizer for the text tower.

    Args:
        texts (`Sequence[str]`): What it is trained on.
        vocab_size (`int`): Most tokens.
        max_length (`int`): Longest text, with the start and end tokens.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<pad>", "<|startoftext|>", "<|endoftext|>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special))
    start, end = (tokenizer.token_to_id(token) for token in special[2:])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[2]} $A {special[3]}", special_tokens=[(special[2], start), (special[3], end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        model_max_length=max_length,
    )


def pool_regions(patches: torch.Tensor) -> torch.Tensor:
    """
    Mean of the patches of the whole image and of each quarter.

    Args:
        patches (`torch.Tensor`): `(images, grid * grid, width)`, row by row, `grid` even.

    Returns:
        `torch.Tensor`: `(images, 5, width)`.
    """
    images, count, width = patches.shape
    half = round(count**0.5) // 2
    quarters = patches.view(images, 2, half, 2, half, width).mean(dim=(2, 4)).flatten(1, 2)  # (images, 4, width)
    return torch.cat([patches.mean(dim=1, keepdim=True), quarters], dim=1)


def patch_regions(regions: torch.Tensor, grid: int) -> torch.Tensor:
    """
    What each patch is part of.

    Args:
        regions (`torch.Tensor`): int64 `(images, 5)`, one number a region, negative for regions without a name.
        grid (`int`): Patches of a row, even.

    Returns:
        `torch.Tensor`: int64 `(images, grid * grid)`: the number of the patch's quarter, or of the whole image if its
        quarters have no names.
    """
    is_second_half = (torch.arange(grid, device=regions.device) >= grid // 2).long()
    quarter = (1 + 2 * is_second_half[:, None] + is_second_half).flatten()  # (grid * grid,)
    of_quarter = regions[:, quarter]  # (images, grid * grid)
    return torch.where(of_quarter >= 0, of_quarter, regions[:, :1])


def shared_features(model: CLIPModel, states: torch.Tensor) -> torch.Tensor:
    """
    Features of patches, or of means of patches, in the space shared with the texts.

    Args:
        model (`CLIPModel`): The model.
        states (`torch.Tensor`): Last hidden states, `(..., width)`.

    Returns:
        `torch.Tensor`: `(..., projection_dim)`, of length one.
    """
    return F.normalize(model.visual_projection(model.vision_model.post_layernorm(states)), dim=-1)


def region_features(model: CLIPModel, patches: torch.Tensor) -> torch.Tensor:
    """
    Features of regions in the space shared with the texts.

    Args:
        model (`CLIPModel`): The model.
        patches (`torch.Tensor`): Last hidden states of the patches, `(images, grid * grid, width)`.

    Returns:
        `torch.Tensor`: `(images, 5, projection_dim)`, of length one.
    """
    return shared_features(model, pool_regions(patches))


@dataclass
class ClipCollator:
    """
    Makes a batch of samples.

    A sample has `pixel_values` `(3, size, size)`, `caption`, and optionally `regions` (five names or `None`) and
    `drawings` (five indices into the teacher's features, or -1).

    Args:
        tokenizer (`PreTrainedTokenizerFast`): Tokenizer of the text tower.
        candidates (`Sequence[str]`): Names every region is contrasted with, besides those in the batch.
        teacher_features (`torch.Tensor`, *optional*): `(drawings, width)`, of length one.
    """

    tokenizer: PreTrainedTokenizerFast
    candidates: Sequence[str] = ()
    teacher_features: torch.Tensor | None = None

    def __call__(self, samples: Sequence[dict]) -> dict[str, torch.Tensor]:
        """The batch, as named arguments of [`ClipObjective.forward`]."""
        captions = [sample["caption"] for sample in samples]
        regions = [name for sample in samples for name in sample.get("regions", [None] * NUM_REGIONS)]
        names = list(dict.fromkeys([*self.candidates, *(name for name in regions if name is not None)]))
        texts = list(dict.fromkeys([*names, *captions]))
        index = {text: i for i, text in enumerate(texts)}
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        batch = {
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            "input_ids": tokens["input_ids"],  # (texts, length)
            "attention_mask": tokens["attention_mask"],
            "captions": torch.tensor([index[caption] for caption in captions]),  # (images,)
            "regions": torch.tensor([_IGNORED if name is None else index[name] for name in regions]),  # (images * 5,)
            "num_names": torch.tensor(len(names)),  # the first texts are names
        }
        if self.teacher_features is not None:
            drawings = torch.tensor([drawing for sample in samples for drawing in sample["drawings"]])  # (images * 5,)
            batch["taught"] = (drawings >= 0).nonzero()[:, 0]  # (taught,)
            batch["teacher"] = self.teacher_features[drawings[batch["taught"]]]  # (taught, width)
        return batch


def contrast(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Symmetric contrastive loss when several images may share one text.

    Args:
        logits (`torch.Tensor`): `(images, texts)`.
        targets (`torch.Tensor`): int64 `(images,)` in [0, texts): the text of each image.

    Returns:
        `torch.Tensor`: Scalar, the mean of both directions; texts without an image count in one of them only.
    """
    to_text = F.cross_entropy(logits, targets)
    used, inverse = targets.unique(return_inverse=True)
    share = F.one_hot(inverse, len(used)).T.to(logits.dtype)  # (used, images)
    share = share / share.sum(dim=1, keepdim=True)
    to_image = -(share * logits[:, used].T.log_softmax(dim=1)).sum(dim=1).mean()
    return (to_text + to_image) / 2


class ClipObjective(nn.Module):
    """
    CLIP with the objective of this file.

    Args:
        clip (`CLIPModel`): The model that is trained.
        teacher_width (`int`, *optional*): Width of the teacher's features; no teacher by default.
        caption_weight (`float`, *optional*, defaults to 0.3): Weight of the contrast of images with captions.
        region_weight (`float`, *optional*, defaults to 1.0): Weight of the contrast of regions with names.
        teacher_weight (`float`, *optional*, defaults to 3.0): Weight of the distance to the teacher.
        patch_weight (`float`, *optional*, defaults to 1.0): Weight of the cross entropy of single patches and names.
    """

    def __init__(
        self,
        clip: CLIPModel,
        teacher_width: int | None = None,
        caption_weight: float = 0.3,
        region_weight: float = 1.0,
        teacher_weight: float = 3.0,
        patch_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.clip = clip
        vision = clip.config.vision_config
        self.grid = vision.image_size // vision.patch_size
        self.teacher_head = None if teacher_width is None else nn.Linear(clip.vision_embed_dim, teacher_width)
        self.weights = {
            "caption": caption_weight,
            "region": region_weight,
            "patch": patch_weight,
            "teacher": teacher_weight,
        }

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        captions: torch.Tensor,
        regions: torch.Tensor,
        num_names: torch.Tensor,
        taught: torch.Tensor | None = None,
        teacher: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Losses of one batch; the arguments are those [`ClipCollator`] makes.

        Returns:
            `dict[str, torch.Tensor]`: `loss`, and `loss_<term>` of each term, unweighted and detached.
        """
        clip = self.clip
        states = clip.vision_model(pixel_values=pixel_values)
        texts = clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        texts = F.normalize(texts, dim=-1)  # (texts, projection)
        scale = clip.logit_scale.clamp(max=4.6052).exp()  # at most 100, as in CLIP

        images = F.normalize(clip.visual_projection(states.pooler_output), dim=-1)  # (images, projection)
        used, captions = captions.unique(return_inverse=True)
        terms = {"caption": contrast(scale * images @ texts[used].T, captions)}

        patches = states.last_hidden_state[:, 1:]  # (images, patches, width)
        named = (regions >= 0).nonzero()[:, 0]
        if len(named):
            names = texts[: int(num_names)]
            features = region_features(clip, patches).flatten(0, 1)[named]  # (named, projection)
            terms["region"] = contrast(scale * features @ names.T, regions[named])
            patch_names = patch_regions(regions.view(-1, NUM_REGIONS), self.grid)  # (images, patches)
            shown = patch_names >= 0
            logits = scale * shared_features(clip, patches[shown]) @ names.T  # (shown, names)
            terms["patch"] = F.cross_entropy(logits, patch_names[shown])
        if teacher is not None and self.teacher_head is not None and len(teacher):
            guess = self.teacher_head(pool_regions(patches).flatten(0, 1)[taught])  # (taught, teacher width)
            terms["teacher"] = 1 - F.cosine_similarity(guess, teacher, dim=-1).mean()
        loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return {"loss": loss, **{f"loss_{name}": term.detach() for name, term in terms.items()}}
