"""Every bound of kiteq, with its unit in the name and its reason beside it."""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

# --- names -------------------------------------------------------------------------------------
NAME_LENGTH_MAX: Final = 255
"""Characters of a topic, message type or group: a length fits one byte wherever a name is stored."""
PATTERN_LENGTH_MAX: Final = 256
"""Characters of a regex binding: RE2 is linear in it, and no honest pattern is longer."""

# --- one message -------------------------------------------------------------------------------
BODY_BYTES_MAX_DEFAULT: Final = 1 * MIB
"""A broker is not a file server; what is larger belongs in one, with its address in the message."""
BODY_BYTES_MAX_CEILING: Final = 64 * MIB
"""The most a broker can be configured to: a message is held whole in memory several times."""
EXTRAS_BYTES_MAX: Final = 65_535
"""Encoded properties, key and delay: their length is two bytes in the message."""
PROPERTIES_MAX: Final = 128
"""Properties of one message."""
TTL_MS_MAX: Final = 7 * 24 * 3_600_000
"""Seven days, also the default, as in KiteQ: what nobody took in a week is looked at by a person."""
DELAY_MS_MAX: Final = 366 * 24 * 3_600_000
"""A year, also a leap year: a yearly reminder is possible, and a time in the wrong unit is noticed."""
DELIVER_LIMIT_MAX: Final = 100
"""Attempts for one group, also the default, as in KiteQ."""

# --- the wire ----------------------------------------------------------------------------------
FRAME_OVERHEAD_BYTES: Final = 1 * MIB
"""A frame may be as large as one message plus this, so many small messages share a frame."""
HELLO_FRAME_BYTES_MAX: Final = 64 * KIB
"""Before the greeting is accepted: a stranger cannot make the broker buffer more than this."""
FRAME_ITEMS_MAX: Final = 65_536
"""Items of one list in a frame."""
UNAUTHENTICATED_SECONDS_MAX: Final = 5.0
"""From connect to a valid greeting: a silent socket costs a file descriptor."""
HEARTBEAT_SECONDS: Final = 10.0
"""A client that has nothing to say says PING this often."""
IDLE_SECONDS_MAX: Final = 35.0
"""Three missed heartbeats and a little more: the peer is gone."""
WRITE_STALL_SECONDS_MAX: Final = 10.0
"""A peer whose socket takes nothing for this long is cut off."""
OUTBOX_BYTES_MAX: Final = 16 * MIB
"""Answers waiting to be sent to one peer, beside what it holds unacked and one frame."""
READ_BYTES: Final = 256 * KIB
"""One socket read: a batch of a thousand small messages, and a pause nobody notices."""
UNCOMMITTED_BYTES_MAX: Final = 1 * MIB
"""What one reader may have in the store's queue before it waits (design: batches grow instead)."""
PORT_MAX: Final = 65_535
"""The last port of TCP."""
WORKERS_MAX: Final = 32
"""Broker processes of one command: a client connects to each, and more than a machine has cores bring nothing."""
CONNECTIONS_MAX_DEFAULT: Final = 1_024
"""File descriptors left for the store, the logs and the listeners."""

# --- delivery ----------------------------------------------------------------------------------
PREFETCH_DEFAULT: Final = 256
"""Unacked messages a consumer holds: enough to hide a round trip."""
PREFETCH_MAX: Final = 10_000
"""More only moves the backlog from the broker's disk into a client's memory."""
IN_FLIGHT_BYTES_MAX: Final = 16 * MIB
"""Unacked bytes of one connection, unless a single message is larger."""
ACK_DEADLINE_SECONDS: Final = 60.0
"""Without ack, nack or extension for this long a delivery has failed."""
HOLD_SECONDS_MAX: Final = 3_600.0
"""However often it is extended, a delivery fails after this."""
RECONNECT_GRACE_SECONDS: Final = 10.0
"""How long what was routed to a non-persistent group waits for its return."""
READY_BYTES_MAX: Final = 8 * MIB
"""Messages of one subscription kept in memory for delivery; the rest is read from the log."""
FLY_QUEUE_MAX: Final = 10_000
"""Fly messages waiting in memory for one subscription."""
RETRY_ROWS_MAX: Final = 10_000
"""Messages of one subscription waiting for another attempt before first deliveries pause."""
RETRY_BYTES_MAX: Final = 64 * MIB
"""The same, in bytes."""
HISTORY_MAX: Final = 10
"""Failures described in a retry row or dead letter: the last ones."""
ERROR_LENGTH_MAX: Final = 1_024
"""Characters of an error text kept with a failure."""

# --- the broker --------------------------------------------------------------------------------
TOPICS_MAX: Final = 1_000
"""Topics of a broker that serves every name: a typing error in a loop cannot fill the store."""
BINDINGS_MAX: Final = 100_000
"""Bindings of one broker: all of them are held in memory."""
ROUTES_CACHED_MAX: Final = 100_000
"""Distinct message heads whose routing is remembered."""
DUPLICATE_IDS_MAX: Final = 500_000
"""Message ids remembered to recognise a repeated send."""
DUPLICATE_WINDOW_SECONDS: Final = 600.0
"""For how long a repeated send is recognised, as long as the number above suffices."""
UNROUTED_SECONDS_MAX: Final = 7 * 24 * 3_600.0
"""How long a message that no group was bound to is kept for a group that binds with start="first"."""
UNROUTED_BYTES_MAX: Final = 256 * MIB
"""All of them together; the oldest go first."""

