"""Every refusal with its sentence, for both public operators: where, rule, finding, way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vision_mamba.ops import (
    BackendError,
    available_backends,
    contract,
    cross_selective_scan,
    selective_scan,
    use_backend,
)
from vision_mamba.ops.call import ScanCall
from vision_mamba.scans import CROSS


def classic(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    arguments = dict(
        u=torch.randn(2, 6, 9),
        delta=torch.rand(2, 6, 9),
        A=-torch.rand(6, 3),
        B=torch.randn(2, 2, 3, 9),
        C=torch.randn(2, 2, 3, 9),
        D=torch.ones(6),
        z=torch.randn(2, 6, 9),
        delta_bias=torch.zeros(6),
        initial_state=torch.zeros(2, 6, 3),
    )
    return arguments | changes


def crossed(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    arguments = dict(
        x=torch.randn(2, 6, 5),
        dt=torch.randn(2, 6, 4, 5),
        A=-torch.rand(4, 5, 3),
        B=torch.randn(2, 6, 4, 3),
        C=torch.randn(2, 6, 4, 3),
        D=torch.ones(4, 5),
        indices=CROSS.indices(2, 3),
        dt_bias=torch.zeros(4, 5),
    )
    return arguments | changes


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape)


CLASSIC = [
    (dict(u=ones(6, 9)), r"u must be \(batch, channels, length\), got 2 dimensions: \(6, 9\)"),
    (dict(u=3.0), r"u must be a tensor, got float"),
    (dict(B=None), r"B must be a tensor, got None"),
    (dict(u=ones(2, 6, 0)), r"u must have at least one channel and one step"),
    (dict(u=torch.ones(2, 6, 9, dtype=torch.int64)), r"u must be float32, .* got int64"),
    (dict(delta=ones(2, 6, 8)), r"delta must be \(batch, channels, length\) = \(2, 6, 9\), got \(2, 6, 8\)"),
    (dict(z=ones(2, 5, 9)), r"z must be .* = \(2, 6, 9\), got \(2, 5, 9\)"),
    (dict(A=ones(6)), r"A must be \(channels, state\), got 1 dimensions"),
    (dict(A=ones(5, 3)), r"A must be \(channels, state\) = \(6, 3\), got \(5, 3\)"),
    (dict(A=ones(6, 0)), r"A must have 1 to 256 states"),
    (dict(A=ones(6, 257)), r"A must have 1 to 256 states"),
    (dict(B=ones(2, 2, 9, 3)), r"B must be .* = \(2, 2, 3, 9\), got \(2, 2, 9, 3\); move the length axis last"),
    (dict(B=ones(2, 9, 3)), r"B must be .* = \(2, 3, 9\), got \(2, 9, 3\); move the length axis last"),
    (dict(C=ones(9)), r"C must be \(batch, state, length\) or .* or \(channels, state\), got 1 dimensions: \(9\)"),
    (dict(C=ones(2, 9)), r"C must be \(channels, state\) = \(6, 3\), got \(2, 9\)"),
    (dict(B=ones(2, 4, 3, 9), C=ones(2, 4, 3, 9)), r"the groups of B must divide the channels of u, got 4 .* 6"),
    (dict(B=ones(2, 1, 3, 9)), r"B and C must have as many groups, got \(2, 1, 3, 9\) and \(2, 2, 3, 9\)"),
    (dict(B=ones(2, 3, 9)), r"B and C must have as many groups"),
    (dict(D=ones(5)), r"D must be \(channels,\) = \(6\), got \(5\)"),
    (dict(delta_bias=ones(6, 1)), r"delta_bias must be \(channels,\) = \(6\), got \(6, 1\)"),
    (dict(initial_state=ones(2, 6, 4)), r"initial_state must be .* = \(2, 6, 3\), got \(2, 6, 4\)"),
    (dict(A=torch.ones(6, 3, dtype=torch.float64)), r"float64 does not mix .* A is float64 beside float32"),
    (dict(delta=torch.ones(2, 6, 9, device="meta")), r"one device, but delta is on meta and the input on cpu"),
    (dict(out_dtype=torch.float64), r"out_dtype must be .* got float64 for float32 input"),
    (dict(out_dtype=torch.int32), r"out_dtype must be .* got int32"),
    (
        dict(A=torch.ones(6, 3, dtype=torch.complex64)),
        r"A must be float32, .* got complex64; complex states are not supported",
    ),
]

CROSSED = [
    (dict(x=ones(6, 5)), r"x must be .* got 2 dimensions"),
    (dict(x="map"), r"x must be a tensor, got str"),
    (dict(dt=None), r"dt must be a tensor, got NoneType"),
    (dict(indices=None), r"indices must be an int32 table"),
    (dict(x=ones(2, 0, 5)), r"at least one token"),
    (dict(x=ones(2, 6, 3, 5)), r"x must be .* = \(2, 6, 4, 5\), got \(2, 6, 3, 5\)"),
    (dict(A=ones(20, 3)), r"A must be \(routes, channels, states\), got 2 dimensions"),
    (dict(A=ones(4, 4, 3)), r"A must be .* = \(4, 5, 3\), got \(4, 4, 3\)"),
    (dict(A=ones(4, 5, 300)), r"A must have 1 to 256 states"),
    (dict(dt=ones(2, 6, 4, 2)), r"dt must be .* got \(2, 6, 4, 2\); pass dt_weight with a low-rank dt"),
    (dict(dt_weight=ones(4, 5, 2)), r"dt must be \(batch, tokens, routes, rank\) = \(2, 6, 4, 2\)"),
    (dict(dt_weight=ones(4, 5)), r"dt_weight must be \(routes, channels, rank\), got 2 dimensions"),
    (dict(dt_weight=ones(4, 6, 2), dt=ones(2, 6, 4, 2)), r"dt_weight must be .* = \(4, 5, 2\), got \(4, 6, 2\)"),
    (dict(dt_weight=ones(4, 5, 0), dt=ones(2, 6, 4, 0)), r"dt_weight must have a rank of at least 1"),
    (dict(B=ones(2, 4, 3, 6)), r"B must be .* got \(2, 4, 3, 6\); move the token axis to place 1"),
    (dict(C=ones(2, 6, 4, 2)), r"C must be .* = \(2, 6, 4, 3\), got \(2, 6, 4, 2\)"),
    (dict(D=ones(20)), r"D must be \(routes, channels\) = \(4, 5\), got \(20\)"),
    (dict(dt_bias=ones(4)), r"dt_bias must be \(routes, channels\) = \(4, 5\), got \(4\)"),
    (dict(indices=CROSS.indices(2, 3).long()), r"indices must be int32, got int64; convert with indices.int\(\)"),
    (dict(indices=CROSS.indices(2, 3)[0]), r"indices must be \(routes, steps\), got 1 dim"),
    (dict(indices=CROSS.indices(2, 3)[:3]), r"indices must be .* = \(4, 6\), got \(3, 6\)"),
    (dict(indices=CROSS.indices(2, 3)[:, :0]), r"indices must have at least one step"),
    (dict(indices=CROSS.indices(2, 4)), r"-1 \(padding\) or a token from 0 to 5, got 6 at route 0, step 6"),
    (dict(indices=CROSS.indices(2, 3) - 2), r"-1 \(padding\) or a token from 0 to 5, got -2 at route 0, step 0"),
    (dict(indices=CROSS.indices(2, 3) // 2), r"at most once, but route 0 visits token 0 2 times"),
    (dict(indices=torch.zeros(4, 6, dtype=torch.int32, device="meta")), r"indices must be on the input's device"),
    (dict(B=torch.ones(2, 6, 4, 3, dtype=torch.float64)), r"float64 does not mix"),
    (dict(out_dtype=torch.float64), r"out_dtype must be"),
    (dict(out_dtype="float32"), r"out_dtype must be .* got 'float32' for float32 input"),
]


@pytest.mark.parametrize(("changes", "sentence"), CLASSIC)
def test_selective_scan_refuses(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"selective_scan: .*" + sentence):
        selective_scan(**classic(**changes))


@pytest.mark.parametrize(("changes", "sentence"), CROSSED)
def test_cross_selective_scan_refuses(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"cross_selective_scan: .*" + sentence):
        cross_selective_scan(**crossed(**changes))


def test_what_is_refused_is_otherwise_accepted() -> None:
    assert selective_scan(**classic()).shape == (2, 6, 9)
    assert cross_selective_scan(**crossed()).shape == (2, 6, 5)


def test_a_table_changed_in_place_is_read_again() -> None:
    table = CROSS.indices(2, 3).clone()
    cross_selective_scan(**crossed(indices=table))
    table[1, 2] = 77
    with pytest.raises(ValueError, match="got 77 at route 1, step 2"):
        cross_selective_scan(**crossed(indices=table))


def test_a_table_made_under_inference_mode_is_taken_and_read_each_time() -> None:
    with torch.inference_mode():
        table = torch.arange(6, dtype=torch.int32).expand(4, 6).contiguous()
        assert cross_selective_scan(**crossed(indices=table)).shape == (2, 6, 5)
        table[1, 2] = 77  # which such a tensor does not count
        with pytest.raises(ValueError, match="got 77 at route 1, step 2"):
            cross_selective_scan(**crossed(indices=table))


def test_whether_a_table_visits_all_is_found_when_it_is_read() -> None:
    def visits_all(indices: torch.Tensor | None) -> bool:
        arguments = crossed(indices=indices)
        return contract.visits_all(ScanCall(**arguments))

    table = CROSS.indices(2, 3).clone()
    assert visits_all(None) and visits_all(table)
    assert visits_all(torch.nn.functional.pad(table, (2, 0), value=-1)) and not visits_all(table[:, 1:])
    table[3, 4] = -1
    assert not visits_all(table)


def test_a_model_calling_the_operator_gets_the_same_sentence() -> None:
    arguments = crossed(B=ones(2, 6, 4, 7))
    names = ("x", "dt", "A", "B", "C", "D", "indices")
    for device in ("cpu", "meta"):
        tensors = [arguments[name].to(device) for name in names]
        with pytest.raises(ValueError, match=r"B must be .* = \(2, 6, 4, 3\), got \(2, 6, 4, 7\)"):
            torch.ops.vision_mamba.cross_selective_scan(*tensors)


def test_a_named_backend_is_obeyed_or_refused() -> None:
    with pytest.raises(BackendError, match=r"backend 'eagre' is unknown, known are .*; did you mean 'eager'"):
        cross_selective_scan(**crossed(), backend="eagre")
    with pytest.raises(BackendError, match="backend 'tpu' is unknown"):
        use_backend("tpu")
    doubles = {n: t.double() if t.is_floating_point() else t for n, t in crossed().items()}
    with pytest.raises(
        BackendError, match=r"backend 'cpu' refuses this call: .*float64.* accept it: eager, reference\."
    ):
        cross_selective_scan(**doubles, backend="cpu")
    with pytest.raises(BackendError, match="backend 'cpu' refuses this call"), use_backend("cpu"):
        cross_selective_scan(**doubles)


def test_use_backend_sets_for_a_block_or_for_good() -> None:
    asked = []

    def ask() -> str:
        from vision_mamba.ops import registry

        asked.append(registry.forced())
        return asked[-1]

    with use_backend("eager"):
        assert ask() == "eager"
        with use_backend("reference"):
            assert ask() == "reference"
        assert ask() == "eager"
    assert ask() is None
    use_backend("reference")
    assert ask() == "reference"
    use_backend(None)
    assert ask() is None


def test_use_backend_is_no_decorator() -> None:
    """It sets when it is made, so that decorating would set it for everything else and for one call alone."""
    with pytest.raises(TypeError, match="not callable"), use_backend(None):

        @use_backend(None)
        def scan() -> None: ...


def test_backward_runs_on_the_backend_that_ran_forward() -> None:
    arguments = crossed()
    x = arguments["x"].requires_grad_()
    with use_backend("reference"):
        y = cross_selective_scan(**arguments)
    y.sum().backward()
    expected, x.grad = x.grad, None
    cross_selective_scan(**arguments).sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_available_backends_names_them_all() -> None:
    table = available_backends("cpu")
    assert list(table)[-2:] == ["eager", "reference"] and "cpu" in table
    assert table["eager"] is None and table["reference"] is None
    assert all(reason is None or reason.endswith(".") for reason in table.values())
    assert available_backends(torch.device("meta"))["cpu"] is not None
