"""Laws of remembered baselines: told by the batch's content alone, the oldest forgotten first."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from maskpro_lightning.fit.baseline import BaselineCache, fingerprint

FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
INTEGER = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool]
DTYPES = [*FLOATING, *INTEGER, torch.complex64]


@dataclass
class Graph:
    nodes: Tensor
    name: str = "graph"


class Slots:
    __slots__ = ("nodes",)

    def __init__(self) -> None:
        self.nodes = torch.zeros(1)


class Pair(NamedTuple):
    inputs: Tensor
    labels: Tensor


# --- fingerprints -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_told_by_their_content(dtype: torch.dtype) -> None:
    bits = torch.tensor([[0, 1, 1], [0, 0, 1]])
    tensor = bits.to(dtype)
    one = fingerprint(tensor)
    assert one is not None
    assert fingerprint(tensor.clone()) == one
    assert fingerprint(tensor.T.contiguous().T) == one
    assert fingerprint(torch.stack([bits, bits], dim=-1).to(dtype)[..., 0]) == one
    for place in range(tensor.numel()):
        other = bits.clone()
        other.view(-1)[place] ^= 1
        assert fingerprint(other.to(dtype)) != one
    assert fingerprint(tensor.view(3, 2)) != one
    assert fingerprint(tensor.flatten()) != one


def test_zeros_are_told_by_dtype_and_shape() -> None:
    shapes = [(0,), (0, 3), (3, 0), (), (1,), (4,), (2, 2), (4, 1), (8,)]
    zeros = [torch.zeros(shape).to(dtype) for dtype in DTYPES for shape in shapes]
    assert len({fingerprint(zero) for zero in zeros}) == len(zeros)


A, B = torch.arange(4), torch.arange(4) + 1
BATCHES: list[Any] = [
    *(None, True, False, 1, 0, 1.0, 2, "1", "", b"1", 1j, A, B),
    *([], (), [A], (A,), [[A]], [A, A], [A, B], [B, A], [A, [B]], [[A], B], [[A, B]]),
    *([torch.cat([A, B])], ["a", "b"], ["ab", ""], ["ab"], ["b", "a"], ["a\0", "b"]),
    *({"a": A}, {"b": A}, {"a": B}, {0: A}, {"a": {"a": A}}, {"a": [A]}, {"a": A, "b": B}),
    {"b": B, "a": A},  # a step may go through them in order
    *(Pair(A, B), Pair(B, A), Graph(A), Graph(B), Graph(A, "other"), [Graph(A)]),
]


def test_batches_are_told_by_their_content() -> None:
    fingerprints = [fingerprint(batch) for batch in BATCHES]
    assert None not in fingerprints
    assert fingerprints == [fingerprint(copy.deepcopy(batch)) for batch in BATCHES]
    same = [
        (BATCHES[i], BATCHES[j])
        for i in range(len(BATCHES))
        for j in range(i)
        if fingerprints[i] == fingerprints[j]
    ]
    assert same == []


def test_an_encoding_of_a_tokenizer_is_told_by_its_content() -> None:
    one, same, other = (BatchEncoding({"input_ids": ids}) for ids in (A, A.clone(), B))
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert fingerprint(one) is not None


@pytest.mark.parametrize(
    "thing",
    [
        pytest.param(object(), id="an object"),
        pytest.param({1, 2}, id="a set"),
        pytest.param(iter([A]), id="an iterator"),
        pytest.param(len, id="a function"),
        pytest.param(Slots(), id="an object without __dict__"),
        pytest.param(torch.eye(2).to_sparse(), id="a sparse tensor"),
    ],
)
def test_what_cannot_be_hashed_has_no_fingerprint_wherever_it_hides(thing: object) -> None:
    for batch in (thing, [A, thing], {"a": A, "b": thing}, (1, [thing]), Graph(A, thing)):  # type: ignore[arg-type]
        assert fingerprint(batch) is None


@pytest.mark.parametrize(("one", "other"), [({"a": A}, ["a", A]), ({}, [])], ids=str)
def test_a_mapping_is_no_list(one: Any, other: Any) -> None:
    assert fingerprint(one) != fingerprint(other)


def test_an_object_that_holds_itself_has_no_fingerprint() -> None:
    graph = Graph(A)
    graph.name = graph  # type: ignore[assignment]
    assert fingerprint(graph) is None


def test_a_conjugate_is_told_by_its_content() -> None:
    tensor = torch.tensor([1 + 1j])
    assert fingerprint(tensor.conj()) == fingerprint(torch.tensor([1 - 1j]))


# --- the cache ----------------------------------------------------------------------------------


def remembered(cache: BaselineCache, *keys: str) -> list[float | None]:
    found = [cache.get(key) for key in keys]
    return [None if loss is None else float(loss) for loss in found]


def test_the_baseline_not_seen_for_longest_is_forgotten_first() -> None:
    cache = BaselineCache(size=3)
    for number, key in enumerate("abc"):
        cache.put(key, torch.tensor(float(number)))
    assert remembered(cache, "a", "b", "c", "d") == [0, 1, 2, None]
    assert remembered(cache, "a") == [0]  # now b is the oldest
    cache.put("d", torch.tensor(3.0))
    assert remembered(cache, "a", "b", "c", "d") == [0, None, 2, 3]
    cache.put("e", torch.tensor(4.0))
    assert remembered(cache, "a", "c", "d", "e") == [None, 2, 3, 4]


@pytest.mark.parametrize("size", [0, 1, 5])
def test_no_more_baselines_are_kept_than_asked_for(size: int) -> None:
    cache = BaselineCache(size)
    for number in range(10):
        cache.put(str(number), torch.tensor(float(number)))
        assert len(cache.state_dict()["losses"]) == min(size, number + 1)
    newest = [None] * (10 - size) + [float(number) for number in range(10 - size, 10)]
    assert remembered(cache, *map(str, range(10))) == newest


def test_the_hit_rate_counts_every_lookup() -> None:
    cache = BaselineCache(size=4)
    assert cache.hit_rate == 0
    cache.put("a", torch.tensor(1.0))
    cache.put(None, torch.tensor(2.0))
    answers = [cache.get(key) for key in ("a", "b", None, "a", None)]
    assert [answer is not None for answer in answers] == [True, False, False, True, False]
    assert cache.hit_rate == 2 / 5


def test_baselines_are_numbers_that_survive_a_checkpoint() -> None:
    cache, resumed = BaselineCache(size=2), BaselineCache(size=2)
    for key, loss in {"a": 0.1, "b": 1 / 3}.items():
        cache.put(key, torch.tensor(loss, requires_grad=True))
    kept = cache.get("a")
    assert kept is not None
    assert not kept.requires_grad
    state = cache.state_dict()
    assert {key: type(loss) for key, loss in state["losses"].items()} == {"b": float, "a": float}
    resumed.load_state_dict(state)
    assert resumed.hit_rate == cache.hit_rate == 1
    resumed.put("c", torch.tensor(2.0))  # the order has survived too: b goes first
    assert remembered(resumed, "b", "c") == [None, 2]
    assert resumed.get("a") == kept
