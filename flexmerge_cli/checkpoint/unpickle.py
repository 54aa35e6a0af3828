"""Interprets the pickle inside a `.bin` or `.pt` file: turns bytes into plain values and tensor records. No I/O.

Nothing of the file is imported, called or hashed: a class or function is a name, and only the names that `torch.save`
writes for state dicts are known. What a state dict does not need (sets, bytes, devices, keys that are not text) is
skipped and becomes an `Opaque`. So a file can neither run code nor make this take more than time and memory in
proportion to its size: about 100 bytes for each byte of the file.
"""

import io
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Values that many tensors share are visited once per tensor, so they must be short.
MAX_AXES = 64
MAX_ARGUMENTS = 16

STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexDouble": "complex128",
    "ComplexFloat": "complex64", "QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32", "QUInt4x2": "quint4x2",
    "QUInt2x4": "quint2x4", "Untyped": "",
}  # fmt: skip
DTYPE = re.compile(r"torch ((?:q?u?int|float|bfloat|complex|bits)\d\w*|bool)")
STORAGE = re.compile(r"torch(?:\.storage|\.cuda)? (\w+)Storage")
# Names whose arguments are ignored.
READ_OVER = re.compile(
    r"(__builtin__|builtins) (bytearray|set|complex)|_codecs encode|collections Counter|_io BytesIO"
    r"|torch (device|per_\w+|Tensor)|torch\.serialization _get_layout"
)
REBUILD = "torch._utils _rebuild_"
# Constructors of tensors that are not plain arrays in a storage -> the name of the kind.
ODD = {
    "qtensor": "quantized", "sparse_tensor": "sparse", "meta_tensor_no_storage": "meta", "nested_tensor": "nested",
    "wrapper_subclass": "of a subclass", "device_tensor_from_numpy": "of another device",
    "device_tensor_from_cpu_tensor": "of another device",
}  # fmt: skip


class UnsafePickle(Exception):
    """The file names something that does not belong in a state dict."""


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """A value that a state dict does not need."""


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A class or function that the file names. Only the name is kept."""

    name: str
    """The module and name, separated by a space."""


@dataclass(frozen=True, slots=True, eq=False)
class PickledStorage:
    """A record of the archive that holds elements."""

    dtype: str
    """The dtype as torch spells it; empty if the record holds bytes of any dtype."""
    key: str
    """The name of the record below `data/`."""
    num_elements: int


@dataclass(frozen=True, slots=True, eq=False)
class PickledTensor:
    """A tensor as the file describes it. Nothing is checked against the storage yet."""

    storage: PickledStorage
    dtype: str
    """The dtype as torch spells it."""
    offset: int
    """The offset in elements, like the strides. Neither is negative."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class OddTensor:
    """A tensor that is not an array of elements in a storage."""

    kind: str
    """The kind of tensor, e.g. `sparse`."""


