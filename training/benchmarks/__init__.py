"""Benchmarks: the metrics of the paper's Table 5, Libra for lmms-eval, and easy-VQA."""
