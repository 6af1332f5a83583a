"""`libra serve`: the chat API of OpenAI over one Libra, with transformers' own server code behind limits of ours."""
