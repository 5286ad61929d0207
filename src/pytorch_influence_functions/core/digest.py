"""Digests of values and of code: the same contents give the same digest in every process, whatever they are called.

| what | counts by |
|---|---|
| numbers, strings, tensors, arrays | kind, dtype, shape and bytes; `1`, `1.0`, `True` differ, and so do `0.0`, `-0.0` |
| lists, tuples, sets, mappings | kind and members; the order counts in lists and tuples only |
| functions, methods, partials | bytecode, constants, defaults, captured values, and the globals the code refers to |
| classes | their members and bases |
| dataclasses, modules (`nn.Module`) | class, and fields or state; any other object by what pickling would keep of it |
| code of torch, of this and any other installed library | module, name and version |

Code of the user's own modules is followed into whatever it refers to. Names, comments, docstrings, line numbers and
files do not count. Three limits: code that is reached by a computed name is not found, what code reads from a disk is
not looked at, and an object without readable state (a lock, an open file) counts by its class only.
"""

from __future__ import annotations

import copyreg
import dataclasses
import dis
import enum
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import struct
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import zip_longest
from pathlib import PurePath
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._version import __version__
from .errors import InvalidInput

# Libraries by name: they may be installed from a working copy, which is not in the folder of installed packages.
_LIBRARIES: Final = (__name__.partition(".")[0], "torch", "numpy", "safetensors")
_INSTALLED: Final = tuple(
    os.path.realpath(path) + os.sep
    for path in {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    if path
)
_CONSTANTS: Final = (type(None), type(Ellipsis), type(NotImplemented))
_TORCH_NAMES: Final = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_BUILTINS: Final = (
    types.BuiltinFunctionType,
    types.MethodWrapperType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
)
_SLOTS: Final = (types.MemberDescriptorType, types.GetSetDescriptorType)
# Members of a class that say nothing about what it computes.
_SILENT: Final = (
    *("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__firstlineno__", "__static_attributes__"),
    *("__annotations__", "__annotations_cache__", "__annotate__", "__annotate_func__", "__parameters__"),
    *("__orig_bases__", "__abstractmethods__", "_abc_impl", "__match_args__"),
    *("__dataclass_fields__", "__dataclass_params__"),
)
# What every module has: mode and hooks. Of these only the hooks count.
_MODULE_STATE: Final = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}
# Whether a function stands inside another one changes this flag of its code and nothing else.
_NESTED: Final = 0x10


def digest(*values: Any) -> str:
    """The SHA-256 of some values, as 64 hexadecimal digits; see the module for what counts.

    >>> digest({"a": 1, "b": (2.0, None)}) == digest({"b": (2.0, None), "a": 1})
    True
    >>> digest(1) == digest(1.0)
    False
    """
    encoder = _Encoder()
    try:
        return hashlib.sha256(_node("values", [encoder.encode(value) for value in values])).hexdigest()
    except RecursionError as cause:
        raise InvalidInput(
            "Something that the results depend on (a loss, a measure, a method, or what they refer to) holds objects "
            "inside objects too deeply to be looked through; keep such a structure out of it, or leave out folder=."
        ) from cause


# --------------------------------------------------------------------------- encodings


def _leaf(kind: str, content: bytes | memoryview) -> bytes:
    """An encoding that says where it ends: short contents as they are, long ones by their hash."""
    size = len(content)
    head = f"{kind} {size}:".encode()
    if isinstance(content, bytes) and size <= 64:
        return head + content
    hashing = hashlib.sha256(head)
    hashing.update(content)
    return b"#" + hashing.digest()


def _node(kind: str, members: Iterable[bytes]) -> bytes:
    parts = list(members)
    hashing = hashlib.sha256(f"{kind} of {len(parts)}:".encode())
    for part in parts:
        hashing.update(part)
    return b"#" + hashing.digest()


def _text(kind: str, text: str) -> bytes:
    return _leaf(kind, text.encode("utf-8", "surrogatepass"))


def _encode_plain(value: Any) -> bytes | None:
    """The encoding of a value that holds no other; None for everything else."""
    if isinstance(value, enum.Enum):
        return None
    if isinstance(value, _CONSTANTS):
        return _text("constant", repr(value))
    if isinstance(value, np.generic):
        return _encode_array(np.asarray(value))
    if isinstance(value, (bool, int)):
        return _text("bool" if isinstance(value, bool) else "int", str(int(value)))
    if isinstance(value, float):
        return _leaf("float", struct.pack("<d", value))
    if isinstance(value, complex):
        return _leaf("complex", struct.pack("<dd", value.real, value.imag))
    if isinstance(value, str):
        return _text("str", value)
    if isinstance(value, (bytes, bytearray)):
        return _leaf("bytes", bytes(value))
    if isinstance(value, Tensor):
        return _encode_tensor(value)
    if isinstance(value, np.ndarray):
        return None if value.dtype.hasobject else _encode_array(value)
    if isinstance(value, _TORCH_NAMES):
        return _text("torch", str(value))
    if isinstance(value, PurePath):
        return _text("path", os.fspath(value))
    return _text("range", repr(value)) if isinstance(value, range) else None


