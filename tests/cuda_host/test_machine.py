"""The machine itself: warp operations against the layouts of the PTX manual, and the faults that it must report.

The layouts are written down here once more, from the manual ("Matrix Fragments for mma.m16n8k16 / m16n8k8", "ldmatrix",
"stmatrix", "Register Fragments and Shared Memory Matrix Layouts" of wgmma, "Matrix Descriptor Format"), and share
nothing with the machine's.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from tests.cuda_host import harness
from tests.cuda_host.harness import LaunchError, SanitizerReport


def words(values: Tensor) -> Tensor:
    """Pairs of 16-bit values -> 32-bit registers, the first in the lower half."""
    return values.contiguous().view(torch.int32)


@pytest.mark.parametrize(("name", "dtype"), [("mma_bf16", torch.bfloat16), ("mma_f16", torch.float16)])
def test_mma_m16n8k16(machine, name, dtype) -> None:
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    a_registers, b_registers = torch.zeros(32, 4, 2, dtype=dtype), torch.zeros(32, 2, 2, dtype=dtype)
    d = torch.zeros(32, 4)
    for lane in range(32):
        group, in_group = lane >> 2, lane % 4
        for i in range(8):  # a_i, i = 0..7: two in each of four registers
            row = group if i in (0, 1, 4, 5) else group + 8
            column = in_group * 2 + (i & 1) + (8 if i >= 4 else 0)
            a_registers[lane, i // 2, i % 2] = a[row, column]
        for i in range(4):
            row = in_group * 2 + (i & 1) + (8 if i >= 2 else 0)
            b_registers[lane, i // 2, i % 2] = b[row, group]
        for i in range(4):
            d[lane, i] = c[group if i < 2 else group + 8, in_group * 2 + (i & 1)]
    machine.probe(name, words(a_registers), words(b_registers), d)
    want = c.double() + a.double() @ b.double()
    for lane in range(32):
        group, in_group = lane >> 2, lane % 4
        for i in range(4):
            expected = want[group if i < 2 else group + 8, in_group * 2 + (i & 1)].item()
            assert abs(d[lane, i].item() - expected) <= 2**-23 * abs(expected)  # truncation to fp32


def test_mma_m16n8k8_tf32(machine) -> None:
    def tf32(v: Tensor) -> Tensor:
        return (v.view(torch.int32) & ~0x1FFF).view(torch.float32)

    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.randn(16, 8)
    a_registers, b_registers, d = torch.zeros(32, 4), torch.zeros(32, 2), torch.zeros(32, 4)
    for lane in range(32):
        group, in_group = lane >> 2, lane % 4
        for i in range(4):
            a_registers[lane, i] = a[group if i in (0, 2) else group + 8, in_group if i < 2 else in_group + 4]
            d[lane, i] = c[group if i < 2 else group + 8, in_group * 2 + (i & 1)]
        for i in range(2):
            b_registers[lane, i] = b[in_group + 4 * i, group]
    machine.probe("mma_tf32", a_registers, b_registers, d)
    want = c.double() + tf32(a).double() @ tf32(b).double()
    for lane in range(32):
        group, in_group = lane >> 2, lane % 4
        for i in range(4):
            expected = want[group if i < 2 else group + 8, in_group * 2 + (i & 1)].item()
            assert abs(d[lane, i].item() - expected) <= 2**-23 * abs(expected)


def rows_of_tiles(count: int) -> Tensor:
    """Random distinct 16-byte aligned row addresses of ``count`` 8x8 tiles; the other lanes' are out of the way."""
    rows = torch.randperm(256)[:32] * 16
    if count < 4:
        rows[8 * count :] = 4096 - 16
    return rows.to(torch.int32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_load_matrix(machine, count, transposed) -> None:
    memory, rows = torch.randint(0, 2**15, (2048,), dtype=torch.int16), rows_of_tiles(count)
    registers = torch.zeros(32, count, 2, dtype=torch.int16)
    machine.probe(f"load_{count}" + "_transposed" * transposed, memory, rows, registers)
    for i in range(count):
        tile = torch.stack([memory[rows[8 * i + r] // 2 :][:8] for r in range(8)])
        if transposed:
            tile = tile.T
        for lane in range(32):
            assert registers[lane, i, 0] == tile[lane // 4, 2 * (lane % 4)]
            assert registers[lane, i, 1] == tile[lane // 4, 2 * (lane % 4) + 1]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_store_matrix_and_its_substitute(machine, count, transposed, plain) -> None:
    registers = torch.randint(0, 2**15, (32, count, 2), dtype=torch.int16)
    rows = rows_of_tiles(4)
    memory, want = torch.zeros(2048, dtype=torch.int16), torch.zeros(2048, dtype=torch.int16)
    for i in range(count):
        tile = torch.zeros(8, 8, dtype=torch.int16)
        for lane in range(32):
            tile[lane // 4, 2 * (lane % 4)] = registers[lane, i, 0]
            tile[lane // 4, 2 * (lane % 4) + 1] = registers[lane, i, 1]
        if transposed:
            tile = tile.T
        for r in range(8):
            want[rows[8 * i + r] // 2 :][:8] = tile[r]
    machine.probe(f"store_{count}" + "_transposed" * transposed + "_plain" * plain, memory, rows, registers)
    assert torch.equal(memory, want)


@pytest.mark.parametrize("n", [0, 1, 5, 16, 31])
def test_shuffles(machine, n) -> None:
    values, out = torch.randint(-(2**62), 2**62, (32,)), torch.zeros(4, 32, dtype=torch.int64)
    machine.probe("shuffles", values, torch.tensor([n], dtype=torch.int32), out)
    lane = torch.arange(32)
    assert torch.equal(out[0], values[(lane + n) % 32])
    assert torch.equal(out[1], values[lane ^ n])
    assert torch.equal(out[2], values[torch.where(lane >= n, lane - n, lane)])
    assert torch.equal(out[3], values[torch.where(lane + n < 32, lane + n, lane)])


def test_async_copies_land_at_the_wait_and_not_before(machine) -> None:
    source, out = torch.randint(0, 2**30, (3, 32), dtype=torch.int32), torch.zeros(3, 32, dtype=torch.int32)
    machine.probe("async_copies", source, out)
    assert torch.equal(out[0], source[0])  # waited for
    assert (out[1] == -1).all()  # in flight: nothing but poison to be seen
    assert torch.equal(out[2], source[2])


def test_indices_and_sizes(machine) -> None:
    out = torch.zeros(24, 24, 4, dtype=torch.int32)
    machine.probe("indices", out)
    for block in range(24):
        for thread in range(24):
            bx, by, bz = block % 2, block // 2 % 3, block // 6
            tx, ty, tz = thread % 4, thread // 4 % 3, thread // 12
            want = [bx + 10 * by + 100 * bz, tx + 10 * ty + 100 * tz, 2 + 30 + 400, 4 + 30 + 200]
            assert out[block, thread].tolist() == want


def swizzled(address: int, row_bytes: int) -> int:
    """The manual's swizzling modes: 16-byte words XORed within rows of 128, 64 or 32 bytes; 16: none."""
    if row_bytes == 128:  # bits 4-6 with bits 7-9
        return address ^ ((address >> 3) & 0x70)
    if row_bytes == 64:  # bits 4-5 with bits 7-8
        return address ^ ((address >> 3) & 0x30)
    return address ^ ((address >> 3) & 0x10) if row_bytes == 32 else address


def k_major(matrix: Tensor, memory: Tensor, start: int, row_bytes: int, next_rows: int, next_k: int) -> None:
    """Puts ``matrix`` [rows, 16] where a descriptor finds it: 8 rows follow each other, then the next 8."""
    for row in range(matrix.shape[0]):
        for k in range(16):
            address = start + row // 8 * next_rows + row % 8 * row_bytes
            address += k // 8 * next_k + k % 8 * 2 if row_bytes == 16 else 2 * k
            memory[swizzled(address, row_bytes) // 2] = matrix[row, k]


def wgmma_case(columns: int, dtype: torch.dtype, row_bytes: int) -> tuple[Tensor, ...]:
    """a in registers, shared memory, its layout, d in registers; and what d shall be, row by row."""
    a, b, c = torch.randn(64, 16).to(dtype), torch.randn(columns, 16).to(dtype), torch.randn(64, columns)
    next_k = 144 * 8
    next_rows = 8 * row_bytes if row_bytes > 16 else 144  # the next 8 numbers along k behind all rows, in turns
    if row_bytes == 16:
        next_k = 144 * (columns // 8 + 1)
    offset = 32 if row_bytes >= 64 else 0  # a k further on within the swizzle's row
    begin_b, total = 16384, 16384 + max(columns * row_bytes, 2 * next_k + 4096) + 1024
    memory = torch.full((total // 2,), torch.nan, dtype=dtype)
    k_major(a, memory, offset, row_bytes, next_rows, next_k)
    k_major(b, memory, begin_b + offset, row_bytes, next_rows, next_k)
    a_registers, d = torch.zeros(128, 4, 2, dtype=dtype), torch.zeros(128, columns // 2)
    for thread in range(128):
        warp, group, in_group = thread // 32, thread % 32 >> 2, thread % 4
        for i in range(8):
            row = 16 * warp + (group if i in (0, 1, 4, 5) else group + 8)
            a_registers[thread, i // 2, i % 2] = a[row, in_group * 2 + (i & 1) + (8 if i >= 4 else 0)]
        for i in range(columns // 2):
            d[thread, i] = c[wgmma_row(thread, i), wgmma_column(thread, i)]
    layout = torch.tensor([offset, begin_b + offset, next_rows, next_k, total], dtype=torch.int32)
    return words(a_registers), memory.view(torch.int32), layout, d, c.double() + a.double() @ b.double().T


def wgmma_row(thread: int, i: int) -> int:
    return 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)


def wgmma_column(thread: int, i: int) -> int:
    return 8 * (i // 4) + 2 * (thread % 4) + i % 2


@pytest.mark.parametrize(
    ("name", "columns", "dtype", "row_bytes"),
    [
        ("wgmma_256_bf16_registers_128", 256, torch.bfloat16, 128),
        ("wgmma_64_f16_registers_64", 64, torch.float16, 64),
        ("wgmma_128_bf16_shared_32", 128, torch.bfloat16, 32),
        ("wgmma_64_f16_shared_16", 64, torch.float16, 16),
        ("wgmma_64_bf16_registers_16", 64, torch.bfloat16, 16),
        ("wgmma_64_f16_shared_64", 64, torch.float16, 64),
        ("wgmma_64_bf16_shared_128", 64, torch.bfloat16, 128),
    ],
)
def test_wgmma(machine, name, columns, dtype, row_bytes) -> None:
    *arguments, d, want = wgmma_case(columns, dtype, row_bytes)
    machine.device = {"architecture": 90}
    machine.probe(name, *arguments, d)
    for thread in range(128):
        for i in range(columns // 2):
            expected = want[wgmma_row(thread, i), wgmma_column(thread, i)].item()
            assert abs(d[thread, i].item() - expected) <= 2**-23 * abs(expected)


@pytest.mark.parametrize(("mode", "swizzle"), [(0, None), (1, 128), (2, 64), (3, 32)])
def test_matrix_descriptor(machine, mode, swizzle) -> None:
    """The kernels' own code against the manual's table of bits: three 14-bit numbers of 16-byte words and the mode."""
    start, next_rows, next_k, further = 3 * 1024, 8 * (swizzle or 16), 16 if swizzle else 4096, 96
    machine.device = {"architecture": 90}
    bits = torch.zeros(3, dtype=torch.int64)
    machine.probe("descriptor", torch.tensor([start, mode, next_rows, next_k, further], dtype=torch.int32), bits)
    base = bits[2].item()  # of dynamic shared memory
    assert base % 1024 == 0
    for found, address in zip(bits[:2].tolist(), (base + start, base + start + further), strict=True):
        found %= 2**64
        assert found % 2**14 == (address & 0x3FFFF) >> 4
        assert found >> 16 & 0x3FFF == next_k >> 4  # leading dimension; with a swizzle not looked at
        assert found >> 32 & 0x3FFF == next_rows >> 4  # stride dimension
        assert found >> 49 & 7 == 0  # base offset: the swizzle's pattern begins at a multiple of 1024, 512 or 256 bytes
        assert found >> 62 == {None: 0, 128: 1, 64: 2, 32: 3}[swizzle]
        assert found & (3 << 14 | 3 << 30 | 7 << 46 | 0x3FF << 52) == 0


def test_wgmma_is_not_done_before_the_wait(machine) -> None:
    *arguments, d, _ = wgmma_case(64, torch.bfloat16, 128)
    machine.device = {"architecture": 90}
    machine.probe("wgmma_without_wait", *arguments, d)
    assert d.isnan().all()
    with pytest.raises(LaunchError, match="wgmma without a wgmma_fence since the last wait"):
        machine.probe("wgmma_without_fence", *arguments, d)


@pytest.mark.parametrize("name", ["grid_barrier", "grid_barrier_split"])
@pytest.mark.parametrize("sanitizer", ["none", "thread"])
def test_grid_barrier(machine_with, name, sanitizer) -> None:
    machine = machine_with(sanitizer)
    for seed in range(4):
        machine.seed = seed
        counter, numbers, out = (
            torch.full((1,), 3),
            torch.zeros(10, dtype=torch.int32),
            torch.zeros(5, dtype=torch.int32),
        )
        machine.probe(name, counter, numbers, out)
        assert out.tolist() == [5 * 100 * 6 + 4 * 10 + (6 if "split" in name else 0)] * 5
        assert counter.item() == 2 * 4 * 5


def test_cooperative_launches_are_refused_when_they_do_not_fit(machine) -> None:
    machine.device = {"multiprocessors": 3, "shared_bytes": 163 * 1024}
    report = r"16 blocks must run at once, the device holds 15 of 96 threads and 30720 bytes"
    with pytest.raises(LaunchError, match=report):
        machine.probe("one_block_too_many", torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("sanitizer", ["none", "thread", "address"])
def test_clusters(machine_with, size, sanitizer) -> None:
    machine = machine_with(sanitizer)
    machine.device = {"architecture": 90}
    out = torch.zeros(6, 4, dtype=torch.int32)
    machine.probe(f"cluster_of_{size}", out)
    for block in range(6):
        first = block // size * size
        want = [block % size, size, sum(10 + b for b in range(first, first + size)), (block - 1) % size]
        assert out[block].tolist() == want


@pytest.mark.parametrize("sanitizer", ["none", "thread"])
def test_release_and_acquire_order_a_chain_of_blocks(machine_with, sanitizer) -> None:
    machine = machine_with(sanitizer)
    machine.device = {"architecture": 90}
    values, plain = torch.zeros(6, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    machine.probe("chain", values, plain)
    assert plain.tolist() == [1, 2, 3, 4, 5, 6]


def test_tickets_are_drawn_once(machine) -> None:
    ticket, out = torch.zeros(1, dtype=torch.int32), torch.zeros(7, dtype=torch.int32)
    machine.probe("tickets", ticket, out)
    assert sorted(out.tolist()) == list(range(7))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("cluster_of_3", "invalid launch: clusters on an architecture before sm_90"),
        ("cluster_of_4", "6 blocks along x are not whole clusters of 4"),
        (
            "cluster_without_the_last_barrier",
            "exits whose shared memory|memory of a block that has exited",
        ),
        ("mapping_too_early", "before the first cluster barrier"),
        ("mapping_beyond_the_cluster", "the shared memory of block 2 of a cluster of 2"),
        ("cluster_arrive_twice", "arrives twice at a cluster barrier"),
        ("cluster_never_waited", "arrives at a cluster barrier and exits"),
    ],
)
def test_faults_of_clusters_are_reported(machine, name, report, seed) -> None:
    machine.seed, machine.device = seed, {"architecture": 80 if report.endswith("sm_90") else 90}
    with pytest.raises(LaunchError, match=report):
        machine.probe(name, torch.zeros(128, dtype=torch.int32))


def test_a_missing_cluster_barrier_gives_wrong_results(machine) -> None:
    machine.device, wrong = {"architecture": 90}, 0
    for seed in range(8):
        machine.seed, out = seed, torch.zeros(6, 4, dtype=torch.int32)
        with contextlib.suppress(LaunchError):  # that is noticed, too
            machine.probe("cluster_without_a_barrier", out)
        wrong += out[:, 3].tolist() != [2, 0, 1, 2, 0, 1]
    assert wrong == 8


def test_sanitizers_see_an_access_to_an_exited_block(machine_with) -> None:
    out = torch.zeros(128, dtype=torch.int32)
    machine = machine_with("thread")
    machine.device = {"architecture": 90}
    with pytest.raises(SanitizerReport, match="data race"):
        machine.probe("read_after_exit", out)
    machine = machine_with("address", seed=1)  # one under which the other block has exited by then
    machine.device = {"architecture": 90}
    with pytest.raises(SanitizerReport, match="use-after-poison"):
        machine.probe("read_after_exit", out)


@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("grid_barrier_in_a_plain_launch", "a barrier of the whole grid in a launch that is not cooperative"),
        ("group_barrier_of_too_many", "different places: .*32 at group_barrier .*32 exited"),
        ("wait_for_nobody", "different places: .* 1 at wait_until .*thread 5;"),
        ("divergent_barrier", "wait for each other in different places: 40 at block_barrier .* 24 at block_barrier"),
        ("barrier_after_exit", "different places: .*1 exited, the first is thread 7"),
        ("half_a_warp_shuffles", "different places: .*at shuffle_xor .*exited"),
        ("different_operations", "different places: 16 at shuffle_up .* 16 at shuffle_xor"),
        ("partial_warp", "shuffle_xor in a warp of fewer than 32 threads"),
        ("misaligned_copy", "of 8 bytes is not aligned to its size"),
        ("misaligned_row", "thread 13: an address in shared memory is not aligned to 16 bytes"),
        ("row_outside_of_shared_memory", "thread 3: an address outside of the block's shared memory"),
        ("misaligned_rows_of_a_matrix", "a distance in shared memory of 264 bytes, no multiple of 16"),
        ("matrix_at_row_4", "a swizzled matrix whose rows of 8 are not aligned to 512 bytes"),
        ("matrix_every_9_rows", "a swizzled matrix whose rows of 8 are not aligned to 512 bytes"),
        ("copy_outside_shared_memory", "ends outside of shared memory"),
        ("copy_never_awaited", "exits with asynchronous copies in flight"),
        ("too_many_threads", "invalid launch: 1025 threads per block"),
        ("too_much_shared_memory", "invalid launch: 1048576 bytes of shared memory, the device has 166912"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_faults_are_reported_and_do_not_hang(machine, name, report, seed) -> None:
    machine.seed = seed
    source, out = torch.zeros(256, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    with pytest.raises(LaunchError, match=report):
        machine.probe(name, *((source, out) if "copy" in name else (out, source, source[:0])))


def test_a_missing_barrier_gives_wrong_results(machine) -> None:
    want = ((torch.arange(64) + 1) % 64).to(torch.int32)
    wrong = 0
    for seed in range(8):
        machine.seed = seed
        out = torch.zeros(64, dtype=torch.int32)
        machine.probe("barrier", out)
        assert torch.equal(out, want)
        machine.probe("no_barrier", out)
        wrong += not torch.equal(out, want)
    assert wrong == 8


@pytest.mark.parametrize("name", ["no_barrier", "shuffle_is_no_barrier"])
def test_thread_sanitizer_sees_a_missing_barrier(machine_with, name) -> None:
    machine = machine_with("thread")
    out = torch.zeros(64, dtype=torch.int32)
    machine.probe("barrier", out)  # correct: no report
    with pytest.raises(SanitizerReport, match=r"data race.*\n.*\n +#0 .*(neighbours|shuffle_is_no_barrier)"):
        machine.probe(name, out)


def test_thread_sanitizer_sees_a_missing_acquire_and_a_missing_cluster_barrier(machine_with) -> None:
    machine = machine_with("thread")
    machine.device = {"architecture": 90}
    with pytest.raises(SanitizerReport, match=r"data race.*\n.*\n +#0 .*chain_probe"):
        machine.probe("chain_without_order", torch.zeros(6, dtype=torch.int32), torch.zeros(6, dtype=torch.int32))
    with pytest.raises(SanitizerReport, match=r"data race.*\n.*\n +#0 .*cluster_probe"):
        machine.probe("cluster_without_a_barrier", torch.zeros(6, 4, dtype=torch.int32))


def test_misaligned_words_and_accesses_beyond_a_tensor_end_every_run(machine) -> None:
    with pytest.raises(SanitizerReport, match="misaligned address"):
        machine.probe("misaligned_word", torch.zeros(64, dtype=torch.int32))
    out = torch.zeros(64, dtype=torch.int32)
    machine.probe("barrier", out)
    with pytest.raises(SanitizerReport):
        machine.probe("beyond_the_tensor", out)


def test_a_product_and_a_sum_round_once_where_the_processor_can(machine) -> None:
    numbers = torch.randn(4, 64)
    machine.probe("product_and_sum", numbers)
    a, b, c, found = numbers
    once = (a.double() * b.double() + c.double()).float()
    assert torch.equal(found, once if harness.contracted() else a * b + c)
    assert not torch.equal(once, a * b + c)


def test_thread_sanitizer_sees_a_missing_proxy_fence(machine_with) -> None:
    machine = machine_with("thread", device={"architecture": 90})
    *arguments, d, _ = wgmma_case(64, torch.bfloat16, 128)
    machine.probe("wgmma_64_bf16_shared_128", *arguments, d.clone())  # correct: no report
    with pytest.raises(SanitizerReport, match=r"Previous write .*\n +#0 wgmma_probe"):
        machine.probe("wgmma_without_proxy_fence", *arguments, d)


def test_address_sanitizer_sees_the_first_byte_beyond_shared_memory(machine_with) -> None:
    machine = machine_with("address")
    out = torch.zeros(64, dtype=torch.int32)
    machine.probe("barrier", out)
    with pytest.raises(SanitizerReport, match="heap-buffer-overflow"):
        machine.probe("one_past_shared_memory", out)


def test_address_sanitizer_sees_the_first_byte_beyond_a_tensor(machine_with) -> None:
    machine = machine_with("address")
    with pytest.raises(SanitizerReport, match="heap-buffer-overflow"):
        machine.probe("barrier", torch.zeros(63, dtype=torch.int32))
