"""`libra serve` as its users have it: a process of its own, asked by the `openai` client."""

import base64
import io
import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import openai
import pytest
from PIL import Image

from tests.conftest import REPOSITORY

QUESTION = "What is in the image?\nAnswer the question using a single word or phrase."
AIRPLANE = (REPOSITORY / "samples" / "airplane.png").read_bytes()
LIMITS = {"max-images": 8, "max-image-bytes": 100_000, "max-body-bytes": 400_000, "max-parts": 20}


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
def server(files, tmp_path_factory):
    """A server of libra-tiny: where it listens, its log, and its process."""
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
        yield SimpleNamespace(address=line.split()[-1], log=log, pid=process.pid)
        process.terminate()
        assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def address(server):
    return server.address


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


def post(address: str, text: str) -> tuple[int, dict]:
    """Status and body of the answer to a chat request that no client library would send."""
    connection = HTTPConnection(address.split("/")[2])
    connection.request("POST", "/v1/chat/completions", text)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def test_models(client):
    assert [model.id for model in client.models.list()] == ["libra-tiny"]
    assert client.models.retrieve("libra-tiny").id == "libra-tiny"
    assert "not 'libra/huge'" in refusal(client.models.retrieve, "libra/huge", status=404)


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
    greedy = ask(client, data_uri(AIRPLANE), temperature=0).choices[0].message.content
    assert greedy.strip() == "airplane"
    # hot, two answers of five are the greedy one: that all of twenty are is out of the question
    hot = (ask(client, data_uri(AIRPLANE), temperature=2, max_tokens=12).choices[0].message.content for _ in range(20))
    assert any(answer != greedy for answer in hot)


def test_the_last_token_may_be_the_end(client):
    whole = ask(client, data_uri(AIRPLANE))
    length = whole.usage.completion_tokens  # the end is one of them
    for max_tokens, reason in ((length, "stop"), (length - 1, "length")):
        answer = ask(client, data_uri(AIRPLANE), max_tokens=max_tokens)
        assert answer.choices[0].finish_reason == reason
        assert answer.choices[0].message.content == whole.choices[0].message.content
        chunks = list(ask(client, data_uri(AIRPLANE), max_tokens=max_tokens, stream=True))
        assert chunks[-1].choices[0].finish_reason == reason


@pytest.mark.parametrize("stop", ["plane", ["horse", "lane", "plan"], ["planet", "plane"]])
def test_texts_to_stop_at_are_left_out(client, stop):
    answer = ask(client, data_uri(AIRPLANE), stop=stop)
    assert answer.choices[0].message.content.strip() == "air"
    assert answer.choices[0].finish_reason == "stop"
    chunks = list(ask(client, data_uri(AIRPLANE), stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip() == "air"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_beginnings_of_texts_to_stop_at_are_kept(client):
    chunks = list(ask(client, data_uri(AIRPLANE), stop=["planet", "airplanes", "nest"], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip() == "airplane"


def test_usage_of_a_stream(client):
    usage = ask(client, data_uri(AIRPLANE)).usage
    *chunks, last = ask(client, data_uri(AIRPLANE), stream=True, stream_options={"include_usage": True})
    assert (last.choices, last.usage.total_tokens) == ([], usage.total_tokens)
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert all(chunk.choices for chunk in ask(client, data_uri(AIRPLANE), stream=True))


def test_options_that_ask_for_nothing(client):
    answer = ask(
        client,
        data_uri(AIRPLANE),
        n=1,
        presence_penalty=0,
        frequency_penalty=0,
        logit_bias={},
        logprobs=False,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        stop=[],
        user="somebody",
        metadata={"run": "1"},
        store=False,
    )
    assert answer.choices[0].message.content.strip() == "airplane"


@pytest.mark.parametrize(
    "option",
    [
        {"n": 2},
        {"logprobs": True},
        {"presence_penalty": 1},
        {"logit_bias": {"5": 1}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"stop": ["a", "b", "c", "d", "e"]},
        {"stop": [""]},
        {"stream_options": {"include_usage": "yes"}},
    ],
)
def test_options_that_are_not_done_are_named(client, option):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, data_uri(AIRPLANE), **option)
    assert caught.value.param == next(iter(option))


def test_messages_of_other_clients(client):
    def create(*turns):
        messages = [{"role": role, "content": text} for role, text in turns]
        return client.chat.completions.create(model="libra-tiny", messages=messages, max_tokens=3)

    question = ("user", "Is there a horse?")
    answers = [create((role, "Be brief."), question) for role in ("system", "developer")]
    assert answers[0].usage == answers[1].usage
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    answers = [create(question, ("assistant", text), question) for text in ("", None)]
    assert answers[0].usage == answers[1].usage
    assert "must be a text" in refusal(create, ("user", None))


def test_the_same_seed_gives_the_same_answer_among_other_clients(client):
    def run(seed):
        options = {"temperature": 2, "max_tokens": 12} | ({} if seed is None else {"seed": seed})
        return ask(client, **options).choices[0].message.content  # without an image: it may be anything

    seeds = [1, 2, 3, 4]
    alone = [run(seed) for seed in seeds]
    assert len(set(alone)) > 1
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, [seed for each in seeds for seed in (each, None)]))
    assert together[::2] == alone
    assert len({(run(1), run(None))[1] for _ in range(5)}) > 1  # nobody's seed decides the next answer


def test_temperatures_next_to_zero(client, address):
    for temperature in (1e-40, 1e-3):
        assert ask(client, data_uri(AIRPLANE), temperature=temperature).choices[0].message.content.strip() == "airplane"
        chunks = ask(client, data_uri(AIRPLANE), temperature=temperature, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip() == "airplane"
    for value in ("NaN", "Infinity", '"\\ud800"'):
        status, answer = post(address, f'{{"messages": [{{"role": "user", "content": "x"}}], "temperature": {value}}}')
        assert status == 400
        assert "temperature must be a number from 0 to 2" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": [{"role": "user", "content": "a \ud800"}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": content("data:image/png;base64,\ud800")}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": content("http://\ud800/")}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "\ud800", "content": "x"}]}, "messages[0]"),
        ({"stop": "\ud800"}, "stop"),
        ({"\ud800": 1}, "\\ud800"),
    ],
)
def test_half_characters(address, change, param):
    status, answer = post(address, json.dumps({"messages": [{"role": "user", "content": "x"}]} | change))
    assert (status, answer["error"]["param"]) == (400, param), answer


