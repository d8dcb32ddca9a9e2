"""Run-time compilation without a GPU: every shipped kernel for every architecture, its registers, and the cache."""

from __future__ import annotations

import logging
import os
import re
import stat
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.cases import Case, make_call
from vision_mamba.ops.backends import cuda_kernels as kernels
from vision_mamba.ops.backends import few_cuda, gpu, narrow_cuda, nvrtc, routes_cuda, rows_cuda, sums_cuda

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))

ARCHITECTURES = (80, 90, 100, 120)

#: Bytes of registers that may spill to memory, by kernel, 0 for others; measured, and to be
#: lowered where a change allows it.
SPILLS = dict(
    wide_forward=4,
    wide_flow=4,  # with NVRTC 13.0 for sm_80
    wide_backward=20,
    wave_forward=96,  # none in bfloat16
    wave_backward=76,  # for sm_90 none with NVRTC 13.0, 20 with 13.2
    narrow_backward=128,
    walk_backward=64,
    routes_weigh=8,
    few_backward=64,  # for sm_80; none for sm_90
    conv_backward=16,
)
#: The same where all is float32, with a low rank: with NVRTC 13.2 for sm_80, 52.
SPILLS_FLOAT = SPILLS | dict(wide_backward=56)


def _not_shipped(dtype: str) -> tuple[nvrtc.Specialisation, ...]:
    """What Vim-S, also with step sizes given, and long routes take where they aren't in bfloat16, which is shipped."""
    more = dict(copies=True, add=dtype == "Float", whole=True)
    flows = (kernels._shipped(kernels.forward_tiles(16)[1], rank)._replace(**more) for rank in (0, 24))
    back, types = kernels._many(24, add=dtype == "Float"), (dtype,) * 5
    long = kernels.wave_forward(types, kernels.WaveForward(3, True, True))
    return (
        *(kernels.wide_forward(types, flow) for flow in flows),
        kernels.wide_backward(types, back, dtype, dtype),
        long,
    )


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VISION_MAMBA_CACHE", str(tmp_path / "cache"))
    nvrtc.cache_dir.cache_clear()
    yield tmp_path / "cache"
    nvrtc.cache_dir.cache_clear()


@pytest.mark.parametrize(
    "wanted",
    (
        *(kernels.SHIPPED + few_cuda.SHIPPED + rows_cuda.SHIPPED + routes_cuda.SHIPPED + sums_cuda.SHIPPED),
        *(_not_shipped("Half") + _not_shipped("Float")),
    ),
    ids=lambda s: "-".join((s.name, *dict(s.macros).values())),
)
def test_nvrtc_compiles_every_shipped_kernel(wanted: nvrtc.Specialisation) -> None:
    known = [a for a in ARCHITECTURES if a in nvrtc.known_architectures()]
    with ThreadPoolExecutor(2) as pool:
        built = dict(zip(known, pool.map(lambda a: nvrtc.compile_source(wanted, a), known), strict=True))
    assert 80 in built and 90 in built
    spills = SPILLS_FLOAT if dict(wanted.macros).get("DT_TYPE") == "Float" else SPILLS
    for architecture, (code, report) in built.items():
        assert code[:4] == b"\x7fELF"
        assert re.search(rf"{wanted.name}' for 'sm_{architecture}", report)
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", report))
        assert "spill stores" in report and spilled <= spills.get(wanted.name, 0), f"sm_{architecture}: {spilled} bytes"


def launch_shape(cubin: bytes) -> tuple[int, int]:
    """Threads and bytes of shared memory of a kernel's block, which its object code holds in a variable."""
    (sections_at,), (size, count) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<2H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, sections_at + i * size) for i in range(count)]
    symbols = next(section for section in sections if section[1] == 2)
    names = sections[symbols[6]][4]
    for at in range(symbols[4], symbols[4] + symbols[5], 24):
        name, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", cubin, at)
        if cubin[names + name :].startswith(b"launch_shape\0"):
            return struct.unpack_from("<2i", cubin, sections[section][4] + value)  # type: ignore[return-value]
    raise AssertionError("no launch_shape")


@pytest.mark.parametrize(
    ("states", "rank", "dtype"),
    [(2, 64, "Bfloat"), (4, 48, "Float"), (8, 24, "Float"), (8, 32, "Bfloat"), (8, 64, "Half"), (16, 64, "Float")],
)
def test_nvrtc_blocks_fit_gpus_of_little_shared_memory(states: int, rank: int, dtype: str) -> None:
    """Going back with a low rank, where a block has 99 KiB, as for compute capabilities 8.6, 8.9 and 12.0."""
    tile = kernels.backward_tile(states, 99 * 1024, rank)
    how = kernels._shipped(tile, rank)
    code, _ = nvrtc.compile_source(kernels.wide_backward((dtype,) * 5, how, dtype, dtype), 86)
    threads, shared = launch_shape(code)
    assert threads == 32 * tile.warps and shared <= 99 * 1024


