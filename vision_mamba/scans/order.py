"""Scan orders: K routes over one grid under a name, as the index table that the scan operator follows."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_mamba.constants import Constants, copy_of
from vision_mamba.scans.routes import Route, atrous, column_major, reverse, row_major, snake, transpose, visits, window


@dataclass(frozen=True)
class ScanOrder:
    """A named tuple of routes. A new order is data: nothing else has to know of it.

    Args:
        name: what models and configurations call it.
        routes: functions (height, width) -> (S,) of tokens, see `vision_mamba.scans.routes`.

    >>> ScanOrder("there_and_back", (snake, reverse(snake))).indices(2, 2)
    tensor([[0, 1, 3, 2],
            [2, 3, 1, 0]], dtype=torch.int32)
    """

    name: str
    routes: tuple[Route, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "routes", tuple(self.routes))
        if not self.routes:
            raise ValueError(f"ScanOrder {self.name!r}: an order needs at least one route, got none.")
        for number, route in enumerate(self.routes):
            if not callable(route):
                raise ValueError(
                    f"ScanOrder {self.name!r}: route {number} must be a function (height, width) -> tokens, "
                    f"got {route!r}; vision_mamba.scans.routes has some."
                )

    def __len__(self) -> int:
        return len(self.routes)

    def indices(
        self, height: int, width: int, *, class_token: int | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The table of tokens that the routes visit; made once per grid and device and shared: do not write into it.

        Args:
            height: rows of the grid; with width L = height * width patches. A token sequence is a grid of one row.
            width: columns of the grid.
            class_token: place p of one more token among the L + 1: patches from p on move up by one, and every route
                visits the class token at step p (the routes of LocalMamba; arXiv:2403.09338).
            device: where the table is wanted.

        Returns: int32 (K, S); routes shorter than the longest end in padding steps, -1.
        Raises: ValueError for an empty grid, a class token out of place, or a route that breaks the contract.
        """
        return _tables.get(torch.device(device), self, height, width, class_token)

    def visits(self, height: int, width: int, *, device: torch.device | str = "cpu") -> Tensor:
        """When and how each route comes to each token: int64 (2, K, L), see `routes.visits`; shared as indices are."""
        return _visits.get(torch.device(device), self, height, width)


def _table(device: torch.device, order: ScanOrder, height: int, width: int, class_token: int | None) -> Tensor:
    # A table made under inference mode could not be kept for backward later.
    with torch.inference_mode(False):
        if device.type != "cpu":
            return copy_of(_tables.get(torch.device("cpu"), order, height, width, class_token), device)
        if any(isinstance(side, float) for side in (height, width)) or height < 1 or width < 1:
            raise ValueError(
                f"ScanOrder {order.name!r}: the grid must have tokens, got {height} x {width}; sides are whole numbers."
            )
        if class_token is not None and not 0 <= class_token <= height * width:
            raise ValueError(
                f"ScanOrder {order.name!r}: class_token must be from 0 to {height * width}, got {class_token}."
            )
        with torch.device("cpu"):
            routes = [route(height, width) for route in order.routes]
            for number, route in enumerate(routes):
                _check_route(order.name, number, route, height, width)
            return stack(routes, class_token)


def _visits_of(device: torch.device, order: ScanOrder, height: int, width: int) -> Tensor:
    order.indices(height, width)  # whatever breaks the contract is reported there
    with torch.inference_mode(False), torch.device("cpu"):
        return all_visits(order.routes, height, width).to(device)


_tables, _visits = Constants(_table), Constants(_visits_of)


def all_visits(order_routes: Sequence[Route], height: int, width: int) -> Tensor:
    """`routes.visits` of several routes: int64 (2, K, L)."""
    return torch.stack([visits(route, height, width) for route in order_routes], 1)


def stack(routes: Sequence[Tensor], class_token: int | None = None) -> Tensor:
    """Routes of any lengths -> int32 (K, S), ended by padding steps; with a class token put into each, if asked."""
    if class_token is not None:
        routes = [_insert(route, class_token) for route in routes]
    sizes: list[Any] = [route.shape[0] for route in routes]  # symbolic where torch.export traces for any size
    if torch.jit.is_tracing():  # whose sizes are tensors
        sizes = [int(size) for size in sizes]
    longest = functools.reduce(torch.sym_max, sizes)
    padded = [F.pad(route, (0, longest - size), value=-1) for route, size in zip(routes, sizes, strict=True)]
    return torch.stack(padded).int()


def _insert(route: Tensor, place: int) -> Tensor:
    moved = torch.where(route >= place, route + 1, route)
    return torch.cat((moved[:place], route.new_full((1,), place), moved[place:]))


