"""A block's code as it is run: its text is not changed; where the device in use is not ``cuda``, its syntax tree is.

``cuda`` becomes that device then (``cpu``, ``xpu``, ``mps``). Placeholder paths come to stand in the block's own folder,
and what an ``except`` holds back is noted. Line numbers are those of the page.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import TypeVar

NOTE_CAUGHT = "__diffopt_caught__"
"""The name, in a block's namespace, of the function that is told of each exception that the block's own code caught."""

_DEVICE = re.compile(r"^(?:cuda|gpu)(?P<index>:\d+)?$")
_PLACEHOLDER = re.compile(r"^/?(?:path/to|your/path|path_to)(?:/|$)")


def compiled(source: str, *, page: str, line: int, device: str, folder: str) -> CodeType:
    """The code of a block.

    Args:
        source: its text. page: the file that tracebacks name. line: of its first line there, from 1.
        device: what ``cuda`` stands for; ``"cuda"`` leaves every device as it is written.
        folder: where placeholder paths such as ``/path/to/checkpoint`` lead.

    Raises:
        SyntaxError: it is no Python; its line is the page's.
    """
    try:
        tree = ast.parse(source, page)
    except SyntaxError as error:
        if error.lineno is not None:
            error.lineno += line - 1
        if error.end_lineno is not None:
            error.end_lineno += line - 1
        raise
    tree = _Rewriter(device, folder, _names_of_torch(tree)).visit(tree)
    ast.increment_lineno(ast.fix_missing_locations(tree), line - 1)
    return compile(tree, page, "exec")


def _names_of_torch(tree: ast.AST) -> frozenset[str]:
    names = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname for alias in node.names if alias.name == "torch" and alias.asname}
    return frozenset(names)


_Node = TypeVar("_Node", bound=ast.AST)


class _Rewriter(ast.NodeTransformer):
    def __init__(self, device: str, folder: str, torch_names: frozenset[str]) -> None:
        self.device = device
        self.folder = folder
        self.torch_names = torch_names

    @property
    def moves(self) -> bool:
        return self.device != "cuda"

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if not isinstance(node.value, str):
            return node
        match = _DEVICE.match(node.value)
        if self.moves and match and not node.value.startswith("gpu"):
            return _like(ast.Constant(self.device + (match["index"] or "")), node)
        if _PLACEHOLDER.match(node.value):
            return _like(ast.Constant(f"{self.folder}/{node.value.lstrip('/')}"), node)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        self.generic_visit(node)
        first = node.values[0] if node.values else None
        if self.moves and isinstance(first, ast.Constant) and first.value == "cuda:":
            node.values[0] = _like(ast.Constant(f"{self.device}:"), first)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if self.moves and node.attr == "cuda" and self._is_torch(node.value):
            node.attr = self.device
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        function = node.func
        if (
            self.moves
            and isinstance(function, ast.Attribute)
            and function.attr == "cuda"
            and not self._is_torch(function.value)
        ):
            function.attr = "to"
            index = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            name = f"{self.device}:{index}" if isinstance(index, int) else self.device
            node.args = [_like(ast.Constant(name), node)]
            node.keywords = [keyword for keyword in node.keywords if keyword.arg == "non_blocking"]
            function.value = self.visit(function.value)
            return node
        return self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> ast.AST:
        for alias in node.names:
            alias.name = self._module(alias.name)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if node.module:
            node.module = self._module(node.module)
        for alias in node.names:
            if self.moves and node.module == "torch" and alias.name == "cuda":
                alias.asname = alias.asname or "cuda"
                alias.name = self.device
        return node

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        self.generic_visit(node)
        told = ast.Expr(ast.Call(ast.Name(NOTE_CAUGHT, ast.Load()), [], []))
        for part in ast.walk(told):
            _like(part, node)
        node.body.insert(0, told)
        return node

    def _module(self, name: str) -> str:
        if self.moves and (name == "torch.cuda" or name.startswith("torch.cuda.")):
            return f"torch.{self.device}{name.removeprefix('torch.cuda')}"
        return name

    def _is_torch(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id in self.torch_names


def _like(node: _Node, other: ast.AST) -> _Node:
    return ast.copy_location(node, other)


def placeholders(source: str, folder: str) -> list[Path]:
    """Where the placeholder paths of a block lead."""
    constants = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)] if source else []
    texts = [value for value in constants if isinstance(value, str) and _PLACEHOLDER.match(value)]
    return [Path(folder, text.lstrip("/")) for text in texts]


def on_caught(note: Callable[[BaseException, int], None], page: str) -> Callable[[], None]:
    """The function under `NOTE_CAUGHT`: it tells ``note`` the exception that is being handled, and the page's line of it."""
    import sys

    def caught() -> None:
        error = sys.exc_info()[1]
        if error is not None:
            note(error, line_in(error, page))

    return caught


def line_in(error: BaseException, page: str) -> int:
    """The line of the page at which an exception left its code; 0 where it never was in it."""
    line = error.lineno or 0 if isinstance(error, SyntaxError) and error.filename == page else 0
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == page:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line
