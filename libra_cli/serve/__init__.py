"""`libra serve`: the chat API of OpenAI over one Libra, behind limits."""
