"""What the fields of packets may hold."""

from __future__ import annotations

from typing import Any, Final

from kiteq.limits import ERROR_LENGTH_MAX, FRAME_ITEMS_MAX, PREFETCH_MAX

__all__ = [
    "is_answer",
    "is_arguments",
    "is_bindings",
    "is_blobs",
    "is_bool",
    "is_exceptions",
    "is_handle_or_handles",
    "is_instance",
    "is_int_or_ints",
    "is_ints",
    "is_limits",
    "is_nacks",
    "is_plain",
    "is_ranges",
    "is_rising_ranges",
    "is_tag",
    "is_text",
    "is_texts",
    "is_token",
    "is_tokens",
    "is_u32",
    "is_window",
    "shown",
]


def is_u32(value: object) -> bool:
    """Return whether a value is a number below 2^32."""
    return type(value) is int and 0 <= value < 1 << 32


def is_text(value: object) -> bool:
    """Return whether a value is text of at most 4,096 characters."""
    return type(value) is str and len(value) <= 4 * ERROR_LENGTH_MAX


def is_bool(value: object) -> bool:
    """Return whether a value is true or false."""
    return type(value) is bool


def is_blobs(value: object) -> bool:
    """Return whether a value is a list of at least one bytes value."""
    return type(value) is list and 0 < len(value) <= FRAME_ITEMS_MAX and set(map(type, value)) == {bytes}


def is_ints(value: object) -> bool:
    """Return whether a value is a list of numbers below 2^63."""
    return (
        type(value) is list and (not value or set(map(type, value)) == {int}) and all(0 <= i < 1 << 63 for i in value)
    )


def is_texts(value: object) -> bool:
    """Return whether a value is a list of texts."""
    return type(value) is list and all(map(is_text, value))


def is_lists(value: object) -> bool:
    """Return whether a value is a list of lists."""
    return type(value) is list and (not value or set(map(type, value)) == {list})


def is_ranges(value: object) -> bool:
    """Return whether a value is a flat list of ranges, none upside down."""
    return is_ints(value) and len(value) % 2 == 0 and all(map(int.__le__, value[::2], value[1::2]))  # type: ignore[index, arg-type]


def is_rising_ranges(value: object) -> bool:
    """Return whether a value is a flat list of ranges in order, none touching another's numbers.

    Each is then looked up once, however many there are.
    """
    return is_ranges(value) and all(map(int.__lt__, value[1:-1:2], value[2::2]))  # type: ignore[index]


def is_int_or_ints(value: object) -> bool:
    """Return whether a value is one number or a list of them."""
    return is_u32(value) or is_ints(value)


def is_binding(item: list[Any]) -> bool:
    """Return whether a value is a binding."""
    return (
        len(item) >= 6
        and type(item[0]) is str
        and type(item[1]) is int
        and item[1] in (0, 1, 2)
        and type(item[2]) is str
        and (item[3] is None or is_u32(item[3]))
        and type(item[4]) is bool
        and type(item[5]) is str
    )


def is_bindings(value: object) -> bool:
    """Return whether a value is a list of bindings."""
    return is_lists(value) and all(map(is_binding, value))  # type: ignore[call-overload]


def is_nack(item: list[Any]) -> bool:
    """Return whether a value is an item of a `Nack`."""
    return (
        len(item) >= 4
        and is_tag(item[0])
        and type(item[1]) is int
        and item[1] in (0, 1, 2)
        and (item[2] is None or is_u32(item[2]))
        and type(item[3]) is str
    )


def is_nacks(value: object) -> bool:
    """Return whether a value is a list of such items."""
    return is_lists(value) and all(map(is_nack, value))  # type: ignore[call-overload]


def is_exception(item: list[Any]) -> bool:
    """Return whether a value is an item of `Receipts.exceptions`."""
    return len(item) >= 4 and is_u32(item[0]) and is_text(item[1]) and is_text(item[2]) and is_bool(item[3])


def is_exceptions(value: object) -> bool:
    """Return whether a value is a list of such items."""
    return is_lists(value) and all(map(is_exception, value))  # type: ignore[call-overload]


_PLAIN: Final = frozenset((type(None), bool, int, float, str, bytes))


def is_plain(value: object) -> bool:
    """Return whether a value has no timestamp in it: msgpack makes them itself, they skip the hook for extensions."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if type(one) is list:
            waiting += one
        elif type(one) is dict:
            waiting += one.values()
        elif type(one) not in _PLAIN:
            return False
    return True


def is_arguments(value: object) -> bool:
    """Return whether a value is the arguments of an administrative request."""
    return type(value) is dict and all(type(name) is str for name in value) and is_plain(value)


def is_limits(value: object) -> bool:
    """Return whether a value is a map of names to numbers."""
    return type(value) is dict and all(type(name) is str and type(limit) is int for name, limit in value.items())


def is_instance(value: object) -> bool:
    """Return whether a value is the id of a client instance."""
    return type(value) is bytes and len(value) == 16


def is_window(value: object) -> bool:
    """Return whether a value is a window of credit."""
    return type(value) is int and 0 <= value <= PREFETCH_MAX


def is_tag(value: object) -> bool:
    """Return whether a value is a delivery tag."""
    return type(value) is int and 0 <= value < 1 << 63


def is_handle_or_handles(value: object) -> bool:
    """Return whether a value is one transaction handle or a list of them."""
    return is_tag(value) or is_ints(value)


def is_answer(value: object) -> bool:
    """Return whether a value is a decision, or an answer that decides nothing."""
    return type(value) is int and 0 <= value <= 3


def is_token(value: object) -> bool:
    """Return whether a value names a transaction: its id, and its handle if known."""
    return type(value) is bytes and len(value) in (16, 24)


def is_tokens(value: object) -> bool:
    """Return whether a value is a list of at least one such name."""
    return is_blobs(value) and set(map(len, value)) <= {16, 24}  # type: ignore[call-overload]


def shown(value: object) -> str:
    """Return a short text for a value of any depth and size; the `repr` of such a value could fail, or fill memory."""
    if type(value) in (int, float, bool, type(None)):
        return repr(value)
    if type(value) is str:
        return repr(value[:64])
    return f"of type {type(value).__name__}"