def test_nvrtc_blocks_that_add_up_routes_take_the_shared_memory_that_is_planned() -> None:
    half = ("Bfloat",) * 5
    kinds = ((0, "Bfloat"), (6, "Float"))
    merged = [how._replace(rank=rank, sums=sums) for how in kernels.MERGED for rank, sums in kinds]
    made = [(kernels.walk_merged(half, how, 1), how.shared(half, 64) - how.sums_shared(64)) for how in merged]
    paired = [kernels.Paired(rank, turns) for rank, turns in ((0, 5), (6, 5), (8, 2))]
    made += [(kernels.walk_paired(half, how), how.shared(64) - how.sums_shared(64)) for how in paired]
    for wanted, shared in made:
        assert launch_shape(nvrtc.compile_source(wanted, 90)[0])[1] == shared


MERGE = kernels.merge("Float", "Half", 4)


def test_nvrtc_keeps_what_it_compiled(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = nvrtc.cubin(MERGE, 90)
    monkeypatch.setattr(nvrtc, "compile_source", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.cubin(MERGE, 90) == code
    assert len(list(own_cache.iterdir())) == 1


def test_nvrtc_builds_a_damaged_entry_again(own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    code = nvrtc.cubin(MERGE, 90)
    (entry,) = own_cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING, "vision_mamba"):
        assert nvrtc.cubin(MERGE, 90) == code
    assert "damaged" in caplog.text
    entry.write_bytes(b"")
    assert nvrtc.cubin(MERGE, 90) == code


def test_nvrtc_survives_a_race_for_one_entry(own_cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(lambda _: nvrtc.cubin(MERGE, 80), range(4)))
    assert len(set(codes)) == 1
    (entry,) = own_cache.iterdir()  # no half-written file is left
    assert entry.suffix == ".cubin"


def test_nvrtc_imports_the_compiler_in_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[str] = []

    def importing(name: str) -> object:
        inside.append(name)
        time.sleep(0.01)
        assert inside.pop() == name and not inside
        return sys.modules[name]

    monkeypatch.setattr(nvrtc.importlib, "import_module", importing)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: nvrtc.missing(), range(4))) == [None] * 4


def test_nvrtc_names_entries_by_all_that_decides_them(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "compile_source", lambda wanted, architecture: (b"code", ""))
    nvrtc.cubin(MERGE, 90)
    nvrtc.cubin(MERGE, 80)
    nvrtc.cubin(kernels.merge("Float", "Half", 2), 90)
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: (99, 9))
    nvrtc.cubin(MERGE, 90)
    monkeypatch.setattr(nvrtc, "_sources", lambda: "changed")
    nvrtc.cubin(MERGE, 90)
    assert len(list(own_cache.iterdir())) == 5


def test_nvrtc_works_where_nothing_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "a_file"
    blocked.write_text("")
    blocked.chmod(stat.S_IRUSR)
    monkeypatch.setenv("VISION_MAMBA_CACHE", str(blocked / "cache"))
    nvrtc.cache_dir.cache_clear()
    with caplog.at_level(logging.WARNING, "vision_mamba"):
        first = nvrtc.cubin(MERGE, 90)
        assert nvrtc.cubin(MERGE, 90) == first
    assert caplog.text.count("set VISION_MAMBA_CACHE") == 1
    spare = nvrtc.cache_dir()
    assert stat.S_IMODE(os.stat(spare).st_mode) == 0o700
    nvrtc.cache_dir.cache_clear()


@pytest.mark.parametrize("of_caches", ["", "relative"])
def test_nvrtc_makes_no_cache_of_a_tilde(of_caches: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a user has no home, as in containers run under a number, and where XDG_CACHE_HOME is to be passed over."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VISION_MAMBA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", of_caches)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    _, obstacle = nvrtc.cache_wanted()
    assert "no home directory" in obstacle and "set VISION_MAMBA_CACHE" in obstacle
    assert not list(tmp_path.iterdir())


def test_nvrtc_shares_entries_as_other_files_are(own_cache: Path) -> None:
    """A cache that several users name is of use to all of them."""
    before = os.umask(0o022)
    try:
        nvrtc.cubin(MERGE, 90)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(entry.stat().st_mode) for entry in own_cache.iterdir()] == [0o644]


def test_nvrtc_error_names_the_kernel() -> None:
    with pytest.raises(RuntimeError, match=r"narrow_forward.*does not compile for sm_90"):
        nvrtc.compile_source(nvrtc.Specialisation("narrow_forward", (("X_TYPE", "Bfloat"),)), 90)


def test_nvrtc_parameters_are_read_from_the_source() -> None:
    names = nvrtc.field_names("params.cuh")
    assert names[0] == "x" and names[-1] == "dC_n" and len(set(names)) == len(names)


@pytest.mark.parametrize("states", [1, 2, 3, 5, 16, 17, 64, 100, 128, 129, 256])
def test_lanes_hold_every_state(states: int) -> None:
    for slots, per_lane in ((2, 4), (2, 8), (1, 4), (1, 2)):
        shape = kernels.wide_shape(states, slots, per_lane)
        assert shape.lanes * shape.states >= states and shape.lanes <= 32 and shape.channels >= 2


