"""The Space where ZeroGPU's package `spaces` is there: a stand-in for it says which functions ask for the GPU, and when."""

import json
import os
import subprocess
import sys

from tests.space.conftest import REPOSITORY, SPACE, free_port

SPACES = """
import functools
import inspect

decorated, called = [], []

def GPU(function):
    decorated.append(function.__name__)
    def ask_once(*args, **kwargs):
        called.append(function.__name__)
        return function(*args, **kwargs)
    def ask_and_yield(*args, **kwargs):  # a generator stays one: gradio looks at that
        called.append(function.__name__)
        yield from function(*args, **kwargs)
    return functools.wraps(function)(ask_and_yield if inspect.isgeneratorfunction(function) else ask_once)
"""

VISIT = """
import json
from page import build_page, launch_options
import spaces

page = build_page()
at_start = list(spaces.called)
_, address, _ = page.launch(**launch_options(), prevent_thread_lock=True, quiet=True)
from gradio_client import Client, handle_file
answer = Client(address, verbose=False).predict(
    {"text": "What is in the image?", "files": [handle_file("examples/airplane.png")]}, api_name="/chat"
)
page.close()
print(json.dumps([sorted(spaces.decorated), at_start, spaces.called, answer]))
"""


def test_requests_ask_for_the_gpu_and_nothing_does_at_the_start(tmp_path):
    (tmp_path / "spaces.py").write_text(SPACES)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(SPACE)]),
        "LIBRA_MODEL": str(REPOSITORY / "hub_configs" / "libra-tiny"),
        "GRADIO_TEMP_DIR": str(tmp_path / "uploads"),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SERVER_PORT": str(free_port()),
    }
    done = subprocess.run(
        [sys.executable, "-c", VISIT], cwd=SPACE, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    decorated, at_start, called, answer = json.loads(done.stdout.splitlines()[-1])
    assert decorated == ["answer", "complete", "draw", "inspect", "tokenize"]
    assert at_start == []
    assert called == ["answer"]
    assert answer == "airplane"
