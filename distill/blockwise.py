"""Distillation a layer at a time, for machines that cannot hold a training state of the model.

    embed the items -> for each layer: BF16 outputs -> train against them -> keep -> drop

Each layer of the language model is read, run over the items as it is, trained (``block.py``) so
that with its inputs and weights rounded it gives the same, and saved; then the next. Its inputs are
what the quantized layers before it give, so a layer also makes up for errors of those; what it is
compared with is what it gives in the BF16 model. Between layers an item is two tensors in CPU
memory, one of each model. A layer that got no better on held-out items stays as the teacher has it.

The result is written as that of the whole distillation is: trained BF16 weights first, then the
quantized checkpoint packed from them. A killed run goes on after the last layer in ``OUT.train``.
"""

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nvvl.calib_data.manifest import CalibrationSet
from nvvl.distill.block import BlockStudent
from nvvl.distill.data import DistillData, pack_lengths
from nvvl.distill.embed import embed_items
from nvvl.distill.execution import Execution
from nvvl.distill.losses import relative_error
from nvvl.distill.optimize import INPUT_AMAX
from nvvl.distill.recipe import DistillRecipe, warn_about_rate
from nvvl.distill.teacher import check_run, run_identity
from nvvl.distill.train_folder import LOG_NAME, LazyTensors, TrainFolder, hold_train_folder
from nvvl.distill.write import bf16_folder, staged_outputs, write_bf16, write_quantized
from nvvl.errors import RecipeError, TrainingError, writing
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.checkpoint_writer import write_safetensors
from nvvl.model.hashing import hash_file
from nvvl.model.load import materialize
from nvvl.model.packing import Packing
from nvvl.model.processes import Processes
from nvvl.model.safetensors_io import read_header, read_tensor
from nvvl.model.vlm import LanguageModel
from nvvl.progress import Progress
from nvvl.quantize.identity import describe_arithmetic
from nvvl.quantize.load import read_quantization
from nvvl.quantize.manifest import Manifest
from nvvl.quantize.recipe import Format
from nvvl.quantize.targets import LAYERS, list_linears


@dataclass(frozen=True)
class LayerResult:
    """What training did to one layer.

    Attributes:
        layer: Its name.
        start_error: Relative squared error of its output on held-out items, before.
        error: After, of the weights that were kept.
        trained: Whether it was trained; one without quantized linears only passes on what the
            layers before it give.
    """

    layer: str
    start_error: float
    error: float
    trained: bool = True


@dataclass(frozen=True)
class BlockwiseResult:
    """What came out: the manifest, the folder of trained BF16 weights, and each layer."""

    manifest: Manifest
    bf16: Path
    layers: tuple[LayerResult, ...]


def distill_blockwise(
    run: Path,
    teacher: Path,
    out: Path,
    recipe: DistillRecipe,
    items: CalibrationSet,
    *,
    seed: int = 0,
    execution: Execution | None = None,
) -> BlockwiseResult:
    """Train the layers of a run one after the other, and write them in the run's format.

    Args:
        run: What ``nvvl quantize`` wrote.
        teacher: The BF16 checkpoint it was made from.
        out: The folder to make; the trained BF16 weights go to ``OUT.bf16`` beside it.
        recipe: Its ``num_steps`` are those of each layer, its rate a fraction of the weights' size.
        items: What to train and validate on; all of them are held in memory as activations.
        seed: Of the split and order of items.
        execution: How it is run: on one device, in one process.

    Raises:
        RecipeError: if the recipe is not for layers, or what is asked for needs the whole model.
        NvvlError: as `nvvl.distill.train.distill`.
        KeyboardInterrupt: again, saying how to go on where layers are finished.
    """
    how = execution or Execution()
    processes = how.processes or Processes(how.device)
    with processes.agreed():
        _require_alone(recipe, how, processes)
    warn_about_rate(recipe)
    out = out.absolute()
    with hold_train_folder(out) as folder:
        sources = [run, teacher, *items.files]
        with staged_outputs(out, sources=sources, overwrite=how.overwrite) as staged:
            quantized, trained = staged
            check_run(run, teacher)
            device = torch.device(how.device)
            data = DistillData.from_set(items, teacher, recipe, seed=seed, progress=how.progress)
            identity = run_identity(run, teacher, recipe, items, data, seed)
            kept = _KeptLayers(
                folder, identity | describe_arithmetic(device), overwrite=how.overwrite
            )
            with kept.named_when_interrupted():
                walk = _Walk(run, teacher, recipe, data, seed, device)
                layers = walk.run(kept, how.progress)
                record = identity | {"layers": [vars(layer) for layer in layers]}
                lines = "".join(f"{json.dumps(vars(layer))}\n" for layer in layers)
                with writing(quantized):
                    (quantized / f"distill_{LOG_NAME}").write_text(lines, encoding="utf-8")
                weights = kept.weights()
                write_bf16(teacher, trained, weights, distillation=record, command=how.command)
                manifest = write_quantized(
                    trained, run, quantized, walk.amaxes, distillation=record, command=how.command
                )
        kept.discard()
    return BlockwiseResult(manifest, bf16_folder(out), tuple(layers))


