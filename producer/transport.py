"""The broker's door: kombu's Redis transport that checks each item's bytes before Celery parses them.

Anybody who can reach the broker can put anything into a list, a channel or a key, and a stock worker stops for good on about
half of the malformed items that we tried. Here an item is parsed once, by one strict declaration of what the factory's own
senders write, and what goes on to Celery is a message made anew out of the few values that passed: no header, encoding or time
limit that a sender made up ever reaches it. Everything else goes to a bounded list of its own, is counted by reason, logged
once without its content, and is gone from the queue.

The quarantine lies in the broker: ``LRANGE factory.quarantine 0 -1`` shows the last thousand, ``HGETALL factory.quarantined``
the counts.
"""

import base64
import binascii
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Annotated, Any, Literal, TypeVar
from uuid import uuid4

import redis
import structlog
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as stock
from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from pydantic_core import to_json
from redis.exceptions import RedisError, ResponseError

from contentfactory.jobs.spec import load_kinds

log = structlog.get_logger(__name__)

MAX_ITEM_BYTES = 2**20
"""Largest item: a hint with the most ids takes a quarter of it."""
MAX_IDS = 4096
"""Most jobs that one hint may name."""
QUARANTINE = "factory.quarantine"
"""List of what was taken out, newest first; keys of a wrong type are renamed to this and their old name."""
QUARANTINED = "factory.quarantined"
"""Hash of counts by reason."""
READ_S = 5.0
"""Longest wait for the rest of a published message, seconds."""
KEEP = 1000
KEEP_BYTES = 4096
COMMANDS = frozenset({
    "active", "active_queues", "clock", "conf", "disable_events", "enable_events", "heartbeat", "ping", "query_task", "registered",
    "report", "reserved", "revoked", "scheduled", "stats",
})  # fmt: skip
"""Celery's remote commands that reach a worker: those that look. Jobs are cancelled in the ledger and workers stopped by a
signal, so ``shutdown``, ``cancel_consumer``, ``rate_limit`` and their like would only be ways to stop a worker with one message."""

REASONS = (
    "too_large", "not_utf8", "not_json", "not_an_object", "content_type", "properties", "headers", "body", "unknown_kind", "args",
    "command", "event", "unknown_channel", "key_type", "refused",
)  # fmt: skip
"""Why an item was refused; also the values of the metric's label."""


_HOST = f"dispatcher@{socket.gethostname()}"