@pytest.mark.parametrize(
    "url", ["/etc/hostname", "samples/airplane.png", "file:///etc/hostname", "ftp://example.org/a.png", "iVBORw0KGgo="]
)
def test_files_are_not_read(client, url):
    assert "must be an http(s) URL or a base64 data URI" in refusal(ask, client, url)


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254"])
def test_private_addresses_are_not_asked(client, host):
    assert "not public" in refusal(ask, client, f"http://{host}/image.png")


def test_what_a_name_means_inside_is_for_the_log(client, server):
    message = refusal(ask, client, "http://localhost/image.png")
    assert "localhost is not public" in message
    assert "127.0.0.1" not in message
    assert "::1" not in message
    assert "localhost has the address 127.0.0.1" in server.log.read_text()


def test_redirects_lead_nowhere_else(client, files):
    assert "127.0.0.2 is not public" in refusal(ask, client, files + "/away")
    assert "must be an http(s) URL" in refusal(ask, client, files + "/file")
    assert "more than 3 redirects" in refusal(ask, client, files + "/round")


def test_downloads_that_fail(client, files):
    assert "answers 404" in refusal(ask, client, files + "/absent.png")
    assert "more than 100000 bytes" in refusal(ask, client, files + "/large")
    assert "within 5 seconds" in refusal(ask, client, files + "/hangs")


def test_limits_of_images(client):
    small = data_uri(png(8, 8))
    assert "9 images, the most is 8" in refusal(ask, client, *[small] * 9)
    # known without a look at them: these are none
    assert "8 images of 66 tokens each, but the context" in refusal(ask, client, *["data:image/png;base64,"] * 8)
    bomb = png(50_000, 50_000)
    assert len(bomb) > LIMITS["max-image-bytes"]
    assert "bytes, the most is" in refusal(ask, client, data_uri(bomb[:150_000]))
    assert "10000 x 5000 pixels" in refusal(ask, client, data_uri(png(10_000, 5_000)))
    noise = Image.effect_noise((600, 600), 90)
    file = io.BytesIO()
    noise.save(file, "BMP")
    assert "more than 400000 bytes" in refusal(ask, client, data_uri(file.getvalue()), status=413)


def test_large_images_hold_nobody_up(client, server):
    """Six images of 40 million pixels; padded to squares as they are, they would take 2.6 GB."""
    host, slowest = server.address.split("/")[2], 0.0
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, client, *[data_uri(png(12_000, 3_333))] * 6)
        while not answer.done():
            start = time.monotonic()
            connection = HTTPConnection(host)
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
            connection.close()
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(0.05)
    assert answer.result().usage.prompt_tokens > 6 * 66
    assert slowest < 4
    status = Path(f"/proc/{server.pid}/status")
    if status.exists():  # Linux
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        assert int(peak.split()[1]) < 2_000_000, peak  # kB


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
    many = [{"role": "user", "content": ""}] * 5000
    assert "5000 parts, the most is 20" in refusal(create, model="libra-tiny", messages=many)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = [*hello, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert "messages[1] calls a tool" in refusal(create, model="libra-tiny", messages=called)


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


def test_hanging_up_in_the_middle_of_a_request(server):
    host, port = server.address.split("/")[2].split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        time.sleep(0.5)  # it is being read
    time.sleep(0.5)
    assert "ClientDisconnect" not in server.log.read_text()
