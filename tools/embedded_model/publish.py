"""Write the trained model as a checkpoint folder in the released layout."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from nvvl.model.vlm import NemotronNanoVL
from nvvl.tools.embedded_model.spec import SPECIAL_TOKENS, make_config

# the state-space parameters stay in float32, which servers keep as they find it
FLOAT32_SUFFIXES = (".A_log", ".D", ".dt_bias")


def publish(model: NemotronNanoVL, tokenizer_file: Path, out: Path) -> None:
    """Write BF16 weights, config, tokenizer and processor files to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    config = make_config()
    tensors = {
        name: tensor.detach()
        .cpu()
        .to(torch.float32 if name.endswith(FLOAT32_SUFFIXES) else torch.bfloat16)
        .contiguous()
        for name, tensor in sorted(model.state_dict().items())
    }
    radio = "vision_model.radio_model."
    for key in ("norm_mean", "norm_std"):
        tensors[f"{radio}input_conditioner.{key}"] = torch.tensor(config[key]).view(3, 1, 1)
    tensors[f"{radio}summary_idxs"] = torch.tensor([0])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    language = config["llm_config"]
    token_ids = {key: language[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = {
        "config.json": config,
        "generation_config.json": {**token_ids, "do_sample": False},
        "preprocessor_config.json": {
            "image_size": config["force_image_size"],
            "max_num_tiles": config["max_num_tiles"],
            "use_thumbnail": config["use_thumbnail"],
            "norm_mean": config["norm_mean"],
            "norm_std": config["norm_std"],
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": SPECIAL_TOKENS[language["eos_token_id"]],
            "pad_token": SPECIAL_TOKENS[language["pad_token_id"]],
            "unk_token": "<unk>",
            "model_max_length": language["max_position_embeddings"],
        },
        "special_tokens_map.json": {
            "bos_token": "<s>",
            "eos_token": SPECIAL_TOKENS[language["eos_token_id"]],
            "pad_token": SPECIAL_TOKENS[language["pad_token_id"]],
            "unk_token": "<unk>",
        },
    }
    for name, content in files.items():
        text = json.dumps(content, indent=2) + "\n"
        (out / name).write_text(text, encoding="utf-8")
    shutil.copyfile(tokenizer_file, out / "tokenizer.json")
    template = Path(__file__).with_name("chat_template.jinja")
    shutil.copyfile(template, out / template.name)