def _check_route(name: str, number: int, route: Tensor, height: int, width: int) -> None:
    where = f"ScanOrder {name!r}: route {number} on a {height} x {width} grid"
    if not isinstance(route, Tensor) or route.dim() != 1 or route.dtype.is_floating_point or route.numel() == 0:
        raise ValueError(f"{where} must be a tensor of whole numbers (steps,), got {route!r}.")
    if int(route.min()) < -1 or int(route.max()) >= height * width:
        bad = int(route[(route < -1) | (route >= height * width)][0])
        raise ValueError(f"{where} must visit tokens from 0 to {height * width - 1} or -1 for padding, got {bad}.")
    counts = torch.bincount(route[route >= 0], minlength=1)
    if int(counts.max()) > 1:
        raise ValueError(
            f"{where} visits token {int(counts.argmax())} {int(counts.max())} times; once a route is the rule, a "
            f"second visit is a second route."
        )


_orders: dict[str, ScanOrder] = {}
_unlisted: set[str] = set()


def register(order: ScanOrder, *, listed: bool = True) -> ScanOrder:
    """Make an order known by its name, as in ``create_model("test_vmamba", scan_order="my_order")``.

    The same order may be registered again, as when a cell of a notebook is run twice.

    Args:
        order: what `get` gives for its name from now on.
        listed: have its name among the `names`.

    Raises: ValueError if another order has that name.
    """
    if _orders.setdefault(order.name, order) != order:
        raise ValueError(f"scans.register: an order named {order.name!r} exists; choose another name.")
    if not listed:
        _unlisted.add(order.name)
    return order


def get(name: str) -> ScanOrder:
    """The registered order of that name.

    Raises: ValueError naming the nearest known ones.
    """
    if name not in _orders:
        near = difflib.get_close_matches(name, _orders, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "register it with vision_mamba.scans.register(ScanOrder(...))."
        raise ValueError(f"scans.get: no scan order is named {name!r}; known are {', '.join(names())}; {hint}")
    return _orders[name]


def names() -> tuple[str, ...]:
    """Names of all registered orders, but for those that asked to be left out."""
    return tuple(name for name in _orders if name not in _unlisted)


_back = tuple(reverse(route) for route in (row_major, column_major))
FORWARD = register(ScanOrder("forward", (row_major,)))  # Mamba, arXiv:2312.00752
BIDIRECTIONAL = register(ScanOrder("bidirectional", (row_major, _back[0])))  # Vim, arXiv:2401.09417
CROSS = register(ScanOrder("cross", (row_major, column_major, *_back)))  # VMamba, arXiv:2401.10166
SNAKE = register(  # PlainMamba, arXiv:2403.17695
    ScanOrder("snake", (snake, reverse(snake), transpose(snake), reverse(transpose(snake))))
)
# LocalMamba, arXiv:2403.09338: the order of its models without a search, with windows of 2 or of 7 tokens a side.
LOCAL_2 = register(ScanOrder("local_2", (row_major, _back[0], window(2), reverse(window(2)))))
LOCAL_7 = register(ScanOrder("local_7", (row_major, _back[0], window(7), reverse(window(7)))))
ATROUS_2 = register(  # EfficientVMamba, arXiv:2403.09977: four disjoint sub-grids, two of them column by column
    ScanOrder(
        "atrous_2",
        (atrous(2, (0, 0)), transpose(atrous(2, (0, 1))), atrous(2, (0, 1)), transpose(atrous(2, (1, 1)))),
    )
)

# The table as an operator, so that a model asks for it by name under TorchScript, fx, torch.compile and torch.export.
# It makes a new tensor, as those expect of operators, and gives the shared one, as eager models want it, if asked to.
_library = torch.library.Library("vision_mamba", "FRAGMENT")
_library.define(
    "scan_indices(Tensor like, str order, SymInt height, SymInt width, int class_token=-1, bool shared=False) -> Tensor"
)


def _scan_indices(
    like: Tensor, order: str, height: int, width: int, class_token: int = -1, shared: bool = False
) -> Tensor:
    place = None if class_token < 0 else class_token
    table = get(order).indices(height, width, class_token=place, device=like.device)
    return table if shared else copy_of(table)


def _fake_scan_indices(
    like: Tensor, order: str, height: int, width: int, class_token: int = -1, shared: bool = False
) -> Tensor:
    with torch.device(like.device):
        routes = [route(height, width) for route in get(order).routes]
        return stack(routes, None if class_token < 0 else class_token)


_library.impl("scan_indices", _scan_indices, "CompositeExplicitAutograd")
_library.impl("scan_indices", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("vision_mamba::scan_indices", _fake_scan_indices, lib=_library)

_library.define("scan_visits(Tensor like, str order, SymInt height, SymInt width, bool shared=False) -> Tensor")


def _scan_visits(like: Tensor, order: str, height: int, width: int, shared: bool = False) -> Tensor:
    visits = get(order).visits(height, width, device=like.device)
    return visits if shared else copy_of(visits)


def _fake_scan_visits(like: Tensor, order: str, height: int, width: int, shared: bool = False) -> Tensor:
    with torch.device(like.device):
        return all_visits(get(order).routes, height, width)


_library.impl("scan_visits", _scan_visits, "CompositeExplicitAutograd")
_library.impl("scan_visits", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("vision_mamba::scan_visits", _fake_scan_visits, lib=_library)
