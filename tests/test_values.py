# SPDX-License-Identifier: Apache-2.0
"""Values: compared, hashed and shown by their fields, compiled early or with the first instance."""

from __future__ import annotations

import gc
import threading

import attrs
import pytest

from spanker import collecting
from spanker.values import Value, lazy_frozen, made


def classes() -> tuple[type, type]:
    """A class of its own each time, and one that is derived from it: neither has an instance."""

    @lazy_frozen
    class Base(Value):
        a: int
        b: int = attrs.field(default=2, kw_only=True)

    @lazy_frozen
    class Derived(Base):
        c: tuple[int, ...] = ()

    return Base, Derived


def test_a_lazy_class_is_as_attrs_makes_it() -> None:
    base, derived = classes()
    value = derived(1, (3,), b=4)
    assert (value.a, value.b, value.c) == (1, 4, (3,))
    assert value == derived(1, c=(3,), b=4) != derived(1, (3,))
    assert hash(value) == hash(derived(1, (3,), b=4))
    assert repr(value) == "Derived(a=1, b=4, c=(3,))"
    assert attrs.evolve(value, a=5) == derived(5, (3,), b=4)
    assert attrs.asdict(value) == {"a": 1, "b": 4, "c": (3,)}
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        value.a = 2
    with pytest.raises(TypeError, match="unexpected keyword argument 'd'"):
        derived(1, d=2)
    assert base(1) == base(1, b=2) != value


def test_either_of_two_lazy_classes_may_be_first() -> None:
    base, derived = classes()
    assert base(7).b == 2 and derived(7).c == ()
    base, derived = classes()
    assert derived(7).c == () and base(7).b == 2


def test_fields_of_a_lazy_class_are_there_before_an_instance() -> None:
    _, derived = classes()
    assert not attrs.has(derived)
    assert [field.name for field in attrs.fields(made(derived))] == ["a", "b", "c"]


def test_first_instances_in_many_threads_are_all_whole() -> None:
    for _ in range(20):
        _, derived = classes()
        start, found = threading.Barrier(8), []

        def make(derived: type = derived, start: threading.Barrier = start) -> None:
            start.wait()
            found.append(derived(1, (2,)))  # noqa: B023

        threads = [threading.Thread(target=make) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [derived(1, (2,))] * 8


def test_collecting_is_paused_within_the_block_and_then_as_before() -> None:
    @collecting.paused()
    def inside() -> bool:
        return gc.isenabled()

    assert gc.isenabled()
    assert not inside() and gc.isenabled()
    with pytest.raises(ZeroDivisionError), collecting.paused():
        1 / 0  # noqa: B018
    assert gc.isenabled()
    gc.disable()
    try:
        assert not inside() and not gc.isenabled()
    finally:
        gc.enable()
