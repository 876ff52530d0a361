"""nvvl's checkpoints in lmms-eval, the harness of image and video benchmarks, by the name ``nvvl``.

lmms-eval finds the name through the entry point ``lmms_eval.models`` (its 0.7), so where both are
installed its own command does everything else:

    python -m lmms_eval --model nvvl --model_args pretrained=OUT --tasks docvqa_val --batch_size 8

``pretrained`` is a folder, a Hub id or ``embedded``; further arguments are those of `NvvlModel`.
Only tasks that have answers written, in one round, are served. Images stand before the text, or
where the text has as many ``<image>``.

lmms-eval needs torchvision, which is why it is no extra of nvvl: install it into an environment of
its own. Tests use a stand-in of its interface; by hand, four lines were read through its own base
class, registry and requests (0.7.3), without its evaluator.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]
from PIL import Image

from nvvl.calib_data.video_files import read_video
from nvvl.errors import DataError
from nvvl.model.generate import generate
from nvvl.model.processor import ModelInputs, Processor, collate
from nvvl.model.prompt import Message
from nvvl.model.resolve import resolve_model
from nvvl.model.video import Video
from nvvl.quantize.load import load_any
from nvvl.reports.generation_settings import GenerationSettings, longest_of

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_DEFAULT_NEW_TOKENS = 1024


def manifest() -> ModelManifest:
    """Say where the model is; the entry point calls this."""
    return ModelManifest(model_id="nvvl", simple_class_path=f"{__name__}.NvvlModel")


class NvvlModel(lmms):  # type: ignore[misc]
    """A checkpoint that answers lmms-eval's requests."""

    def __init__(
        self,
        pretrained: str,
        *,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "bfloat16",
        max_num_tiles: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """Load a checkpoint.

        Args:
            pretrained: BF16 or quantized checkpoint.
            batch_size: Requests run at a time.
            device: Where the model runs; a GPU if there is one.
            dtype: Of the computation: bfloat16, float16 or float32.
            max_num_tiles: Most tiles of an image; None for the model's own limit.
            max_batch_size: Not used by nvvl, and refused.

        Raises:
            DataError: if an argument is not one of these.
            ConfigError, CheckpointError: if the checkpoint cannot be loaded.
        """
        super().__init__()
        if dtype not in _DTYPES or max_batch_size is not None or not str(batch_size).isdigit():
            raise DataError(
                f"nvvl in lmms-eval: required dtype of {', '.join(_DTYPES)}, a number as "
                f"batch_size and no max_batch_size, got {dtype}, {batch_size}, {max_batch_size}"
            )
        folder = resolve_model(pretrained)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size = max(1, int(batch_size))
        self.max_num_tiles = max_num_tiles
        self.processor = Processor.from_folder(folder)
        self.model = load_any(folder, dtype=_DTYPES[dtype], device=device)

    @torch.inference_mode()
    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return a greedy answer to each request, cut before the first stop string.

        Pictures are opened a batch at a time, so requests are sorted by what is known without
        them: the length of the text.

        Raises:
            DataError: if a task samples, which is said before any answer, or its images cannot be
                used.
        """
        texts: dict[int, str] = {}
        settings = [
            GenerationSettings.read(request.args[1], default=_DEFAULT_NEW_TOKENS)
            for request in requests
        ]
        order = sorted(range(len(requests)), key=lambda place: -len(requests[place].args[0]))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            batch = [(self._prepare(*requests[place].args), settings[place]) for place in places]
            for place, text in zip(places, self._write(batch), strict=True):
                texts[place] = text
                context, values, *_ = requests[place].args
                self.cache_hook.add_partial("generate_until", (context, values), text)
        return [texts[place] for place in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: tasks that score given answers are not served."""
        raise DataError(
            "nvvl in lmms-eval: the task scores given answers; nvvl serves tasks with written "
            "answers (output_type generate_until)"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: tasks of several rounds are not served."""
        raise DataError("nvvl in lmms-eval: the task has several rounds; nvvl serves one")

    def _prepare(
        self,
        context: str,
        _: dict[str, Any],
        doc_to_visual: Any,
        doc_id: int,
        task: str,
        split: str,
    ) -> ModelInputs:
        """Turn a request, as lmms-eval's simple models get it, into tokens and pixels."""
        visuals = _flatten(doc_to_visual(self.task_dict[task][split][doc_id]))
        images = [visual for visual in visuals if isinstance(visual, Image.Image)]
        videos = [_open_video(v, task) for v in visuals if not isinstance(v, Image.Image)]
        return self.processor(
            [Message("user", self._place(context, len(images), len(videos)))],
            images=images,
            videos=videos,
            add_generation_prompt=True,
            max_num_tiles=self.max_num_tiles,
        )

    def _place(self, context: str, num_images: int, num_videos: int) -> str:
        """Put placeholders before the text, unless the text has them all.

        A text that names a picture twice has more than there are pictures: its own are taken out.
        """
        config = self.processor.config
        found = (context.count(config.image_token), context.count(config.video_token))
        if found == (num_images, num_videos):
            return context
        for token in (config.image_token, config.video_token):
            context = context.replace(token, "")
        marks = [config.image_token] * num_images + [config.video_token] * num_videos
        return "\n".join([*marks, context])

    def _write(self, batch: Sequence[tuple[ModelInputs, GenerationSettings]]) -> list[str]:
        language = self.model.config.language
        answers = generate(
            self.model,
            collate([inputs for inputs, _ in batch], language.pad_token_id),
            eos_token_id=language.eos_token_ids,
            max_new_tokens=longest_of([settings for _, settings in batch]),
        )
        return [
            settings.cut(self.processor.decode(ids[: settings.max_new_tokens])).strip()
            for ids, (_, settings) in zip(answers, batch, strict=True)
        ]


def _flatten(visuals: Any) -> list[Any]:
    """Make one list of what a task gives: nothing, one thing, a list, or lists of lists."""
    if visuals is None:
        return []
    if not isinstance(visuals, list | tuple):
        return [visuals]
    return [inner for visual in visuals for inner in _flatten(visual)]


def _open_video(visual: Any, task: str) -> Video:
    if not isinstance(visual, str | Path):
        raise DataError(
            f"nvvl in lmms-eval: {task} gives a {type(visual).__name__}; required images, or "
            "paths of videos"
        )
    return read_video(Path(cast(str, visual)))
