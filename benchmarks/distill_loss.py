"""Memory and time of the distillation loss over a long sequence and the full vocabulary.

    python benchmarks/distill_loss.py [--tokens 16384] [--vocab 131072] [--hidden 5120]

Forward KL and its gradient from BF16 hidden states of teacher and student, chunked. Prints seconds,
and by how much resident memory rose above what the inputs need; the logits of both sides in FP32
would be 17 GB by default. Exit 1 if it rose by more than ``EXTRA_BYTES``.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch

from nvvl.benchmarks.machine import describe_machine
from nvvl.distill.losses import Positions, chunked_loss

EXTRA_BYTES = 2e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--vocab", type=int, default=131_072)
    parser.add_argument("--hidden", type=int, default=5_120)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    head = torch.randn(arguments.vocab, arguments.hidden, dtype=torch.bfloat16)
    head *= arguments.hidden**-0.5
    theirs = torch.randn(arguments.tokens, arguments.hidden, dtype=torch.bfloat16)
    ours = (theirs + 0.1 * torch.randn_like(theirs)).requires_grad_()
    before = resident_bytes()
    began = time.perf_counter()
    loss = chunked_loss("kl", Positions(ours, head), teacher=Positions(theirs, head))
    loss.backward()
    seconds = time.perf_counter() - began
    extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    whole = 2 * 4 * arguments.tokens * arguments.vocab
    print(describe_machine())
    print(
        f"{arguments.tokens:,} tokens x {arguments.vocab:,} vocabulary x {arguments.hidden:,} "
        f"hidden: KL {loss.item():.4f}, {seconds:.0f} s, {extra / 1e9:.2f} GB beyond the inputs "
        f"(all logits of both sides: {whole / 1e9:.1f} GB)"
    )
    if extra > EXTRA_BYTES:
        sys.exit(f"more than {EXTRA_BYTES / 1e9:.0f} GB")


def resident_bytes() -> int:
    """Return the memory that the process has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
