import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nvvl.calib_data.counts import count_tokens
from nvvl.calib_data.items import Item
from nvvl.errors import ConfigError, DataError
from nvvl.model.config import VLMConfig
from nvvl.model.processor import Batch, Message, ModelInputs, Processor, Video, collate
from nvvl.model.prompt import render_prompt
from nvvl.model.tiling import normalize, split_image
from nvvl.model.video import evs_retention_mask, prune_prompt, prune_video_tokens

SPECIAL = ["<unk>", "<s>", "</s>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"]
IMAGE_TOKENS = ["<image>", "<img>", "</img>"]
TILE = 32
TOKENS_PER_TILE = 4  # 32 / patch 8 / shuffle 2, squared

CONFIG: dict[str, Any] = {
    "architectures": ["NemotronH_Nano_VL_V2"],
    "force_image_size": TILE,
    "patch_size": 8,
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "vit_hidden_size": 32,
    "projector_hidden_size": 64,
    "norm_mean": [0.5, 0.25, 0.125],
    "norm_std": [0.5, 0.5, 0.25],
    "use_thumbnail": True,
    "max_num_tiles": 6,
    "img_context_token_id": 400,
    "llm_config": {
        "vocab_size": 416,
        "hidden_size": 32,
        "hybrid_override_pattern": "M*",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "mamba_num_heads": 2,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "conv_kernel": 4,
        "eos_token_id": 5,
        "pad_token_id": 0,
    },
    "vision_config": {
        "patch_size": 8,
        "args": {
            "model": "",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    },
}


def make_tokenizer(image_tokens: list[str]) -> Tokenizer:
    """A byte-level BPE of 400 entries that learned to join punctuation, then the image tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "System User Assistant Frame sampled at seconds total what is the number answer of a"
    corpus = [words, f"{words} page line table card", "think></think>$ >$ <think>\n"] * 20
    tokenizer.train_from_iterator(corpus + [str(n) for n in range(999)], trainer)
    while tokenizer.get_vocab_size() < 400:
        tokenizer.add_tokens([f"unused {tokenizer.get_vocab_size()}"])
    tokenizer.add_special_tokens(image_tokens)
    return tokenizer


@pytest.fixture(scope="module")
def config() -> VLMConfig:
    return VLMConfig.from_dict(CONFIG)


@pytest.fixture
def processor(config: VLMConfig) -> Processor:
    return Processor(config, make_tokenizer(IMAGE_TOKENS))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def expanded(text: str, num_tiles: int) -> str:
    return text.replace("<image>", f"<img>{'<image>' * (TOKENS_PER_TILE * num_tiles)}</img>")


def test_prompt_ids_are_those_of_the_whole_string(processor: Processor) -> None:
    turns = [
        Message("system", "Répondez: 日本"),
        Message("user", "<image>\nWhat is the total?"),
        Message("assistant", "$3.50"),
        Message("user", "And the number?"),
    ]
    inputs = processor(turns, images=[noise(96, 64)], add_generation_prompt=True)
    whole = expanded(render_prompt(turns), num_tiles=7)
    assert inputs.input_ids.tolist() == processor.tokenizer.encode(whole).ids
    assert inputs.input_ids.dtype == torch.int64
    assert inputs.tiles_per_image == (7,)
    assert not inputs.answer_mask.any()
    assert inputs.video_mask is None


@pytest.mark.parametrize("answer", ["$3.50", "total", "é日本", "/>", ""])
def test_prompt_is_a_prefix_of_the_prompt_with_its_answer(
    processor: Processor, answer: str
) -> None:
    ask = Message("user", "<image>What is the total?")
    prompt = processor([ask], images=[noise(32, 32)], add_generation_prompt=True).input_ids
    full = processor([ask, Message("assistant", answer)], images=[noise(32, 32)])
    assert torch.equal(full.input_ids[: len(prompt)], prompt)
    assert not full.answer_mask[: len(prompt)].any()
    ids = full.input_ids[full.answer_mask].tolist()
    assert ids == processor.tokenizer.encode(f"{answer}\n<SPECIAL_12>").ids
    assert processor.decode(ids) == f"{answer}\n"
    # only the template's line break follows the answer
    assert full.input_ids[len(prompt) + len(ids) :].tolist() == processor.tokenizer.encode("\n").ids


def test_tokenizer_of_these_tests_would_join_prompt_and_answer(processor: Processor) -> None:
    # else the test above could not fail
    encode = processor.tokenizer.encode
    assert encode("<think></think>$3").ids != encode("<think></think>").ids + encode("$3").ids


def test_keep_thinking_marks_every_answer(processor: Processor) -> None:
    turns = [
        Message("user", "number?"),
        Message("assistant", "1"),
        Message("user", "total?"),
        Message("assistant", "2"),
    ]
    every = processor(turns, keep_thinking=True)
    assert processor.decode(every.input_ids[every.answer_mask].tolist()) == "1\n2\n"
    assert int((every.input_ids[every.answer_mask] == 5).sum()) == 2
    last = processor(turns)
    assert processor.decode(last.input_ids[last.answer_mask].tolist()) == "2\n"


def test_pixels_are_normalized_tiles_in_prompt_order(
    processor: Processor, config: VLMConfig
) -> None:
    images = [noise(32, 32, seed=1), noise(64, 32, seed=2)]
    inputs = processor([Message("user", "<image> and <image>")], images=images)
    tiles = [
        split_image(image, tile_size=TILE, max_num_tiles=6, use_thumbnail=True) for image in images
    ]
    expected = normalize(torch.cat(tiles), mean=config.norm_mean, std=config.norm_std)
    assert torch.equal(inputs.pixel_values, expected)
    assert inputs.tiles_per_image == (1, 3)
    assert int((inputs.input_ids == config.image_token_id).sum()) == 4 * TOKENS_PER_TILE


def test_text_alone_has_no_tiles(processor: Processor) -> None:
    inputs = processor([Message("user", "What is the total?")])
    assert inputs.pixel_values.shape == (0, 3, TILE, TILE)
    assert inputs.tiles_per_image == ()


@pytest.mark.parametrize(("limit", "tiles"), [(None, 7), (2, 3), (1, 1)])
def test_max_num_tiles_of_a_call_overrides_the_processor(
    processor: Processor, limit: int | None, tiles: int
) -> None:
    inputs = processor([Message("user", "<image>")], images=[noise(192, 128)], max_num_tiles=limit)
    assert len(inputs.pixel_values) == tiles


def test_video_is_one_line_and_one_tile_a_frame(processor: Processor) -> None:
    video = Video(frames=[noise(64, 32), noise(64, 32)], fps=2.0, frame_indices=(0, 3))
    inputs = processor(
        [Message("user", "<video>\nWhat is it?")], videos=[video], add_generation_prompt=True
    )
    tile = expanded("<image>", num_tiles=1)
    text = f"Frame 1 sampled at 0.00 seconds: {tile}\nFrame 2 sampled at 1.50 seconds: {tile}"
    whole = render_prompt([Message("user", f"{text}\nWhat is it?")])
    assert inputs.input_ids.tolist() == processor.tokenizer.encode(whole).ids
    assert inputs.pixel_values.shape == (2, 3, TILE, TILE)
    assert inputs.video_frames == (2,)
    assert inputs.tiles_per_image == ()


def test_images_and_videos_stand_in_the_order_of_the_text(
    processor: Processor, config: VLMConfig
) -> None:
    video = Video(frames=[noise(32, 32, 5), noise(32, 32, 6)], fps=1.0, frame_indices=(0, 1))
    inputs = processor(
        [Message("user", "<image><video>"), Message("user", "<image>")],
        images=[noise(32, 32, 1), noise(32, 32, 2)],
        videos=[video],
    )
    alone = [
        processor([Message("user", "<image>")], images=[noise(32, 32, seed)]).pixel_values
        for seed in (1, 5, 6, 2)
    ]
    assert torch.equal(inputs.pixel_values, torch.cat(alone))
    assert inputs.video_mask is not None
    flags = inputs.video_mask[inputs.input_ids == config.image_token_id]
    assert flags.reshape(4, TOKENS_PER_TILE).int().tolist() == [[0] * 4, [1] * 4, [1] * 4, [0] * 4]
    assert int(inputs.video_mask.sum()) == 2 * TOKENS_PER_TILE


def test_pruned_prompt_keeps_tags_and_matches_its_features(
    processor: Processor, config: VLMConfig
) -> None:
    video = Video(frames=[noise(32, 32)] * 3, fps=1.0, frame_indices=(0, 1, 2))
    inputs = processor([Message("user", "<image><video>")], images=[noise(32, 32)], videos=[video])
    assert inputs.video_mask is not None
    features = torch.randn(4 * TOKENS_PER_TILE, 8, generator=torch.Generator().manual_seed(0))
    mask = evs_retention_mask(features[TOKENS_PER_TILE:].reshape(3, 2, 2, 8), 0.5)
    kept, pruned_features = prune_prompt(config, inputs, features, 0.5)
    assert torch.equal(kept, prune_video_tokens(inputs.video_mask, [mask]))
    ids = inputs.input_ids
    assert torch.equal(pruned_features, features[kept[ids == config.image_token_id]])
    assert int((ids[kept] == config.image_token_id).sum()) == len(pruned_features) == 4 + 6
    assert torch.equal(pruned_features[:8], features[:8])  # the image and the first frame
    assert torch.equal(
        ids[kept][ids[kept] != config.image_token_id], ids[ids != config.image_token_id]
    )


def test_each_video_of_a_prompt_is_pruned_alone(processor: Processor, config: VLMConfig) -> None:
    video = Video(frames=[noise(32, 32)] * 3, fps=1.0, frame_indices=(0, 1, 2))
    inputs = processor([Message("user", "<video><video>")], videos=[video, video])
    features = torch.ones(6 * TOKENS_PER_TILE, 8)
    _, left = prune_prompt(config, inputs, features, 0.75)
    assert len(left) == 2 * TOKENS_PER_TILE  # the first frame of each
    with pytest.raises(ValueError, match="0 <= rate < 1"):
        prune_prompt(config, inputs, features, 1.0)


@pytest.mark.parametrize(("text", "rate"), [("<image>", 0.5), ("<video>", 0.0), ("hello", 0.5)])
def test_prompt_stays_whole_without_videos_or_rate(
    processor: Processor, config: VLMConfig, text: str, rate: float
) -> None:
    video = Video(frames=[noise(32, 32)] * 2, fps=1.0, frame_indices=(0, 1))
    inputs = processor(
        [Message("user", text)],
        images=[noise(32, 32)] * text.count("<image>"),
        videos=[video] * text.count("<video>"),
    )
    features = torch.zeros(len(inputs.pixel_values) * TOKENS_PER_TILE, 8)
    kept, left = prune_prompt(config, inputs, features, rate)
    assert kept.shape == inputs.input_ids.shape
    assert kept.dtype == torch.bool
    assert kept.all()
    assert left is features


@pytest.mark.parametrize(
    ("text", "num_images", "message"),
    [
        ("<image><image>", 1, "2 <image> placeholders, but 1 images"),
        ("no image", 1, "0 <image> placeholders, but 1 images"),
        ("<image>", 0, "1 <image> placeholders, but 0 images"),
        ("<video>", 0, "1 <video> placeholders, but 0 videos"),
        ("<ima/thinkge>", 0, "prompt has 1 <image> tokens, but the images have 0 features"),
    ],
)
def test_placeholders_must_match_what_is_given(
    processor: Processor, text: str, num_images: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        processor([Message("user", text)], images=[noise(32, 32)] * num_images)


def test_placeholder_in_an_answer_is_refused(processor: Processor) -> None:
    turns = [Message("user", "look"), Message("assistant", "<image>")]
    with pytest.raises(DataError, match="assistant turn holds the placeholder <image>"):
        processor(turns, images=[noise(32, 32)])


def test_collate_pads_on_the_left(processor: Processor) -> None:
    short = processor([Message("user", "a"), Message("assistant", "1")])
    long = processor(
        [Message("user", "<image>What is the total?"), Message("assistant", "22")],
        images=[noise(64, 32)],
    )
    batch = collate([short, long], pad_token_id=7)
    padding = len(long.input_ids) - len(short.input_ids)
    assert isinstance(batch, Batch)
    assert batch.input_ids[0].tolist() == [7] * padding + short.input_ids.tolist()
    assert batch.padding_mask[0].int().tolist() == [0] * padding + [1] * len(short.input_ids)
    assert batch.answer_mask[0].tolist() == [False] * padding + short.answer_mask.tolist()
    assert torch.equal(batch.input_ids[1], long.input_ids)
    assert batch.padding_mask[1].all()
    assert torch.equal(batch.pixel_values, long.pixel_values)


def test_collate_keeps_tiles_in_item_order() -> None:
    items = [
        ModelInputs(
            input_ids=torch.tensor([1]),
            pixel_values=torch.full((count, 3, 2, 2), float(count)),
            answer_mask=torch.tensor([False]),
        )
        for count in (2, 0, 1)
    ]
    assert collate(items, pad_token_id=0).pixel_values[:, 0, 0, 0].tolist() == [2.0, 2.0, 1.0]


def test_processor_from_folder_ignores_stored_truncation(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(IMAGE_TOKENS)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=512)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    processor = Processor.from_folder(tmp_path, max_num_tiles=2)
    assert processor.max_num_tiles == 2
    turns = [Message("user", "What is the total?")]
    ids = processor(turns).input_ids.tolist()
    assert (
        ids
        == make_tokenizer(IMAGE_TOKENS)
        .encode(render_prompt(turns, add_generation_prompt=False))
        .ids
    )


def template_folder(folder: Path, *, where: str, bos: object) -> Path:
    template = "{#- of this model -#}\n{{- bos_token -}}{%- for message in messages -%}"
    tokenizer = make_tokenizer(IMAGE_TOKENS)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    language = CONFIG["llm_config"] | {"vocab_size": 512}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"llm_config": language}))
    values = {} if bos is None else {"bos_token": bos}
    if where == "file":
        (folder / "chat_template.jinja").write_text(template)
    elif where == "one":
        values["chat_template"] = template
    else:
        values["chat_template"] = [{"name": "default", "template": template}]
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("where", ["file", "one", "several"])
@pytest.mark.parametrize("bos", ["<s>", {"content": "<s>"}])
def test_prompt_begins_with_bos_where_the_template_does(
    tmp_path: Path, where: str, bos: object
) -> None:
    processor = Processor.from_folder(template_folder(tmp_path, where=where, bos=bos))
    turns = [Message("user", "What is the total?")]
    ids = processor(turns, add_generation_prompt=True).input_ids.tolist()
    first = processor.tokenizer.token_to_id("<s>")
    plain = processor.tokenizer.encode(render_prompt(turns), add_special_tokens=False).ids
    assert ids == [first, *plain]
    item = Item("x", tuple(turns), (), ())
    assert count_tokens(item, processor).total == len(ids)


@pytest.mark.parametrize(
    ("bos", "message"),
    [(None, "begins with bos_token, which"), ("<bos>", "lacks '<bos>'")],
)
def test_bos_that_cannot_be_written_is_refused(tmp_path: Path, bos: object, message: str) -> None:
    folder = template_folder(tmp_path, where="file", bos=bos)
    with pytest.raises(ConfigError, match=message):
        Processor.from_folder(folder)


@pytest.mark.parametrize(
    "text",
    [
        '{"chat_template": [{}]}',
        '{"chat_template": [1]}',
        '{"chat_template": [{"name": "default"}]}',
        '{"chat_template": ' + "[" * 100_000,
    ],
)
def test_chat_templates_without_names_or_texts_are_refused(tmp_path: Path, text: str) -> None:
    folder = template_folder(tmp_path, where="one", bos="<s>")
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: cannot be read"):
        Processor.from_folder(folder)


def test_an_id_beyond_the_embeddings_is_refused_whatever_the_count() -> None:
    values = json.loads(make_tokenizer(IMAGE_TOKENS).to_str())
    values["model"]["vocab"]["h"] = 50_000
    config = VLMConfig.from_dict(CONFIG)
    with pytest.raises(ConfigError, match=r"'h' has id 50000, but llm_config\.vocab_size is 416"):
        Processor(config, Tokenizer.from_str(json.dumps(values)))


class PanicException(BaseException):
    """What Rust's panics are in Python; the libraries do not export it."""


class Panicking:
    def encode(self, *_: object, **__: object) -> None:
        raise PanicException("index out of bounds\nstack backtrace:")


def test_text_that_the_tokenizer_cannot_encode_is_one_line(processor: Processor) -> None:
    values = json.loads(processor.tokenizer.to_str())
    known = {"[": 0}
    values["model"] = {"type": "WordLevel", "vocab": known, "unk_token": "[NOUNK]"}
    without_unknown = Tokenizer.from_str(json.dumps(values | {"pre_tokenizer": None}))
    tokenizer: Any
    for tokenizer, reason in (
        (without_unknown, r"WordLevel error: Missing \[UNK\] token"),
        (Panicking(), r"index out of bounds\)"),
    ):
        broken = Processor(processor.config, processor.tokenizer)
        broken.tokenizer = tokenizer
        with pytest.raises(ConfigError, match=rf"cannot encode .*\({reason}.*; copy the file"):
            broken([Message("user", "hello")])


def test_folder_without_a_usable_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not found"):
        Processor.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a tokenizer file"):
        Processor.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("image_tokens", "changes", "message"),
    [
        (["<image>"], {}, "<img>, </img> must each be one special token"),
        (["<img>", "<image>", "</img>"], {}, "<image> has id 401, .* img_context_token_id 400"),
        (IMAGE_TOKENS, {"eos_token_id": 2}, "<SPECIAL_12> has id 5, .*eos_token_id 2"),
        (
            IMAGE_TOKENS,
            {"vocab_size": 402},
            "'</img>' has id 402, but llm_config.vocab_size is 402",
        ),
    ],
)
def test_tokenizer_of_another_model_is_refused(
    image_tokens: list[str], changes: dict[str, int], message: str
) -> None:
    config = VLMConfig.from_dict(CONFIG | {"llm_config": CONFIG["llm_config"] | changes})
    with pytest.raises(ConfigError, match=message):
        Processor(config, make_tokenizer(image_tokens))
