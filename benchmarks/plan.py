"""Prints the plan of docs/guides/scale.md: strategy, memory, network and speed for 1 to 1,024 GPUs. Arithmetic only.

    python -m benchmarks.plan

P parameters, of which the matrices of blocks and head make 6 FLOPs per weight and token; L layers, C channels, D GPUs.
bf16-mixed, Adam, 1,024 tokens a sequence.
"""

import argparse
import itertools
from dataclasses import dataclass

VOCABULARY, CTX_LEN = 50_277, 1024

# Bytes for each token of a micro-batch, as training/memory.py measures them on the blocks that a GPU runs: for each
# channel of a block, for each channel apart from the blocks, and for each logit. A test compares them.
BLOCK, REST, LOGIT = 64.6, 46.0, 6.0
# The same with activation checkpointing.
CHECKPOINTED_BLOCK, CHECKPOINTED_REST = 4.0, 171.0
# Bytes for each parameter: the weight, its gradient and Adam's two moments. A copy of a matrix in bfloat16 has 2 more.
FIXED, COPY = 16, 2

# Published, not measured here: an H100 SXM has 80 GB and 989 TFLOP/s in dense bfloat16, and in a DGX H100 each sends
# 450 GB/s to the seven others, and 50 GB/s (400 Gbit/s) to other machines.
GPU_MEMORY, PEAK_FLOPS = 80e9, 989e12
GPUS_OF_A_MACHINE, NVLINK, INFINIBAND = 8, 450e9, 50e9
# Assumed: the share of the peak that training reaches, and the share of the memory that the plan may fill.
UTILISATION, FILL = 0.4, 0.8

ROWS_OF_ONE_MICRO_BATCH = (16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Size:
    """A model by its layers L and channels C."""

    name: str
    n_layer: int
    n_embd: int

    @property
    def block(self) -> int:
        """Parameters of a block: 13 C^2 in its matrices, 11 C in its vectors."""
        return 13 * self.n_embd**2 + 11 * self.n_embd

    @property
    def outside(self) -> int:
        """Parameters of embedding and head, and of three norms."""
        return 2 * VOCABULARY * self.n_embd + 4 * self.n_embd

    @property
    def parameters(self) -> int:
        return self.n_layer * self.block + self.outside

    @property
    def flops_per_token(self) -> int:
        return 6 * (13 * self.n_layer * self.n_embd**2 + VOCABULARY * self.n_embd)


SIZES = (Size("169M", 12, 768), Size("1.5B", 24, 2048), Size("7B", 32, 4096))
# GPUs, and the sequences of one optimizer step.
SCALES = ((1, 512), (8, 512), (64, 1024), (1024, 4096))


def memory(size: Size, n_gpus: int, rows: int, accumulate: int, strategy: str, checkpointing: bool) -> float:
    """Bytes on one GPU for micro-batches of `rows` sequences."""
    block, rest = (CHECKPOINTED_BLOCK, CHECKPOINTED_REST) if checkpointing else (BLOCK, REST)
    per_token = (block * size.n_layer + rest) * size.n_embd + LOGIT * VOCABULARY
    # Checkpointed blocks keep their copies only while they are recomputed.
    copied = size.outside // 2 + (2 if checkpointing or strategy == "fsdp" else size.n_layer) * size.block
    fixed: float = FIXED * size.parameters + COPY * copied
    if strategy == "fsdp":
        # Besides the parts: weights and gradients of the embedding, the head and two blocks. If micro-batches
        # accumulate, all gradients are whole.
        in_use = size.outside + 2 * size.block
        whole = 4 * in_use + 4 * (size.parameters if accumulate > 1 else in_use)
        fixed = FIXED * size.parameters / n_gpus + whole + COPY * copied
    return fixed + per_token * rows * CTX_LEN


def network(size: Size, n_gpus: int, strategy: str, accumulate: int) -> float:
    """Bytes that each GPU sends in one optimizer step, float32.

    DDP sums the gradients in a ring: twice all of them but its own part. FSDP collects the weights in each forward and
    each backward pass, and adds up the parts of the gradients once.
    """
    part = 4 * size.parameters * (n_gpus - 1) / n_gpus
    return part * (2 if strategy == "ddp" else 2 * accumulate + 1) if n_gpus > 1 else 0


def plan(size: Size, n_gpus: int, batch: int) -> list[str]:
    """One row of the table: of the strategies and micro-batches that fit, the fastest."""
    each = batch // n_gpus
    strategies = ("ddp", "fsdp") if n_gpus > 1 else ("default",)
    found: list[tuple[float, list[str]]] = []
    for strategy, checkpointing, rows in itertools.product(strategies, (False, True), ROWS_OF_ONE_MICRO_BATCH):
        accumulate, left = divmod(each, rows)
        needed = memory(size, n_gpus, rows, accumulate, strategy, checkpointing)
        if left or needed > FILL * GPU_MEMORY:
            continue
        sent = network(size, n_gpus, strategy, accumulate)
        work = size.flops_per_token * (4 / 3 if checkpointing else 1)
        compute = each * CTX_LEN * work / (UTILISATION * PEAK_FLOPS)
        wire = sent / (NVLINK if n_gpus <= GPUS_OF_A_MACHINE else INFINIBAND)
        speed = batch * CTX_LEN / max(compute, wire)
        row = [f"{n_gpus:,}", strategy + (", checkpointing" if checkpointing else ""), f"{batch:,}"]
        row += [f"{rows} x {accumulate}", f"{needed / 1e9:.0f} GB", f"{sent / 1e9:.1f} GB"]
        found.append((speed, [*row, f"{compute:.2f} s", f"{wire:.2f} s", _two_digits(speed)]))
    if found:
        return max(found, key=lambda each: each[0])[1]
    least = memory(size, n_gpus, 1, 1, strategies[-1], True) / 1e9
    return [f"{n_gpus:,}", "does not fit", f"{batch:,}", "", f"{least:.0f} GB", "", "", "", ""]


def _two_digits(number: float) -> str:
    digits = len(str(int(number))) - 2
    return f"{round(number, -digits):,.0f}"


TITLES = ("GPUs", "trainer=", "batch", "micro-batches", "memory", "sent", "compute", "network", "tokens/s")


def table() -> str:
    """The tables in Markdown."""
    lines = []
    for size in SIZES:
        lines += [
            f"{size.name}: {size.n_layer} x {size.n_embd:,}, {size.parameters / 1e6:,.0f} million parameters, "
            f"{size.flops_per_token / 1e9:.1f} GFLOP a token:",
            "",
            "| " + " | ".join(TITLES) + " |",
            "|" + "---|" * len(TITLES),
            *("| " + " | ".join(plan(size, *scale)) + " |" for scale in SCALES),
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(prog="benchmarks.plan", description=__doc__).parse_args()
    print(table(), end="")


if __name__ == "__main__":
    main()