def unpickle(data: bytes) -> Any:
    """Interpret the pickle: dicts with text keys (or `Opaque`), lists, tuples, plain values and tensors.

    Raises UnsafePickle if it needs more than weights do, ValueError if it is damaged.
    """
    machine, file = _Machine(), io.BytesIO(data)
    try:
        while (code := file.read(1)) != b".":
            if code not in STEPS:
                raise UnsafePickle(f"the opcode {code!r}") if code else ValueError("it has no end")
            read_argument, step = STEPS[code]
            step(machine, read_argument(file))
        return machine.stack.pop()
    except (IndexError, KeyError, TypeError, AttributeError) as error:  # the stack or memo lacks what is taken from it
        raise ValueError(f"{type(error).__name__}: {error}") from None


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("a tuple of more items than the stack has")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)
        elif not isinstance(self.stack[-1], Opaque):
            raise ValueError("items for a value that is not a list")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict) and len(items) % 2 == 0:
            # Only text is hashed: numbers and tuples can be made to collide, or to take for ever.
            for key, value in zip(items[::2], items[1::2]):
                target[key if type(key) is str else Opaque()] = value
        elif not isinstance(target, Opaque):
            raise ValueError("items for a value that is not a dict")

    def find(self, name: str) -> None:
        module, _, last = name.partition(" ")
        known = name in CALLS or (module == "torch._utils" and last.removeprefix("_rebuild_") in ODD)
        if not (known or DTYPE.fullmatch(name) or STORAGE.fullmatch(name) or READ_OVER.fullmatch(name)):
            raise UnsafePickle(f"it names {name[:100].replace(' ', '.')!r}")
        self.stack.append(Global(name))

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name that is not text")
        self.find(f"{module} {name}")

    def call(self, _: Any) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if type(called) is not Global or type(arguments) is not tuple:
            raise UnsafePickle("a call of a value that is not a name")
        self.stack.append(_made(called, _short(arguments)))

    def build(self, _: Any) -> None:
        """Set the state of an object: attributes in a dict, such as `_metadata`, or those of a tensor."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict | Opaque | PickledTensor):
            raise UnsafePickle("state for a value that has none")

    def persistent(self, _: Any) -> None:
        match _short(self.stack.pop()):
            case ("storage", Global(name=name), str(key), _, int(count), *_) if count >= 0:
                found = STORAGE.fullmatch(name)
                if found is None or found[1] not in STORAGES:
                    raise ValueError(f"an unknown storage {name[:100]!r}")
                self.stack.append(PickledStorage(STORAGES[found[1]], key, count))
            case _:
                raise ValueError("a persistent object that is not a storage")


def _made(called: Global, arguments: tuple[Any, ...]) -> Any:
    if called.name == "torch._tensor _rebuild_from_type_v2":  # a tensor with attributes, or of a subclass
        function, kind, arguments, _ = arguments
        if not (isinstance(function, Global) and isinstance(kind, Global) and isinstance(arguments, tuple)):
            raise ValueError("a tensor without a type")
        if not function.name.startswith(REBUILD):
            raise ValueError("a tensor without a known constructor")
        called, arguments = function, _short(arguments)
    if called.name in CALLS:
        return CALLS[called.name](*arguments)
    odd = ODD.get(called.name.removeprefix(REBUILD))
    return Opaque() if odd is None else OddTensor(odd)


def _short(value: Any) -> Any:
    if isinstance(value, tuple | dict) and len(value) > MAX_ARGUMENTS:
        raise ValueError(f"{len(value):,} arguments")
    return value


def _ordered_dict(*arguments: Any) -> dict[str, Any]:
    if arguments:  # torch.save fills it by SETITEMS
        raise UnsafePickle("an OrderedDict made from values")
    return {}


def _size(axes: Any) -> Any:
    return axes


def _same(data: Any, *_: Any) -> Any:
    """Return the tensor of a Parameter, which represents it."""
    return data


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any = None, _hooks: Any = None, *rest: Any
) -> Any:
    return _array(storage, offset, shape, strides, storage.dtype, *rest)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *rest: Any
) -> Any:
    found = DTYPE.fullmatch(dtype.name)
    if found is None:
        raise ValueError("a tensor without a dtype")
    return _array(storage, offset, shape, strides, found[1], *rest)


def _array(storage: Any, offset: Any, shape: Any, strides: Any, dtype: str, metadata: Any = None) -> Any:
    if not (isinstance(storage, PickledStorage) and isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise ValueError("a tensor without a storage or a shape")
    if len(shape) != len(strides) or len(shape) > MAX_AXES:
        raise ValueError(f"a tensor of {len(shape)} axes and {len(strides)} strides")
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in (offset, *shape, *strides)):
        raise ValueError("a tensor with a negative offset, size or stride, or one over 2^63")
    if isinstance(metadata, dict) and any(_short(metadata).values()):
        return OddTensor("a lazily negated or conjugated view")  # its bits are not its values
    return PickledTensor(storage, dtype, offset, shape, strides)


CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _ordered_dict,
    "torch Size": _size,
    "torch.nn.parameter Parameter": _same,
    "torch._tensor _rebuild_from_type_v2": _same,
    f"{REBUILD}tensor": _tensor,
    f"{REBUILD}tensor_v2": _tensor,
    f"{REBUILD}tensor_v3": _tensor_v3,
    f"{REBUILD}parameter": _same,
    f"{REBUILD}parameter_with_state": _same,
}


def _value(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


_STEPS: dict[str, Callable[[_Machine, Any], object]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": _Machine.mark,
    "POP": lambda machine, _: machine.stack.pop() if machine.stack else machine.since_mark(),
    "POP_MARK": lambda machine, _: machine.since_mark(),
    "NONE": _value,
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _value),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE"), _value),
    "SHORT_BINSTRING": lambda machine, _: machine.push(Opaque()),
    "SHORT_BINBYTES": lambda machine, _: machine.push(Opaque()),
    "BINBYTES": lambda machine, _: machine.push(Opaque()),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_SET": lambda machine, _: machine.push(Opaque()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "ADDITEMS": lambda machine, _: machine.since_mark(),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": _Machine.memoize,
    "GLOBAL": _Machine.find,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}


def _no_argument(_: io.BytesIO) -> None:
    return None


# The first byte of each opcode -> how to read its argument, and what it does.
STEPS = {
    opcode.code.encode("latin-1"): (opcode.arg.reader if opcode.arg is not None else _no_argument, _STEPS[opcode.name])
    for opcode in pickletools.opcodes
    if opcode.name in _STEPS
}
