"""What the page says around its tabs."""

PAPER = "https://arxiv.org/abs/2405.10140"
"""Where "Libra: Building Decoupled Vision System on Large Language Models" (ICML 2024) can be read."""

SECTION = "https://arxiv.org/html/2405.10140v1#{}"
"""A section of it: `S3.SS3` is Section 3.3."""

INTRODUCTION = f"""
# Libra

One model that reads text and images and writes both. Images have parameters of their own in every layer: a *decoupled
vision system* ([the paper]({PAPER})).
"""

TINY_NOTICE = """
**This is libra-tiny**, a complete Libra small enough for two CPU cores. It has seen drawings of 100 things and nothing
else. It names drawings, also in a corner of the image, captions them and counts to three. It mostly knows whether
something is there, where, and which of four options it is. It learned from one image a conversation: clear the chat
before the next. A photo gets the name of one of the 100 things. It draws these one by one, from their names; several
together come out empty.
"""
