"""An adapter on a repository, with PEFT and without this package: `fresh_adapter.py REPO ADAPTER INPUTS OUTPUT`."""

import sys

import torch
from fresh_process import NotInstalled
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

if __name__ == "__main__":
    sys.meta_path.insert(0, NotInstalled())
    repo, adapter, inputs_file, output = sys.argv[1:]
    inputs = load_file(inputs_file)
    base = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
    assert "transformers_modules" in type(base).__module__
    model = PeftModel.from_pretrained(base, adapter).eval()
    results = {}
    with torch.no_grad():
        results["adapter"] = model(**inputs).logits
        with model.disable_adapter():
            results["base"] = model(**inputs).logits
        merged = model.merge_and_unload(safe_merge=True)
        results["merged"] = merged(**inputs).logits
    assert not any("lora" in name or "modules_to_save" in name for name in merged.state_dict())
    results["written"] = merged.generate(**inputs, max_new_tokens=4, do_sample=False)
    save_file({name: value.contiguous() for name, value in results.items()}, output)
