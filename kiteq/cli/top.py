"""`kiteq top`: what the brokers do, again and again."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Annotated, Any, Final

import typer

from kiteq.cli.administration import DEFAULT_BROKER
from kiteq.cli.failing import STATUS_FAILED, STATUS_USAGE, CommandFailed
from kiteq.cli.options import Broker
from kiteq.cli.output import print_json
from kiteq.cli.page import page
from kiteq.cli.samples import Look, sample
from kiteq.cli.sights import Watch
from kiteq.errors import NotConnected
from kiteq.values import Given, WrongValue, duration

__all__ = ["top"]

INTERVAL_SECONDS_MIN: Final = 0.1
INTERVAL_SECONDS_MAX: Final = 3_600.0
HOME: Final = "\x1b[H"
REST_OF_LINE: Final = "\x1b[K"
REST_OF_SCREEN: Final = "\x1b[J"


def top(
    *,
    interval: Annotated[str, typer.Option("--interval", metavar="TIME", help="Between two pages.")] = "2s",
    once: Annotated[bool, typer.Option("--once", help="One page, over one interval.")] = False,
    broker: Broker = DEFAULT_BROKER,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON for each sample.")] = False,
) -> None:
    """Show brokers, topics and groups with their rates and backlogs until Ctrl-C."""
    seconds = _seconds(interval)
    in_place = sys.stdout.isatty() and not once and not as_json
    try:
        is_whole = _show(broker, seconds, once=once, as_json=as_json, in_place=in_place)
    except KeyboardInterrupt:
        if in_place:
            print()  # the prompt of the shell gets a line of its own
        return
    if not is_whole:
        raise typer.Exit(STATUS_FAILED)


def _seconds(text: str) -> float:
    read = duration(INTERVAL_SECONDS_MIN, INTERVAL_SECONDS_MAX)
    try:
        return float(str(read(Given(text, "--interval", is_toml=False))))
    except WrongValue:
        sentence = f"--interval is {text!r}; it must be a time from 0.1s to 1h, like 2s"
        raise CommandFailed(sentence, STATUS_USAGE) from None


def _show(named: str, seconds: float, *, once: bool, as_json: bool, in_place: bool) -> bool:
    """Print sample after sample, or one; return whether every broker was reached in the last one."""
    with Watch(named) as watch:
        before: Look | None = None
        while True:
            started = time.monotonic()
            now = Look(time.time_ns() // 1_000_000, watch.look())
            if before is None:
                _check_first(named, now)
            if before is not None or not once:
                shown = sample(before, now)
                if as_json:
                    print_json(shown)
                elif in_place:
                    _print_in_place(shown, named)
                else:
                    print(page(shown, named), end="\n" if once else "\n\n", flush=True)
                if once:
                    return all(sight.overview is not None for sight in now.sights)
            before = now
            time.sleep(max(0.0, started + seconds - time.monotonic()))


def _check_first(named: str, look: Look) -> None:
    """Say at once that nobody is there: nothing was seen yet that could come back."""
    if not look.sights:
        raise NotConnected(f"no broker is announced in {named}; was one started with this --zkhost?")
    if all(sight.overview is None for sight in look.sights):
        which = "" if len(look.sights) == 1 else f"none of {len(look.sights)} brokers can be asked; the first: "
        raise CommandFailed(f"{which}{look.sights[0].error}")


def _print_in_place(shown: dict[str, Any], named: str) -> None:
    """Write a page over the one before, without a moment in which the screen is empty."""
    columns, lines = shutil.get_terminal_size()
    text = page(shown, named, columns=columns, lines=lines)
    # A line is emptied before it is written: behind a full one, its last character would be emptied.
    written = HOME + REST_OF_LINE + text.replace("\n", f"\n{REST_OF_LINE}")
    if text.count("\n") + 1 < lines:
        written += f"\n{REST_OF_SCREEN}"
    print(written, end="", flush=True)
