"""Calls between the tests and the program that they test, which are two processes.

Values cross as JSON and become values of Python's own types on the other side: an object that says that it is equal to
everything arrives as something that is equal to itself alone. What has no such form (functions, objects of classes of
the program) crosses as a reference, which can be called and whose attributes can be asked for, over there."""

from __future__ import annotations

import base64
import builtins
import collections
import datetime
import decimal
import fractions
import importlib
import json
import socket
import struct
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

MOST_BYTES = 1 << 28
DEEPEST = 200
PLAIN_INT = 1 << 62


class Gone(Exception):
    """The other process has ended."""


class Refused(Exception):
    """The other process asks for what it may not have."""


class ProgramError(Exception):
    """The program raised what is not one of Python's own exceptions."""


class Remote:
    """A value of the other process. It can be called, and its attributes are read and set there."""

    def __init__(self, peer: Peer, number: int) -> None:
        self._peer, self._number = peer, number

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._peer.call(self._number, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._peer.attribute(self._number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            self._peer.assign(self._number, name, value)


class Peer:
    """One end. names: the globals of the program, which the other end may ask for; open_to_others: whether it may read
    and set attributes of what it holds references to. Otherwise it may call them and nothing else."""

    def __init__(self, calls: socket.socket, names: dict[str, Any], open_to_others: bool) -> None:
        self._socket, self._names, self._open = calls, names, open_to_others
        self._values: list[Any] = []
        self._numbers: dict[int, int] = {}

    def call(self, number: int, arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        """Calls a value of the other end. Lists, dictionaries and sets among the arguments are afterwards as the call
        left them."""
        self._send(["call", number, self._encode(list(arguments)), self._encode(named)])
        return self.result(arguments)

    def attribute(self, number: int, name: str) -> Any:
        """An attribute of a value of the other end."""
        self._send(["attribute", number, name])
        return self.result()

    def assign(self, number: int, name: str, value: Any) -> None:
        """Sets an attribute of a value of the other end."""
        self._send(["assign", number, name, self._encode(value)])
        self.result()

    def names(self, names: Sequence[str]) -> dict[str, Any]:
        """Those of the names that the program defines, with their values."""
        self._send(["names", list(names)])
        return dict(self.result())

    def result(self, arguments: Sequence[Any] = ()) -> Any:
        """What the other end returns; what it asks meanwhile is answered."""
        while True:
            kind, *rest = self._receive()
            if kind == "return":
                value, changed = rest
                for place, left in changed:
                    update(arguments[place], self._decode(left))
                return self._decode(value)
            if kind == "raise":
                raise raised(str(rest[0]), str(rest[1]))
            self._answer(kind, rest)

    def serve(self) -> None:
        """Answers until the other end goes away."""
        try:
            while True:
                kind, *rest = self._receive()
                self._answer(kind, rest)
        except Gone:
            return

    def reply(self, work: Callable[[], Any], arguments: Sequence[Any] = ()) -> None:
        """Sends what ``work`` returns or raises, and those of the arguments that it has changed."""
        try:
            before = [self._kept(one) for one in arguments]
            value = work()
            left = [self._kept(one) for one in arguments]
            changed = [[place, json.loads(now)] for place, now in enumerate(left) if now != before[place]]
            message = ["return", self._encode(value), changed]
        except (KeyboardInterrupt, GeneratorExit, Exception) as error:
            message = ["raise", type(error).__name__, text_of(error)]
        self._send(message)

    def _kept(self, argument: Any) -> str:
        """The form of an argument that a call can change; empty for others."""
        return json.dumps(self._encode(argument)) if isinstance(argument, CHANGEABLE) else ""

    def _answer(self, kind: str, rest: list[Any]) -> None:
        if kind == "call":
            number, arguments, named = rest[0], self._decode(rest[1]), self._decode(rest[2])
            self.reply(lambda: self._value(number)(*arguments, **named), arguments)
        elif kind == "attribute" and self._open:
            self.reply(lambda: getattr(self._value(rest[0]), rest[1]))
        elif kind == "assign" and self._open:
            self.reply(lambda: setattr(self._value(rest[0]), rest[1], self._decode(rest[2])))
        elif kind == "names" and self._open:
            self.reply(lambda: {name: self._names[name] for name in rest[0] if name in self._names})
        else:
            raise Refused(kind)

    def _value(self, number: int) -> Any:
        if not isinstance(number, int) or not 0 <= number < len(self._values):
            raise Refused(f"reference {number!r}")
        return self._values[number]

    def _encode(self, value: Any, depth: int = 0) -> Any:
        if depth > DEEPEST:
            raise RecursionError(f"a value is more than {DEEPEST} levels deep")

        def all_of(values: Any) -> list[Any]:
            return [self._encode(one, depth + 1) for one in values]

        if value is None or value is True or value is False or type(value) is float or type(value) is str:
            return value
        if type(value) is int:
            return value if -PLAIN_INT < value < PLAIN_INT else {"int": hex(value)}
        if type(value) is list:
            return all_of(value)
        if isinstance(value, Remote):
            return {"yours": value._number}
        if isinstance(value, type | types.ModuleType) or callable(value):
            return self._reference(value)
        for kind, name in KINDS.items():
            if isinstance(value, kind):
                return {name: FORMS[name][0](value, all_of)}
        if isinstance(value, Iterator):
            return {"iterator": all_of(value)}
        return self._reference(value)

    def _reference(self, value: Any) -> Any:
        name = getattr(value, "__name__", None)
        if isinstance(value, type) and vars(builtins).get(str(name)) is value:
            return {"builtin": name}
        if isinstance(value, types.ModuleType) and name in sys.stdlib_module_names:
            return {"module": name}
        number = self._numbers.setdefault(id(value), len(self._values))
        if number == len(self._values):
            self._values.append(value)  # held, so that its id stays its own
        return {"mine": number}

    def _decode(self, form: Any) -> Any:
        if isinstance(form, list):
            return [self._decode(one) for one in form]
        if not isinstance(form, dict):
            return form
        ((name, held),) = form.items()
        if name == "mine":
            return Remote(self, int(held))
        if name == "yours":
            return self._value(held)
        if name == "builtin":
            return getattr(builtins, held) if isinstance(getattr(builtins, held, None), type) else None
        if name == "module":
            return importlib.import_module(held) if held in sys.stdlib_module_names else None
        return FORMS[name][1](held, self._decode)

    def _send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        try:
            self._socket.sendall(struct.pack("<Q", len(data)) + data)
        except OSError:
            raise Gone("the program ended before its tests did") from None

    def _receive(self) -> list[Any]:
        (length,) = struct.unpack("<Q", self._exactly(8))
        if length > MOST_BYTES:
            raise Gone("the program gave back more than can be compared")
        message = json.loads(self._exactly(length))
        if not isinstance(message, list) or not message:
            raise Refused("a message of another form")
        return message

    def _exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                piece = self._socket.recv(min(length - len(data), 1 << 20))
            except OSError:
                piece = b""
            if not piece:
                raise Gone("the program ended before its tests did")
            data += piece
        return bytes(data)


CHANGEABLE = (list, dict, set, bytearray)


def update(old: Any, new: Any) -> None:
    """Makes a container equal to another of its kind, in place."""
    if isinstance(old, list | bytearray):
        old[:] = new
    elif isinstance(old, dict | set):
        old.clear()
        old.update(new)


def raised(name: str, text: str) -> Exception:
    """The exception that a program raised, if it is one of Python's own; else ProgramError with its name."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:
            pass
    return ProgramError(f"{name}: {text}" if text else name)


def text_of(error: BaseException) -> str:
    """What an exception says, which its class may refuse to tell."""
    try:
        return str(error)[:2000]
    except Exception:
        return ""


All = Callable[[Any], list[Any]]
One = Callable[[Any], Any]

KINDS: dict[Any, str] = {
    str: "str",
    int: "int",
    float: "float",
    complex: "complex",
    bytes: "bytes",
    bytearray: "bytearray",
    list: "list",
    tuple: "tuple",
    frozenset: "frozenset",
    set: "set",
    dict: "dict",
    collections.deque: "deque",
    range: "range",
    type({}.keys()): "keys",
    type({}.values()): "values",
    type({}.items()): "items",
    slice: "slice",
    decimal.Decimal: "decimal",
    fractions.Fraction: "fraction",
    datetime.datetime: "datetime",
    datetime.date: "date",
    datetime.time: "time",
    datetime.timedelta: "timedelta",
}
"""Types that cross as values, by their names here; objects of classes that derive from them cross as theirs."""


def _pairs(value: dict[Any, Any], all_of: All) -> list[Any]:
    return all_of([*map(list, dict.items(value))])


def _dict(pairs: Any, one: One) -> dict[Any, Any]:
    return {one(key): one(value) for key, value in pairs}


def _each(kind: Callable[[list[Any]], Any]) -> Callable[[Any, One], Any]:
    return lambda held, one: kind([one(value) for value in held])


FORMS: dict[str, tuple[Callable[[Any, All], Any], Callable[[Any, One], Any]]] = {
    "str": (lambda value, _: str.__str__(value), lambda held, _: str(held)),
    "int": (lambda value, _: hex(int.__index__(value)), lambda held, _: int(held, 16)),
    "float": (lambda value, _: float.__float__(value), lambda held, _: float(held)),
    "complex": (lambda value, _: [value.real, value.imag], lambda held, _: complex(held[0], held[1])),
    "bytes": (lambda value, _: base64.b64encode(value).decode(), lambda held, _: base64.b64decode(held)),
    "bytearray": (
        lambda value, _: base64.b64encode(value).decode(),
        lambda held, _: bytearray(base64.b64decode(held)),
    ),
    "list": (lambda value, all_of: all_of(value), _each(list)),
    "tuple": (lambda value, all_of: all_of(value), _each(tuple)),
    "frozenset": (lambda value, all_of: all_of(value), _each(frozenset)),
    "set": (lambda value, all_of: all_of(value), _each(set)),
    "dict": (_pairs, _dict),
    "deque": (lambda value, all_of: all_of(value), _each(collections.deque)),
    "range": (lambda value, _: [value.start, value.stop, value.step], lambda held, _: range(*held)),
    "keys": (lambda value, all_of: all_of(value), lambda held, one: dict.fromkeys(one(k) for k in held).keys()),
    "values": (lambda value, all_of: all_of(value), lambda held, one: dict(enumerate(map(one, held))).values()),
    "items": (lambda value, all_of: all_of(map(list, value)), lambda held, one: _dict(held, one).items()),
    "iterator": (lambda value, all_of: all_of(value), lambda held, one: iter([one(value) for value in held])),
    "decimal": (lambda value, _: str(value), lambda held, _: decimal.Decimal(held)),
    "fraction": (
        lambda value, _: [hex(value.numerator), hex(value.denominator)],
        lambda held, _: fractions.Fraction(int(held[0], 16), int(held[1], 16)),
    ),
    "datetime": (lambda value, _: value.isoformat(), lambda held, _: datetime.datetime.fromisoformat(held)),
    "date": (lambda value, _: value.isoformat(), lambda held, _: datetime.date.fromisoformat(held)),
    "time": (lambda value, _: value.isoformat(), lambda held, _: datetime.time.fromisoformat(held)),
    "timedelta": (
        lambda value, _: [value.days, value.seconds, value.microseconds],
        lambda held, _: datetime.timedelta(*held),
    ),
    "slice": (
        lambda value, all_of: all_of([value.start, value.stop, value.step]),
        lambda held, one: slice(*map(one, held)),
    ),
}
