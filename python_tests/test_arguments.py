"""Errors say the name of the function that was called, whatever their class, and stay what they are."""

import pickle
from collections.abc import Iterator

import pytest

from janus_ext.arguments import called, naming
from janus_ext.errors import ArgumentError, DataError


class OfTheirOwn(DataError):
    def __init__(self, path: str, line: int) -> None:
        super().__init__(f"{path} is wrong")
        self.line = line


def test_somebodys_own_error_gets_a_name_in_front() -> None:
    who = "--benchmark mine"
    with pytest.raises(OfTheirOwn, match=f"^{who}: a.csv is wrong$") as found, naming(who):
        raise OfTheirOwn("a.csv", 3)
    assert found.value.line == 3


@called
def outer(images: int) -> Iterator[int]:
    inner(images)
    yield images


@called
def inner(images: int) -> None:
    if images < 1:
        raise ArgumentError(f"images must be positive, got {images}")


def test_the_outermost_function_is_named_also_where_it_computes_as_it_is_asked() -> None:
    assert list(outer(1)) == [1]
    with pytest.raises(ArgumentError, match="^outer: images must be positive, got 0$") as found:
        next(outer(0))
    assert found.value.text == "images must be positive, got 0"
    assert str(pickle.loads(pickle.dumps(found.value))) == str(found.value)  # processes tell each other
    with pytest.raises(ArgumentError, match="^inner: "):
        inner(0)
