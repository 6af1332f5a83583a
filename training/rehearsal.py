"""Samples of pretraining beside conversations.

Instruction tuning supervises answers alone, so a model that is tuned on them forgets to predict codes, and to draw. Here
every step also has a few captioned images in the layouts of pretraining (Section 4.1).
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from processing.processing_libra import LibraProcessor

from .caption_stream import CaptionArguments, CheckedRows, SampleReader
from .data import DataArguments, load_worlds
from .pretrain import PretrainCollator, drop_features_of_drawn
from .world.scenes import Layout, SceneObject, World

DRAWING_VENDOR = "twemoji"
"""Whose drawings of the world's things are rehearsed: flat ones, of which codes keep the most."""

LAYOUT_SEED = 9
"""Of size and place of each such drawing: libra-tiny knows these."""

DRAWINGS_OF_TEN = 8
"""Of ten samples of the world so many are such drawings; the others are scenes."""


@dataclass
class RehearsalArguments:
    """
    What is rehearsed beside conversations.

    Args:
        rehearsal_weight (`float`, *optional*, defaults to 0.0): of the mean loss of these samples, beside that of the
            answers; at 0 nothing is rehearsed.
        rehearsal_batch_size (`int`, *optional*, defaults to 4): samples of each device in a step.
        rehearsal_dataset (`str`, *optional*):
            Where captioned images are, read as pretraining reads them by default, see
            [`~training.captions.load_captions`]; or `"world"`, its drawings and scenes (see [`WorldSamples`]), as is the
            default for conversations about the world. For those of one's own there is none.
        rehearsal_samples (`int`, *optional*, defaults to 1000): of captioned images at most the first so many. They are
            kept in memory, encoded.
        rehearsal_draws (`float`, *optional*, defaults to 0.5): share with the image after its caption.
        rehearsal_noise (`float`, *optional*, defaults to 0.4):
            Largest share of the codes of these images that are read as those of another image in the same place; how
            many is uniform from 0. Who draws reads codes that it wrote itself, some of them wrong, and must go on.

    Raises:
        ValueError: for a negative weight, no sample, or a share that is none.
    """

    rehearsal_weight: float = field(
        default=0.0, metadata={"help": "Weight of the loss of pretraining samples; 0: none."}
    )
    rehearsal_batch_size: int = field(default=4, metadata={"help": "Pretraining samples of each device in a step."})
    rehearsal_dataset: str | None = field(default=None, metadata={"help": "Where captioned images are, or 'world'."})
    rehearsal_samples: int = field(default=1000, metadata={"help": "Captioned images that are rehearsed, at most."})
    rehearsal_draws: float = field(default=0.5, metadata={"help": "Share with the image after its caption."})
    rehearsal_noise: float = field(default=0.4, metadata={"help": "Largest share of their codes read as wrong ones."})

    def __post_init__(self):
        if self.rehearsal_weight < 0:
            raise ValueError(f"rehearsal_weight must not be negative, found {self.rehearsal_weight}.")
        for name in ("rehearsal_batch_size", "rehearsal_samples"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, found {vars(self)[name]}.")
        for name in ("rehearsal_draws", "rehearsal_noise"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"{name} is a share, 0 to 1, found {vars(self)[name]}.")

    def open(self, data: DataArguments, processor: LibraProcessor, seed: int) -> "Rehearsal | None":
        """
        Args:
            data ([`DataArguments`]): of the conversations.
            processor ([`LibraProcessor`]): makes ids.
            seed (`int`): of all choices.

        Returns:
            [`Rehearsal`]: or None if nothing is to be rehearsed.

        Raises:
            FileNotFoundError: if `rehearsal_dataset` is nowhere.
            ValueError: if it has no captioned image, or is not set for conversations of one's own.
        """
        if self.rehearsal_weight == 0:
            return None
        place = self.rehearsal_dataset or ("world" if data.dataset == "world" else None)
        if place is None:
            raise ValueError("rehearsal_weight is set: set rehearsal_dataset, where captioned images are, as well.")
        samples: WorldSamples | CheckedRows
        if place == "world":
            samples = WorldSamples(load_worlds(data)[0])
        else:
            captions = CaptionArguments()
            source = captions.open(place, captions.split)
            reader = SampleReader(source, captions, processor.tokenizer.all_special_tokens)
            samples = CheckedRows(source.rows, reader, self.rehearsal_samples)
        collator = PretrainCollator(processor, self.rehearsal_draws, seed)
        return Rehearsal(
            samples, collator, self.rehearsal_batch_size, self.rehearsal_weight, self.rehearsal_noise, seed
        )


class WorldSamples(Dataset):
    """
    Things of the world as one vendor draws them, each alone on white and always in the same place, and among them scenes
    of the training split, as `{"image", "text"}`.

    The drawings are few enough to be learned by heart, which is what drawing a name needs; the scenes keep the rest.

    Args:
        scenes ([`World`]): the training split.
    """

    def __init__(self, scenes: World) -> None:
        self.scenes = scenes
        plain = World(scenes.subjects, "train", length=len(scenes.subjects), pastel_fraction=0.0)
        self._drawings = [_draw_alone(plain, thing) for thing in range(len(scenes.subjects))]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `index`."""
        round_, place = divmod(index, 10)
        if place < DRAWINGS_OF_TEN:
            return self._drawings[(DRAWINGS_OF_TEN * round_ + place) % len(self._drawings)]
        scene = self.scenes[index]
        return {"image": scene.image, "text": scene.caption}


def _draw_alone(world: World, thing: int) -> dict[str, Any]:
    """A thing as `DRAWING_VENDOR` draws it, or else the first that does."""
    subject = world.subjects[thing]
    drawing = subject.vendors.index(DRAWING_VENDOR) if DRAWING_VENDOR in subject.vendors else 0
    layout = Layout((SceneObject(thing, None, drawing),), subject.label)
    return {"image": world.draw(layout, np.random.default_rng([LAYOUT_SEED, thing])).image, "text": subject.label}


@dataclass(frozen=True)
class Rehearsal:
    """
    The pretraining samples of every step: a function of the step, so that a run that goes on has what it would have had.

    Args:
        samples ([`WorldSamples`] or [`~training.caption_stream.CheckedRows`]): `{"image", "text"}` each.
        collator ([`PretrainCollator`]): makes batches of them.
        batch_size (`int`): samples a process.
        weight (`float`): of their mean loss.
        noise (`float`): largest share of the codes of drawn images that are read as wrong ones, see [`mix_codes`].
        seed (`int`): of all choices.
    """

    samples: WorldSamples | CheckedRows
    collator: PretrainCollator
    batch_size: int
    weight: float
    noise: float
    seed: int

    def of_step(self, step: int, process: int, num_processes: int) -> dict[str, torch.Tensor]:
        """
        Args:
            step (`int`): of the run.
            process (`int`): of those that share the step's samples, in `[0, num_processes)`.
            num_processes (`int`): how many there are.

        Returns:
            `dict`: as of [`PretrainCollator`].
        """
        count, wanted = len(self.samples), self.batch_size * num_processes
        chosen = np.random.default_rng([self.seed, step]).choice(count, wanted, replace=wanted > count)
        rows = range(process, wanted, num_processes)
        return self.collator([{**self.samples[int(chosen[row])], "place": (step, row)} for row in rows])

    def as_read(self, batch: dict[str, torch.Tensor], step: int, process: int) -> dict[str, torch.Tensor]:
        """
        A tokenized batch as the model reads it: images that are drawn have no features, and some of their codes are wrong.

        Args:
            batch (`dict`): of [`Rehearsal.of_step`], tokenized.
            step (`int`), process (`int`): as there.

        Returns:
            `dict`: a new one, without `draws`; `labels` are as they were.
        """
        processor, ids = self.collator.processor, batch["input_ids"]
        is_code = (ids >= processor.text_vocab_size) & (ids < processor.boi_token_id)
        codes = ids[is_code].view(len(ids), -1)  # (batch, codes of an image)
        mixed = mix_codes(codes, self.noise, np.random.default_rng([self.seed, step, process]))
        read = ids.masked_scatter(is_code, torch.where(batch["draws"][:, None], mixed, codes))
        return drop_features_of_drawn(batch) | {"input_ids": read}


def mix_codes(codes: torch.Tensor, noise: float, rng: np.random.Generator) -> torch.Tensor:
    """
    Replaces some codes by those of other images in the same place, which are wrong in a way that images are.

    Args:
        codes (`torch.LongTensor` of shape `(images, codes)`): ids.
        noise (`float`): largest share of an image's codes that are replaced, in [0, 1]; each image's is uniform from 0.
        rng (`np.random.Generator`): chooses shares, codes and images; an image may be chosen for itself.

    Returns:
        `torch.LongTensor`: of the same shape.
    """
    images, places = codes.shape
    wrong = rng.random(codes.shape) < noise * rng.random((images, 1))
    source = np.where(wrong, rng.integers(images, size=codes.shape), np.arange(images)[:, None])
    return codes[torch.as_tensor(source, device=codes.device), torch.arange(places, device=codes.device)]