class Malformed(Exception):
    """An item that none of our senders wrote.

    Attributes:
        reason: One of `REASONS`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


# --- what our senders write ---


class _Strict(BaseModel):
    # Built when the first item comes: most processes that load this module read none, and each would pay a tenth of a second.
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=True, defer_build=True)


_Short = Annotated[str, Field(max_length=255)]
_Text = Annotated[str, Field(max_length=8192)] | None
_Unset = Literal[None]


class _DeliveryInfo(_Strict):
    exchange: _Short
    routing_key: _Short


class _Properties(_Strict):
    delivery_tag: Annotated[str, Field(min_length=1, max_length=255)]
    delivery_info: _DeliveryInfo
    body_encoding: Literal["base64"]
    priority: Annotated[int, Field(ge=0, le=9)] = 0


class _Envelope(_Strict):
    content_type: Literal["application/json"] = Field(alias="content-type")
    content_encoding: Literal["utf-8"] = Field(alias="content-encoding")
    properties: _Properties
    body: str


class _HintHeaders(_Strict):
    # Celery's protocol 2. What would delay, expire, compress, chain or kill a job is the ledger's business and must be unset.
    task: _Short
    id: Annotated[str, Field(pattern=r"^[\w.:-]{1,128}$")]
    lang: Literal["py"] = "py"
    root_id: _Short | None = None
    parent_id: _Short | None = None
    argsrepr: _Text = None
    kwargsrepr: _Text = None
    origin: _Short | None = None
    retries: Literal[0] = 0
    timelimit: tuple[_Unset, _Unset] | None = None
    eta: _Unset = None
    expires: _Unset = None
    compression: _Unset = None
    shadow: _Unset = None
    meth: _Unset = None
    group: _Unset = None
    group_index: _Unset = None
    replaced_task_nesting: Literal[0] = 0
    ignore_result: bool = True
    stamped_headers: _Unset = None
    stamps: Annotated[dict[str, JsonValue], Field(max_length=0)] | None = None
    dispatched_at: Annotated[float, Field(gt=0)]


class _Hint(_Envelope):
    headers: _HintHeaders


class _Embed(_Strict):
    callbacks: _Unset = None
    errbacks: _Unset = None
    chain: _Unset = None
    chord: _Unset = None


class _ControlHeaders(_Strict):
    clock: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    ticket: _Short | None = None
    expires: float | None = None
    hostname: _Short | None = None


class _Control(_Envelope):
    headers: _ControlHeaders


class _ReplyTo(_Strict):
    exchange: _Short
    routing_key: _Short


class _Command(_Strict):
    method: _Short
    arguments: dict[str, JsonValue] | None = None
    destination: list[_Short] | None = None
    # A regular expression from outside could keep the worker busy for ever.
    pattern: _Unset = None
    matcher: _Unset = None
    reply_to: _ReplyTo | None = None
    ticket: _Short | None = None


class _Event(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True, defer_build=True)

    type: Annotated[str, Field(pattern=r"^[a-z]+-[a-z-]{1,64}$")]
    hostname: Annotated[str, Field(min_length=1, max_length=255)]
    timestamp: float
    clock: Annotated[int, Field(ge=0, lt=2**62)] = 0
    # Celery writes hours as a float: 5.5 in India.
    utcoffset: Annotated[float, Field(ge=-26, le=26)] = 0
    pid: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    uuid: _Short | None = None


_JobId = Annotated[str, Field(pattern=r"^job_[0-9a-f]{32}$")]


@cache
def _adapter(what: Any, strict: bool = False) -> TypeAdapter[Any]:
    return TypeAdapter(what, config=ConfigDict(strict=True) if strict else None)


_BODY = partial(_adapter, tuple[list[JsonValue], dict[str, JsonValue], _Embed], True)
_IDS = tuple[Annotated[list[_JobId], Field(min_length=1, max_length=MAX_IDS)]]
_HINT_BODY = partial(_adapter, tuple[_IDS, Annotated[dict[str, JsonValue], Field(max_length=0)], _Embed], True)
_COMMAND = partial(_adapter, _Command)
_EVENTS = partial(_adapter, _Event | list[_Event])
_REPLY = partial(_adapter, dict[str, JsonValue], True)


# --- checking ---

E = TypeVar("E", bound=_Envelope)


def _envelope(raw: bytes, model: type[E]) -> tuple[E, bytes]:
    if len(raw) > MAX_ITEM_BYTES:
        raise Malformed("too_large")
    try:
        raw.decode()
    except UnicodeDecodeError:
        raise Malformed("not_utf8") from None
    try:
        envelope = model.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise Malformed("not_json") from None
        where = str(first["loc"][0]) if first["loc"] else "not_an_object"
        raise Malformed("content_type" if where.startswith("content-") else where) from None
    try:
        return envelope, base64.b64decode(envelope.body.encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        raise Malformed("body") from None


def _parsed(adapter: Callable[[], TypeAdapter[Any]], value: bytes, reason: str) -> Any:
    try:
        return adapter().validate_json(value)
    except ValidationError:
        raise Malformed(reason) from None


def _writable(body: Any) -> Any:
    try:
        # Escapes for half a character pass every parser and break every writer.
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise Malformed("body") from None
    return body


def _message(body: Any, headers: dict[str, Any], exchange: str, routing_key: str, priority: int = 0) -> dict[str, Any]:
    return {
        "body": base64.b64encode(to_json(body)).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": {
            "delivery_info": {"exchange": exchange, "routing_key": routing_key},
            # Ours: two items with the same tag would be one to the worker's bookkeeping.
            "delivery_tag": uuid4().hex,
            "body_encoding": "base64",
            "delivery_mode": 2,
            "priority": priority,
        },
    }


def read_hint(raw: bytes, queue: str) -> dict[str, Any]:
    """Check an item of a queue's list and make the message that Celery gets in its stead.

    Args:
        raw: The item as it lay in the list.
        queue: The queue that it came from.

    Returns:
        A message in kombu's form.

    Raises:
        Malformed: If it is not what `producer.publish` writes.
    """
    envelope, body = _envelope(raw, _Hint)
    headers = envelope.headers
    try:
        (ids,), _, _ = _HINT_BODY().validate_json(body)
    except ValidationError:
        _parsed(_BODY, body, "body")  # whether it is no message of Celery's, or only none of ours
        raise Malformed("args" if headers.task in load_kinds() else "unknown_kind") from None
    if headers.task not in load_kinds():
        raise Malformed("unknown_kind")
    return hint_message(headers.task, ids, queue, envelope.properties.priority, headers.dispatched_at, headers.id)


def hint_message(
    kind: str, ids: Sequence[str], queue: str, priority: int, dispatched_at: float, message_id: str | None = None
) -> dict[str, Any]:
    """A micro-batch as a message of Celery's (protocol 2) in kombu's form, byte for byte what Celery would send.

    Args:
        kind: Kind of job, which is the task's name.
        ids: Jobs.
        queue: Queue.
        priority: Redis priority.
        dispatched_at: The ledger's time of dispatch.
        message_id: Id of the message; a new one where left out.
    """
    message_id = message_id or str(uuid4())
    shown = ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
    made = {
        "lang": "py", "task": kind, "id": message_id, "root_id": message_id, "parent_id": None, "group": None,
        "meth": None, "shadow": None, "eta": None, "expires": None, "retries": 0, "timelimit": [None, None], "argsrepr": shown,
        "kwargsrepr": "{}", "origin": None, "ignore_result": True, "dispatched_at": dispatched_at,
    }  # fmt: skip
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    message = _message([[list(ids)], {}, embed], made, "", queue, priority)
    message["properties"].update(correlation_id=message_id, reply_to="")
    return message


def sent_event(message: Mapping[str, Any]) -> dict[str, Any]:
    """The event ``task-sent`` of a message of `hint_message`, as Celery's sender would publish it."""
    headers, queue = message["headers"], message["properties"]["delivery_info"]["routing_key"]
    event = {
        "type": "task-sent", "uuid": headers["id"], "root_id": headers["id"], "parent_id": None, "name": headers["task"],
        "args": headers["argsrepr"], "kwargs": "{}", "retries": 0, "eta": None, "expires": None, "queue": queue, "exchange": "",
        "routing_key": queue, "hostname": _HOST, "utcoffset": time.timezone // 3600, "pid": os.getpid(), "clock": 0, "timestamp": time.time(),
    }  # fmt: skip
    return _message(event, {"hostname": _HOST}, "celeryev", "task.sent")


