"""Which module is running: a stack of module calls, kept by PyTorch's global module hooks."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from rekindle.record.torch_private import never_compile, put_back


class ModuleCall:
    """One call of a module.

    Attributes:
        path: qualified name relative to the outermost module; empty for that module and outside of all.
        types: qualified names of its class and their bases, nearest first.
        parent: the call it was made in; None outside of all modules.
        number: position among the calls of the session.
    """

    __slots__ = ("__weakref__", "module_id", "number", "parent", "path", "root", "types")

    def __init__(
        self, path: str, types: tuple[str, ...], parent: ModuleCall | None, number: int, module_id: int = 0
    ) -> None:
        self.path = path
        self.types = types
        self.parent = parent
        self.number = number
        self.module_id = module_id

    def describe(self) -> str:
        """A name for error messages."""
        if not self.types:
            return "no module"
        cls = self.types[0].rpartition(".")[2]
        return f"module {self.path!r} ({cls})" if self.path else f"the outermost module ({cls})"


_spare: list[list[RemovableHandle]] = []  # removed, to be put back: Dynamo compiles again for every new one
_types: dict[int, tuple[weakref.ref[type], tuple[str, ...]]] = {}  # by `id`: cheaper than a WeakKeyDictionary


def types_of(cls: type) -> tuple[str, ...]:
    """Qualified names of a module class and its bases, nearest first, up to `torch.nn.Module`."""
    known = _types.get(id(cls))
    if known is not None and known[0]() is cls:
        return known[1]
    bases = (base for base in cls.__mro__ if base not in (torch.nn.Module, object))
    names = tuple(f"{base.__module__}.{base.__qualname__}" for base in bases)
    _types[id(cls)] = weakref.ref(cls), names
    return names


class ModuleStack:
    """Follows the calls of modules on the thread that opened it."""

    def __init__(
        self,
        on_root: Callable[[torch.nn.Module], None] | None = None,
        on_call: Callable[[torch.nn.Module, Any], None] | None = None,
    ) -> None:
        """`on_call(module, args)` is called before each call of a module, and then `on_root(module)` if it is an
        outermost one."""
        self._on_root = on_root
        self._on_call = on_call
        self.outside = ModuleCall("", (), None, 0)
        self.current = self.outside
        self.roots: weakref.WeakKeyDictionary[torch.nn.Module, dict[int, str]] = weakref.WeakKeyDictionary()
        self._hooks: list[RemovableHandle] = []
        self._stays = self._slack = False
        self._thread = 0
        self._count = 0

    def attach(self) -> None:
        """Have PyTorch tell of every module call, until `detach`."""
        if self._hooks:
            if self._slack:
                self._follow()
            return
        try:
            self._hooks = _spare.pop()
        except IndexError:
            self._hooks = [
                register_module_forward_pre_hook(self._enter),
                register_module_forward_hook(self._leave, always_call=True),
            ]
        else:
            self._follow()

    def _follow(self) -> None:
        put_back(self._hooks[0], self._enter)
        put_back(self._hooks[1], self._leave)
        self._slack = False

    def detach(self) -> None:
        """Undo `attach`. Not from inside a module call that failed: PyTorch walks the hooks then."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            _spare.append(self._hooks)
        self._hooks, self._slack = [], False

    def open(self) -> None:
        """Begin to follow module calls."""
        self._thread = threading.get_ident()
        self.current = self.outside
        self._count = 0
        self._stays = bool(self._hooks)
        self.attach()

    def slacken(self) -> None:
        """Have `on_call` told of each call, and follow them no more: that costs less."""
        for hook in self._hooks:
            hook.remove()
        put_back(self._hooks[0], self._glance)
        self._slack = True

    def tighten(self, module: torch.nn.Module, args: Any) -> None:
        """Follow calls again, from one of `module` on that is about to run: the outermost, as far as is known."""
        self._follow()
        self.current = self.outside
        self._enter(module, args)

    @contextmanager
    def blind(self) -> Iterator[None]:
        """Runs one block whose module calls are none of the step's."""
        thread, self._thread = self._thread, 0
        try:
            yield
        finally:
            self._thread = thread

    def pause(self) -> None:
        """Follow no calls until `resume`."""
        self._thread = 0

    def resume(self) -> None:
        """Go on following calls, those of the running thread."""
        self._thread = threading.get_ident()

    def close(self) -> None:
        """Stop following them."""
        self._thread = 0
        self.current = self.outside
        if not self._stays:
            self.detach()

    def names(self) -> dict[int, str]:
        """The names of all parameters and buffers of the modules that were called, by the address of their storage."""
        names: dict[int, str] = {}
        for root in list(self.roots):
            for name, tensor in (*root.named_buffers(), *root.named_parameters()):
                names[_address(tensor)] = name
        names.pop(0, None)
        return names

    def name_of(self, key: int) -> str:
        """The name of the parameter or buffer whose storage has the address `key`; empty if there is none."""
        return self.names().get(key, "")

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or threading.get_ident() != self._thread:
            return
        parent = self.current
        self._count += 1
        if self._on_call is not None:
            self._on_call(module, args)
        if parent is self.outside:
            if self._on_root is not None:
                self._on_root(module)
            self._root = self._names(module)
            path = ""
        else:
            path = self._root.get(id(module)) or ".".join(filter(None, (parent.path, type(module).__name__)))
        self.current = ModuleCall(path, types_of(type(module)), parent, self._count, id(module))

    def _glance(self, module: torch.nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or threading.get_ident() != self._thread:
            return
        if not self._slack:  # since PyTorch made its list of whom to call
            self._enter(module, args)
            return
        assert self._on_call is not None
        self._on_call(module, args)

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or threading.get_ident() != self._thread:
            return
        call: ModuleCall | None = self.current
        while call is not None and call.module_id != id(module):
            call = call.parent
        if call is not None and call.parent is not None:
            self.current = call.parent

    def _names(self, root: torch.nn.Module) -> dict[int, str]:
        names = self.roots.get(root)
        if names is None:
            names = self.roots[root] = {id(module): name for name, module in root.named_modules()}
        return names


def gradient_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The gradient of a parameter or buffer, if it has one. One that an op with a gradient wrote in place has none, and
    PyTorch warns whoever asks for it."""
    return tensor.grad if tensor.is_leaf or tensor.retains_grad else None


def _address(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return 0


never_compile(ModuleStack._enter)
never_compile(ModuleStack._glance)
never_compile(ModuleStack._leave)
