"""One process of load: `python -m benchmark.load.worker JOB`, JOB as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable

import anyio

from benchmark.load.channel import Job


def _kiteq(job: Job) -> None:
    from benchmark.load import cluster_load, kiteq_load, transactions_load

    roles: dict[str, Callable[[Job], Awaitable[None]]] = {
        "produce": kiteq_load.produce,
        "one_by_one": kiteq_load.one_by_one,
        "many_tasks": kiteq_load.many_tasks,
        "steady": kiteq_load.steady,
        "bind": kiteq_load.bind,
        "consume": kiteq_load.consume,
        "transact_tasks": transactions_load.many_tasks,
        "transact_steady": transactions_load.steady,
        "meet": cluster_load.meet,
        "subscribe": cluster_load.subscribe,
        "call": cluster_load.call,
    }
    anyio.run(roles[job.role], job, backend=job.loop)


def _frames(job: Job) -> None:
    from benchmark.load import frames_load

    roles: dict[str, Callable[[Job], None]] = {
        "frames_publish": frames_load.publish,
        "frames_transact": frames_load.transact,
        "frames_prepare": frames_load.prepare,
    }
    roles[job.role](job)


def _redis(job: Job) -> None:
    from benchmark.load import redis_load

    roles: dict[str, Callable[[Job], None]] = {
        "produce": redis_load.produce,
        "one_by_one": redis_load.one_by_one,
        "bind": redis_load.bind,
        "consume": redis_load.consume,
    }
    roles[job.role](job)


def _marks(job: Job) -> None:
    from benchmark.load import marks

    roles: dict[str, Callable[[Job], None]] = {
        "commit": marks.commit,
        "echo_server": marks.echo_server,
        "echo_client": marks.echo_client,
    }
    roles[job.role](job)


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    {"kiteq": _kiteq, "frames": _frames, "redis": _redis, "marks": _marks}[job.system](job)
    sys.stdout.flush()
    # A thread may still be waiting for a command on stdin; nothing is left to do for it.
    os._exit(0)


if __name__ == "__main__":
    main()