def _encode_tensor(tensor: Tensor) -> bytes:
    plain = tensor.detach()
    kind = f"tensor {plain.dtype} {tuple(plain.shape)}"
    if plain.is_meta:
        return _text(kind, "meta")
    if plain.layout is torch.sparse_coo:
        plain = plain.coalesce()
        return _node(f"sparse {kind}", [_encode_tensor(plain.indices()), _encode_tensor(plain.values())])
    if plain.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = (plain.crow_indices(), plain.col_indices(), plain.values())
        return _node(f"{plain.layout} {kind}", map(_encode_tensor, parts))
    if plain.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = (plain.ccol_indices(), plain.row_indices(), plain.values())
        return _node(f"{plain.layout} {kind}", map(_encode_tensor, parts))
    return _leaf(kind, tensor_bytes(plain))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's numbers in reading order, without a copy where that is possible."""
    plain = tensor.detach()
    plain = plain.dequantize() if plain.is_quantized else plain
    flat = plain.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    array: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return array.data


def _encode_array(array: NDArray[Any]) -> bytes:
    return _leaf(f"array {array.dtype.descr} {array.shape}", np.ascontiguousarray(array).tobytes())


class _Encoder:
    """One walk through a value and all it refers to; what is met twice is walked once, also where it refers back."""

    def __init__(self) -> None:
        # The values are kept, so that no other can take the place in memory that identifies them.
        self._finished: dict[int, tuple[Any, bytes]] = {}
        self._open: dict[int, int] = {}

    def encode(self, value: Any) -> bytes:
        """An encoding in which no two different values read alike."""
        plain = _encode_plain(value)
        if plain is not None and not _is_own(type(value)):
            return plain
        if id(value) in self._finished:
            return self._finished[id(value)][1]
        if id(value) in self._open:
            return _text("back by", str(len(self._open) - self._open[id(value)]))
        self._open[id(value)] = len(self._open)
        try:
            encoding = self._encode_compound(value)
        finally:
            del self._open[id(value)]
        self._finished[id(value)] = (value, encoding)
        return encoding

    def _encode_all(self, kind: str, *values: Any) -> bytes:
        return _node(kind, map(self.encode, values))

    def _encode_compound(self, value: Any) -> bytes:
        content = _encode_plain(value) or self._encode_container(value)
        if content is not None:
            # A list or a number of a class of the user's has methods, too.
            own = [type(value), getattr(value, "__dict__", None)] if _is_own(type(value)) else []
            return _node("own", [content, *map(self.encode, own)]) if own else content
        if isinstance(value, enum.Enum):
            return self._encode_all("member", type(value), value.name, value.value)
        encoding = self._encode_code(value)
        return self._encode_object(value) if encoding is None else encoding

    def _encode_container(self, value: Any) -> bytes | None:
        """Lists, mappings and the like; None for everything else."""
        if isinstance(value, tuple):
            fields = getattr(value, "_fields", ())
            return self._encode_all(f"tuple {' '.join(fields)}" if isinstance(fields, tuple) else "tuple", *value)
        if isinstance(value, list):
            return self._encode_all("list", *value)
        if isinstance(value, (Set, frozenset)):
            return _node("set", sorted(map(self.encode, value)))
        if isinstance(value, Mapping):
            entries = sorted(((self.encode(key), value[key]) for key in value), key=lambda entry: entry[0])
            return _node("mapping", (code for key, member in entries for code in (key, self.encode(member))))
        if isinstance(value, slice):
            return self._encode_all("slice", value.start, value.stop, value.step)
        if isinstance(value, np.ndarray):
            return self._encode_all(f"array of objects {value.shape}", *value.reshape(-1).tolist())
        return None

    # ---------------------------------------------------------------- code

    def _encode_code(self, value: Any) -> bytes | None:
        """Functions, classes and what is made of them; None for everything else."""
        if isinstance(value, types.FunctionType):
            return self._encode_function(value)
        if isinstance(value, types.MethodType):
            return self._encode_all("method", value.__func__, value.__self__)
        if isinstance(value, functools.partial):
            return self._encode_all("partial", value.func, value.args, value.keywords)
        if isinstance(value, (staticmethod, classmethod)):
            return self._encode_all(type(value).__name__, value.__func__)
        if isinstance(value, property):
            return self._encode_all("property", value.fget, value.fset, value.fdel)
        if isinstance(value, _BUILTINS):
            owner = getattr(value, "__self__", None)
            name = _library_name(str(getattr(value, "__module__", "")), value.__qualname__)
            return _node("builtin", [name, self.encode(None if isinstance(owner, types.ModuleType) else owner)])
        if isinstance(value, types.CodeType):
            return self._encode_instructions(value)
        if isinstance(value, types.ModuleType):
            return self._encode_module(value)
        return self._encode_class(value) if isinstance(value, type) else None

    def _encode_function(self, function: Any) -> bytes:
        compiled_from = getattr(function, "_torchdynamo_orig_callable", None)
        if compiled_from is not None:
            return self.encode(compiled_from)
        code, home = function.__code__, str(function.__globals__.get("__name__", ""))
        cells = [_cell_value(cell) for cell in function.__closure__ or ()]
        if _is_library(home):
            # A decorator of a library holds the user's function in a cell.
            return _node("library function", [_library_name(home, _code_name(code)), *map(self.encode, cells)])
        attributes = {name: value for name, value in vars(function).items() if name != "__wrapped__"}
        settings = (function.__defaults__, function.__kwdefaults__, cells, attributes)
        references = self._encode_references(code, function.__globals__)
        return _node("function", [self.encode(code), *map(self.encode, settings), *references])

    def _encode_instructions(self, code: types.CodeType) -> bytes:
        """The instructions with the values they name, so that a docstring or another line number does not count."""
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 0x4) + bool(code.co_flags & 0x8)
        shape = (code.co_flags & ~_NESTED, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
        parts = [self.encode(shape), self.encode(code.co_varnames[:count])]
        parts.append(self.encode(getattr(code, "co_exceptiontable", b"")))
        for instruction in _instructions(code):
            parts += [_text("operation", instruction.opname), self.encode(instruction.argval)]
        return _node("code", parts)

    def _encode_references(self, code: types.CodeType, scope: Mapping[str, Any]) -> Iterator[bytes]:
        """What the code means by its global names, and by the modules it imports."""
        codes = list(_nested(code))
        names = {n for c in codes for n in c.co_names} | {n for c in codes for n in c.co_consts if isinstance(n, str)}
        # Sorted, True comes last and wins where a name is used in both ways.
        used = dict(sorted(pair for c in codes for pair in _global_names(c)))
        for name in used:
            if name not in scope or name.startswith("__"):  # a module's own name, file and the like
                continue
            value = scope[name]
            yield _text("global", name)
            # Of a module that is handed on as a whole, any member may be used.
            part = isinstance(value, types.ModuleType) and not used[name]
            yield self._encode_module(value, names) if part else self.encode(value)
        package = str(scope.get("__package__") or "")
        for imported in sorted({name for c in codes for name in _imports(c)}):
            module = _own_module(imported, package)
            if module is not None:
                yield self._encode_module(module, names)

    def _encode_module(
        self, module: types.ModuleType, names: Set[str] | None = None, above: frozenset[int] = frozenset()
    ) -> bytes:
        """A module of the user's: the members that are named, or all of them."""
        if _is_library(module.__name__):
            return _library_name(module.__name__, "")
        parts = []
        for name, value in sorted(vars(module).items()):
            if name.startswith("__") or (names is not None and name not in names):
                continue
            below = isinstance(value, types.ModuleType) and names is not None
            if below and id(value) in above:
                continue
            parts += [_text("name", name), self._encode_module(value, names, above | {id(module)})] if below else [
                _text("name", name), self.encode(value)
            ]  # fmt: skip
        return _node("module", parts)

    def _encode_class(self, kind: type) -> bytes:
        if not _is_own(kind):
            return _library_name(_home(kind), kind.__qualname__)
        members = {
            name: value for name, value in vars(kind).items() if name not in _SILENT and not isinstance(value, _SLOTS)
        }
        return self._encode_all("class", type(kind), kind.__bases__, members)

    # ---------------------------------------------------------------- objects

    def _encode_object(self, value: Any) -> bytes:
        kind = type(value)
        # An object may say itself what it depends on, such as the contents of a file it names.
        own = getattr(kind, "__fingerprint__", None)
        if own is not None:
            return self._encode_all("object", kind, own(value))
        if dataclasses.is_dataclass(value):
            counted = [f.name for f in dataclasses.fields(value) if f.metadata.get("fingerprint", True)]
            return self._encode_all("object", kind, {name: getattr(value, name) for name in counted})
        if isinstance(value, nn.Module):
            return self._encode_network(value)
        if isinstance(value, torch.jit.ScriptFunction):
            return self._encode_all("script", value.code)
        if callable(value) and _home(kind).partition(".")[0] in _LIBRARIES and hasattr(value, "__name__"):
            return self._encode_all("named", kind, str(getattr(value, "__module__", "")), value.__name__)
        try:
            reduce = copyreg.dispatch_table.get(kind)
            state: Any = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception:
            return self._encode_all("object", kind)
        if isinstance(state, str):
            # Pickled by its name; functools.lru_cache keeps the user's function in an attribute.
            wrapped = getattr(value, "__wrapped__", None)
            return self._encode_all("named", kind, str(getattr(value, "__module__", "")), state, wrapped)
        members = [list(part) if isinstance(part, Iterator) else part for part in state]
        return self._encode_all("object", kind, *members)

    def _encode_network(self, module: nn.Module) -> bytes:
        original = getattr(module, "_orig_mod", None)
        if isinstance(original, nn.Module):  # torch.compile
            return self.encode(original)
        if isinstance(module, torch.jit.ScriptModule):
            scripts = [(name, getattr(part, "code", "")) for name, part in module.named_modules()]
            return self._encode_all("script", module.state_dict(), scripts)
        state = {name: value for name, value in vars(module).items() if name not in _MODULE_STATE}
        hooks = [list(value.values()) for n in sorted(_MODULE_STATE) if isinstance(value := vars(module).get(n), dict)]
        return self._encode_all("network", type(module), state, [hook for hook in hooks if hook])


# --------------------------------------------------------------------------- looking at code


def _instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """The instructions that do something."""
    return (i for i in dis.get_instructions(code) if i.opname not in ("NOP", "EXTENDED_ARG", "CACHE"))


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """A piece of code and every piece inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _global_names(code: types.CodeType) -> Iterator[tuple[str, bool]]:
    """Every global name that a piece of code reads, and whether it uses the value as a whole, not by an attribute."""
    following = [*_instructions(code)][1:]
    for instruction, then in zip_longest(_instructions(code), following):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval, then is None or then.opname not in ("LOAD_ATTR", "LOAD_METHOD")


def _code_name(code: types.CodeType) -> str:
    return str(getattr(code, "co_qualname", code.co_name))


def _is_own(kind: type) -> bool:
    """Whether a class is the user's own."""
    return not _is_library(_home(kind))


def _home(kind: type) -> str:
    """The module of a class; some of C's own have another thing in its place."""
    home: Any = kind.__module__
    return home if isinstance(home, str) else "builtins"


def _cell_value(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return NotImplemented


def _imports(code: types.CodeType) -> Iterator[str]:
    """The modules that a piece of code imports when it runs, with a dot in front for every level of a relative one."""
    before: list[Any] = [0, 0]
    for instruction in _instructions(code):
        if instruction.opname == "IMPORT_NAME":
            level = before[-2] if isinstance(before[-2], int) else 0
            yield "." * level + instruction.argval
        before.append(instruction.argval)


def _own_module(relative: str, package: str) -> types.ModuleType | None:
    """A module of the user's that code imports when it runs; None for a library's, and for one that is not there."""
    try:
        name = importlib.util.resolve_name(relative, package)
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is None or _is_installed(spec.origin):
                return None
        module = importlib.import_module(name)
    except Exception:  # the code itself fails on it in the same way
        return None
    return None if _is_library(name) else module


def _is_installed(path: str) -> bool:
    real = os.path.realpath(path)
    parts = real.split(os.sep)
    return real.startswith(_INSTALLED) or "site-packages" in parts or "dist-packages" in parts


@functools.cache
def _is_library(name: str) -> bool:
    """Whether a module is installed rather than the user's own."""
    top = name.partition(".")[0]
    if top in _LIBRARIES or top in sys.builtin_module_names:
        return True
    path = getattr(sys.modules.get(name), "__file__", None)
    if isinstance(path, str):
        return _is_installed(path)
    return top != "__main__" and top in sys.stdlib_module_names


@functools.cache
def _version(top: str) -> str:
    if top == _LIBRARIES[0]:
        return __version__
    if top in sys.stdlib_module_names:
        return f"{sys.version_info.major}.{sys.version_info.minor}"
    given = getattr(sys.modules.get(top), "__version__", None)
    if isinstance(given, str):
        return given
    try:
        return importlib.metadata.version(top)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ""


def _library_name(module: str, name: str) -> bytes:
    return _text("library", f"{module} {name} {_version(module.partition('.')[0])}")
