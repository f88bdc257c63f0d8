from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcu_ops.analysis import layer_spectrum, recurrent_spectra
from rcu_ops.analysis.spectrum import natural_order, recurrent_weights


def test_by_hand():
    # Rotation by 90 degrees times 2: eigenvalues +2i and -2i, real part 0, modulus 2.
    s = layer_spectrum("turn", [[0.0, -2.0], [2.0, 0.0]])
    assert s.eigenvalues.tolist() == pytest.approx([2j, -2j])
    assert s.modulus.tolist() == pytest.approx([2.0, 2.0])
    assert s.spectral_radius == pytest.approx(2.0)
    assert (s.entries_mean, s.diagonal_mean, s.diagonal_std) == (0.0, 0.0, 0.0)
    assert s.entries_std == pytest.approx(math.sqrt(2))


def test_the_identity_of_initialisation():
    s = layer_spectrum("eye", torch.eye(8).reshape(8, 8, 1, 1, 1).bfloat16())
    assert s.channels == 8
    assert (s.eigenvalues == 1).all()
    assert s.entries_mean == pytest.approx(1 / 8)
    assert s.entries_std == pytest.approx(math.sqrt(1 / 8 - 1 / 64))
    assert (s.diagonal_mean, s.diagonal_std) == (1.0, 0.0)


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_trace_and_determinant(channels, seed):
    matrix = np.random.default_rng(seed).normal(size=(channels, channels))
    s = layer_spectrum("layer", matrix)
    assert s.eigenvalues.sum() == pytest.approx(np.trace(matrix), abs=1e-9)
    assert s.eigenvalues.prod() == pytest.approx(np.linalg.det(matrix), rel=1e-8, abs=1e-8)
    assert s.diagonal_mean * channels == pytest.approx(np.trace(matrix))
    assert (np.diff(s.modulus) <= 1e-9).all()
    assert s.modulus.max() <= np.linalg.norm(matrix, 2) + 1e-9


class _Recurrent(torch.nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight_hh = torch.nn.Parameter(torch.randn(channels, channels))


def test_modules_and_state_dicts_agree():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        _Recurrent(3), torch.nn.Conv2d(3, 4, 1), torch.nn.Sequential(_Recurrent(4), _Recurrent(2))
    )
    from_module, from_state = recurrent_spectra(model), recurrent_spectra(model.state_dict())
    assert [s.name for s in from_module] == [s.name for s in from_state] == ["0", "2.0", "2.1"]
    for a, b in zip(from_module, from_state, strict=True):
        assert (a.eigenvalues == b.eigenvalues).all()


def test_wrapped_keys_lose_their_prefix():
    state = {
        "module.layer1.weight_hh": torch.eye(2),
        "module.layer1.my_weight_hh": torch.eye(2),
        "weight_hh": torch.eye(1),
    }
    assert [name for name, _ in recurrent_weights(state)] == ["layer1", "weight_hh"]
    assert recurrent_weights(_Recurrent(2))[0][0] == "_Recurrent"


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (np.zeros((2, 3)), ValueError, r"layer: expected a square matrix \[C, C\], got shape \[2, 3\]"),
        (np.zeros((2, 2, 3)), ValueError, "expected a square matrix"),
        (np.zeros(4), ValueError, "expected a square matrix"),
        (np.zeros((0, 0)), ValueError, "expected a square matrix"),
        (np.full((2, 2), np.inf), ValueError, "layer: expected finite numbers"),
        (np.zeros((2, 2), dtype=complex), TypeError, "layer: expected real numbers"),
    ],
)
def test_unusable_weights(weight, error, message):
    with pytest.raises(error, match=message):
        layer_spectrum("layer", weight)


def test_a_network_without_recurrence_is_refused():
    for source in (torch.nn.Conv2d(1, 1, 1), {"weight": torch.eye(2)}):
        with pytest.raises(ValueError, match="no recurrent layer found"):
            recurrent_spectra(source)


def test_order_from_names():
    names = ["layer10.0.conv1", "layer2.1.conv1", "layer2.0.conv2", "stem.conv", "layer2.0.conv1"]
    expected = ["stem.conv", "layer2.0.conv1", "layer2.0.conv2", "layer2.1.conv1", "layer10.0.conv1"]
    assert natural_order(names) == expected
    assert natural_order(["2.a", "10.a", "conv1", "b"]) == ["conv1", "2.a", "10.a", "b"]
