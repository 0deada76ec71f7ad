"""What stands where in the registry, and in which form.

    /kiteq/server/<topic>/<ip:port>         ephemeral: who serves the topic ("*": every topic)
    /kiteq/pub/<topic>/<group>/<ip:port>    ephemeral: through which broker a group publishes
    /kiteq/sub/<topic>/<group>-bind         persistent: JSON list of the group's bindings in the topic

The field names of a binding are those of KiteQ. A topic name never starts with "*".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kiteq.binding.bindings import Binding, Kind
from kiteq.message import check_name

__all__ = [
    "BINDINGS",
    "EVERY_TOPIC",
    "NODE_BYTES_MAX",
    "PUBLISHERS",
    "ROOT",
    "SERVERS",
    "Entry",
    "Server",
    "ServerMap",
    "bindings_path",
    "decode_entries",
    "decode_server",
    "encode_entries",
    "encode_server",
    "entry",
    "group_of",
    "publisher_path",
    "server_path",
]

ROOT: Final = "/kiteq"
SERVERS: Final = "/kiteq/server"
PUBLISHERS: Final = "/kiteq/pub"
BINDINGS: Final = "/kiteq/sub"
EVERY_TOPIC: Final = "*"
BIND_SUFFIX: Final = "-bind"
BINDING_VERSION: Final = "1.0.0"
NODE_BYTES_MAX: Final = 512 * 1024
"""ZooKeeper refuses a request of 1 MiB: a list of bindings is kept well below."""
ENTRIES_MAX: Final = 10_000
PARTITIONS_MAX: Final = 1_024
NUMBER_MAX: Final = (1 << 63) - 1
_BROKER_ID: Final = re.compile(r"[!-~]{1,255}")


def server_path(topic: str, address: str) -> str:
    """Return the node by which the broker at an address says that it serves a topic."""
    return f"{SERVERS}/{topic}/{address}"


def publisher_path(topic: str, group: str, address: str) -> str:
    """Return the node by which a broker says that a group publishes a topic through it."""
    return f"{PUBLISHERS}/{topic}/{group}/{address}"


def bindings_path(topic: str, group: str) -> str:
    """Return the node of a group's bindings in a topic."""
    return f"{BINDINGS}/{topic}/{group}{BIND_SUFFIX}"


def group_of(name: str) -> str | None:
    """Return the group that a node below `/kiteq/sub/<topic>` belongs to, None for a node of another kind."""
    return name.removesuffix(BIND_SUFFIX) if name.endswith(BIND_SUFFIX) else None


@dataclass(frozen=True, slots=True)
class Server:
    """What a broker tells of itself.

    broker_id: kept in its store. epoch: grows with each start on that store.
    partitions: the numbers of what it owns of a shared store, none for a store of its own.
    """

    broker_id: str
    epoch: int
    wire_version: int
    partitions: tuple[int, ...] = ()


ServerMap = Mapping[str, Mapping[str, Server]]
"""What brokers say of themselves, by topic ("*": every topic) and address."""


def encode_server(server: Server) -> bytes:
    """Return the content of the node of a server."""
    return _json(
        {
            "brokerId": server.broker_id,
            "epoch": server.epoch,
            "wireVersion": server.wire_version,
            "partitions": list(server.partitions),
        }
    )


def decode_server(content: bytes) -> Server:
    """Return what the node of a server says. Raises `ValueError`; unknown fields are ignored."""
    fields = _parsed(content)
    if not isinstance(fields, dict):
        raise ValueError("it is not a JSON object")  # noqa: TRY004 one kind of error for what is not ours
    broker_id, partitions = fields.get("brokerId"), fields.get("partitions", [])
    if not isinstance(broker_id, str) or _BROKER_ID.fullmatch(broker_id) is None:
        raise ValueError("brokerId is not a text of 1 to 255 printable ASCII characters")
    if not isinstance(partitions, list) or len(partitions) > PARTITIONS_MAX:
        raise ValueError(f"partitions is not a list of at most {PARTITIONS_MAX} numbers")
    return Server(
        broker_id,
        _number(fields, "epoch"),
        _number(fields, "wireVersion"),
        tuple(_number({"a partition": one}, "a partition") for one in partitions),
    )


@dataclass(frozen=True, slots=True)
class Entry:
    """One binding as a node holds it. fields: all of the JSON object, also those of a later version."""

    binding: Binding
    fields: dict[str, Any]


def entry(group: str, binding: Binding) -> Entry:
    """Return the form in which a node holds a binding; its `start` is of the moment and not kept."""
    return Entry(
        binding,
        {
            "groupId": group,
            "topic": binding.topic,
            "messageType": binding.pattern,
            "bindType": int(binding.kind),
            "watermark": binding.watermark or 0,
            "persistent": binding.persistent,
            "version": BINDING_VERSION,
        },
    )


def encode_entries(entries: Iterable[Entry]) -> bytes:
    """Return the content of a node of bindings. Raises `ValueError` when it would be too large."""
    content = _json([one.fields for one in entries])
    if len(content) > NODE_BYTES_MAX:
        raise ValueError(f"a group's bindings in one topic take at most {NODE_BYTES_MAX} bytes in the registry")
    return content


def decode_entries(topic: str, group: str, content: bytes) -> list[Entry]:
    """Return the bindings that a node holds. Raises `ValueError`; unknown fields are kept."""
    check_name("group", group)
    items = _parsed(content)
    if not isinstance(items, list) or len(items) > ENTRIES_MAX:
        raise ValueError(f"it is not a JSON list of at most {ENTRIES_MAX} bindings")
    found: dict[tuple[Kind, str], Entry] = {}
    for number, fields in enumerate(items, 1):
        try:
            binding = _binding(topic, group, fields)
        except ValueError as error:
            raise ValueError(f"binding {number}: {error}") from None
        found[binding.kind, binding.pattern] = Entry(binding, fields)
    return list(found.values())


def _binding(topic: str, group: str, fields: Any) -> Binding:
    if not isinstance(fields, dict):
        raise ValueError("it is not a JSON object")  # noqa: TRY004 one kind of error for what is not ours
    if fields.get("groupId") != group or fields.get("topic") != topic:
        raise ValueError("groupId or topic is not that of the path")
    kind, pattern, persistent = fields.get("bindType"), fields.get("messageType"), fields.get("persistent")
    if type(kind) is not int or not 0 <= kind <= 2:
        raise ValueError("bindType is not 0, 1 or 2")
    if not isinstance(pattern, str):
        raise ValueError("messageType is not a text")  # noqa: TRY004 one kind of error for what is not ours
    if type(persistent) is not bool:
        raise ValueError("persistent is not true or false")
    watermark = fields.get("watermark", 0)
    if type(watermark) is not int:
        raise ValueError("watermark is not a whole number")
    if Kind(kind) is Kind.FANOUT and not pattern:
        pattern = "*"
    return Binding(topic, Kind(kind), pattern, watermark if watermark > 0 else None, persistent)


def _number(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or not 0 <= value <= NUMBER_MAX:
        raise ValueError(f"{name} is not a whole number")
    return value


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _parsed(content: bytes) -> Any:
    if len(content) > NODE_BYTES_MAX:
        raise ValueError(f"it has more than {NODE_BYTES_MAX} bytes")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
