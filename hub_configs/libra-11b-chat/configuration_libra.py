"""Configuration of Libra: a language model, and the vision system that is put on it.

The language model is described by its own configuration (`text_config`); everything else here describes the vision
system of the paper (Xu et al., "Libra: Building Decoupled Vision System on Large Language Models", ICML 2024), and
the flat id space in which text, image codes and the two image markers live side by side.
"""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

# Language models whose decoder layer is input norm, separate q/k/v/o, post-attention norm, gated MLP.
SUPPORTED_TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")

# As in the config.json of the authors' chat model: LLaMA-2-7B but for its context (4096) and epsilon (1e-5).
RELEASED_TEXT_CONFIG = {
    "model_type": "llama",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
}


@strict
class LibraConfig(PreTrainedConfig):
    r"""
    Configuration of a [`LibraForCausalLM`]. The defaults are those of the authors' 11B release on LLaMA-2-7B.

    Token ids are one flat space, with `V = text_config.vocab_size`:

    | ids | meaning |
    |---|---|
    | `[0, V)` | text |
    | `V + id1 * codebook_size + id2` | the image patch with codes `(id1, id2)` |
    | `boi_token_id = V + codebook_size**2` | begin of image |
    | `eoi_token_id = V + codebook_size**2 + 1` | end of image |

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to LLaMA-2-7B):
            Configuration of the language model: model type llama, mistral, qwen2 or qwen3.
        image_grid (`int`, *optional*, defaults to 24):
            Patches along one side of an image; an image is `image_grid**2` codes between BOI and EOI.
        num_codebooks (`int`, *optional*, defaults to 2):
            Codebooks of the image tokenizer, each with a table of embeddings and a prediction head of its own.
        codebook_size (`int`, *optional*, defaults to 512):
            Entries of one codebook. Every table and head has two more, for BOI and EOI.
        feature_size (`int`, *optional*, defaults to 4096):
            Width of the frozen CLIP features of a patch, the continuous half of the hybrid token (Section 3.2).
        expert_down_ratio (`int`, *optional*, defaults to 4):
            A low-rank map of the visual expert with `out` outputs has rank `out // expert_down_ratio`.
        bridge_rank (`int`, *optional*, defaults to 8):
            Rank of the four maps of the cross-modal bridge of each layer.
        use_bridge (`bool`, *optional*, defaults to `True`):
            Whether keys and values read across modalities get the bridge's term. `False` is row (e) of the paper's Table
            3, "no bridge".
        use_expert (`bool`, *optional*, defaults to `True`):
            Whether vision rows have norms, projections and MLPs of their own in every layer. `False` is row (d) of
            Table 3, "no expert": they go through the language model's, as text does; embedding, bridge, final norm
            and heads stay the vision system's.
        use_continuous_features (`bool`, *optional*, defaults to `True`):
            Whether image tokens are hybrid. `False` is row (f) of Table 3, "discrete input only": an image token is the
            embeddings of its codes (`concat_signals: false` in the authors' code), without norm and projection;
            `image_features` are checked but not read.
        newline_token_id (`int`, *optional*, defaults to 13):
            Text id of the newline that follows every image.

    Raises:
        StrictDataclassClassValidationError: (of `huggingface_hub.errors`, as all configurations of transformers) if a
            size is not positive, a low-rank map would have rank 0, the codebooks do not divide the hidden size, or the
            language model is of a family whose layers Libra cannot route.

    Example:

    ```python
    >>> from modeling_libra import LibraConfig, LibraForCausalLM

    >>> config = LibraConfig(text_config={"model_type": "llama", "hidden_size": 64, "intermediate_size": 176})
    >>> config.boi_token_id
    294144
    ```"""

    model_type = "libra"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "vision_logits",
        "text_loss",
        "vision_loss",
        "codebook_losses",
    ]

    text_config: dict | PreTrainedConfig | None = None
    image_grid: int = 24
    num_codebooks: int = 2
    codebook_size: int = 512
    feature_size: int = 4096
    expert_down_ratio: int = 4
    bridge_rank: int = 8
    use_bridge: bool = True
    use_expert: bool = True
    use_continuous_features: bool = True
    newline_token_id: int = 13
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        text_config = RELEASED_TEXT_CONFIG if self.text_config is None else self.text_config
        if isinstance(text_config, dict):
            try:
                text_config = AutoConfig.for_model(**{"model_type": "llama", **text_config})
            except ValueError:  # a family of a later transformers, for instance: its answer lists all it knows
                _check_family(str(text_config.get("model_type", "llama")))
                raise
        self.text_config = text_config
        super().__post_init__(**kwargs)
        # The language model decides; transformers reads the flag from the outer configuration.
        self.tie_word_embeddings = self.text_config.tie_word_embeddings

    def validate_libra(self):
        """Part of the `@strict` validation: sizes that must fit together."""
        text = self.text_config
        _check_family(text.model_type)
        for name in (
            "image_grid",
            "num_codebooks",
            "codebook_size",
            "feature_size",
            "expert_down_ratio",
            "bridge_rank",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}.")
        if text.hidden_size % self.num_codebooks:
            raise ValueError(
                f"text_config.hidden_size ({text.hidden_size}) must be a multiple of num_codebooks "
                f"({self.num_codebooks}): the codebooks' embeddings share it in equal parts."
            )
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        narrowest = min(text.hidden_size, text.intermediate_size, text.num_key_value_heads * head_dim)
        if narrowest < self.expert_down_ratio:
            raise ValueError(
                f"expert_down_ratio ({self.expert_down_ratio}) leaves a map with {narrowest} outputs rank 0; "
                "use a smaller ratio."
            )
        if not 0 <= self.newline_token_id < text.vocab_size:
            raise ValueError(
                f"newline_token_id ({self.newline_token_id}) must be a text id, in [0, {text.vocab_size})."
            )

    @property
    def text_vocab_size(self) -> int:
        """`int`: V, the number of text ids; image codes start here."""
        return self.text_config.vocab_size

    @property
    def num_image_codes(self) -> int:
        """`int`: size of the vision vocabulary, `codebook_size ** num_codebooks` (2**18 in the release)."""
        return self.codebook_size**self.num_codebooks

    @property
    def boi_token_id(self) -> int:
        """`int`: id that begins an image."""
        return self.text_vocab_size + self.num_image_codes

    @property
    def eoi_token_id(self) -> int:
        """`int`: id that ends an image."""
        return self.boi_token_id + 1

    @property
    def total_vocab_size(self) -> int:
        """`int`: text ids, image codes, BOI and EOI together."""
        return self.boi_token_id + 2

    @property
    def num_patches(self) -> int:
        """`int`: codes of one image, without BOI and EOI."""
        return self.image_grid**2


def _check_family(model_type: str):
    if model_type not in SUPPORTED_TEXT_MODELS:
        raise ValueError(
            f"text_config.model_type is {model_type!r}; Libra routes the layers of {', '.join(SUPPORTED_TEXT_MODELS)}. "
            "Use a language model of one of these families."
        )


__all__ = ["LibraConfig"]