def read_control(raw: bytes, channel: str) -> dict[str, Any]:
    """Check a message of Celery's own traffic: a command for workers, a reply to one, an event for Flower.

    Args:
        raw: The bytes.
        channel: Exchange (commands, events) or queue (replies) that they came by.

    Returns:
        A message in kombu's form.

    Raises:
        Malformed: If Celery does not write such a message, or the factory has no use for it.
    """
    envelope, body = _envelope(raw, _Control)
    headers = envelope.headers.model_dump(exclude_none=True)
    content: Any
    if ".reply." in channel:
        content = _parsed(_REPLY, body, "command")
    elif channel == "celeryev":
        events = _parsed(_EVENTS, body, "event")
        content = [one.model_dump() for one in events] if isinstance(events, list) else events.model_dump()
    else:
        content = _parsed(_COMMAND, body, "command").model_dump(exclude_none=True)
        if content["method"] not in COMMANDS:
            raise Malformed("command")
    info = envelope.properties.delivery_info
    return _message(_writable(content), headers, info.exchange, info.routing_key)


# --- the transport ---


class _Subscriber(redis.client.PubSub):
    """A subscription whose broken connection is an error.

    The broker hangs up on a subscriber to whom more is sent than it wants to keep (32 MB). By itself this class would then connect
    anew and wait, without a limit and in the worker's main loop, for a message that may never come; Celery has it done in order.
    """

    def _execute(self, conn: Any, command: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (redis.ConnectionError, redis.TimeoutError):
            conn.disconnect()
            raise

    def parse_response(self, block: bool = True, timeout: float = 0) -> Any:
        """As the parent does for a message that has begun to arrive: whoever calls this saw that the socket is readable."""
        if self.connection is None or not self.connection.is_connected:
            raise redis.ConnectionError("the broker closed the subscription")
        return super().parse_response(block=False, timeout=READ_S)


class _Client(redis.Redis):
    """A client whose blocking pop gives out checked items only, and whose subscriptions do not wait."""

    def __init__(self, *args: Any, channel: "_Checks", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._channel = channel

    def pubsub(self, **kwargs: Any) -> _Subscriber:
        """A subscription."""
        return _Subscriber(self.connection_pool, **kwargs)

    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        """As the parent does; None, as when nothing waits, where what was popped is no message."""
        if command_name != "BRPOP":
            return super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]
        try:
            reply = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]
        except ResponseError as error:
            if str(error).startswith("WRONGTYPE") and self._channel.clear_queue_keys():
                return None
            raise
        if not reply:
            return reply
        key, item = reply
        checked = self._channel.checked(item, str(key, "utf-8").rsplit(self._channel.sep, 1)[0])
        return None if checked is None else (key, checked)