def _require_alone(recipe: DistillRecipe, how: Execution, processes: Processes) -> None:
    if recipe.method != "layers":
        raise RecipeError(f'method: required "layers", got "{recipe.method}"')
    for option in ("shard", "logits", "tensorboard"):
        if getattr(how, option):
            raise RecipeError(f'--{option}: has no meaning with method "layers"; leave it out')
    if processes.count > 1:
        raise RecipeError('method "layers" runs in one process; start nvvl without torchrun')


class _Walk:
    """The items, in front of the next layer.

    Attributes:
        amaxes: The run's amax of inputs, named as weights of a distillation name them.
    """

    def __init__(
        self,
        run: Path,
        teacher: Path,
        recipe: DistillRecipe,
        data: DistillData,
        seed: int,
        device: torch.device,
    ) -> None:
        self._checkpoint = Checkpoint(teacher)
        self._formats, self._run_amaxes = read_quantization(
            run, list_linears(self._checkpoint.config)
        )
        self.amaxes = {
            f"{INPUT_AMAX}{fqn}": amax.input
            for fqn, amax in self._run_amaxes.items()
            if amax.input is not None
        }
        self._recipe = recipe
        self._device = device
        self._seed = seed
        with torch.device("meta"):
            self._model = LanguageModel(self._checkpoint.config.language)
        self._training, self._validation = data.training, data.validation
        inputs = (data.inputs(index) for index in range(len(data)))
        self._teacher = embed_items(self._checkpoint, inputs, self._device)
        self._student = list(self._teacher)

    def run(self, kept: "_KeptLayers", progress: Progress | None) -> list[LayerResult]:
        """Train every layer that is not kept yet; run the items through all."""
        num_layers = len(self._checkpoint.config.language.layers)
        results = []
        for index in range(num_layers):
            name = f"{LAYERS}.{index}"
            formats: dict[str, Format] = {}
            for fqn, linear_format in self._formats.items():
                if fqn.startswith(f"{name}."):
                    formats[fqn] = linear_format
            layer = self._load(name)
            self._advance(self._teacher, layer)
            student = BlockStudent(layer, name, formats, self._run_amaxes, self._recipe)
            if name in kept:
                student.load(kept.load(name))
                result = kept.result(name)
            elif formats:
                result, student = self._train(name, student, formats)
                kept.add(result, student.masters)
            else:
                error = self._error(student)
                result = LayerResult(name, error, error, trained=False)
            self._advance(self._student, student.layer)
            results.append(result)
            if progress is not None:
                shown = f"{name} error {result.start_error:.2e} -> {result.error:.2e}"
                progress(shown, index + 1, num_layers)
        return results

    def _train(
        self, name: str, student: BlockStudent, formats: Mapping[str, Format]
    ) -> tuple[LayerResult, BlockStudent]:
        start = self._error(student)
        for rows in self._rows():
            x, target, packing = self._pack(rows)
            error = student.step(x, target, packing)
            if not math.isfinite(error):
                ids = ", ".join(str(index) for index in rows)
                raise TrainingError(
                    f"{name}: the error became {error} on items {ids} of the set; lower "
                    "learning_rate; finished layers are kept"
                )
        error = self._error(student)
        if error < start:
            return LayerResult(name, start, error), student
        student = BlockStudent(self._load(name), name, formats, self._run_amaxes, self._recipe)
        return LayerResult(name, start, start), student

    def _rows(self) -> Iterator[list[int]]:
        """Give the items of each step: rows of the training items, shuffled anew each epoch."""
        lengths = [self._teacher[index].shape[1] for index in self._training]
        rows = pack_lengths(lengths, self._recipe.tokens_per_batch)
        generator = torch.Generator().manual_seed(self._seed)
        done = 0
        while True:
            for place in torch.randperm(len(rows), generator=generator).tolist():
                if done == self._recipe.num_steps:
                    return
                yield [self._training[index] for index in rows[place]]
                done += 1

    def _pack(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Packing]:
        """Return student inputs, teacher outputs and the packing of a row."""
        x = torch.cat([self._student[index] for index in indices], dim=1)
        target = torch.cat([self._teacher[index] for index in indices], dim=1)
        lengths = [self._student[index].shape[1] for index in indices]
        packing = Packing.of(lengths, device=self._device)
        return x.to(self._device), target.to(self._device), packing

    @torch.no_grad()
    def _error(self, student: BlockStudent) -> float:
        """Return the mean error over held-out items, each as long as it is."""
        total, tokens = 0.0, 0
        for index in self._validation:
            x, target, packing = self._pack([index])
            error = relative_error(student.layer(x, packing=packing)[0], target)
            total += float(error) * x.shape[1]
            tokens += x.shape[1]
        return total / tokens

    @torch.no_grad()
    def _advance(self, hidden: list[Tensor], layer: nn.Module) -> None:
        for index, x in enumerate(hidden):
            hidden[index] = layer(x.to(self._device))[0].cpu()

    def _load(self, name: str) -> nn.Module:
        layer = copy.deepcopy(self._model.get_submodule(name.removeprefix("language_model.")))
        materialize(layer, name, self._checkpoint, dtype=torch.bfloat16, device=self._device)
        return layer


