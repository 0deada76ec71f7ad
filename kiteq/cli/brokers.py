"""`kiteq broker`: the brokers themselves, which there are, and that one should end."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, Final

import typer

from kiteq.cli.administration import DEFAULT_BROKER
from kiteq.cli.cluster import Cluster, state_of_error, together
from kiteq.cli.finding import Announced
from kiteq.cli.options import Broker, Json
from kiteq.cli.output import print_json, table
from kiteq.cli.session import AdminSession
from kiteq.errors import KiteQError
from kiteq.values import seconds_text

__all__ = ["broker_commands"]

ENDED_SECONDS_MAX: Final = 10.0
"""From the last connection to the end of the process: the store is closed in between."""

broker_commands = typer.Typer(no_args_is_help=True, help="The brokers themselves.", rich_markup_mode=None)


@broker_commands.command("list")
def broker_list(*, broker: Broker = DEFAULT_BROKER, as_json: Json = False) -> None:
    """List the brokers of a registry, a list or a set of workers, and how they are."""
    with Cluster(broker, needs_one=False) as brokers:
        sessions = brokers.sessions
        shown = dict(zip((one.address for one in sessions), together(_show, sessions), strict=True))
        greeted = {one.address: one.broker_id for one in sessions}
        rows: list[dict[str, Any]] = []
        for address, outcome in (shown | brokers.failures).items():
            announced = brokers.announced.get(address)
            if isinstance(outcome, KiteQError):
                if address in shown:
                    brokers.tell(address, outcome)
                rows.append(_row_of_lost(address, announced, outcome))
                if address in greeted:
                    rows[-1]["broker_id"] = greeted[address]
            else:
                rows.append(_row(address, announced, outcome))
        rows.sort(key=lambda row: str(row["address"]))
        if as_json:
            print_json(rows)
        else:
            titles = ("ADDRESS", "BROKER ID", "STATE", "EPOCH", "WIRE", "TOPICS")
            print(table(titles, list(map(_cells, rows))))


def _show(session: AdminSession) -> dict[str, Any]:
    shown: dict[str, Any] = session.ask("broker.show")
    return shown


def _row(address: str, announced: Announced | None, shown: dict[str, Any]) -> dict[str, Any]:
    names = ("broker_id", "state", "reasons", "epoch", "version", "wire_version", "uptime_s", "pid")
    return {
        "address": address,
        "announced": announced is not None,
        **{name: shown[name] for name in names},
        "topics": shown["topics"] or ["*"],
    }


def _row_of_lost(address: str, announced: Announced | None, error: KiteQError) -> dict[str, Any]:
    """Return what is known of a broker that tells nothing: what it announced."""
    return {
        "address": address,
        "announced": announced is not None,
        "broker_id": None if announced is None else announced.broker_id,
        "state": state_of_error(error),
        "reasons": [str(error)],
        "epoch": None if announced is None else announced.epoch,
        "version": None,
        "wire_version": None if announced is None else announced.wire_version,
        "uptime_s": None,
        "pid": None,
        "topics": [] if announced is None else list(announced.topics),
    }


def _cells(row: dict[str, Any]) -> list[object]:
    topics = ", ".join("every name" if topic == "*" else topic for topic in row["topics"])
    cells = [row["address"], row["broker_id"], row["state"], row["epoch"], row["wire_version"], topics or None]
    return ["-" if cell is None else cell for cell in cells]


@broker_commands.command("drain")
def broker_drain(
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Come back when the broker is gone.")] = False,
    broker: Broker = DEFAULT_BROKER,
    as_json: Json = False,
) -> None:
    """Have one broker finish what it does and end, as SIGTERM does; of a set of workers all of them."""
    with Cluster(broker) as brokers:
        asked = brokers.only_one("draining")
        sessions = brokers.sessions
        processes = _processes(sessions) if wait else []
        told = asked.ask("broker.drain")
        what = asked.address if len(sessions) == 1 else f"the workers {', '.join(one.address for one in sessions)}"
        if as_json:
            print_json({"draining": [one.address for one in sessions], **told})
        elif told["draining_before"]:
            print(f"{what}: draining already")
        else:
            seconds = seconds_text(told["drain_timeout_s"])
            print(f"draining {what}: clients may finish what they hold, at most {seconds}", flush=True)
        if wait:
            together(AdminSession.wait_gone, sessions)
            _wait_ended(processes)
            if not as_json:
                print(f"gone: {what}")


def _processes(sessions: Sequence[AdminSession]) -> list[int]:
    """Return a handle for the process of each broker, as far as the system has them."""
    handles: list[int] = []
    for shown in together(_show, sessions):
        if not isinstance(shown, KiteQError) and hasattr(os, "pidfd_open"):
            with suppress(OSError):  # in another container
                handles.append(os.pidfd_open(shown["pid"]))
    return handles


def _wait_ended(processes: Sequence[int]) -> None:
    """Wait until processes have ended: then the store may be opened again."""
    for handle in processes:
        ended = select.poll()
        ended.register(handle, select.POLLIN)
        ended.poll(ENDED_SECONDS_MAX * 1000)
        os.close(handle)
