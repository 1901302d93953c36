"""A judge of the search for nearest codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vaelib.checks.verdicts import Mistakes, check_same, fail, judge, tensor_from, verdict

Function = Callable[..., Any]


def euclidean(q: Tensor, x: Tensor) -> Tensor:
    distances: Tensor = (q[:, None] - x[None]).norm(dim=2)
    return distances


def search_recipe(
    q: Tensor,
    x: Tensor,
    k: int,
    sides: Function = lambda q, x: (q, x),
    distance: Function = euclidean,
    far: bool = False,
    places: Function = lambda k: slice(0, k),
    order: Function = lambda found: found,
    output: Function = lambda distances, found: found,
) -> Tensor:
    """The places of the k nearest in x of each query, nearest first; the arguments put mistakes into it."""
    distances = distance(*sides(q, x))
    found = order(distances.argsort(dim=1, descending=far, stable=True)[:, places(k)])
    result: Tensor = output(distances, found)
    return result


def search_with(**switches: Any) -> partial[Tensor]:
    return partial(search_recipe, **switches)


def differences(q: Tensor, x: Tensor) -> Tensor:
    return q[:, None] - x[None]


def itself_excluded(q: Tensor, x: Tensor) -> Tensor:
    """A query's own place counts as infinitely far."""
    return euclidean(q, x).fill_diagonal_(torch.inf)


def copies_excluded(q: Tensor, x: Tensor) -> Tensor:
    """A code equal to the query counts as infinitely far."""
    distances = euclidean(q, x)
    return distances.masked_fill(distances < 1e-6, torch.inf)


RETRIEVAL_MISTAKES: Mistakes = {  # q: query_codes, x: database_codes
    "farthest": ("these are the farthest: the smallest distances come first", search_with(far=True)),
    "cosine": (
        "these are nearest by cosine, not by Euclidean distance",
        search_with(distance=lambda q, x: -F.cosine_similarity(q[:, None], x[None], dim=2)),
    ),
    "dot": ("the squared norms are forgotten: this ranks by the inner product", search_with(distance=lambda q, x: -(q @ x.T))),
    "manhattan": (
        "this ranks by the sum of absolute differences",
        search_with(distance=lambda q, x: differences(q, x).abs().sum(2)),
    ),
    "largest-difference": (
        "this ranks by the largest difference",
        search_with(distance=lambda q, x: differences(q, x).abs().amax(2)),
    ),
    "signed": (
        "differences are added up with their signs: square them first",
        *(
            search_with(distance=lambda q, x: differences(q, x).sum(2)),
            search_with(distance=lambda q, x: differences(q, x).sum(2).abs()),
        ),
    ),
    "cross-term": (
        "the square |q - x|^2 = |q|^2 - 2 q x + |x|^2 has a wrong term",
        search_with(distance=lambda q, x: x.square().sum(1) - q @ x.T),
        search_with(distance=lambda q, x: x.square().sum(1) + 2 * q @ x.T),
        search_with(distance=lambda q, x: x.norm(dim=1) - 2 * q @ x.T),
        search_with(distance=lambda q, x: x.square().sum(1) + 0 * (q @ x.T)),
    ),
    "one-unit": (
        "the codes are compared in one unit only; the sum runs over all of them",
        *(search_with(distance=lambda q, x, unit=unit: differences(q, x)[..., unit].abs()) for unit in (0, -1)),
    ),
    "one-query": ("all rows are those of the first query", search_with(output=lambda distances, found: found[:1].expand_as(found))),
    "standardized": (
        "the codes are shifted or scaled before they are compared",
        search_with(sides=lambda q, x: (q / x.std(0), x / x.std(0))),
        search_with(sides=lambda q, x: (q - q.mean(0), x - x.mean(0))),
    ),
    "queries": ("the queries are searched in themselves, not in the database", search_with(sides=lambda q, x: (q, q))),
    "database": ("the database is searched in itself, not for the queries", search_with(sides=lambda q, x: (x, x))),
    "swapped": ("queries and database are swapped", search_with(sides=lambda q, x: (x, q))),
    "skips-first": ("the nearest is left out, but a query is not in the database", search_with(places=lambda k: slice(1, k + 1))),
    "one-less": ("one neighbour is missing: k are asked for", search_with(places=lambda k: slice(0, k - 1))),
    "one-more": ("there is one neighbour too many: k are asked for", search_with(places=lambda k: slice(0, k + 1))),
    "all": ("all places come back: k are asked for", search_with(places=lambda k: slice(None))),
    "excluded": (
        "a place of the database is left out, as if it were the query itself",
        *(search_with(distance=itself_excluded), search_with(distance=copies_excluded)),
    ),
    "one-based": ("the indices count from 1; they count from 0", search_with(output=lambda distances, found: found + 1)),
    "order": (
        "the right neighbours in the wrong order: nearest first",
        *(search_with(order=lambda found: found.flip(1)), search_with(order=lambda found: found.sort(1).values)),
    ),
    "transposed": ("the result is transposed: a row for each query", search_with(output=lambda distances, found: found.T)),
    "ranks": (
        "these are ranks: argsort of argsort tells how near each place is, not which is nearest",
        search_with(output=lambda distances, found: distances.argsort(1).argsort(1)[:, : found.shape[1]]),
    ),
    "distances": (
        "these are distances; return the indices",
        search_with(output=lambda distances, found: distances.gather(1, found)),
        search_with(output=lambda distances, found: distances.gather(1, found).square()),
    ),
}


@verdict
def check_retrieval(fn: Callable[[Tensor, Tensor, int], Tensor]) -> str:
    """Judges retrieval(query_codes, database_codes, k): (Q, L) and (N, L) -> int64 indices (Q, k), nearest first.

    The distance is the Euclidean one; ties may come in any order. The mistakes are in `RETRIEVAL_MISTAKES`, with "own-noise" and "half".
    """
    cases: list[dict[str, Any]] = []
    for q, n, k in ((7, 30, 4), (3, 12, 2), (1, 9, 1), (5, 6, 1), (6, 6, 3)):
        database = torch.randn(n, 3) * torch.linspace(0.3, 2, n)[:, None]
        cases.append({"query_codes": torch.randn(q, 3), "database_codes": database, "k": k})
    queries = torch.cat([cases[0]["database_codes"][[3, 0, 29]], torch.randn(2, 3)])  # three queries that are in the database
    cases.append({"query_codes": queries, "database_codes": cases[0]["database_codes"].clone(), "k": 3})
    praise = judge("retrieval", fn, search_recipe, RETRIEVAL_MISTAKES, cases)
    queries, database = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 2.0]])
    what = "retrieval with ties (1, 2), (5, 2), 5"
    found = tensor_from(what, fn, queries, database, 5)
    check_same(f"{what}, sorted", found.sort(-1).values, torch.arange(5)[None])
    check_same(f"{what}, distances", database[found[0]].norm(dim=1), torch.tensor([1.0, 1.0, 1.0, 2.0, 3.0]))
    order = torch.tensor([3, 2, 5, 1, 4, 0])
    close = torch.tensor([1.0, 0.5]) + order.argsort()[:, None] * torch.tensor([5e-5, 0.0])
    what = "retrieval of codes 5e-5 apart (1, 2), (6, 2), 6"
    if not torch.equal(tensor_from(what, fn, queries, close, 6).flatten(), order):
        fail(f"{what} gives the wrong order: the codes are rounded, as in half precision", "half")
    return praise