class _Checks(stock.Channel):
    """What `Channel` and `SentinelChannel` have in common."""

    # The stock transport copies what it pops to a hash and puts it back from there one day, or when it ends. A lost hint costs
    # seconds here, because the ledger sends it again; and what is never read back brings no bad item back either.
    ack_emulation = False
    do_restore = False
    _at_hand: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        # The stock transport makes one for each event that a worker sends, which takes it longer than to send it.
        if asynchronous:
            return super()._create_client(asynchronous=True)  # type: ignore[no-untyped-call]
        if self._at_hand is None or self._at_hand.connection_pool is not self.pool:
            self._at_hand = super()._create_client()  # type: ignore[no-untyped-call]
        return self._at_hand

    def _get_client(self) -> Any:
        super()._get_client()  # type: ignore[no-untyped-call]  # checks the version
        return partial(_Client, channel=self)

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        raise NotImplementedError("messages are consumed, never fetched one by one")

    def checked(self, raw: bytes, queue: str) -> bytes | None:
        """The message to go on with in the place of an item of a queue; None if it went into quarantine."""
        try:
            read = read_control if queue.endswith(".pidbox") else read_hint
            return to_json(read(raw, queue))
        except Malformed as error:
            self.quarantine(raw, queue, error.reason)
            return None

    def _handle_message(self, client: Any, r: Any) -> dict[str, Any]:
        payload: dict[str, Any] = super()._handle_message(client, r)  # type: ignore[no-untyped-call]
        if not bytes(payload["type"]).endswith(b"message"):
            return payload
        raw = payload["data"] if isinstance(payload["data"], bytes) else b""
        exchange = bytes(payload["channel"]).decode("utf-8", "replace")
        if exchange.startswith("/"):
            exchange = exchange.partition(".")[2]
        exchange = exchange.split("/", 1)[0]
        try:
            if exchange not in self._fanout_to_queue:
                raise Malformed("unknown_channel")
            payload["data"] = to_json(read_control(raw, exchange))
        except Malformed as error:
            self.quarantine(raw, exchange, error.reason)
            payload.update(data=None, channel=b"")
        return payload

    def quarantine(self, raw: bytes, queue: str, reason: str) -> None:
        """Set an item aside, count it and log that it was there."""
        digest = hashlib.sha256(raw).hexdigest()
        record = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "queue": queue[:255], "reason": reason, "bytes": len(raw),
            "sha256": digest, "item": raw[:KEEP_BYTES].decode("utf-8", "backslashreplace")[:KEEP_BYTES],
        }  # fmt: skip
        log.warning("bad_message", action="quarantine", queue=queue[:255], reason=reason, bytes=len(raw), sha256=digest)
        try:
            with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
                pipe.lpush(QUARANTINE, json.dumps(record)).ltrim(QUARANTINE, 0, KEEP - 1)
                pipe.hincrby(QUARANTINED, reason, 1).execute()
        except RedisError as error:
            # The broker is full or going away. The item is out of the queue, and that is what counts.
            log.warning("quarantine_failed", action="quarantine", error=type(error).__name__)

    def clear_queue_keys(self, *queues: str) -> bool:
        """Move away whatever stands where the lists of these queues (all that are consumed) belong; whether there was any."""
        steps: list[int] = self.priority_steps
        keys = [self._q_for_pri(queue, step) for queue in queues or self.active_queues for step in steps]  # type: ignore[no-untyped-call]
        return self._clear(dict.fromkeys(keys, b"list"))

    def _clear(self, keys: dict[str, bytes]) -> bool:
        found = False
        with self.conn_or_acquire() as client:
            for key, wanted in keys.items():
                kind = client.type(key)
                if kind in (wanted, b"none"):
                    continue
                found = True
                client.rename(key, f"{QUARANTINE}:{key}")
                self.quarantine(kind, key, "key_type")
        return found

    def _size(self, queue: str) -> int:
        try:
            return int(super()._size(queue))  # type: ignore[no-untyped-call]
        except ResponseError:
            if not self.clear_queue_keys(queue):
                raise
            return int(super()._size(queue))  # type: ignore[no-untyped-call]

    def _queue_bind(self, exchange: str, *args: Any) -> None:
        try:
            super()._queue_bind(exchange, *args)  # type: ignore[no-untyped-call]
        except ResponseError:
            tables = (self.keyprefix_queue % (exchange,), self.keyprefix_binding_permanent % (exchange,))
            if not self._clear({**dict.fromkeys(tables, b"set"), self.keyprefix_binding_deadlines: b"zset"}):
                raise
            super()._queue_bind(exchange, *args)  # type: ignore[no-untyped-call]

    def get_table(self, exchange: str) -> list[tuple[str, ...]]:
        """The exchange's bindings: triples of routing key, pattern and queue; whatever else lies there is passed over."""
        try:
            with self.conn_or_acquire() as client:
                members = client.smembers(self.keyprefix_queue % (exchange,))
        except ResponseError:
            return []
        rows = [tuple(member.decode("utf-8", "replace").split(self.sep)) for member in members]
        return [row for row in rows if len(row) == 3]


