"""Training of Libra: the stages of the paper as scripts, and the small world `libra-tiny` learns from."""
