"""Whether memory stays flat: the memory and the files of a running Space over many requests.

    python measure_memory.py --requests 200

Starts `app.py` as a process of its own and asks everything it can do in turn, each time as a new visitor. Linux only: it
reads /proc.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

HERE = Path(__file__).resolve().parent
STARTING = 600
"""Most seconds to wait for the Space."""


def resident(pid: int) -> float:
    """Memory of a process that is in RAM, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def folder_size(folder: str) -> float:
    """What the files in a folder take, in MiB."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 2**20


def upload(address: str, path: Path) -> dict[str, Any]:
    """Uploads a file as a browser does; returns gradio's description of it."""
    mark = "boundary"
    head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n\r\n'
    body = head.encode() + path.read_bytes() + f"\r\n--{mark}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={mark}"}
    with urlopen(Request(f"{address}/gradio_api/upload", body, headers)) as answer:
        return {"path": json.load(answer)[0], "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}


def ask(address: str, number: int) -> None:
    """One request of a visitor who has just come: chat, codes, completion, attention, in turn."""
    image = upload(address, HERE / "examples" / "airplane.png")
    name, data = [
        ("chat", [{"text": "What is in the image?", "files": [image]}, True, 0, 1, 64]),
        ("tokenize", [image, number % 60]),
        ("complete", [image, 7, "airplane", 1]),
        ("look", [image, "What is in the image?"]),
    ][number % 4]
    call = f"{address}/gradio_api/call/{name}"
    with urlopen(Request(call, json.dumps({"data": data}).encode(), {"Content-Type": "application/json"})) as answer:
        event = json.load(answer)["event_id"]
    with urlopen(f"{call}/{event}") as answer:
        told = answer.read()
    if b"event: complete" not in told:
        raise RuntimeError(f"Request {number} ({name}) ended in {told[-300:]!r}")


def main() -> None:
    """Prints a row of a table every 20 requests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7890, help="where the Space listens (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "GRADIO_SERVER_PORT": str(args.port), "GRADIO_TEMP_DIR": folder}
        server = subprocess.Popen([sys.executable, str(HERE / "app.py")], env=environment, stdout=subprocess.DEVNULL)
        try:
            address = f"http://127.0.0.1:{args.port}"
            _wait_for(address, server)
            print("| requests | memory, MiB | files, MiB |\n|---|---|---|")
            for number in range(args.requests + 1):
                if number % 20 == 0:
                    print(f"| {number} | {resident(server.pid):.0f} | {folder_size(folder):.1f} |", flush=True)
                if number < args.requests:
                    ask(address, number)
        finally:
            server.terminate()
            server.wait()


def _wait_for(address, server):
    end = time.monotonic() + STARTING
    while True:
        try:
            urlopen(address).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(2)


if __name__ == "__main__":
    main()
