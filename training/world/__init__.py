"""The small world that `libra-tiny` learns from: emoji drawings in simple layouts, with captions and questions."""
