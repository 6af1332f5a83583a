"""The `libra` command: thin layers over functions that can be imported."""
