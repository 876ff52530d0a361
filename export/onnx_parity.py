"""Proof that graphs compute what their checkpoint does, in float32, without a GPU.

The checkpoint is loaded as ``nvvl evaluate`` and ``nvvl verify`` load it, into the torch model with
fake quantization; the graphs are run by onnxruntime (`nvvl.export.onnx_session`). Both get the same
tiles and tokens and each carries its own states:

    vision    one tile and several
    prefill   several lengths, from an empty state and in pieces, batches of one and two
    decode    after prefill, token by token
    text      documents with an image: 64 greedy tokens, the same ones

After every run the largest difference of logits, and of every state, must be at most ``TOLERANCE``
of the largest magnitude. What quantizers make of rounding is settled by `nvvl.export.onnx_ties`,
and counted. Cases that are longer than the graphs' cache are left out, and counted too. An error
ends the comparison it comes in and is a fault of that check; the others go on.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nvvl.errors import CheckpointError, ConfigError, EngineError, NvvlError
from nvvl.export.checks import Check, judge, not_checked
from nvvl.export.logits_proof import default_probe_items
from nvvl.export.onnx_backend import float32_bytes
from nvvl.export.onnx_export import file_faults, read_manifest
from nvvl.export.onnx_io import read_io
from nvvl.export.onnx_language import BACKBONE
from nvvl.export.onnx_session import GraphFolder, States, StepOutput
from nvvl.export.onnx_ties import TieSettler
from nvvl.export.onnx_weights import read_hashes, round_as_graphs
from nvvl.export.vision_fp8 import quantize_vision
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.memory import free_memory
from nvvl.model.processor import Processor
from nvvl.model.vlm import ModelState, NemotronNanoVL
from nvvl.progress import Progress
from nvvl.quantize.declared import is_quantized
from nvvl.quantize.linear import QuantizedLinear
from nvvl.quantize.load import load_any

if TYPE_CHECKING:
    from nvvl.calib_data.items import Item

# Both sides compute in float32 (unit 6e-8) and sum in another order, through every layer.
TOLERANCE = 1e-5

NUM_TOKENS = 64

FILES = ("O1", "graphs have their manifest's hashes and were made from this checkpoint")
VISION = ("O2", "vision graph equals the torch model")
PREFILL = ("O3", "prefill graph equals the torch model")
DECODE = ("O4", "decode graph equals the torch model")
TEXT = ("O5", f"graphs give the torch model's {NUM_TOKENS} greedy tokens")

# (batch, lengths of the pieces a prompt is prefilled in); ones after the first are decode steps.
CASES: tuple[tuple[int, tuple[int, ...]], ...] = (
    (1, (37, 1, 1)),
    (1, (64, 1)),
    (2, (130, 45, 1, 1)),
    (1, (1, 1, 20, 1)),
    (2, (3, 1)),
)
TILE_COUNTS = (1, 3)
_SEED = 0


@dataclass
class _Score:
    """What the comparisons of one check found, with the faults of quantizers met meanwhile."""

    settler: TieSettler
    largest: float = 0.0
    runs: int = 0
    too_long: int = 0
    faults: list[str] = field(default_factory=list)

    def see(self, where: str, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Compare what a graph gives with what the torch model gives, by name."""
        self.runs += 1
        self.faults += self.settler.drain()
        for name, (got, wanted) in pairs.items():
            error = relative_error(got, wanted)
            self.largest = max(self.largest, error)
            if not error <= TOLERANCE:
                self.faults.append(
                    f"{where}: {name} differs by {error:.2e}, required {TOLERANCE:.0e}"
                )

    @contextlib.contextmanager
    def judging(self) -> Iterator[None]:
        """Make an error that ends the block a fault, one however often it comes."""
        try:
            yield
        except NvvlError as error:
            self.faults += self.settler.drain()
            if str(error) not in self.faults:
                self.faults.append(str(error))

    def check(self, rule: str, name: str, note: str = "") -> Check:
        """State what was found."""
        if self.too_long and not self.runs and not self.faults:
            reason = "every case is longer than the cache; export with a larger kv_capacity"
            return not_checked(rule, name, reason)
        if self.too_long:
            note += f"; {self.too_long} cases left out, longer than the cache"
        note = f"{self.runs} runs, error {self.largest:.1e}{note}"
        return judge(rule, name, self.faults, note=note)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return the largest difference over the largest magnitude; infinity if shapes differ."""
    if got.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    scale = wanted.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((got - wanted).abs().max() / scale)


def prove_graphs(
    run: Path,
    dest: Path,
    *,
    probe_items: "Sequence[Item] | None" = None,
    progress: Progress | None = None,
) -> list[Check]:
    """Prove a folder of graphs against the checkpoint they were made from.

    Args:
        run: the checkpoint.
        dest: the folder of graphs.
        probe_items: documents to generate from; a few of the default set if None.
        progress: called after each comparison.
    """
    files = judge(*FILES, _file_faults(run, dest))
    if not files.passed:
        return [files]
    needed, free = _memory_needed(run), free_memory()
    if free is not None and needed > free:
        reason = (
            f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; run it on a larger "
            "machine"
        )
        return [files, *(not_checked(*which, reason) for which in (VISION, PREFILL, DECODE, TEXT))]
    items = default_probe_items() if probe_items is None else probe_items
    steps = _Steps(len(TILE_COUNTS) + len(CASES) + len(items), progress)
    try:
        pair = _Pair(_load_model(run, dest), GraphFolder(dest, expose_inputs=True))
    except NvvlError as fault:
        reason = "checkpoint or graphs cannot be opened, see O2"
        rest = (not_checked(*which, reason) for which in (PREFILL, DECODE, TEXT))
        return [files, judge(*VISION, [str(fault)]), *rest]
    with torch.inference_mode(), pair.settling():
        return [files, *_compare_all(pair, run, items, steps)]


def _compare_all(pair: "_Pair", run: Path, items: "Sequence[Item]", steps: "_Steps") -> list[Check]:
    vision, prefill, decode, text = (_Score(pair.settler) for _ in range(4))
    for count in TILE_COUNTS:
        with vision.judging():
            _compare_vision(pair, count, vision)
        steps.done("vision")
    for batch, pieces in CASES:
        _compare_steps(pair, batch, pieces, prefill, decode)
        steps.done("prefill, decode")
    ties = f"{pair.settler.num_ties} of {pair.settler.num_values} quantized values on an edge"
    checks = [vision.check(*VISION), prefill.check(*PREFILL)]
    if prefill.faults and not decode.runs and not decode.faults:
        checks.append(not_checked(*DECODE, "no prefill came to an end, see O3"))
    else:
        checks.append(decode.check(*DECODE, f"; {ties}" if pair.settler.num_values else ""))
    try:
        processor = Processor.from_folder(run)
    except ConfigError as fault:
        return [*checks, not_checked(*TEXT, str(fault))]
    for item in items:
        with text.judging():
            _compare_text(pair, processor, item, text)
        steps.done("text")
    return [*checks, text.check(*TEXT)]


def _load_model(run: Path, dest: Path) -> NemotronNanoVL:
    """Load the checkpoint, with the dtype and the vision tower that these graphs have."""
    made = read_io(dest)["model"]
    model = load_any(run, dtype=torch.float32)
    round_as_graphs(model, made["dtype"])
    if made["vision"] == "fp8":
        quantize_vision(model, dest, torch.float32)
    return model


def _memory_needed(run: Path) -> int:
    """Return about how many bytes the proof takes.

    All is float32: the torch model, the language model in two graphs, and whichever graph is being
    opened once more.
    """
    return 4 * float32_bytes(run)


@dataclass
class _Steps:
    """Counts comparisons for the progress bar."""

    total: int
    progress: Progress | None
    count: int = 0

    def done(self, stage: str) -> None:
        self.count += 1
        if self.progress is not None:
            self.progress(f"graphs: {stage}", self.count, self.total)


@dataclass
class _Pair:
    """The torch model and the graphs, with what each left behind."""

    model: NemotronNanoVL
    graphs: GraphFolder
    settler: TieSettler = field(default_factory=TieSettler)

    @contextlib.contextmanager
    def settling(self) -> Iterator[None]:
        """Have ties settled while the block runs."""
        handles = [
            self.settler.watch(fqn, module)
            for fqn, module in self.model.named_modules()
            if isinstance(module, QuantizedLinear) and module.linear_format in ("fp8", "nvfp4")
        ]
        if self.graphs.model["kv_dtype"] == "fp8":
            handles += [
                self.settler.watch_states(fqn, self.model.get_submodule(fqn))
                for fqn in self._kv_linears().values()
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def step(
        self,
        ids: Tensor,
        states: States,
        state: ModelState | None,
        *,
        position: int,
        features: Tensor | None = None,
    ) -> tuple[StepOutput, Tensor, ModelState]:
        """Run new tokens through both; returns what the graph gives, torch's logits and state."""
        if features is None:  # by embedding: the image token may be written, and is no image then
            embeds = self.model.language_model.backbone.embeddings(ids)
        else:
            embeds = self.model.embed(ids, features)
        inputs = self.graphs.token_inputs(ids, features, lambda: embeds)
        output = self.graphs.step(inputs, states, position=position)
        self.settler.inputs = dict(output.quantized_inputs)
        end = position + ids.shape[1]
        self.settler.new_states = {
            fqn: output.states[name][:, :, position:end].transpose(1, 2).flatten(-2)
            for name, fqn in self._kv_linears().items()
        }
        reference = self.model(inputs_embeds=embeds, state=state, logits_to_keep=1)
        return output, reference.logits[:, -1], reference.state

    def holds(self, num_tokens: int) -> bool:
        """Whether this many tokens fit into the graphs' cache."""
        model = self.graphs.model
        return model["kv_cache"] != "fixed" or num_tokens <= model["kv_capacity"]

    def _kv_linears(self) -> dict[str, str]:
        """Return the linear that gives each key or value state, by the state's name."""
        return {
            f"past_{kind}.{layer}": f"{BACKBONE}.layers.{layer}.mixer.{kind[0]}_proj"
            for layer, mixer in enumerate(self.model.config.language.layers)
            if mixer == "attention"
            for kind in ("key", "value")
        }


