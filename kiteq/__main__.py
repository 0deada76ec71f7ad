"""The command `kiteq`."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with its status."""
    words = sys.argv[1:] if words is None else words
    if list(words) in (["--version"], ["-version"]):
        from kiteq.cli.version import version_text

        print(version_text())
        sys.exit(0)
    from kiteq.cli.app import app
    from kiteq.cli.arguments import with_two_dashes
    from kiteq.cli.failing import sentence_and_status, sole

    if isinstance(sys.stdout, io.TextIOWrapper):
        # Bodies have characters that the terminal may not have, as in a locale of ISO 8859.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(args=with_two_dashes(words), prog_name="kiteq")
    except Exception as error:
        if isinstance(sole(error), BrokenPipeError):
            # Whoever read our output has gone, as in `kiteq listen trade | head -1`.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        known = sentence_and_status(error)
        if known is None:
            raise
        sentence, status = known
        print(f"kiteq: {sentence}", file=sys.stderr)
        sys.exit(status)


if __name__ == "__main__":
    main()
