"""The words of a command line, before they are parsed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from kiteq.values import READERS

__all__ = ["NOT_BUILT_FLAGS", "SERVER_FLAGS", "with_two_dashes"]

NOT_BUILT_FLAGS: Final = ("users",)
SERVER_FLAGS: Final = tuple(name.replace("_", "-") for name in (*READERS, *NOT_BUILT_FLAGS, "config"))

_ONE_DASH: Final = re.compile(rf"-(?:{'|'.join(SERVER_FLAGS)}|version|help)(?:=.*)?", re.DOTALL)


def with_two_dashes(words: Sequence[str]) -> list[str]:
    """Return the words with KiteQ's spelling of the broker's flags (`-bind=...`) in ours (`--bind=...`).

    Only flags of the broker are rewritten, so what follows a subcommand stays as it is.
    """
    rewritten: list[str] = []
    is_value = False
    for number, word in enumerate(words):
        if not is_value and not word.startswith("-"):
            return [*rewritten, *words[number:]]
        is_flag = not is_value and _ONE_DASH.fullmatch(word) is not None
        rewritten.append(f"-{word}" if is_flag else word)
        name = word.lstrip("-")
        is_value = not is_value and name in SERVER_FLAGS and name != "insecure"
    return rewritten