# --- the store ---------------------------------------------------------------------------------
RECORD_BYTES_MAX: Final = 1 * MIB
"""A log record is split at about this size: one read of a backlog brings about one record."""
STORE_BYTES_MAX_DEFAULT: Final = 64 * GIB
"""The size of the sparse map; only what is used takes disk."""
STORE_ALARM_SHARE: Final = 0.70
"""Share of the store limit, or of a group's quota, at which the broker warns."""
STORE_REFUSE_SHARE: Final = 0.80
"""Share of the store limit at which publishing is refused: acks need pages too."""
DISK_FREE_BYTES_MIN: Final = 1 * GIB
"""Publishing is refused below this much free disk, DISK_FREE_SHARE_MIN if that is more, or what the setting says."""
DISK_FREE_SHARE_MIN: Final = 0.05
"""See DISK_FREE_BYTES_MIN."""
PREALLOCATED_BYTES: Final = 64 * MIB
"""Disk blocks reserved in the store's file, so that acks go on when the disk is full."""
COMMIT_SPACING_SECONDS: Final = 0.001
"""Under concurrent small sends commits come at most this often, so several share one fsync."""
ACK_LINGER_SECONDS: Final = 0.005
"""How long acks wait for a commit that somebody waits for, to share it."""
SNAPSHOT_SECONDS: Final = 5.0
"""How often the settled cursors are written whole, so that a restart reads little."""
GROUP_QUOTA_BYTES_DEFAULT: Final = 16 * GIB
"""Pending, retrying and dead messages of one group before its topics are refused."""

# --- transactions ------------------------------------------------------------------------------
CHECK_AFTER_SECONDS: Final = 6.0
"""From prepare to the first check, as in KiteQ: an honest local transaction is over by then."""
CHECK_AFTER_SECONDS_MIN: Final = 0.1
"""Two ticks of a client's round trip: asked earlier, it would answer "running" every time."""
CHECK_AFTER_SECONDS_MAX: Final = 86_400.0
"""A day: what is undecided for longer is looked at by a person."""
CHECK_LIMIT: Final = 15
"""Answers "unknown" before a transaction is parked: a quarter of an hour with the back-off to a minute."""
CHECK_LIMIT_MAX: Final = 255
"""The count fits a byte wherever it is kept."""
CHECKS_PER_SECOND: Final = 200
"""Checks asked over all groups: a broker that comes back with 100,000 open does not flood the producers."""
CHECKS_PER_SECOND_MAX: Final = 100_000
"""More than one broker and its clients can answer."""
CHECK_ELSEWHERE_SECONDS: Final = 30.0
"""How long the preparing client must be gone before another member of its group is asked: it may come back."""
HALF_QUOTA: Final = 1_000_000
"""Open transactions of one group: each costs some bytes of memory until it is decided."""
HALF_QUOTA_MAX: Final = 100_000_000
"""The most a broker can be configured to."""
HALF_AGE_ALARM_SECONDS: Final = 600.0
"""An open transaction older than this means that a producer is gone, or that nobody answers checks."""
HALF_AGE_ALARM_SECONDS_MAX: Final = 30 * 86_400.0
"""A month: no local transaction is meant to take that long."""
CHECK_INTERVAL_SECONDS_MAX: Final = 60.0
"""The waits between checks double up to this."""
CHECK_ANSWER_SECONDS: Final = 15.0
"""A check not answered by then counts as not answered, and uses up nothing."""
CHECK_HISTORY_MAX: Final = 32
"""Checks described for `kiteq tx show`: the last ones."""
PARKED_CHECK_SECONDS: Final = 3_600.0
"""A parked transaction is asked about this often, and when a member of its group connects."""
DECISION_KEEP_SECONDS: Final = 3_600.0
"""How long it is known what was decided about a transaction, at least."""
TRANSACTION_ADDED_BYTES_MAX: Final = 16 * MIB
"""Messages added to one transaction: all of it is in memory when it is committed."""
HALF_CACHE_BYTES_MAX: Final = 32 * MIB
"""Half messages kept in memory until they are decided: most are within milliseconds."""

# --- the client --------------------------------------------------------------------------------
MAX_IN_FLIGHT_DEFAULT: Final = 1_000
"""Messages sent and not yet answered, per client."""
UNANSWERED_BYTES_MAX: Final = 16 * MIB
"""The same in bytes, unless a single message is larger."""
PUBLISH_MESSAGES_MAX: Final = 256
"""Messages the client puts in one publish frame: the broker works on one while the next travels."""
HANDLER_TIMEOUT_SECONDS: Final = 300.0
"""A handler that runs longer is cancelled and its message nacked."""
DRAIN_SECONDS: Final = 10.0
"""How long running handlers may finish when a client or a broker stops."""
SEND_TIMEOUT_SECONDS: Final = 5.0
"""How long a client waits for an answer."""

ZK_SESSION_SECONDS: Final = 10.0
"""How long a process that died is still found in ZooKeeper: short, but longer than a pause of ZooKeeper's own."""
ZK_SESSION_SECONDS_MAX: Final = 60.0
"""Clients would be sent to a broker that died for longer than anybody waits."""
