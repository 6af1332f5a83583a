"""`libra demo` as it is used: a process that serves the Space until it is interrupted."""

import os
import signal
import subprocess
import sys
import time

import pytest
from gradio_client import Client, handle_file

from libra_cli.demo import run_demo
from tests.space.conftest import REPOSITORY, free_port


def test_demo_serves_the_model_that_is_named(tmp_path):
    port = free_port()
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "libra_cli.main", "demo", "--model", "hub_configs/libra-tiny", "--port", str(port)]
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    ) as server:
        try:
            client = None
            while client is None:
                assert server.poll() is None, server.stderr.read()
                try:
                    client = Client(f"http://127.0.0.1:{port}", verbose=False)
                except Exception:
                    time.sleep(1)
            question = {
                "text": "What is in the image?",
                "files": [handle_file(str(REPOSITORY / "samples/airplane.png"))],
            }
            assert client.predict(question, api_name="/chat") == "airplane"
            client.close()
        finally:
            os.killpg(server.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
        _, said = server.communicate(timeout=120)
        complaints = [line for line in said.splitlines() if "Warning" in line or "Error" in line]
    assert not [line for line in complaints if "KeyboardInterrupt" not in line and "Pandas4Warning" not in line]


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="There is no folder 'nowhere'"):
        run_demo("nowhere")


@pytest.mark.skipif(sys.platform == "win32", reason="processes of Windows cannot be asked to end")
def test_the_space_ends_with_the_command(tmp_path):
    (tmp_path / "app.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    program = (
        "import pathlib, sys, libra_cli.demo as demo; demo.SPACE = pathlib.Path(sys.argv[1]); "
        "demo.run_demo('hub_configs/libra-tiny')"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as demo:
        space = int(demo.stdout.readline())
        demo.terminate()
        assert demo.wait(timeout=120) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(space, 0)