@pytest.mark.parametrize("steps", [1, 27, 28, 29, 196, 784, 3136, 6085, 100_000])
@pytest.mark.parametrize("most", [4, 8, 16])
def test_chunks_cover_a_route(steps: int, most: int) -> None:
    warps, chunks = kernels.narrow_chunk(steps, most)
    assert 1 <= warps <= most
    chunk = 8 * kernels.narrow_segment(steps) * warps
    assert chunk * (chunks - 1) < steps <= chunk * chunks


@pytest.mark.parametrize("steps", [1, 49, 95, 96, 197, 6085, 100_000])
@pytest.mark.parametrize("blocks", [0, 1, 24, 96, 132, 1000])
@pytest.mark.parametrize("shorter", [False, True])
def test_segments_cover_a_route(steps: int, blocks: int, shorter: bool) -> None:
    tiles = (steps + kernels.CHECKPOINT - 1) // kernels.CHECKPOINT
    segments, each = kernels.wide_segments(steps, blocks, 528, shorter)
    less = each // kernels.FIRST_LESS if shorter and segments > 1 else 0
    assert each * (segments - 1) - less < tiles <= each * segments - less
    assert segments == 1 or 2 < segments <= 528 // max(blocks, 1)


def test_routes_are_added_up_where_a_block_holds_their_sums() -> None:
    half, mixed, full = ("Bfloat",) * 5, ("Half",) * 5, ("Float",) * 5
    shared = 227 * 1024
    for side, channels in ((56, 96), (28, 192), (14, 384), (7, 768)):
        for rank in (0, channels // 16):
            how = kernels.merged(half, side * side, 4, channels, rank, shared)
            assert how is not None and how.shared(half, side * side) <= shared
            assert how.blocks(half, side * side, shared) >= 1 and channels % (32 * how.run) == 0
    assert kernels.merged(half, 64 * 64, 4, 96, 0, shared) is None  # the map is too large
    assert kernels.merged(full, 56 * 56, 4, 96, 0, shared) is None
    assert kernels.merged(half, 49, 9, 96, 0, shared) is None  # more routes than a block has barriers for
    for types, routes in ((mixed, 4), (full, 4), (half, 8)):  # too few digits, or digits that are asked for
        how = kernels.merged(types, 49, routes, 128, 0, shared)
        assert how is not None and how.sums == "Float"


def test_two_routes_share_a_warp_where_their_types_and_sums_fit() -> None:
    half, shared = ("Bfloat",) * 5, 227 * 1024
    for rank in (0, 2, 8):
        how = kernels.paired(half, 56 * 56, 4, rank, shared)
        assert how is not None and how.shared(56 * 56) <= shared
    for tokens, routes, rank in ((64 * 64, 4, 0), (28 * 28, 4, 0), (56 * 56, 2, 0), (56 * 56, 4, 10)):
        assert kernels.paired(half, tokens, routes, rank, shared) is None
    for at in (0, 1, 4):
        other = (*half[:at], "Float", *half[at + 1 :])
        assert kernels.paired(other, 56 * 56, 4, 0, shared) is None
    assert kernels.paired(("Bfloat", "Half", *half[2:]), 56 * 56, 4, 0, shared) is not None
    assert kernels.paired(("Bfloat", "Half", *half[2:]), 56 * 56, 4, 6, shared) is None  # its products are in bfloat16


@pytest.mark.parametrize(("side", "name", "sums"), [(38, "walk_merged", "Float"), (40, "walk_paired", None)])
def test_sums_are_no_shorter_for_two_routes_a_warp(
    side: int, name: str, sums: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "capability", lambda _: (9, 0))
    monkeypatch.setattr(gpu, "multiprocessors", lambda _: 3)
    monkeypatch.setattr(nvrtc, "shared_limit", lambda _: 227 * 1024)
    monkeypatch.setattr(nvrtc, "kernel", lambda wanted, _: wanted)
    half = (torch.bfloat16,) * 4
    call = make_call(Case(channels=96, states=1, batch=2, order="cross", grid=(side, side), dtypes=half))
    plan = narrow_cuda._plan_merged(call, call.new_output(), 0)
    assert plan is not None and plan.scan.kernel.name == name
    assert dict(plan.scan.kernel.macros).get("SUM_TYPE") == sums


@pytest.mark.parametrize(("blocks", "filled"), [(384, True), (264, True), (133, False), (1, False), (0, True)])
def test_blocks_fill_a_device(blocks: int, filled: bool) -> None:
    assert kernels.fills(blocks, 132) == filled


@pytest.mark.parametrize("batch", [1, 3, 8, 128])
@pytest.mark.parametrize("warps", [12, 512, 12_288])
def test_batch_in_turn_keeps_the_device_as_busy(batch: int, warps: int) -> None:
    items = kernels.walk_items(batch, batch * warps, 1056)
    assert batch % items == 0
    waves = -(-batch * warps // items // 1056)
    assert waves * items <= -(-batch * warps // 1056)
