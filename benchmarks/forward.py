"""Prefill of nvvl against transformers' stock CPU forward, and against the machine's matrix rate.

    python benchmarks/forward.py [--tokens 512] [--threads 2] [--runs 5] [--json]

Both sides run the same random 0.5 B hybrid language model in bfloat16 on the same tokens, in turn,
in one process. The matrix rate is that of a bfloat16 product of the model's largest linear shape;
the fraction counts the floating-point operations of the linear layers alone, over the whole time.
Logits of both sides are compared before anything is timed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import NemotronHConfig, NemotronHForCausalLM

from nvvl.model.config import LanguageConfig
from nvvl.model.vlm import LanguageModel

HALF_BILLION = {
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
    stock = NemotronHForCausalLM(NemotronHConfig(**HALF_BILLION)).to(torch.bfloat16).eval()
    for module in stock.modules():  # clamp time steps as servers do, see nvvl/model/mamba2.py
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    with torch.device("meta"):
        ours = LanguageModel(LanguageConfig.from_dict(HALF_BILLION))
    weights = {
        name.replace("model.", "backbone.", 1) if name.startswith("model.") else name: tensor
        for name, tensor in stock.state_dict().items()
    }
    ours.load_state_dict(weights, assign=True)
    return ours.eval(), stock


def matrix_rate(tokens: int) -> float:
    """Return the machine's bfloat16 matrix rate in FLOP/s at the size of the MLP's linears."""
    linear = nn.Linear(
        HALF_BILLION["hidden_size"], HALF_BILLION["intermediate_size"], bias=False
    ).to(torch.bfloat16)
    x = torch.randn(tokens, linear.in_features, dtype=torch.bfloat16)
    seconds = min(timed(lambda: linear(x)) for _ in range(30))
    return 2 * tokens * linear.weight.numel() / seconds


def timed(call: Callable[[], object]) -> float:
    """Return the wall seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ours, stock = make_pair()
    ids = torch.randint(0, HALF_BILLION["vocab_size"], (1, arguments.tokens))

    def run_ours() -> torch.Tensor:
        hidden, _ = ours.hidden_states(ours.backbone.embeddings(ids))
        return ours.lm_head(hidden)

    def run_stock() -> torch.Tensor:
        return stock(ids, use_cache=False).logits

    with torch.inference_mode():
        error = (run_ours() - run_stock()).float().norm() / run_stock().float().norm()
        pairs = [(timed(run_ours), timed(run_stock)) for _ in range(arguments.runs)]
        rate = matrix_rate(arguments.tokens)
    linears = [m for m in ours.modules() if isinstance(m, nn.Linear)]
    flops = 2 * arguments.tokens * sum(linear.weight.numel() for linear in linears)
    ours_s, stock_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    result = {
        "tokens": arguments.tokens,
        "threads": arguments.threads,
        "relative_logit_difference": float(error),
        "nvvl_tokens_per_s": arguments.tokens / ours_s,
        "transformers_tokens_per_s": arguments.tokens / stock_s,
        "speedup": statistics.median(theirs / own for own, theirs in pairs),
        "matrix_rate_gflops": rate / 1e9,
        "nvvl_fraction_of_matrix_rate": flops / ours_s / rate,
        "transformers_fraction_of_matrix_rate": flops / stock_s / rate,
    }
    if arguments.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:38} {value:.4g}")


if __name__ == "__main__":
    main()