def _compare_vision(pair: _Pair, num_tiles: int, score: _Score) -> None:
    size = pair.model.config.image_size
    generator = torch.Generator().manual_seed(_SEED + num_tiles)
    pixels = torch.randn(num_tiles, 3, size, size, generator=generator)
    got, quantized = pair.graphs.encode_images(pixels)
    pair.settler.inputs = dict(quantized)
    score.see(f"{num_tiles} tiles", {"image_embeds": (got, pair.model.encode_images(pixels))})


def _compare_steps(
    pair: _Pair, batch: int, pieces: Sequence[int], prefill: _Score, decode: _Score
) -> None:
    if not pair.holds(sum(pieces)):
        prefill.too_long += 1
        decode.too_long += 1
        return
    generator = torch.Generator().manual_seed(_SEED + sum(pieces))
    vocab = pair.model.config.language.vocab_size
    ids = torch.randint(0, vocab, (batch, sum(pieces)), generator=generator)
    ids = ids.masked_fill(ids == pair.model.config.image_token_id, 0)
    states, state, position = pair.graphs.start(batch), None, 0
    for piece in ids.split(list(pieces), dim=1):
        score = decode if piece.shape[1] == 1 and position else prefill
        end = position + piece.shape[1]
        where = f"batch {batch}, tokens {position} to {end}"
        with score.judging():
            output, logits, state = pair.step(piece, states, state, position=position)
            score.see(where, _pairs(output, logits, state, end))
            position, states = end, output.states
        if position != end:
            return  # an error: there are no states to go on from


