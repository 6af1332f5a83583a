"""Image tokenizer and processor of Libra: pixels and text in, ids and features out, and back.

The modules of this package are also what a Hub repository carries as remote code, flat next to its weights; they
import nothing but `transformers`, `torch`, `PIL` and each other.
"""