class Channel(_Checks):
    """A channel to one server."""


class SentinelChannel(_Checks, stock.SentinelChannel):
    """A channel to the master that Sentinel names."""


class _Deliveries(stock.Transport):
    """What both transports have in common."""

    def _deliver(self, message: dict[str, Any], queue: str) -> None:
        try:
            super()._deliver(message, queue)  # type: ignore[no-untyped-call]
        except (OSError, RedisError, MemoryError):
            raise
        except Exception as error:
            # A checked message that Celery does not take all the same: it must not take the worker along.
            log.warning("message_refused", action="quarantine", queue=queue, error=type(error).__name__)
            tag = message["properties"]["delivery_tag"]
            for channel in self.channels:
                if channel._qos is not None and tag in channel._qos._delivered:
                    channel._qos.ack(tag)
            self.channels[0].quarantine(json.dumps(message).encode(), queue, "refused")


class Transport(_Deliveries):
    """``redis://``, ``rediss://`` and ``redis+socket://``."""

    Channel = Channel


class SentinelTransport(_Deliveries, stock.SentinelTransport):
    """``sentinel://``."""

    Channel = SentinelChannel


def install() -> None:
    """Make kombu take this transport for every Redis address in this process; call it before the first connection.

    Aliases, because of the address of a unix socket kombu takes the transport from the scheme, whatever a setting says.
    """
    TRANSPORT_ALIASES.update(
        redis="producer.transport:Transport", rediss="producer.transport:Transport", sentinel="producer.transport:SentinelTransport"
    )


def counts(client: "redis.Redis") -> dict[str, int]:
    """How many items were refused, by reason.

    Args:
        client: A connection to the broker.

    Raises:
        RedisError: If the broker does not answer.
    """
    try:
        values = client.hmget(QUARANTINED, list(REASONS))
    except ResponseError:
        return {}  # somebody put something else there
    return {reason: int(value) for reason, value in zip(REASONS, values, strict=True) if value is not None and value.isdigit()}
