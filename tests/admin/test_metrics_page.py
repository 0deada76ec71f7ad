"""The page describes every metric, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.admin.http import get, serving

PAGE = Path(__file__).resolve().parent.parent.parent / "doc" / "operating.md"


async def test_the_page_describes_every_metric_and_no_other() -> None:
    rows = PAGE.read_text().partition("### Metrics")[2].partition("\n\nWorth an alarm")[0]
    described = set(re.findall(r"`(kiteq_\w+)`", rows))
    async with serving("memory://") as (_, address):
        text = (await get(address, "/metrics")).body.decode()
    metrics = list(text_string_to_metric_families(text))
    shown = {f"{one.name}_total" if one.type == "counter" else one.name for one in metrics}
    assert described == shown