def _pairs(
    output: StepOutput, logits: Tensor, state: ModelState, position: int
) -> dict[str, tuple[Tensor, Tensor]]:
    pairs = {"logits": (output.logits, logits)}
    for name, value in output.states.items():
        kind, _, layer = name.removeprefix("past_").rpartition(".")
        of_layer = state.layers[int(layer)]
        assert of_layer is not None
        wanted = of_layer[0 if kind in ("conv", "key") else 1]
        if kind in ("key", "value"):  # a cache of fixed capacity is longer than what it holds
            value = value[:, :, :position]
        pairs[name] = (value, wanted)
    return pairs


def _compare_text(pair: _Pair, processor: Processor, item: "Item", score: _Score) -> None:
    question = item.messages[:-1] if item.messages[-1].role == "assistant" else item.messages
    inputs = processor(question, images=item.images, videos=item.videos, add_generation_prompt=True)
    if not pair.holds(len(inputs.input_ids) + NUM_TOKENS - 1):  # the last token is not run
        score.too_long += 1
        return
    features = None
    if len(inputs.pixel_values):
        features, quantized = pair.graphs.encode_images(inputs.pixel_values)
        pair.settler.inputs = dict(quantized)
        reference = pair.model.encode_images(inputs.pixel_values)
        score.see(f"item {item.item_id}", {"image_embeds": (features, reference)})
    ids, states, state, position = inputs.input_ids[None], pair.graphs.start(1), None, 0
    for count in range(NUM_TOKENS):
        output, logits, state = pair.step(
            ids, states, state, position=position, features=None if position else features
        )
        position, states = position + ids.shape[1], output.states
        where = f"item {item.item_id}, token {count}"
        score.see(where, {"logits": (output.logits, logits)})
        ours, theirs = int(logits.argmax()), int(output.logits.argmax())
        if ours != theirs:
            score.faults.append(f"{where}: the graph says {theirs}, torch {ours}")
            return
        ids = torch.tensor([[ours]])


def _file_faults(run: Path, dest: Path) -> list[str]:
    try:
        made_from, faults = read_manifest(dest)["checkpoint"], file_faults(dest)
        checkpoint = Checkpoint(run)
        if is_quantized(checkpoint):  # its own hashes of tensors are proved elsewhere
            recorded = read_hashes(run).tensors
            hashes = {name: sha256 for name, (sha256, _, _) in recorded.items()}
        else:
            hashes = {name: checkpoint.sha256(name) for name in checkpoint.tensors}
    except (CheckpointError, EngineError) as fault:
        return [str(fault)]
    if hashes != made_from["tensors"]:
        faults.append(f"{run}: is not the checkpoint that the graphs were made from")
    return faults
