"""Looking at a trained Libra: what it writes, what its image tokenizer keeps, and where it looks (Sections 4.3 and 4.4)."""
