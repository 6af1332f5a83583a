"""Metrics of the benchmarks of the paper's Table 5, each a module of the `evaluate` library.

    import evaluate
    metric = evaluate.load("training/benchmarks/metrics/vqa_accuracy.py")
    metric.compute(predictions=["two"], references=[["2"] * 9 + ["many"]])  # {"vqa_accuracy": 1.0}

Each file has the plain functions behind its metric as well. None needs a network or Java.

| module | for | counts as |
|---|---|---|
| `vqa_accuracy` | VQAv2, OKVQA, VizWiz | the official VQA score, with its normalisation |
| `exact_match` | GQA, ScienceQA-IMG (letters: `choice_accuracy`) | same answer but for case, outer space and a last period |
| `pope_f1` | POPE | mean F1 of the splits, share of yes |
| `mme_score` | MME | accuracy and accuracy+ of each subtask, sums of perception and cognition |
| `choice_accuracy` | ScienceQA-IMG, SEED, MMVP | letter of an option found in free text |
| `circular_accuracy` | MMBench, MMBench-CN | right in every order of the options |
| `cider` | COCO, NoCaps, Flickr30k | CIDEr-D |
"""
