"""`libra serve` as its users have it: a process of its own, asked by the `openai` client."""

import base64
import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import openai
import pytest
from PIL import Image

from tests.conftest import REPOSITORY

QUESTION = "What is in the image?\nAnswer the question using a single word or phrase."
AIRPLANE = (REPOSITORY / "samples" / "airplane.png").read_bytes()
LIMITS = {"max-images": 2, "max-image-bytes": 100_000, "max-image-pixels": 250_000, "max-body-bytes": 400_000}


class Files(BaseHTTPRequestHandler):
    """A web server beside the model: images, and what somebody could put in their place."""

    has_ended = Event()  # lets go of what hangs

    def do_GET(self):
        if self.path == "/airplane.png":
            self.answer(200, AIRPLANE)
        elif self.path == "/moved":
            self.answer(302, location="/airplane.png")
        elif self.path == "/away":
            self.answer(302, location=f"http://127.0.0.2:{self.server.server_port}/airplane.png")
        elif self.path == "/file":
            self.answer(302, location="file:///etc/hostname")
        elif self.path == "/round":
            self.answer(302, location="/round")
        elif self.path == "/large":
            self.answer(200, bytes(LIMITS["max-image-bytes"] + 1))
        elif self.path == "/hangs":
            self.has_ended.wait(60)
        else:
            self.answer(404)

    def answer(self, status, body=b"", location=None):
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def files():
    server = ThreadingHTTPServer(("0.0.0.0", 0), Files)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Files.has_ended.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def address(files, tmp_path_factory):
    """Where a server of libra-tiny listens."""
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    limits = [text for name, value in LIMITS.items() for text in (f"--{name}", str(value))]
    allowed = ["--allow-image-host", files.removeprefix("http://"), "--image-timeout", "5"]
    command = [sys.executable, "-m", "libra_cli.main", "serve", "--model", "hub_configs/libra-tiny", "--port", "0"]
    with (
        open(log, "w") as errors,
        subprocess.Popen(
            [*command, *limits, *allowed], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        line = process.stdout.readline()
        assert line.startswith("Serving libra-tiny at http://127.0.0.1:"), log.read_text()
        yield line.split()[-1]
        process.terminate()
        assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        yield client


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def png(width, height, mode="1") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


def content(*urls: str, text: str = QUESTION) -> list:
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]


def ask(client, *urls: str, **options):
    messages = [{"role": "user", "content": content(*urls)}]
    return client.chat.completions.create(model="libra-tiny", messages=messages, **options)


def refusal(call, *arguments, status=400, **options) -> str:
    """The message of an error, which must be in the form of OpenAI's API."""
    with pytest.raises(openai.APIStatusError) as caught:
        call(*arguments, **options)
    assert caught.value.status_code == status
    assert caught.value.body.keys() == {"message", "type", "param", "code"}
    assert caught.value.body["type"] == "invalid_request_error"
    return caught.value.body["message"]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["libra-tiny"]


def test_image_in_the_request(client):
    answer = ask(client, data_uri(AIRPLANE))
    assert answer.choices[0].message.content.strip() == "airplane"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens > 64  # patches included


def test_image_by_url_and_behind_a_redirect(client, files):
    for path in ("/airplane.png", "/moved"):
        assert ask(client, files + path).choices[0].message.content.strip() == "airplane"


def test_streaming(client):
    chunks = list(ask(client, data_uri(AIRPLANE), stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces).strip() == "airplane"
    assert sum(piece != "" for piece in pieces) > 1
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_end_of_a_stream_is_said(address):
    host = address.split("/")[2]
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "max_tokens": 2}
    connection = HTTPConnection(host)
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")
    connection.close()


def test_several_clients_at_once(client):
    def run(index: int) -> str:
        if index % 2:
            return ask(client, data_uri(AIRPLANE)).choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, data_uri(AIRPLANE), stream=True))

    with ThreadPoolExecutor(4) as pool:
        assert [text.strip() for text in pool.map(run, range(4))] == ["airplane"] * 4


