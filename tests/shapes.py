"""Check the package's shape annotations at every call, in tests only.

jaxtyping's own option for pytest checks every function, whatever its annotations, and doubles the time of the tests.
Here the functions and records are checked whose annotations name a shape, such as `Float[Tensor, "n p"]`; types without
shapes are left to mypy. Its decorator binds the arguments and checks them twice, before the call and after it, for the
sake of a longer message: a third of the time of the tests. `checked` does so once.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial, wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import cache_from_source
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

import jaxtyping
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation

DECORATOR = "__import__('tests.shapes', fromlist=['checked']).checked"
# Part of the name of a compiled file, so that it is made again when this file changes.
TAG = "shapes" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def names_shape(annotations: Iterable[ast.expr | None]) -> bool:
    """Whether one of the annotations holds a shape: a class of jaxtyping's, subscripted."""
    nodes = (node for annotation in annotations if annotation for node in ast.walk(annotation))
    subscripted = (node.value for node in nodes if isinstance(node, ast.Subscript))
    return any(isinstance(value, ast.Name) and hasattr(jaxtyping, value.id) for value in subscripted)


# Within it a name such as "n" is one length.
_ONE_CALL = jaxtyping.jaxtyped("context")


def checked(what: Any) -> Any:
    """The function with its shapes checked at every call; of a record, those of its fields, when one is made."""
    if isinstance(what, type):
        if dataclasses.is_dataclass(what) and "__init__" in vars(what):
            what.__init__ = checked(what.__init__)  # type: ignore[misc]
        return what
    checker = beartype(without_return(what) if inspect.isgeneratorfunction(what) else what)

    @wraps(what)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return what(*args, **kwargs)
        with _ONE_CALL:
            try:
                return checker(*args, **kwargs)
            except BeartypeCallHintViolation as violation:
                raise jaxtyping.TypeCheckError(str(violation)) from None

    @wraps(what)
    def generate(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        """A generator's arguments are looked at when its first item is asked for, which is in another's call."""
        __tracebackhide__ = True
        items = checker(*args, **kwargs)
        try:
            with _ONE_CALL:
                try:
                    first = next(items)
                except StopIteration as end:
                    return end.value
                except BeartypeCallHintViolation as violation:
                    raise jaxtyping.TypeCheckError(str(violation)) from None
            yield first
            return (yield from items)
        finally:
            items.close()

    return generate if inspect.isgeneratorfunction(what) else call


def without_return(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without the annotation of what it returns: what a generator yields may change its length."""
    assert isinstance(function, FunctionType)
    bare = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    bare.__kwdefaults__, bare.__qualname__, bare.__module__ = (
        function.__kwdefaults__,
        function.__qualname__,
        function.__module__,
    )
    bare.__annotations__ = {k: v for k, v in function.__annotations__.items() if k != "return"}
    return bare


class Checks(ast.NodeTransformer):
    """Decorate what names a shape: a function before its other decorators, a record after them."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        a = node.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
        if names_shape([node.returns, *(argument.annotation for argument in arguments if argument)]):
            node.decorator_list.append(decorator(node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        if names_shape(field.annotation for field in node.body if isinstance(field, ast.AnnAssign)):
            node.decorator_list.insert(0, decorator(node))
        return node


def decorator(at: ast.AST) -> ast.expr:
    """The decorator, as if it stood in the line of what it decorates."""
    expression = ast.parse(DECORATOR, mode="eval").body
    for node in ast.walk(expression):
        ast.copy_location(node, at)
    return expression


class Loader(SourceFileLoader):
    """Compile a module with the checks in it, and keep that apart from the module compiled as it stands."""

    def get_code(self, fullname: str) -> CodeType | None:
        tagged = partial(cache_from_source, optimization=TAG)
        with patch("importlib._bootstrap_external.cache_from_source", tagged):
            return super().get_code(fullname)

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:  # type: ignore[override]
        return super().source_to_code(Checks().visit(ast.parse(data)), path, _optimize=_optimize)


class Finder(MetaPathFinder):
    """Find the modules of one package, and only those."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != self.package:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def check(package: str) -> None:
    """Check the shapes in this package's modules from now on. None of them may have been imported yet."""
    if package in sys.modules:
        raise RuntimeError(f"{package} was imported before its shapes could be checked.")
    sys.meta_path.insert(0, Finder(package))
