"""What keeps a server alive and its network private, part by part."""

import asyncio
import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from ipaddress import IPv4Address, IPv6Address, ip_network
from threading import Event
from types import SimpleNamespace

import httpcore
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from starlette.requests import ClientDisconnect
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, PreTrainedConfig

from libra_cli.serve import image_urls
from libra_cli.serve.answers import ChatAnswers
from libra_cli.serve.app import CHAT, _Gate, _while_connected
from libra_cli.serve.errors import SERVER_FAULT, error_body
from libra_cli.serve.generator import Generator, _Speaker
from libra_cli.serve.image_urls import check_url, download_image, is_public
from libra_cli.serve.images import ImageReader
from libra_cli.serve.limits import ServeLimits
from libra_cli.serve.requests import ChatRequest
from tests.conftest import REPOSITORY

TINY = REPOSITORY / "hub_configs" / "libra-tiny"

PRIVATE = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16",
    "224.0.0.0/4", "240.0.0.0/4",
]  # fmt: skip


@st.composite
def private_addresses(draw) -> IPv4Address:
    network = ip_network(draw(st.sampled_from(PRIVATE)))
    return network[draw(st.integers(0, network.num_addresses - 1))]


@given(private_addresses())
def test_private_addresses_in_all_forms(address):
    forms = [address, IPv6Address(f"::ffff:{address}"), IPv6Address(f"64:ff9b::{address}")]
    forms += [IPv6Address(int(IPv6Address("2002::")) + (int(address) << 80)), IPv6Address(f"::{address}")]
    assert not any(is_public(str(form)) for form in forms)


@pytest.mark.parametrize(
    "address", ["::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "2001::1"]
)
def test_private_addresses_of_ipv6(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "url", ["http://", "https:///x.png", "gopher://example.org", "http://a:b@example.org", "http://ä.org"]
)
def test_urls_that_are_none(url):
    with pytest.raises(ValueError, match="URL"):
        check_url(url)


def test_one_private_address_among_public_ones_is_enough(monkeypatch):
    async def resolve(host, port):
        return ["8.8.8.8", "10.0.0.1"]

    monkeypatch.setattr(image_urls, "resolve", resolve)
    with pytest.raises(ValueError, match=r"example\.org is not public"):
        asyncio.run(download_image("http://example.org/a.png", (), 10, 5))


def test_a_name_is_resolved_once_and_that_address_is_asked(monkeypatch):
    answers, asked = iter([["8.8.8.8"], ["127.0.0.1"]]), []

    async def resolve(host, port):
        return next(answers)

    async def connect_tcp(self, host, port, *args, **kwargs):
        asked.append(host)
        raise httpcore.ConnectError("no network here")

    monkeypatch.setattr(image_urls, "resolve", resolve)
    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect_tcp)
    with pytest.raises(ValueError, match="no network here"):
        asyncio.run(download_image("http://example.org/a.png", (), 10, 5))
    assert asked == ["8.8.8.8"]


@pytest.mark.parametrize("allowed", ["[::1]:9000", "[::1]", "::1", "::1:9000"])
def test_allowed_hosts_are_written_as_in_urls(monkeypatch, allowed):
    async def connect_tcp(self, host, port, *args, **kwargs):
        raise httpcore.ConnectError("no network here")

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect_tcp)
    with pytest.raises(ValueError, match="no network here"):
        asyncio.run(download_image("http://[::1]:9000/a.png", [allowed], 10, 5))
    with pytest.raises(ValueError, match="not public"):
        asyncio.run(download_image("http://[::2]:9000/a.png", [allowed], 10, 5))


def test_a_host_without_address():
    with pytest.raises(ValueError, match="unknown"):
        asyncio.run(download_image("http://nothing.invalid/a.png", (), 10, 5))


def through_gate(app, limits: ServeLimits, requests: int = 1) -> list[list[dict]]:
    """What a gate before `app` sends in answer to chat requests at the same time."""
    gate = _Gate(app, limits)

    async def ask() -> list[dict]:
        sent = []

        async def send(message):
            sent.append(message)

        await gate({"type": "http", "path": CHAT}, None, send)
        return sent

    async def ask_all():
        return await asyncio.gather(*(ask() for _ in range(requests)))

    answers = asyncio.run(ask_all())
    assert gate.running == 0
    return answers


def test_an_answer_that_does_not_come():
    async def app(scope, receive, send):
        await asyncio.Event().wait()

    ((start, body),) = through_gate(app, ServeLimits(timeout=1))
    assert start["status"] == 504
    assert "longer than 1 seconds" in json.loads(body["body"])["error"]["message"]


def test_a_stream_that_does_not_end():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.Event().wait()

    ((_, last),) = through_gate(app, ServeLimits(timeout=1))
    assert "longer than 1 seconds" in json.loads(last["body"].removeprefix(b"data: "))["error"]["message"]
    assert not last.get("more_body")


