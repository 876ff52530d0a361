"""Prefill of nvvl against transformers' stock CPU forward, and against the machine's matrix rate.

    python benchmarks/forward.py [--tokens 512] [--threads 2] [--rounds 7] [--json]

Both sides run the same random 0.5 B hybrid language model in bfloat16 on the same tokens, in one
process. The matrix rate is that of a product of the model's largest linear shape, in bfloat16 or
float32, whichever this CPU does faster; the fraction counts the floating-point operations of the
linear layers alone, over the whole time.

Every round times nvvl, the matrix product and transformers one after the other. Ratios are taken
within a round and their median is reported, so that slow changes of load fall on both sides of a
ratio. With one thread the clock is that thread's CPU time, which load elsewhere changes little;
with more it is wall time, and waiting for a thread that another process keeps from running can
cost more than the work: look at ``speedup_range`` and ``load_before``. Logits are compared before
anything is timed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import NemotronHConfig, NemotronHForCausalLM

from nvvl.benchmarks.machine import describe_machine
from nvvl.model.config import LanguageConfig
from nvvl.model.products import has_fast_bf16
from nvvl.model.vlm import LanguageModel

HALF_BILLION: dict[str, Any] = {
    "vocab_size": 16384,
    "hidden_size": 2048,
    "hybrid_override_pattern": "M-M-M*-M-M-M*-M-M",
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "eos_token_id": 12,
}


def make_pair() -> tuple[LanguageModel, NemotronHForCausalLM]:
    """Build both models with the same random weights, in bfloat16."""
    torch.manual_seed(0)
    stock = NemotronHForCausalLM(NemotronHConfig(**HALF_BILLION)).bfloat16().eval()
    for module in stock.modules():  # clamp time steps as servers do, see nvvl/model/mamba2.py
        if hasattr(module, "time_step_limit"):
            setattr(module, "time_step_limit", (0.0, float("inf")))  # noqa: B010
    with torch.device("meta"):
        ours = LanguageModel(LanguageConfig.from_dict(HALF_BILLION))
    weights = {
        name.replace("model.", "backbone.", 1) if name.startswith("model.") else name: tensor
        for name, tensor in stock.state_dict().items()
    }
    ours.load_state_dict(weights, assign=True)
    return ours.eval(), stock


def make_matrix_product(tokens: int) -> tuple[Callable[[], object], int]:
    """Return a call that does products of the MLP's shape at the CPU's best rate, and its FLOP."""
    hidden, inner = HALF_BILLION["hidden_size"], HALF_BILLION["intermediate_size"]
    dtype = torch.bfloat16 if has_fast_bf16() else torch.float32
    linear = nn.Linear(hidden, inner, bias=False).to(dtype)
    x = torch.randn(tokens, hidden, dtype=dtype)
    repeats = 10

    def run() -> None:
        for _ in range(repeats):
            linear(x)

    return run, repeats * 2 * tokens * hidden * inner


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of one call: CPU time of one thread, wall time of several."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def measure(tokens: int, rounds: int) -> dict[str, object]:
    """Time both models and the matrix product in turn, see the module docstring."""
    ours, stock = make_pair()
    ids = torch.randint(0, HALF_BILLION["vocab_size"], (1, tokens))
    multiply, multiply_flops = make_matrix_product(tokens)

    def run_ours() -> torch.Tensor:
        hidden, _ = ours.hidden_states(ours.backbone.embeddings(ids))
        return ours.lm_head(hidden)

    def run_stock() -> torch.Tensor:
        return stock(ids, use_cache=False).logits

    with torch.inference_mode():
        expected = run_stock().float()
        error = (run_ours().float() - expected).norm() / expected.norm()
        multiply()
        times = [(timed(run_ours), timed(multiply), timed(run_stock)) for _ in range(rounds)]
    linears = [module for module in ours.modules() if isinstance(module, nn.Linear)]
    flops = 2 * tokens * sum(linear.weight.numel() for linear in linears)
    share = flops / multiply_flops  # matrix products' time x share = the linears at full rate
    ours_s, product_s, stock_s = (statistics.median(side) for side in zip(*times, strict=True))
    speedups = [theirs / own for own, _, theirs in times]
    return {
        "tokens": tokens,
        "rounds": rounds,
        "relative_logit_difference": float(error),
        "nvvl_tokens_per_s": tokens / ours_s,
        "transformers_tokens_per_s": tokens / stock_s,
        "speedup": statistics.median(speedups),
        "speedup_range": [min(speedups), max(speedups)],
        "matrix_rate_gflops": multiply_flops / product_s / 1e9,
        "nvvl_fraction_of_matrix_rate": statistics.median(
            share * product / own for own, product, _ in times
        ),
        "transformers_fraction_of_matrix_rate": statistics.median(
            share * product / theirs for _, product, theirs in times
        ),
    }


def main() -> None:
    """Parse the options, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = "thread CPU time" if torch.get_num_threads() == 1 else "wall time"
    result = describe_machine() | {"clock": clock, "transformers": transformers.__version__}
    result |= measure(arguments.tokens, arguments.rounds)
    if arguments.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:38} {shown(value)}")


def shown(value: object) -> str:
    """Format a figure, a list of figures or a word for the table."""
    if isinstance(value, list):
        return " to ".join(shown(part) for part in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
