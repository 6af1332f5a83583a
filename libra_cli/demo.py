"""The Gradio Space of `spaces_demo/`, on this machine."""

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from .loading import MODEL_VARIABLE, check_path

SPACE = Path(__file__).resolve().parent.parent / "spaces_demo"


def run_demo(model: str, port: int | None = None) -> None:
    """
    Serves the Space until it is interrupted or terminated.

    It runs in a process of its own, as on the Hub: with the code of the model's repository, and nothing of this package.

    Args:
        model (`str`): a folder or Hub id.
        port (`int`, *optional*, defaults to the first free one from 7860 on): where to listen.

    Raises:
        ValueError: if gradio is not installed, there is no such model, or the Space could not be served.
    """
    missing = [name for name in ("gradio", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"The demo needs packages that are not installed: {', '.join(missing)}. Run: pip install 'libra-vlm[demo]'"
        )
    check_path(model)
    path = str(Path(model).resolve()) if Path(model).is_dir() else model
    environment = {**os.environ, MODEL_VARIABLE: path}
    if port is not None:
        environment["GRADIO_SERVER_PORT"] = str(port)
    with subprocess.Popen([sys.executable, str(SPACE / "app.py")], env=environment) as space:
        before = signal.signal(signal.SIGTERM, lambda *_: space.terminate())  # or it would go on without us
        try:
            code = space.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
    if code > 0:
        raise ValueError(f"The Space ended with code {code}; what it said stands above.")
