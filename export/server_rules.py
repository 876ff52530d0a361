"""Every rule of the serving contract that files can prove, as one list.

vLLM, TensorRT-LLM, SGLang and Edge-LLM each read a quantized Nemotron Nano V2 VL checkpoint in
their own way, and most of them say nothing when a tensor is dropped or a scale is missing. The
rules were read from vLLM 0.33, TensorRT-LLM main, SGLang main and Edge-LLM 0.11; no server is
started here. Each rule is a function of its own:

    C1 to C7, C13, C14  config.json and the files beside it           rules_config.py
    A2                  the rest of config.json is the source's       rules_config.py
    C8 to C12           the two quantization configs                  rules_quant_config.py
    N1 to N8            tensor names and the shard index              rules_names.py
    D1 to D8            dtypes, shapes, scales                        rules_scales.py
    Q1 to Q4            layers that servers fuse                      rules_scales.py
    E1 to E5            exclude patterns as each server matches them  rules_excludes.py

D9 (dequantized values equal the source within the format's error) needs the weights and is proved
by `nvvl.export.value_proof`. Nothing here imports torch, so a plan can be judged before it is run.
"""

from nvvl.export.checks import Check, Rule
from nvvl.export.rules_config import CONFIG_RULES
from nvvl.export.rules_excludes import EXCLUDE_RULES
from nvvl.export.rules_names import NAME_RULES
from nvvl.export.rules_quant_config import QUANT_CONFIG_RULES
from nvvl.export.rules_scales import SCALE_RULES
from nvvl.export.view import CheckpointView

SERVER_RULES: tuple[Rule[CheckpointView], ...] = (
    *CONFIG_RULES,
    *QUANT_CONFIG_RULES,
    *NAME_RULES,
    *SCALE_RULES,
    *EXCLUDE_RULES,
)


def check_server_rules(view: CheckpointView) -> list[Check]:
    """Apply every rule to a checkpoint, in the order of the list above."""
    return [rule(view) for rule in SERVER_RULES]
