"""A caption of an image, without this package: `fresh_caption.py REPO IMAGE`."""

import sys

from fresh_process import NotInstalled
from transformers import pipeline

if __name__ == "__main__":
    sys.meta_path.insert(0, NotInstalled())
    captioner = pipeline("image-to-text", model=sys.argv[1], trust_remote_code=True)
    assert "transformers_modules" in type(captioner.model).__module__
    print(captioner(sys.argv[2], generate_kwargs={"max_new_tokens": 8})[0]["generated_text"].encode().hex())
