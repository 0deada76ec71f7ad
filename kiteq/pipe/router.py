"""Which outlets a message goes to, and the changes of bindings that decide it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kiteq.binding.bindings import Binding
from kiteq.binding.matching import Matcher, check_agreement
from kiteq.errors import Refused
from kiteq.limits import BINDINGS_MAX, ROUTES_CACHED_MAX, TOPICS_MAX
from kiteq.message import Head
from kiteq.pipe.events import Kind
from kiteq.pipe.outlet import Outlet
from kiteq.store.writer import Submission

if TYPE_CHECKING:
    from kiteq.errors import StoreError
    from kiteq.pipe.deliveries import Deliveries
    from kiteq.store.store import Store

__all__ = ["Router"]


class Router:
    """The table of bindings.

    served: the topics that may be published to; empty for all valid names, up to 1,000.
    Routing results are cached per kind of message until a binding changes, or a group with
    non-persistent bindings comes or goes.
    """

    def __init__(self, store: Store, deliveries: Deliveries, served: Sequence[str]) -> None:
        self._store = store
        self._deliveries = deliveries
        self._served = frozenset(served)
        self._kinds: dict[bytes, Kind] = {}
        self._by_topic: dict[str, dict[int, Outlet]] = {}
        self._submitted: dict[tuple[str, str], tuple[Binding, ...]] = {}
        """Bindings by (group, topic) as last submitted: durable or about to be."""
        self._opening: dict[tuple[str, str], Outlet] = {}
        """Outlets whose first bindings are about to be durable."""
        self._bindings_count = 0
        for subscription in store.subscriptions.values():
            self._submitted[subscription.group, subscription.topic.name] = subscription.bindings
            self._bindings_count += len(subscription.bindings)
            self._open(Outlet(subscription, deliveries.group(subscription.group)))

    def outlets(self) -> list[Outlet]:
        """Return every outlet."""
        return [outlet for by_number in self._by_topic.values() for outlet in by_number.values()]

    # --- routing ------------------------------------------------------------------------------

    def kind(self, prefix: bytes) -> Kind | None:
        """Return what is known of messages with these bytes at HEAD_OFFSET."""
        return self._kinds.get(prefix)

    def new_kind(self, prefix: bytes, head: Head) -> Kind:
        """Note a kind of message. Raises `Refused` when its topic is not served."""
        self.check_served(head.topic)
        if len(self._kinds) >= ROUTES_CACHED_MAX:
            self._kinds.clear()
        kind = self._kinds[prefix] = Kind(prefix, head, self._store.topic(head.topic))
        return kind

    def check_served(self, topic: str, new_topics: int = 0) -> None:
        """Raise `Refused` for a topic this broker does not take messages of.

        new_topics: how many others the same request makes.
        """
        if self._served:
            if topic not in self._served:
                served = ", ".join(sorted(self._served))
                raise Refused("topic_not_served", f"topic {topic!r} is not served here; served: {served}"[:1000])
        elif topic not in self._store.topics and len(self._store.topics) + new_topics >= TOPICS_MAX:
            raise Refused("too_many_topics", f"this broker has {TOPICS_MAX} topics already; name them with --topics")

    def route(self, kind: Kind) -> tuple[Outlet, ...]:
        """Return the outlets a kind of message goes to now."""
        if kind.outlets is None:
            message_type = kind.head.message_type
            outlets = self._by_topic.get(kind.head.topic, {})
            kind.outlets = tuple(
                outlet
                for _, outlet in sorted(outlets.items())
                if (outlet.subscription.persistent or outlet.group.connected) and outlet.matches(message_type)
            )
            kind.owners = tuple(outlet.subscription.number for outlet in kind.outlets)
        return kind.outlets

    def forget_routes(self) -> None:
        """Route every kind anew: a binding or the presence of a group has changed."""
        for kind in self._kinds.values():
            kind.outlets = None

    # --- changes ------------------------------------------------------------------------------

    def merged(
        self, group: str, bindings: Sequence[Binding], without: Collection[tuple[int, str]] = ()
    ) -> dict[str, tuple[Binding, ...]]:
        """Return, by topic, the group's bindings with new ones added or updated.

        without: kinds and patterns of those that are removed in the same step.
        Raises `Refused` for a topic not served, a bad pattern or bindings that contradict each other.
        """
        merged: dict[str, dict[tuple[int, str], Binding]] = {}
        for binding in bindings:
            topic = binding.topic
            if (group, topic) not in self._submitted:
                self.check_served(topic, new_topics=len(merged.keys() - self._store.topics.keys()))
            if topic not in merged:
                olds = self._submitted.get((group, topic), ())
                merged[topic] = {(old.kind, old.pattern): old for old in olds if (old.kind, old.pattern) not in without}
            old = merged[topic].get((binding.kind, binding.pattern))
            if old is not None and old.start == "first":
                binding = replace(binding, start="first")  # noqa: PLW2901 it has taken over what was kept: once is enough
            merged[topic][binding.kind, binding.pattern] = binding
        result = {topic: tuple(by_pattern.values()) for topic, by_pattern in merged.items()}
        added = sum(len(all_) - len(self._submitted.get((group, topic), ())) for topic, all_ in result.items())
        if self._bindings_count + added > BINDINGS_MAX:
            raise Refused("too_many_bindings", f"this broker has {BINDINGS_MAX} bindings already")
        for all_bindings in result.values():
            try:
                check_agreement(all_bindings)
            except ValueError as error:
                raise Refused("binding_conflict", f"group {group!r}: {error}") from error
            for binding in all_bindings:
                try:
                    Matcher(binding)
                except ValueError as error:
                    raise Refused("bad_pattern", str(error)) from error
        return result

    def known(self, group: str, topic: str) -> bool:
        """Return whether the group has bindings in the topic, durable or about to be."""
        return (group, topic) in self._submitted

    def submitted(self, group: str, topic: str) -> tuple[Binding, ...]:
        """Return the group's bindings in a topic, durable or about to be."""
        return self._submitted.get((group, topic), ())

    def put(
        self,
        group: str,
        changes: dict[str, tuple[Binding, ...]],
        outlets: dict[str, Outlet],
        done: Callable[[StoreError | None], None],
    ) -> None:
        """Make bindings durable, then let them take effect, then call `done`.

        outlets: by topic, of subscriptions that are new; their rows are written too.
        """
        submission = Submission(lambda error: self._finish_put(group, changes, error, done))
        for topic, bindings in changes.items():
            if self._submitted.get((group, topic)) == bindings and topic not in outlets:
                continue
            self._bindings_count += len(bindings) - len(self._submitted.get((group, topic), ()))
            self._submitted[group, topic] = bindings
            if topic in outlets:
                self._opening[group, topic] = outlets[topic]
            outlet = self._existing(group, topic)
            if outlet is not None:
                old, outlet.subscription.bindings = outlet.subscription.bindings, bindings
                self._store.save_subscription(outlet.subscription, submission)
                outlet.subscription.bindings = old or bindings
        for outlet in outlets.values():
            # What is routed to it from now on is written behind its row, so none falls between the messages
            # that it took over and the moment when its bindings are durable.
            self._open(outlet)
        if outlets:
            self.forget_routes()
        self._store.writer.submit(submission)

    def _finish_put(
        self,
        group: str,
        changes: dict[str, tuple[Binding, ...]],
        error: StoreError | None,
        done: Callable[[StoreError | None], None],
    ) -> None:
        if error is None:
            for topic, bindings in changes.items():
                outlet = self._existing(group, topic)
                self._opening.pop((group, topic), None)
                if outlet is not None and (group, topic) in self._submitted:
                    outlet.subscription.bindings = bindings
                    self._open(outlet)
            self.forget_routes()
        done(error)

    def new_outlet(self, group: str, topic_name: str, bindings: tuple[Binding, ...]) -> Outlet:
        """Return the outlet of a subscription that does not exist yet; `put` makes it real."""
        subscription = self._store.new_subscription(group, self._store.topic(topic_name))
        subscription.bindings = bindings
        return Outlet(subscription, self._deliveries.group(group))

    def _existing(self, group: str, topic: str) -> Outlet | None:
        return self._opening.get((group, topic)) or self._deliveries.group(group).outlets.get(topic)

    def _open(self, outlet: Outlet) -> None:
        """Let an outlet take part in routing, with its bindings as they are now."""
        subscription = outlet.subscription
        outlet.matchers = tuple(Matcher(binding) for binding in subscription.bindings)
        self._store.subscriptions[subscription.number] = subscription
        self._by_topic.setdefault(subscription.topic.name, {})[subscription.number] = outlet
        outlet.group.outlets[subscription.topic.name] = outlet

    def close(self, outlet: Outlet) -> None:
        """Take an outlet out of routing: the group has left the topic."""
        subscription = outlet.subscription
        self._by_topic[subscription.topic.name].pop(subscription.number, None)
        if outlet.group.outlets.get(subscription.topic.name) is not outlet:
            return  # it was closed before, and the group has bound again
        del outlet.group.outlets[subscription.topic.name]
        submitted = self._submitted.pop((subscription.group, subscription.topic.name), ())
        self._opening.pop((subscription.group, subscription.topic.name), None)
        self._bindings_count -= len(submitted)
        self.forget_routes()
