"""Where in the network quantization noise enters, and what it does to the output.

Three curves over the layers of the language model, on the tokens of real questions:

`sqnr_db`     signal to noise of the hidden states behind each layer: how far the quantized model
              has drifted there from its BF16 source, noise of all layers before included.
`kl_through`  KL of the output when the layers up to this one are quantized and the rest is not. It
              starts at the first layer's share and ends at that of the whole model.
`kl_alone`    KL of the output when this layer alone is quantized, which ranks layers better than
              SQNR does (arXiv 2604.13440).

KL is KL(BF16 || model) in nats at the tokens of the true answers, averaged over an answer's tokens
and over answers. Work grows with the square of the number of layers.

Shapes: B questions, T tokens, N answer tokens of the batch, H hidden.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

import nvvl
from nvvl.calib_data.items import Item
from nvvl.errors import DataError
from nvvl.model.processor import Processor
from nvvl.model.vlm import NemotronNanoVL
from nvvl.progress import Progress
from nvvl.quantize.load import load_any
from nvvl.reports.compare import bootstrap_intervals
from nvvl.reports.curves import (
    Depth,
    LayerNoise,
    make_curves_folder,
    require_replaceable,
    write_curves,
)
from nvvl.reports.metrics import logit_divergence
from nvvl.reports.question import (
    Encoded,
    Question,
    collate_ids,
    encode_questions,
    join_features,
    prepare_question,
)
from nvvl.reports.run import fingerprint
from nvvl.reports.suites import Suite, require_items
from nvvl.reports.teacher import require_bf16

_BATCHES_PER_WINDOW = 8


@dataclass
class _Sums:
    """Energy of signal and noise behind each layer."""

    signal: list[float]
    noise: list[float]


def measure_depth(
    candidates: Mapping[str, Path],
    reference: Path,
    out: Path,
    suites: Sequence[Suite],
    *,
    num_items: int = 64,
    batch_size: int = 16,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Depth:
    """Measure the curves of each model and write ``depth.json``.

    Args:
        candidates: folder of each model, by label.
        reference: the BF16 model they were made from.
        out: folder to write to, made if needed.
        suites: where the questions come from.
        num_items: questions of each suite.
        batch_size: questions run at a time.
        seed: of the questions.
        device: where the models run.
        dtype: of their computation.
        overwrite: replace curves of other models, suites or settings.
        progress: called after each batch.

    Raises:
        DataError: if a suite has fewer items, or a model has other layers than the reference, or
            another basis.
        OutputError: if the file cannot be written, or holds curves of other models, suites or
            settings.
        ConfigError, CheckpointError: if a model cannot be loaded, or the reference is quantized.
    """
    require_items(suites, num_items)
    make_curves_folder("depth", out)
    require_bf16(reference)
    model_sha256 = {label: fingerprint(folder) for label, folder in candidates.items()}
    planned = Depth(
        suites=tuple(suite.name for suite in suites),
        num_items=num_items,
        seed=seed,
        dtype=str(dtype).removeprefix("torch."),
        layers=dict.fromkeys(candidates, ()),
        nvvl_version=nvvl.__version__,
        model_sha256=model_sha256,
        reference_sha256=fingerprint(reference),
    )
    require_replaceable(planned.plan, out, overwrite=overwrite)
    source = load_any(reference, dtype=dtype, device=device)
    processor = Processor.from_folder(reference)
    layers = {}
    for label, folder in candidates.items():
        model = load_any(folder, dtype=dtype, device=device)
        if model.config.language.layers != source.config.language.layers:
            raise DataError(f"{folder}: has other layers than {reference}; give its own source")
        if not _same_basis(source, model):
            raise DataError(
                f"{folder}: has other embeddings than {reference}, so its hidden states cannot be "
                "compared; give the BF16 model it was made from (nvvl rotate makes another)"
            )
        curves = _Curves(source, model)
        items = (item for suite in suites for item in suite.items(num_items, seed=seed))
        num_done, num_all = 0, len(suites) * num_items
        size = min(num_all, _BATCHES_PER_WINDOW * batch_size)
        for part in _batches(items, processor, batch_size, size):
            curves.add(encode_questions(source, part))
            num_done += len(part)
            if progress is not None:
                progress(f"depth of {label}", num_done, num_all)
        layers[label] = curves.finish()
    depth = replace(planned, layers=layers)
    write_curves(depth, out)
    return depth


def _batches(
    items: Iterator[Item], processor: Processor, batch_size: int, window_size: int
) -> Iterator[list[Question]]:
    """Yield questions of about one length together; a window of them is in memory at a time."""
    questions = (prepare_question(item, processor) for item in items)
    while window := list(islice(questions, window_size)):
        window.sort(key=lambda question: len(question.answered.input_ids))
        for start in range(0, len(window), batch_size):
            yield window[start : start + batch_size]


def _same_basis(*models: NemotronNanoVL) -> bool:
    """Whether embeddings differ by less than training moves them, far less than a rotation does."""
    first, second = (m.language_model.backbone.embeddings.weight.float() for m in models)
    return bool((first - second).norm() < 0.5 * second.norm())


class _Curves:
    """Gathers the curves of one model over batches of questions."""

    def __init__(self, source: NemotronNanoVL, model: NemotronNanoVL) -> None:
        self.source, self.model = source, model
        num_layers = len(source.language_model.backbone.layers)
        self.energy = _Sums([0.0] * num_layers, [0.0] * num_layers)
        self.through: list[list[float]] = [[] for _ in range(num_layers)]
        self.alone: list[list[float]] = [[] for _ in range(num_layers)]

    @torch.inference_mode()
    def add(self, questions: Sequence[Encoded]) -> None:
        """Run both models over a batch of questions with their true answers."""
        batch = collate_ids(
            [torch.cat([q.prompt_ids, q.answer_ids]) for q in questions],
            self.source.config.language.pad_token_id,
        )
        device = self.source.language_model.backbone.embeddings.weight.device
        real = batch.padding_mask.to(device)
        mask = None if bool(real.all()) else real
        exact = self.source.embed(batch.input_ids.to(device), join_features(questions))
        noisy = exact
        counts = [len(question.answer_ids) for question in questions]
        before = []
        for layer in self._layers(self.source):
            before.append(exact)
            exact, _ = layer(exact, padding_mask=mask)
        teacher_logits = self._logits(exact, counts)
        for index, layer in enumerate(self._layers(self.model)):
            noisy, _ = layer(noisy, padding_mask=mask)
            alone, _ = layer(before[index], padding_mask=mask)
            behind = before[index + 1] if index + 1 < len(before) else exact
            signal, noise = behind[real].float(), (noisy - behind)[real].float()
            self.energy.signal[index] += float(signal.square().sum(dtype=torch.float64))
            self.energy.noise[index] += float(noise.square().sum(dtype=torch.float64))
            for hidden, kls in ((noisy, self.through[index]), (alone, self.alone[index])):
                rest = self._run_from(hidden, index + 1, mask)
                divergence, _ = logit_divergence(teacher_logits, self._logits(rest, counts))
                kls.extend(float(kl.mean()) for kl in divergence.split(counts))

    def finish(self) -> tuple[LayerNoise, ...]:
        """Return the curves over all batches."""
        layers = []
        for index, kind in enumerate(self.source.config.language.layers):
            columns = zip(self.through[index], self.alone[index], strict=True)
            through, alone = bootstrap_intervals(list(columns))
            layers.append(
                LayerNoise(
                    layer=index,
                    kind=kind,
                    sqnr_db=_decibel(self.energy.signal[index], self.energy.noise[index]),
                    kl_through=through,
                    kl_alone=alone,
                )
            )
        return tuple(layers)

    def _layers(self, model: NemotronNanoVL) -> nn.ModuleList:
        return model.language_model.backbone.layers

    def _run_from(self, hidden: Tensor, index: int, mask: Tensor | None) -> Tensor:
        """Run the source's layers from ``index`` on."""
        for layer in list(self._layers(self.source))[index:]:
            hidden, _ = layer(hidden, padding_mask=mask)
        return hidden

    def _logits(self, hidden: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the logits (N, V) of the answer tokens, which are the last ones of each row."""
        rows = [hidden[row, -count - 1 : -1] for row, count in enumerate(counts)]
        language = self.source.language_model
        logits: Tensor = language.lm_head(language.backbone.norm_f(torch.cat(rows)))
        return logits


def _decibel(signal: float, noise: float) -> float | None:
    if not noise:
        return None
    return float(10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64)))
