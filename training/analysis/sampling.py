"""Writing images code by code, without `generate()`.

The joint distribution over the codes of a patch is the product of the heads (Section 3.4). Without filters each codebook is
sampled from its own head. The most probable products come from the most probable codes of each head, so top-k needs
`top_k` of each and not all 512 * 512 products, which take most of the time of `generate(do_sample=True)` in a small model.
Temperature, top-k and top-p mean what they mean there.
"""

from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache, TopKLogitsWarper, TopPLogitsWarper

LOWEST_TEMPERATURE = 1e-6
"""Below it, differences of scores would exceed what numbers can hold; top_k=1 takes the likeliest code."""


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """
    Refuses what cannot be sampled with, before a model is loaded.

    Raises:
        ValueError: naming the argument, see [`sample_codes`].
    """
    if not LOWEST_TEMPERATURE <= temperature < float("inf"):  # also if it is no number
        raise ValueError(f"temperature must be at least {LOWEST_TEMPERATURE}, found {temperature}.")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 1, or 0 for all codes; found {top_k}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, found {top_p}.")


def sample_codes(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    Samples the codes of one patch in each row.

    Args:
        logits (`torch.Tensor` of shape `(rows, codebooks, codebook_size)`): of the vision heads.
        temperature (`float`, *optional*, defaults to 1.0): divides them; at least `LOWEST_TEMPERATURE`.
        top_k (`int`, *optional*, defaults to 0): sample from this many of the most probable combinations; 0 is all.
        top_p (`float`, *optional*, defaults to 1.0): and from the fewest of these whose probabilities sum to at least it.
        generator (`torch.Generator`, *optional*): where chance comes from.

    Returns:
        `torch.LongTensor` of shape `(rows, codebooks)`: in `[0, codebook_size)`.
    """
    logits = logits.float() / temperature
    rows, codebooks, size = logits.shape
    if top_k == 0 and top_p == 1:
        return torch.multinomial(logits.flatten(0, 1).softmax(dim=-1), 1, generator=generator).view(rows, -1)
    kept = min(top_k or size, size)
    values, codes = logits.log_softmax(dim=-1).topk(kept)  # (rows, codebooks, kept)
    joint = values[:, 0]
    for k in range(1, codebooks):
        joint = (joint[:, :, None] + values[:, k, None, :]).flatten(1)  # (rows, kept ** (k + 1))
    if top_k:
        joint = TopKLogitsWarper(top_k)(None, joint)
    if top_p < 1:
        joint = TopPLogitsWarper(top_p)(None, joint)
    drawn = torch.multinomial(joint.softmax(dim=-1), 1, generator=generator)  # (rows, 1)
    places = drawn // kept ** torch.arange(codebooks - 1, -1, -1, device=drawn.device) % kept  # (rows, codebooks)
    return codes.gather(-1, places[..., None]).squeeze(-1)


@torch.inference_mode()
def write_images(
    model: Any,
    processor: Any,
    inputs: Any,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[Image.Image]:
    """
    Samples the rest of the image that each prompt ends in.

    Args:
        model ([`LibraForCausalLM`]): writes.
        processor ([`LibraProcessor`]): of the same repository.
        inputs (`dict`):
            `input_ids` and `attention_mask` `(n, length)` as `processor(..., generation_mode="image",
            return_tensors="pt")` gives them: BOI last, or BOI and the same number of codes in each row.
        temperature, top_k, top_p: as in [`sample_codes`].
        seed (`int`, *optional*, defaults to 0): of the samples.

    Returns:
        `list` of `PIL.Image.Image`: an image a prompt.

    Raises:
        ValueError: for wrong options.
    """
    check_sampling(temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(seed)
    step, mask = inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device)
    given = step.shape[1] - 1 - int((step[0] == processor.boi_token_id).nonzero()[-1])  # codes after the last BOI
    cache = DynamicCache(config=model.config)
    last = torch.tensor(
        [-1], device=step.device
    )  # of each row; an int would ask for the scores of all combinations too
    written = [step[:, step.shape[1] - given :]]
    for _ in range(processor.image_grid**2 - given):
        output = model(input_ids=step, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=last)
        logits = output.vision_logits[..., : processor.codebook_size].cpu()  # (n, codebooks, codebook_size)
        codes = sample_codes(logits, temperature, top_k, top_p, generator)
        step = processor.codes_to_ids(codes)[:, None].to(step.device)  # (n, 1)
        mask = torch.cat([mask, torch.ones_like(step)], dim=1)
        written.append(step)
    return processor.post_process_multimodal_output(torch.cat(written, dim=1), generation_mode="image")
