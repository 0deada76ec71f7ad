"""What `kiteq --version` prints."""

from __future__ import annotations

from kiteq import __version__
from kiteq.remoting.packets import WIRE_VERSIONS
from kiteq.store.recovery import FORMAT_VERSION, FORMATS_READ

__all__ = ["version_text"]


def version_text() -> str:
    """Return the version of the product, of the wire, and of the store."""
    older = ", ".join(str(number) for number in FORMATS_READ if number != FORMAT_VERSION)
    return f"kiteq {__version__}\nwire versions {', '.join(map(str, WIRE_VERSIONS))}\nstore format {FORMAT_VERSION}" + (
        f", upgrades {older}" if older else ""
    )