def test_a_conversation_with_text_only(client):
    turns = [("system", "Be brief."), ("user", "Is there a horse?"), ("assistant", "no"), ("user", "Is there a key?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    answer = client.chat.completions.create(model="libra-tiny", messages=messages, max_completion_tokens=3)
    assert answer.usage.completion_tokens <= 3


def test_max_tokens_and_sampling(client):
    answer = ask(client, data_uri(AIRPLANE), max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2
    # hot enough that one answer is nearly never given twice; greedy would give it four times
    hot = {ask(client, data_uri(AIRPLANE), temperature=2, max_tokens=12).choices[0].message.content for _ in range(4)}
    assert len(hot) > 1
    assert ask(client, data_uri(AIRPLANE), temperature=0).choices[0].message.content.strip() == "airplane"


@pytest.mark.parametrize(
    "url", ["/etc/hostname", "samples/airplane.png", "file:///etc/hostname", "ftp://example.org/a.png", "iVBORw0KGgo="]
)
def test_files_are_not_read(client, url):
    assert "must be an http(s) URL or a base64 data URI" in refusal(ask, client, url)


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254"])
def test_private_addresses_are_not_asked(client, host):
    assert "not public" in refusal(ask, client, f"http://{host}/image.png")


def test_redirects_lead_nowhere_else(client, files):
    assert "127.0.0.2, which is not public" in refusal(ask, client, files + "/away")
    assert "must be an http(s) URL" in refusal(ask, client, files + "/file")
    assert "more than 3 redirects" in refusal(ask, client, files + "/round")


def test_downloads_that_fail(client, files):
    assert "answers 404" in refusal(ask, client, files + "/absent.png")
    assert "more than 100000 bytes" in refusal(ask, client, files + "/large")
    assert "within 5 seconds" in refusal(ask, client, files + "/hangs")


def test_limits_of_images(client):
    small = data_uri(png(8, 8))
    assert "3 images, the most is 2" in refusal(ask, client, small, small, small)
    bomb = png(50_000, 50_000)
    assert len(bomb) > LIMITS["max-image-bytes"]
    assert "bytes, the most is" in refusal(ask, client, data_uri(bomb[:150_000]))
    assert "10000 x 5000 pixels" in refusal(ask, client, data_uri(png(10_000, 5_000)))
    noise = Image.effect_noise((600, 600), 90)
    file = io.BytesIO()
    noise.save(file, "BMP")
    assert "more than 400000 bytes" in refusal(ask, client, data_uri(file.getvalue()), status=413)


def test_broken_images(client):
    assert "no image of a known format" in refusal(ask, client, data_uri(b"nothing"))
    assert "no image of a known format" in refusal(ask, client, data_uri(b"%!PS-Adobe-3.0 EPSF-3.0"))
    assert "cut short" in refusal(ask, client, data_uri(AIRPLANE[: len(AIRPLANE) // 2]))
    assert "no valid base64" in refusal(ask, client, "data:image/png;base64,@@@")
    assert "data:image/TYPE;base64" in refusal(ask, client, "data:text/plain,hello")


def test_wrong_requests(client):
    create = client.chat.completions.create
    hello = [{"role": "user", "content": "Hello"}]
    assert "'libra-tiny' only" in refusal(create, model="gpt-4", messages=hello, status=404)
    assert "at least one message" in refusal(create, model="libra-tiny", messages=[])
    assert "messages[0]" in refusal(create, model="libra-tiny", messages=[{"role": "tool", "content": "x"}])
    video = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "/etc/hostname"}}]}]
    assert "messages[0].content[0] must be" in refusal(create, model="libra-tiny", messages=video)
    late = [*hello, {"role": "system", "content": "Be brief."}]
    assert "the first one may be from 'system'" in refusal(create, model="libra-tiny", messages=late)
    assert "places for images" in refusal(
        ask,
        client,
        data_uri(AIRPLANE),
        extra_body={"messages": [{"role": "user", "content": content(data_uri(AIRPLANE), text="<image> What is it?")}]},
    )
    assert "context of the model is 512" in refusal(
        create, model="libra-tiny", messages=[{"role": "user", "content": "horse " * 1000}]
    )
    assert "from 1 to 1024" in refusal(ask, client, max_tokens=100_000)
    assert "temperature must be" in refusal(ask, client, temperature=7)
    extra = {"generation_config": '{"num_beams": 1000}'}
    assert "does not do 'generation_config'" in refusal(ask, client, extra_body=extra)
    assert "'stop'" in refusal(ask, client, stop="x")


def test_no_json_and_no_other_routes(address):
    host = address.split("/")[2]
    for method, path, body, status in (
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"\xff", 400),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400),
        ("POST", "/v1/responses", b"{}", 404),
        ("POST", "/load_model", b"{}", 404),
        ("GET", "/v1/chat/completions", None, 405),
        ("GET", "/health", None, 200),
    ):
        connection = HTTPConnection(host)
        connection.request(method, path, body)
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == status, (method, path, answer)
        assert status == 200 or answer["error"]["message"]
        connection.close()
