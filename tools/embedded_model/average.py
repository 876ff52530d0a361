"""Average trained models into one, weight by weight.

    python -m nvvl.tools.embedded_model.average OUT MODEL MODEL...

Models that were trained from the same one, not far apart, lie in one valley of the loss, and their
mean deeper in it than each of them (Wortsman et al., *Model soups*, 2022).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from nvvl.model.load import load_model
from nvvl.tools.embedded_model.publish import publish


def average(folders: Sequence[Path], out: Path) -> None:
    """Write the mean of some models, in the layout `publish` writes.

    Args:
        folders: Models of one config and tokenizer.
        out: Folder that receives the mean.
    """
    first, *others = (load_model(folder, dtype=torch.float32) for folder in folders)
    theirs = [dict(other.named_parameters()) for other in others]
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            every: list[torch.Tensor] = [parameter, *(model[name] for model in theirs)]
            parameter.copy_(torch.stack(every).mean(0))
    publish(first, folders[0] / "tokenizer.json", out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder that receives the model")
    parser.add_argument("models", type=Path, nargs="+", help="folders of trained models")
    arguments = parser.parse_args()
    average(arguments.models, arguments.out)


if __name__ == "__main__":
    main()
