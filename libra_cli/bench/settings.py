"""What a benchmark measures: sizes, figures and bars. No torch here, so that `libra --help` answers at once."""

from dataclasses import asdict, dataclass
from typing import Any

BARS: dict[str, float | None] = {
    "prefill": 0.92,
    "prefill-wide": 0.82,
    "decode": 1.05,
    "cache": 1.01,
    "memory": 1.1,
    "pretrain": 0.75,
    "text": 1.02,
    "naive-prefill": None,
    "naive-decode": None,
    "naive-cache": None,
}
"""The figures in the order they are measured, with the largest ratio allowed at the default sizes (None: no bar)."""


@dataclass(frozen=True)
class Shape:
    """
    Dimensions of a language model.

    Args:
        hidden_size (`int`): D.
        intermediate_size (`int`): I, the inner width of the MLP.
        num_layers (`int`): decoder layers.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """
        Args:
            text (`str`): three numbers, as in `"1024x2752x6"`.

        Returns:
            [`Shape`]

        Raises:
            ValueError: for anything else.
        """
        parts = text.split("x")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"A shape is HIDDENxINTERMEDIATExLAYERS, as in 1024x2752x6; found {text!r}.")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"D {self.hidden_size}, I {self.intermediate_size}, {self.num_layers} layers"


@dataclass(frozen=True)
class BenchSettings:
    """
    Sizes and repetitions. The bars hold for the default sizes.

    Args:
        shape (`Shape`, *optional*, defaults to `Shape(1024, 2752, 6)`): the language model of all figures but one.
        wide_shape (`Shape`, *optional*, defaults to `Shape(2048, 5504, 4)`): that of the figure `prefill-wide`.
        vocab_size (`int`, *optional*, defaults to 32000): V.
        num_heads (`int`, *optional*, defaults to 16): attention heads; keys and values have as many.
        feature_size (`int`, *optional*, defaults to 4096): width of the CLIP features of a patch.
        image_grid (`int`, *optional*, defaults to 24): patches along one side of an image.
        num_tokens (`int`, *optional*, defaults to 660): length of the prompt, one image included.
        memory_tokens (`int`, *optional*, defaults to 4096): length of the prompt of the figure `memory`.
        memory_images (`int`, *optional*, defaults to 6): images in it.
        threads (`int`, *optional*, defaults to 2): threads torch computes with.
        pairs (`int`, *optional*, defaults to 9): timings of each side in a run.
        runs (`int`, *optional*, defaults to 2): runs of each timed figure; the better one counts.
        seed (`int`, *optional*, defaults to 0): of weights and prompts.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    shape: Shape = Shape(1024, 2752, 6)
    wide_shape: Shape = Shape(2048, 5504, 4)
    vocab_size: int = 32000
    num_heads: int = 16
    feature_size: int = 4096
    image_grid: int = 24
    num_tokens: int = 660
    memory_tokens: int = 4096
    memory_images: int = 6
    threads: int = 2
    pairs: int = 9
    runs: int = 2
    seed: int = 0

    def __post_init__(self):
        for shape in (self.shape, self.wide_shape):
            if shape.hidden_size % (2 * self.num_heads):
                raise ValueError(
                    f"The hidden size {shape.hidden_size} must be a multiple of {2 * self.num_heads}, twice the "
                    f"{self.num_heads} heads: rotary embeddings pair the numbers of a head."
                )
        least = self.image_tokens + 3
        if self.num_tokens < least:
            raise ValueError(
                f"A prompt of {self.num_tokens} tokens holds no image of {self.image_tokens}; it needs at least {least}: "
                "a token before the image, a newline and a word after it."
            )
        least = self.memory_images * (self.image_tokens + 1) + 1
        if self.memory_tokens < least:
            raise ValueError(
                f"A prompt of {self.memory_tokens} tokens holds no {self.memory_images} images of {self.image_tokens}, "
                f"each followed by a newline; it needs at least {least}."
            )

    @property
    def image_tokens(self) -> int:
        """`int`: tokens of one image, BOI and EOI included."""
        return self.image_grid**2 + 2

    @property
    def has_default_sizes(self) -> bool:
        """`bool`: whether the bars apply: everything but repetitions and seed is at its default."""
        free = ("pairs", "runs", "seed")
        ours, default = asdict(self), asdict(BenchSettings())
        return all(ours[name] == default[name] for name in ours if name not in free)

    def bar(self, figure: str) -> float | None:
        """The largest ratio allowed for a figure at these sizes, or None where there is none."""
        return BARS[figure] if self.has_default_sizes else None

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON."""
        return asdict(self)
