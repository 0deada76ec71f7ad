"""What doc/protocol.md says is what the code does, as far as tables and examples go."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from zlib import crc32

import pytest

from kiteq import limits
from kiteq.message import _NAME, CRC_RESIDUE, decode, split
from kiteq.remoting.codec import Decoder, encode_packet
from kiteq.remoting.packets import SHAPES, Ack, Credit, Deliver, Hello, Packet, Ping, Publish, Receipts

ROOT = Path(__file__).resolve().parents[2]
REFUSED = re.compile(r'(?:Refused|BadMessage|MessageTooLarge|\.refuse)\(\s*"([a-z_]+)"|Refusal\([^()"]+, "([a-z_]+)"')


@cache
def page() -> str:
    return (ROOT / "doc" / "protocol.md").read_text(encoding="utf-8")


def rows(header: str) -> list[list[str]]:
    """Return the cells of the table whose first line begins with `header`."""
    lines = page().split(header, 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def example(kind: str) -> bytes:
    """Return the bytes of an example: the first word of each of its lines."""
    text = page().split(f"```{kind}\n", 1)[1].split("```", 1)[0]
    return bytes.fromhex("".join(line.split()[0] for line in text.splitlines()))


def test_the_table_of_packets_is_the_one_of_the_code() -> None:
    written = {
        int(number): (name.strip("`"), [field for field in fields.split(", ") if field])
        for number, name, _, fields, *_ in rows("| Number | Packet")
    }
    assert written == {number: (shape[0].__name__, list(shape[0]._fields[1:])) for number, shape in SHAPES.items()}


def test_the_table_of_limits_is_the_one_of_the_code() -> None:
    for text, value, name in rows("| Limit | Value"):
        assert float(value.replace(",", "")) == getattr(limits, name.strip("`")), text


def test_every_refusal_of_the_code_is_listed() -> None:
    listed = {code.strip("`") for code, *_ in rows("| Code | Refuses")}
    sources = [path for path in (ROOT / "kiteq").rglob("*.py") if path.name != "errors.py"]
    raised = {code for path in sources for found in REFUSED.findall(path.read_text()) for code in found if code}
    assert len(raised) > 15, "the pattern still finds them"
    assert raised <= listed


def test_the_names_are_those_of_the_code() -> None:
    assert f"`{_NAME.pattern}`" in page()


def test_the_message_of_the_page_is_a_message() -> None:
    blob = example("message")
    assert crc32(blob) == CRC_RESIDUE == 0x2144DF1C
    assert crc32(b"123456789") == 0xCBF43926
    assert crc32(blob[:-4]) == 0xD0C8E89F
    assert split(blob)[2] == 30 + 21 + 2
    message = decode(blob, "g", 1)
    assert (message.topic, message.message_type, message.text, message.ttl) == ("trade", "pay-succ", "echo", 60)
    assert (message.deliver_limit, message.text_sent, message.fly, message.created_at) == (100, True, False, 1763700000)


@pytest.mark.parametrize(
    "packet",
    [
        Hello(
            1, "kiteq", [1], bytes(range(16)), "members", ["trade"],
            [["trade", 0, "pay-succ", None, True, "latest"]], 0, 1,
        ),
        Publish(2, [example("message")]),
        Receipts(2, 1, True, []),
        Credit(3, 256),
        Deliver(0, 1, 1, [example("message")]),
        Ack(4, [1, 3, 7, 7]),
        Ping(5),
    ],
    ids=lambda packet: type(packet).__name__,
)  # fmt: skip
def test_the_frames_of_the_page_are_frames(packet: Packet) -> None:
    frame = example(f"frame {type(packet).__name__}")
    assert Decoder(limits.HELLO_FRAME_BYTES_MAX).feed(frame) == [packet]
    assert encode_packet(packet) == frame
