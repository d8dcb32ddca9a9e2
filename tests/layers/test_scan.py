"""The scan as layers call it: the operator, and the same in plain torch for exporters."""

from __future__ import annotations

import pytest
import torch
from timm.layers import set_exportable
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.tolerances import assert_close
from vision_mamba.layers import SS2D
from vision_mamba.layers.scan import SelectiveScan
from vision_mamba.scans import CROSS

K, D, N, R = 4, 6, 2, 3


def arguments(tokens: int, routes: int = K) -> tuple[Tensor, ...]:
    """x, dt, A, B, C, D, dt_weight, dt_bias."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    columns = [normal(2, tokens, routes, width) for width in (R, N, N)]
    A = -torch.rand(routes, D, N, generator=draw)
    per_channel = normal(routes, D), normal(routes, D, R), normal(routes, D)
    return normal(2, tokens, D), columns[0], A, *columns[1:], *per_channel


def exportable(order: str) -> SelectiveScan:
    with set_exportable(True):
        return SelectiveScan(order)


@pytest.mark.parametrize("order", ["cross", "bidirectional", "local_2", "atrous_2"])
@pytest.mark.parametrize("class_token", [-1, 5])
def test_plain_torch_equals_the_operator(order: str, class_token: int) -> None:
    scan, plain = SelectiveScan(order), exportable(order)
    given = arguments(3 * 5 + (class_token >= 0), routes=2 if order == "bidirectional" else 4)
    assert_close(order, plain(*given, 3, 5, class_token), scan(*given, 3, 5, class_token))


def test_output_type_is_obeyed() -> None:
    x, *rest = arguments(12)
    for scan in (SelectiveScan("cross"), exportable("cross")):
        assert scan(x.bfloat16(), *rest, 3, 4).dtype == torch.bfloat16
        assert scan(x.bfloat16(), *rest, 3, 4, out_dtype=torch.float32).dtype == torch.float32


def test_exporters_meet_no_operator_of_ours() -> None:
    x = torch.randn(1, 5, 3, 16)
    with set_exportable(True):
        plain = SS2D(16).eval()
    usual = SS2D(16).eval()
    usual.load_state_dict(plain.state_dict())
    for model, ours in ((plain, False), (usual, True)):
        exported = torch.export.export(model, (x,))
        traced = torch.jit.trace(model, x, check_trace=False)
        assert any("vision_mamba" in str(node.target) for node in exported.graph.nodes) is ours
        assert any("vision_mamba" in node.kind() for node in traced.inlined_graph.nodes()) is ours
        for result in (exported.module()(x), traced(x)):
            assert_close("exported", result, usual(x))


def test_operations_are_counted_without_gradients() -> None:
    counts = []
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
            SS2D(16)(torch.randn(1, 4, 4, 16))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_an_unknown_order_is_named_when_the_layer_is_made() -> None:
    with pytest.raises(ValueError, match=r"no scan order is named 'crosss'.*did you mean 'cross'"):
        SelectiveScan("crosss")


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("d_conv", [1, 3])
def test_a_transposed_map_swaps_the_routes(gate: bool, d_conv: int) -> None:
    """Row and column routes trade places, and so do the rows and columns of the convolution's kernel."""
    mixer = SS2D(16, d_state=2, ssm_ratio=1.5, gate=gate, d_conv=d_conv)
    x = torch.randn(2, 5, 3, 16)
    with torch.no_grad():
        expected = mixer(x)
        for parameter in (mixer.x_proj_weight, mixer.dt_projs_weight, mixer.dt_projs_bias, mixer.A_logs, mixer.Ds):
            parameter.add_(0.1 * torch.randn(parameter.shape))
        moved = mixer(x)
        for parameter in (mixer.x_proj_weight, mixer.dt_projs_weight, mixer.dt_projs_bias, mixer.A_logs, mixer.Ds):
            routes = parameter.view(4, -1)
            routes.copy_(routes[[1, 0, 3, 2]].clone())
        if isinstance(mixer.conv2d, nn.Conv2d):
            mixer.conv2d.weight.copy_(mixer.conv2d.weight.mT.clone())
        swapped = mixer(x.transpose(1, 2)).transpose(1, 2)
    assert not torch.allclose(moved, expected)
    assert_close("transposed", swapped, moved)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_graphs_hold_the_shared_table(dynamic: bool) -> None:
    """For grids of one size: the very tensor that eager calls read, as an input that is always the same."""
    scan, given, graphs = SelectiveScan("cross"), arguments(15), []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def along(x: Tensor, *rest: Tensor) -> Tensor:
        grid = x.unflatten(1, (3, -1)).shape[1:3]
        return scan(x, *rest, *grid) + scan.visits(x, *grid).sum()

    y = torch.compile(along, fullgraph=True, dynamic=dynamic, backend=compiler)(*given)
    assert torch.equal(y, along(*given))
    (graph,) = graphs
    held = {tensor.data_ptr() for tensor in graph.buffers()}
    asked = [node.target for node in graph.graph.nodes if str(node.target).startswith("vision_mamba.scan_")]
    if dynamic:
        assert not held and len(asked) == 2
    else:
        shared = CROSS.indices(3, 5), CROSS.visits(3, 5)
        assert not asked and held == {tensor.data_ptr() for tensor in shared}


def test_programs_get_tables_of_their_own() -> None:
    """What torch.fx and exporters record may be compiled later, and compilers use an operator's memory again."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scan = SelectiveScan("cross")

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scan.table(x, 3, 5).sum()

    x = torch.zeros(15)
    for graph in (torch.fx.symbolic_trace(Layer()).graph, torch.export.export(Layer(), (x,)).graph):
        (node,) = [n for n in graph.nodes if "scan_indices" in str(n.target)]
        assert True not in node.args
    assert torch.equal(torch.jit.script(Layer())(x), Layer()(x))