class _KeptLayers(TrainFolder):
    """Trained layers on disk, one file each."""

    method = "layers"

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
        super().__init__(folder, identity)
        self._state = self.find(overwrite=overwrite) or {"layers": {}, "files": {}}

    def __contains__(self, layer: str) -> bool:
        return layer in self._state["layers"]

    def result(self, layer: str) -> LayerResult:
        """Return what training did to a layer that is kept."""
        return LayerResult(**self._state["layers"][layer])

    def load(self, layer: str) -> dict[str, Tensor]:
        """Read the weights of a layer.

        Raises:
            CheckpointError: if they are not what was kept.
        """
        header = read_header(self.require_unchanged(_file_name(layer), self._state))
        return {name: read_tensor(info) for name, info in header.items()}

    def add(self, result: LayerResult, masters: Mapping[str, Tensor]) -> None:
        """Keep a layer.

        Raises:
            OutputError: if the disk is full.
        """
        weights = {name: master.bfloat16() for name, master in masters.items()}
        path = self.folder / _file_name(result.layer)
        write_safetensors(path, weights)
        self._state["layers"][result.layer] = vars(result)
        with writing(path):
            self._state["files"][path.name] = hash_file(path)
        self.write(self._state)

    def weights(self) -> LazyTensors:
        """Return the weights of all layers, read when they are used."""
        headers = [read_header(self.folder / _file_name(name)) for name in self._state["layers"]]
        return LazyTensors({name: info for header in headers for name, info in header.items()})

    @contextmanager
    def named_when_interrupted(self) -> Iterator[None]:
        """Let an interruption say where finished layers are kept, if there are any."""
        try:
            yield
        except KeyboardInterrupt:
            if not self._state["layers"]:
                raise
            raise KeyboardInterrupt(
                f"interrupted; the finished layers are kept in {self.folder}, and the same command "
                "goes on from there"
            ) from None

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise KeyError, TypeError or ValueError where a state has no layers."""
        for values in dict(state["layers"]).values():
            LayerResult(**values)


def _file_name(layer: str) -> str:
    return f"layer-{int(layer.rpartition('.')[2]):05}.safetensors"