def test_too_many_requests():
    entered = []

    async def app(scope, receive, send):
        entered.append(True)
        await asyncio.sleep(0)  # the others come in
        await send({"type": "http.response.start", "status": 200, "headers": []})

    answers = through_gate(app, ServeLimits(max_requests=2), requests=5)
    assert sorted(answer[0]["status"] for answer in answers) == [200, 200, 503, 503, 503]
    assert len(entered) == 2


def test_limits_must_be_positive():
    with pytest.raises(ValueError, match="max_images must be at least 1, found 0"):
        ServeLimits(max_images=0)


class Pause(LogitsProcessor):
    """Holds generation at its second step until it is let go; counts the steps."""

    def __init__(self):
        self.steps, self.is_there, self.go_on = 0, Event(), Event()

    def __call__(self, input_ids, scores):
        self.steps += 1
        if self.steps == 2:
            self.is_there.set()
            assert self.go_on.wait(60)
        return scores


def chat_request(stop=(), **config) -> ChatRequest:
    return ChatRequest([], config, list(stop), seed=None, stream=False, include_usage=False)


def test_nobody_generates_for_a_client_who_left(toy_model):
    """The client hangs up in the middle of its answer: the next one gets its turn at once."""
    pause, tokenizer = Pause(), AutoTokenizer.from_pretrained(TINY, config=PreTrainedConfig())
    inputs = {"input_ids": torch.tensor([[1, 5, 6]]), "logits_processor": LogitsProcessorList([pause])}
    request = chat_request(min_new_tokens=50, max_new_tokens=50)

    class Client:
        async def receive(self):
            await asyncio.to_thread(pause.is_there.wait)
            return {"type": "http.disconnect"}

    async def run():
        generator = Generator(toy_model, tokenizer)

        async def work():
            async with aclosing(generator.generate(inputs, request)) as pieces:
                return [piece async for piece in pieces]

        with pytest.raises(ClientDisconnect):
            await _while_connected(work(), Client())
        await asyncio.sleep(0)  # the cancelled work ends
        pause.go_on.set()
        assert await generator.thread.async_submit(lambda: "next") == "next"

    asyncio.run(run())
    assert pause.steps == 2


def test_a_stream_that_fails_tells_no_internals(caplog):
    async def pieces():
        yield "air"
        raise RuntimeError('probability "tensor"\n contains inf')

    async def run():
        answers = ChatAnswers("libra-tiny", None, SimpleNamespace(tokenizer=None), None)
        return [event async for event in answers._events(pieces(), 3, include_usage=False)]

    *_, last = asyncio.run(run())
    assert json.loads(last.removeprefix("data: ")) == error_body(SERVER_FAULT, 500)
    assert "tensor" in caplog.text


def test_a_model_that_fails_is_no_fault_of_the_request(toy_model):
    """transformers raises ValueErrors for much; as one of a request it would be told to the client."""

    async def run():
        generator = Generator(toy_model, AutoTokenizer.from_pretrained(TINY, config=PreTrainedConfig()))
        request = chat_request(max_new_tokens=2, do_sample=True, temperature=-1.0)
        return [piece async for piece in generator.generate({"input_ids": torch.tensor([[1]])}, request)]

    with pytest.raises(RuntimeError, match="failed") as caught:
        asyncio.run(run())
    assert isinstance(caught.value.__cause__, ValueError)


def read(image: Image.Image, **options) -> Image.Image:
    file = io.BytesIO()
    image.save(file, **options)
    uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    with ThreadPoolExecutor(1) as worker:
        return asyncio.run(ImageReader(ServeLimits(), 64, worker).read(uri))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize(("size", "expected"), [((400, 100), (64, 16)), ((100, 400), (16, 64)), ((64, 30), (64, 30))])
def test_images_are_handed_on_no_larger_than_is_of_use(mode, size, expected):
    image = read(Image.new(mode, size), format="PNG")
    assert (image.size, image.mode) == (expected, "RGB")
    assert image.getpixel((0, 0)) == ((255, 255, 255) if mode == "RGBA" else (0, 0, 0))  # transparent, on white


def test_shrunk_images_are_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    assert read(Image.new("RGB", (400, 100)), format="JPEG", exif=exif).size == (16, 64)
    assert read(Image.new("RGB", (40, 10)), format="JPEG", exif=exif).size == (10, 40)


@pytest.mark.parametrize("pieces", [["a", "b", "c", "d"], ["ab", "cd"], ["abcd"], ["abc", "d"]])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ([], "abcd"),
        (["c"], "ab"),
        (["bc"], "a"),
        (["abc", "b"], "a"),
        (["bcd", "cd"], "a"),
        (["cde"], "abcd"),
        (["bd", "cd"], "ab"),
    ],
)
def test_stops_over_the_borders_of_pieces(pieces, stop, expected):
    said: list[str] = []
    speaker = _Speaker(SimpleNamespace(backend_tokenizer=None), stop, said.append)
    for piece in pieces:
        if not speaker.has_stopped.is_set():
            speaker._hear(piece)
    speaker.end()
    assert "".join(said) == expected
    assert speaker.has_stopped.is_set() == (expected != "abcd")
