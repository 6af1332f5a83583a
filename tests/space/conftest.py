"""The Space, served to the tests of this folder by the process that runs them, and a browser to visit it with."""

import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SPACE = REPOSITORY / "spaces_demo"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# Also those of the server, which runs in this process. Those of pandas are about gradio's own use of it; sockets and event
# loops are left open by gradio and its client.
NO_WARNINGS = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

sys.path.insert(0, str(SPACE))  # its modules lie flat, as on the Hub


def free_port() -> int:
    """Two processes of tests that let gradio look for a port may find the same."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def uploads_folder(tmp_path_factory) -> Path:
    """Where gradio keeps what visitors bring."""
    return tmp_path_factory.mktemp("gradio")


@pytest.fixture(scope="session")
def space(uploads_folder):
    """The address of the Space, with libra-tiny behind it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIBRA_MODEL", str(REPOSITORY / "hub_configs" / "libra-tiny"))
        patch.setenv("GRADIO_TEMP_DIR", str(uploads_folder))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        from page import build_page, launch_options

        page = build_page()
        _, address, _ = page.launch(**launch_options(), server_port=free_port(), prevent_thread_lock=True, quiet=True)
        yield address.rstrip("/")
        page.close()


@pytest.fixture(scope="module")  # not longer: while it lives, its thread has a running event loop
def browser():
    """A headless Chromium."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        told = f"No browser: none of {', '.join(BROWSERS)} is installed. On Debian: apt-get install chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(told)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])  # CI may be root
        yield started
        started.close()
