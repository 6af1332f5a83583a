"""Model cards: what the Hub shows of a repository."""

from huggingface_hub import ModelCard, ModelCardData

PAPER = "https://icml.cc/virtual/2024/poster/33049"

_CARD = """---
{metadata}
---

# {name}

{description}

## Use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)

messages = [{{"role": "user", "content": [{{"type": "image", "path": "photo.png"}}, {{"type": "text", "text": "What is in the image?"}}]}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
ids = model.generate(**inputs, max_new_tokens=30)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""

_DESCRIPTION = (
    'A Libra model: a language model with a decoupled vision system (Xu et al., "Libra: Building Decoupled Vision '
    'System on Large Language Models", ICML 2024). It reads and writes text and images.'
)


def model_card(name: str, description: str = _DESCRIPTION, **metadata) -> str:
    """
    A minimal model card.

    Args:
        name (`str`): name of the repository or folder.
        description (`str`, *optional*): what the model is.
        metadata: further fields of the Hub's metadata, for instance `license="llama2"`.

    Returns:
        `str`: Markdown with the metadata in front.
    """
    data = ModelCardData(library_name="transformers", pipeline_tag="image-text-to-text", tags=["libra"], **metadata)
    return str(ModelCard(_CARD.format(metadata=data.to_yaml(), name=name, description=description)))
