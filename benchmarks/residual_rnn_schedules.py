"""Layer by layer or as a wavefront: which schedule runs a residual LSTM stack faster?

    python -m benchmarks.residual_rnn_schedules [OUT.json]

Layer by layer is what ``rcu_ops.nn.ResidualRNN`` does: the library's LSTM over the whole sequence, once per layer, with
all input products of a layer in one matrix product. A wavefront runs layer l at step k - l in wave k, all layers of a
wave in one batched product: T + L - 1 dependent products instead of L * T, but every wave reads the input weights too,
which layer by layer are read once. Both are checked against each other before they are timed. One thread, processor
time, runs interleaved, median; only the ratio means anything.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from rcu_ops.nn import ResidualRNN
from rcu_ops.progress import Progress

STEPS, SIZE = 25, 1024
DEPTHS, BATCHES = (2, 3, 4), (1, 8, 64)
ROUNDS = 7


def wavefront(stack: ResidualRNN, joined: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """m^L [N,T,H] of a residual LSTM stack; ``joined`` [L,2H,4H] and ``bias`` [L,1,4H] are its weights, rearranged."""
    depth, (n, steps, size) = stack.num_layers, x.shape
    inputs, h, c = (x.new_zeros(depth, n, size) for _ in range(3))
    outputs = []
    for wave in range(steps + depth - 1):
        if wave < steps:
            inputs[0] = x[:, wave]
        low, high = max(0, wave - steps + 1), min(depth, wave + 1)
        gates = torch.baddbmm(bias[low:high], torch.cat([inputs[low:high], h[low:high]], 2), joined[low:high])
        i, f, g, o = gates.chunk(4, 2)
        c[low:high] = f.sigmoid() * c[low:high] + i.sigmoid() * g.tanh()
        h[low:high] = o.sigmoid() * c[low:high].tanh()
        sums = h[low:high] + inputs[low:high]
        if high == depth:
            outputs.append(h[-1].clone())
            sums = sums[:-1]
        inputs[low + 1 : low + 1 + len(sums)] = sums
    return torch.stack(outputs, 1)


def measure(depth: int, batch: int) -> dict[str, float]:
    """Median processor time of both schedules in milliseconds."""
    stack = ResidualRNN(SIZE, num_layers=depth)
    x = torch.randn(batch, STEPS, SIZE)
    joined = torch.stack([torch.cat([each.weight_ih_l0, each.weight_hh_l0], 1).T for each in stack.layers]).contiguous()
    bias = torch.stack([(each.bias_ih_l0 + each.bias_hh_l0)[None] for each in stack.layers])
    forms = {"layers": lambda: stack(x)[0], "wavefront": lambda: wavefront(stack, joined, bias, x)}
    torch.testing.assert_close(forms["wavefront"](), forms["layers"](), atol=1e-4, rtol=1e-4)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(ROUNDS):
        for name, form in forms.items():
            began = time.process_time()
            form()
            times[name].append(1e3 * (time.process_time() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def main(out: str | None = None) -> None:
    """Print the table; write it as JSON to ``out``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode(), Progress(len(DEPTHS) * len(BATCHES), "schedules", "cases") as bar:
        for depth in DEPTHS:
            for batch in BATCHES:
                found = measure(depth, batch)
                rows.append({"depth": depth, "batch": batch, **found, "ratio": found["wavefront"] / found["layers"]})
                bar.update()
    print(f"{'L':>2} {'N':>3} {'layers ms':>10} {'wavefront ms':>13} {'wavefront / layers':>19}")
    for row in rows:
        times = f"{row['layers']:>10.1f} {row['wavefront']:>13.1f} {row['ratio']:>19.2f}"
        print(f"{row['depth']:>2} {row['batch']:>3} {times}")
    if out is not None:
        content = {"steps": STEPS, "size": SIZE, "dtype": "float32", "torch": torch.__version__, "rows": rows}
        Path(out).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:2])
