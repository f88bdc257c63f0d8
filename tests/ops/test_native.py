"""How functions of ``rcu_ops._native`` take their arguments, and what ``help`` shows of them."""

from __future__ import annotations

import inspect
import re

import pytest

from rcu_ops import _library

native = _library.native()
pytestmark = pytest.mark.skipif(native is None, reason="rcu_ops._native is not built")

STRIDES = (64, 1, 16, 4, 1)
FUNCTIONS = [name for name, value in vars(native or re).items() if callable(value)]


def test_arguments_are_given_by_place_or_by_name() -> None:
    assert native.fast_gru_few_weights(8, 4) is native.fast_gru_few_weights(r=4, c=8) is True
    assert native.fast_gru_few_weights(8, r=4) is True
    assert native.fast_gru_panel_vectors(64, 16, 2) == native.fast_gru_panel_vectors(threads=2, columns=64, lanes=16)


def test_defaults_are_what_the_signature_says() -> None:
    short = native.recurrent_conv_gpu_plan([1, 64, 4, 2, 2], "float16", STRIDES, STRIDES)
    assert short == native.recurrent_conv_gpu_plan(
        [1, 64, 4, 2, 2], "float16", STRIDES, STRIDES, None, 0, False, False, False, False, False, False, True, 80, 108
    )
    assert short["read"] == b""
    assert short != native.recurrent_conv_gpu_plan([1, 64, 4, 2, 2], "float16", STRIDES, STRIDES, end=1)


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "why"),
    [
        ("fast_gru_few_weights", (8,), {}, "r is missing"),
        ("fast_gru_few_weights", (), {"r": 8}, "c is missing"),
        ("fast_gru_few_weights", (8, 4, 2), {}, "3 arguments without a name were given"),
        ("fast_gru_few_weights", (8, 4), {"c": 8}, "c was given twice"),
        ("fast_gru_few_weights", (8, 4), {"rows": 8}, "there is no rows"),
        ("fast_gru_few_weights", (8.5, 4), {}, r"c is 8\.5"),
        ("fast_gru_few_weights", ("8", 4), {}, "c is '8'"),
        ("fast_gru_few_weights", (2**63, 4), {}, "c is 9223372036854775808"),
        ("fast_gru_panel_vectors", (64, 16, None), {}, "threads is None"),
        ("fast_gru_by_columns", (8, 8, 4, "float32", 1), {}, "5 arguments without a name were given"),
        ("fast_gru_by_columns", (8, 8, 4, 32), {"threads": 1}, "dtype is 32"),
        ("recurrent_conv_gpu_plan", ((1, 2), "float32", STRIDES, STRIDES), {}, r"shape is \(1, 2\)"),
        ("recurrent_conv_gpu_plan", (5, "float32", STRIDES, STRIDES), {}, "shape is 5"),
        ("recurrent_conv_gpu_weight_grad", (STRIDES, "float32", STRIDES, STRIDES), {"block": (1,)}, r"block is \(1,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(name: str, args: tuple, kwargs: dict, why: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}\(\): incompatible function arguments: {why}\. ") as raised:
        getattr(native, name)(*args, **kwargs)
    assert native.__dict__[name].__doc__.splitlines()[0] in str(raised.value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_shows_the_signature_and_what_a_function_is_for(name: str) -> None:
    signature, empty, *text = inspect.getdoc(getattr(native, name)).splitlines()
    assert re.fullmatch(rf"{name}\(.*\) -> (dict|str|bool|int|list\[str\]|str \| None)", signature)
    assert empty == "" and text[0].endswith(".")
    assert getattr(native, name).__module__ == "rcu_ops._native" and getattr(native, name).__name__ == name


def test_help_shows_types_and_defaults() -> None:
    integer = "typing.SupportsInt | typing.SupportsIndex"
    assert native.fast_gru_by_columns.__doc__.splitlines()[0] == (
        f"fast_gru_by_columns(columns: {integer}, c: {integer}, r: {integer}, dtype: str, *, threads: {integer}, "
        "avx512: bool | None = None) -> bool"
    )
    assert (
        f"shared_bytes: {integer} = 166912, backward: bool = False) -> dict" in native.fast_gru_gpu_columns_plan.__doc__
    )
