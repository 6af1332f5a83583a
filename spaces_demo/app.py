"""Libra on a page: `python app.py`, or a Space of the Hub."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from page import build_page, launch_options

if __name__ == "__main__":
    build_page().launch(**launch_options())
