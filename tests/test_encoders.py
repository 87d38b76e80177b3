"""``attn_implementation="yoso"`` in other people's encoders: beside formulas written out here,
padded as truncated, and what must raise.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.models.bert.modeling_bert import BertCrossAttention, BertSelfAttention

import yoso_core
from yoso_core.model import yoso_attention
from yoso_core.model.draws import evaluation_draw
from yoso_core.model.encoders import YosoAttentionOptions, enable_yoso_attention

HIDDEN, HEADS, LAYERS, VOCAB, PAD = 32, 2, 2, 99, 1
SAMPLED = YosoAttentionOptions(num_hash=16, hash_code_len=3)
EXPECTED = YosoAttentionOptions(hash_code_len=3, use_expectation=True)

both_modes = pytest.mark.parametrize("options", [SAMPLED, EXPECTED], ids=["sampled", "expectation"])

USUAL: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
}
TEXT = USUAL | {"vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2}
DISTILBERT = {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 48, "vocab_size": VOCAB, "pad_token_id": PAD}
# Three layers: the first is global, the others see two tokens to either side.
MODERNBERT = TEXT | {"num_hidden_layers": 3, "local_attention": 4, "cls_token_id": 0, "sep_token_id": 2}
WAV2VEC2 = USUAL | {
    "conv_dim": (16, 16),
    "conv_kernel": (8, 4),
    "conv_stride": (4, 4),
    "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}

# Model class and the settings of its config.
TEXT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", TEXT),
    "roberta": ("Roberta", TEXT),
    "xlm-roberta": ("XLMRoberta", TEXT),
    "electra": ("Electra", TEXT | {"embedding_size": 16}),
    "distilbert": ("DistilBert", DISTILBERT),
    "modernbert": ("ModernBert", MODERNBERT),
    "albert": ("Albert", TEXT | {"embedding_size": 16}),
}
OTHER_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", USUAL | {"image_size": 16, "patch_size": 4}),
    "wav2vec2": ("Wav2Vec2", WAV2VEC2),
}
MODELS = TEXT_MODELS | OTHER_MODELS

every_model = pytest.mark.parametrize("name", MODELS)
every_text_model = pytest.mark.parametrize("name", TEXT_MODELS)


@pytest.fixture(autouse=True)
def _enabled() -> None:
    """With the default options, whatever a test before this one has set."""
    enable_yoso_attention()


def build(name: str, options: YosoAttentionOptions | None = None, attention: str = "yoso", **settings: Any) -> Any:
    """A model of the list in evaluation, with the same random weights every time: large enough for
    attention to matter.
    """
    kind, usual = MODELS[name]
    own = {} if options is None else {"yoso_attention": asdict(options)}
    config = getattr(transformers, f"{kind}Config")(**usual | own | settings, attn_implementation=attention)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(std=0.3)
    return model


def some_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of two, the first row with masked tokens; and which tokens of the output count."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        mask = torch.ones(2, 17, dtype=torch.bool)
        mask[0, 11:] = False
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator), "attention_mask": mask}, mask
    if name == "wav2vec2":
        heard = torch.ones(2, 400, dtype=torch.long)
        heard[0, 200:] = 0
        mask = torch.ones(2, 24, dtype=torch.bool)
        mask[0, 12:] = False  # 200 samples: 49 windows of 8 samples, 12 of 4 windows
        return {"input_values": torch.randn(2, 400, generator=generator), "attention_mask": heard}, mask
    ids, mask = some_ids(2, 20), torch.ones(2, 20, dtype=torch.bool)
    mask[0, 13:] = False
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}, mask


@torch.no_grad()
def hidden(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    return model(**inputs).last_hidden_state


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


# Beside the formulas


ATTENTION = ("SelfAttention", "AlbertAttention", "ModernBertAttention", "ViTAttention", "Wav2Vec2Attention")


def attention_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith(ATTENTION)]


@pytest.fixture
def by_formula() -> Iterator[Callable[[PreTrainedModel, YosoAttentionOptions], None]]:
    """Puts a model on an attention that is written out: all pairs, and masks of all pairs."""
    numbers: dict[nn.Module, int] = {}
    chosen: list[YosoAttentionOptions] = []

    def written_out(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else mask
        if others.get("sliding_window") is not None:
            scores = (query @ key.mT * others["scaling"]).masked_fill(~mask, -math.inf)
            return (scores.softmax(-1).nan_to_num() @ value).transpose(1, 2), None
        (options,) = chosen
        if options.use_expectation:
            q, k = (nn.functional.normalize(x, dim=-1) for x in (query.double(), key.double()))
            weights = (1 - torch.arccos((q @ k.mT).clamp(-1, 1)) / math.pi) ** options.hash_code_len
        else:
            numbers_of_hash = options.num_hash, options.hash_code_len
            heads, dim = query.shape[1], query.shape[3]
            signs = evaluation_draw("signs", options.seed, numbers[module], heads, *numbers_of_hash, dim, query.device)
            codes = [yoso_core.fast_hash(x.numpy(), signs.numpy(), *numbers_of_hash) for x in (query, key)]
            q, k = (torch.from_numpy(x) for x in codes)
            weights = (q[..., :, None, :] == k[..., None, :, :]).double().mean(-1)
        context = nn.functional.normalize(weights.masked_fill(~mask, 0) @ value.double(), dim=-1)
        return context.to(value.dtype).transpose(1, 2), weights

    def put(model: PreTrainedModel, options: YosoAttentionOptions) -> None:
        chosen[:] = [options]
        numbers.update({module: number for number, module in enumerate(attention_modules(model))})
        model.set_attn_implementation("written_out")

    AttentionInterface.register("written_out", written_out)
    AttentionMaskInterface.register("written_out", lambda **given: sdpa_mask(**given | {"allow_is_bidirectional_skip": False}))
    yield put
    del AttentionInterface._global_mapping["written_out"], AttentionMaskInterface._global_mapping["written_out"]


@every_model
@both_modes
def test_every_layer_computes_the_formula_with_its_own_hashes(
    name: str, options: YosoAttentionOptions, by_formula: Callable[[PreTrainedModel, YosoAttentionOptions], None]
) -> None:
    model = build(name, options)
    inputs, mask = inputs_of(name)
    got = hidden(model, **inputs)
    by_formula(model, options)
    assert apart(got[mask], hidden(model, **inputs)[mask]) < 2e-5


@pytest.mark.parametrize("other", [{"seed": 1}, {"num_hash": 17}, {"hash_code_len": 4}, {"use_expectation": True}], ids=str)
def test_the_comparison_with_the_formula_rejects_other_options(
    other: dict[str, Any], by_formula: Callable[[PreTrainedModel, YosoAttentionOptions], None]
) -> None:
    model = build("distilbert", SAMPLED)
    inputs, mask = inputs_of("distilbert")
    got = hidden(model, **inputs)
    by_formula(model, YosoAttentionOptions(**asdict(SAMPLED) | other))
    assert apart(got[mask], hidden(model, **inputs)[mask]) > 1e-2


# Padding


@every_text_model
@both_modes
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_text_is_what_it_is_alone(name: str, options: YosoAttentionOptions, side: str) -> None:
    model = build(name, options)
    lengths = (13, 20, 1)
    rows = [some_ids(n, seed=n) for n in lengths]
    ids, mask, positions = torch.full((3, 20), PAD), torch.zeros(3, 20, dtype=torch.long), torch.zeros(3, 20, dtype=torch.long)
    places = [slice(0, n) if side == "right" else slice(20 - n, 20) for n in lengths]
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[i, place], mask[i, place], positions[i, place] = row, 1, torch.arange(len(row))
    given = {"input_ids": ids, "attention_mask": mask}
    if side == "left" and "roberta" not in name:  # RoBERTa counts positions from the ids, padding aside
        given["position_ids"] = positions
    padded = hidden(model, **given)
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        assert apart(padded[i, place], hidden(model, input_ids=row[None])[0]) < 1e-5
    assert apart(padded[0, places[0]], hidden(model, **given | {"attention_mask": torch.ones_like(mask)})[0, places[0]]) > 1e-2


@both_modes
def test_padded_sound_is_what_it_is_alone(options: YosoAttentionOptions) -> None:
    model = build("wav2vec2", options)
    inputs, mask = inputs_of("wav2vec2")
    padded = hidden(model, **inputs)
    assert apart(padded[0, mask[0]], hidden(model, input_values=inputs["input_values"][:1, :200])[0]) < 1e-5
    assert apart(padded[1], hidden(model, input_values=inputs["input_values"][1:])[0]) < 1e-5


@both_modes
def test_an_image_meets_neither_its_neighbors_nor_its_masked_patches(options: YosoAttentionOptions) -> None:
    model = build("vit", options)
    inputs, mask = inputs_of("vit")
    got = hidden(model, **inputs)
    other = {name: x.clone() for name, x in inputs.items()}
    other["pixel_values"][1] = 0
    other["pixel_values"][0, :, 12:] += 1  # the last row of patches, which is masked
    again = hidden(model, **other)
    assert apart(got[0, mask[0]], again[0, mask[0]]) < 1e-5
    assert apart(got[1], again[1]) > 1e-2
    assert apart(got[1], hidden(model, pixel_values=inputs["pixel_values"][1:])[0]) < 1e-5


# Randomness


@pytest.mark.parametrize("name", ["bert", "distilbert", "vit"])
def test_evaluation_repeats_whatever_ran_before(name: str) -> None:
    model = build(name, SAMPLED)
    inputs, _ = inputs_of(name)
    first = hidden(model, **inputs)
    torch.manual_seed(1)
    assert torch.equal(first, hidden(model, **inputs))

    layers = attention_modules(busy := build(name, SAMPLED))
    states = torch.randn(1, 9, HIDDEN)
    for layer in reversed(layers):
        layer(states)
    busy.train()
    busy(**inputs).last_hidden_state.sum().backward()
    assert torch.equal(first, hidden(busy.eval(), **inputs))
    assert torch.equal(first, hidden(copy.deepcopy(busy), **inputs))


@pytest.mark.parametrize("name", ["distilbert", "vit", "wav2vec2"])
def test_a_layer_has_its_number_however_the_model_came_to_yoso(name: str) -> None:
    built, later = build(name, SAMPLED), build(name, SAMPLED, attention="eager")
    later.set_attn_implementation("yoso")
    enabled = build(name, attention="eager")
    enable_yoso_attention(SAMPLED, model=enabled)
    inputs, _ = inputs_of(name)
    first = hidden(built, **inputs)
    assert torch.equal(first, hidden(later, **inputs))
    assert torch.equal(first, hidden(enabled, **inputs))
    assert build(name, attention="eager").state_dict().keys() == built.state_dict().keys()


def test_a_model_and_its_head_number_their_layers_alike() -> None:
    config = transformers.DistilBertConfig(**DISTILBERT, attn_implementation="yoso")
    whole = transformers.DistilBertForMaskedLM(config)
    assert [layer._yoso_layer for layer in attention_modules(whole)] == list(range(LAYERS))
    whole.set_attn_implementation("yoso")
    assert [layer._yoso_layer for layer in attention_modules(whole)] == list(range(LAYERS))


def test_training_draws_anew_from_torchs_generator() -> None:
    model = build("bert", SAMPLED, hidden_dropout_prob=0.0).train()
    inputs, _ = inputs_of("bert")
    torch.manual_seed(3)
    first, second = hidden(model, **inputs), hidden(model, **inputs)
    assert apart(first, second) > 1e-2
    torch.manual_seed(3)
    assert torch.equal(first, hidden(model, **inputs))


def test_there_is_no_dropout_of_probabilities() -> None:
    model = build("bert", EXPECTED, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.9)
    inputs, _ = inputs_of("bert")
    assert torch.equal(hidden(model, **inputs), hidden(model.train(), **inputs))


# Options


def test_two_models_with_two_sets_of_options() -> None:
    inputs, _ = inputs_of("bert")
    one, two = build("bert", SAMPLED), build("bert", EXPECTED)
    first, second = hidden(one, **inputs), hidden(two, **inputs)
    assert apart(first, second) > 1e-2
    enable_yoso_attention(YosoAttentionOptions(num_hash=5))  # of neither
    assert torch.equal(first, hidden(one, **inputs))
    enable_yoso_attention(EXPECTED, model=one)
    assert torch.equal(second, hidden(one, **inputs))
    assert torch.equal(second, hidden(two, **inputs))


def test_options_of_the_process_are_of_all_models_without_their_own() -> None:
    inputs, _ = inputs_of("bert")
    model = build("bert")
    enable_yoso_attention(SAMPLED)
    assert torch.equal(hidden(model, **inputs), hidden(build("bert", SAMPLED), **inputs))
    enable_yoso_attention()
    assert torch.equal(hidden(model, **inputs), hidden(build("bert", YosoAttentionOptions()), **inputs))


def test_options_change_in_the_config() -> None:
    inputs, _ = inputs_of("bert")
    model = build("bert", SAMPLED)
    before = hidden(model, **inputs)
    model.config.yoso_attention["seed"] = 1
    assert apart(before, hidden(model, **inputs)) > 1e-2
    model.config.yoso_attention["seed"] = SAMPLED.seed
    assert torch.equal(before, hidden(model, **inputs))
    model.config.yoso_attention["number_of_hashes"] = 3
    with pytest.raises(TypeError, match="number_of_hashes"):
        hidden(model, **inputs)


def test_options_are_saved_with_the_model(tmp_path: Path) -> None:
    inputs, _ = inputs_of("distilbert")
    model = build("distilbert", attention="sdpa")
    enable_yoso_attention(SAMPLED, model=model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="yoso")
    assert torch.equal(hidden(model, **inputs), hidden(loaded, **inputs))
    enable_yoso_attention(model=loaded)  # keeps them
    assert loaded.config.yoso_attention == asdict(SAMPLED)


@both_modes
@pytest.mark.parametrize("own", [True, False], ids=["own_options", "options_of_the_process"])
def test_a_saved_model_attends_with_yoso_again(options: YosoAttentionOptions, own: bool, tmp_path: Path) -> None:
    """Loaded by its name alone, with the options that it had, whatever the process has by then."""
    inputs, _ = inputs_of("bert")
    model = build("bert", options if own else None)
    enable_yoso_attention(YosoAttentionOptions() if own else options)
    settings = model.config.to_dict()
    model.save_pretrained(tmp_path)
    assert model.config.to_dict() == settings | {"architectures": ["BertModel"], "dtype": model.config.to_dict()["dtype"]}
    expected = hidden(model, **inputs)
    enable_yoso_attention()
    for again in (transformers.AutoModel.from_pretrained(tmp_path), transformers.BertModel.from_pretrained(tmp_path)):
        assert again.config._attn_implementation == "yoso"
        assert torch.equal(hidden(again, **inputs), expected)
        again.save_pretrained(tmp_path / "again")
        assert torch.equal(hidden(transformers.AutoModel.from_pretrained(tmp_path / "again"), **inputs), expected)
    softmax = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert softmax.config._attn_implementation == "sdpa"
    softmax.save_pretrained(tmp_path / "softmax")
    assert transformers.AutoModel.from_pretrained(tmp_path / "softmax").config._attn_implementation == "sdpa"


def test_a_saved_model_is_refused_where_yoso_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By transformers: other numbers in silence would be worse."""
    build("bert", SAMPLED).save_pretrained(tmp_path)
    monkeypatch.delitem(AttentionInterface._global_mapping, "yoso")
    with pytest.raises(ValueError, match='Specified `attn_implementation="yoso"` is not supported'):
        transformers.AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("parts", [("vision_config",), ("text_config", "vision_config")], ids=len)
def test_a_saved_model_of_several_parts_has_the_same_parts_again(parts: tuple[str, ...], tmp_path: Path) -> None:
    vision = USUAL | {"image_size": 16, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=16)
    model = transformers.CLIPModel(config)
    model.set_attn_implementation({"": "sdpa"} | {name: "yoso" if name in parts else "eager" for name in ("text_config", "vision_config")})
    model.save_pretrained(tmp_path)
    again = transformers.CLIPModel.from_pretrained(tmp_path)
    for name in ("text_config", "vision_config"):
        assert (getattr(again.config, name)._attn_implementation == "yoso") == (name in parts)
    pixels = torch.ones(1, 3, 16, 16)
    assert torch.equal(again.vision_model(pixels).last_hidden_state, model.eval().vision_model(pixels).last_hidden_state)


def test_options_in_every_config_of_a_composite_model() -> None:
    towers = {"text_config": TEXT, "vision_config": USUAL | {"image_size": 16, "patch_size": 4}, "projection_dim": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(**towers)).eval()
    enable_yoso_attention(EXPECTED, model=model.vision_model)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(input_ids=some_ids(2, 7), pixel_values=pixels)
    assert out.logits_per_image.isfinite().all()
    assert model.config.text_config._attn_implementation == "sdpa"  # causal, and left alone
    with pytest.raises(ValueError, match="another pattern"):
        transformers.CLIPModel(transformers.CLIPConfig(**towers, attn_implementation="yoso"))(some_ids(2, 7), pixel_values=pixels)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_hash": 0}, "num_hash: need an integer at least 1, got 0"),
        ({"hash_code_len": 31}, "hash_code_len: need an integer between 1 and 30, got 31"),
        ({"seed": -1}, "seed: need an integer at least 0, got -1"),
        ({"seed": 0.5}, "seed: need an integer, got float 0.5"),
        ({"grad": "true"}, "grad: "),
        ({"backward": "none"}, "backward: "),
        ({"variant": "numpy:magic"}, "variant: "),
        ({"use_expectation": "yes"}, "use_expectation: need True or False, got 'yes'"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_options_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        YosoAttentionOptions(**wrong)


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match="options: need YosoAttentionOptions or None, got dict"):
        enable_yoso_attention({"num_hash": 3})
    with pytest.raises(TypeError, match="model: need a PreTrainedModel of transformers, got Linear"):
        enable_yoso_attention(model=nn.Linear(2, 2))


def test_the_variant_is_taken() -> None:
    inputs, mask = inputs_of("bert")
    names = [variant.name for variant in yoso_core.variants("yoso_attention")]
    slow, gpu = (next(name for name in names if name.startswith(where)) for where in ("numpy:", "cupy:"))
    best, written, impossible = (build("bert", YosoAttentionOptions(**asdict(SAMPLED) | {"variant": name})) for name in (None, slow, gpu))
    assert apart(hidden(best, **inputs)[mask], hidden(written, **inputs)[mask]) < 1e-5
    with pytest.raises(ValueError, match=gpu):
        hidden(impossible, **inputs)


# Attention of other shapes


@both_modes
def test_grouped_queries_share_keys_and_values(options: YosoAttentionOptions) -> None:
    """A bidirectional decoder whose four heads share keys and values in pairs, beside one that
    holds them twice.
    """
    config = TEXT | {"num_attention_heads": 4, "is_causal": False, "use_cache": False, "yoso_attention": asdict(options)}
    torch.manual_seed(0)
    grouped, plain = (
        transformers.LlamaModel(transformers.LlamaConfig(**config, num_key_value_heads=n, attn_implementation="yoso")).eval()
        for n in (2, 4)
    )
    weights = grouped.state_dict()
    for name in weights:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            weights[name] = weights[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    plain.load_state_dict(weights)
    inputs, mask = inputs_of("bert")
    got = hidden(grouped, **inputs)
    assert apart(got[mask], hidden(plain, **inputs)[mask]) < 1e-5
    assert apart(got[0, mask[0]], hidden(grouped, input_ids=inputs["input_ids"][:1, :13])[0]) < 1e-5


def one_layer(kind: type[nn.Module] = BertSelfAttention, layer_idx: int | None = 0, **options: Any) -> nn.Module:
    config = transformers.BertConfig(**TEXT, attn_implementation="yoso", yoso_attention=options)
    torch.manual_seed(0)
    return kind(config, layer_idx=layer_idx).eval()


@both_modes
@pytest.mark.parametrize("n_q", [5, 9], ids=["shorter", "as-long"])
def test_cross_attention_masks_its_keys_alone(options: YosoAttentionOptions, n_q: int) -> None:
    layer = one_layer(BertCrossAttention, **asdict(options))
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(1, n_q, HIDDEN, generator=generator), torch.randn(1, 9, HIDDEN, generator=generator)
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    mask[..., 6:] = False
    assert apart(layer(queries, keys, mask)[0], layer(queries, keys[:, :6])[0]) < 1e-5


def test_local_layers_keep_their_window() -> None:
    local = {"layer_types": ["sliding_attention"] * 3}
    ours, theirs = build("modernbert", **local), build("modernbert", attention="sdpa", **local)
    inputs, mask = inputs_of("modernbert")
    assert apart(hidden(ours, **inputs)[mask], hidden(theirs, **inputs)[mask]) < 1e-5
    ids = some_ids(1, 20)
    far = ids.clone()
    far[0, 7:] = some_ids(13, seed=1)  # three layers of two tokens to either side reach six
    assert torch.equal(hidden(ours, input_ids=ids)[0, 0], hidden(ours, input_ids=far)[0, 0])
    mixed = build("modernbert")
    assert apart(hidden(mixed, input_ids=ids)[0, 0], hidden(mixed, input_ids=far)[0, 0]) > 1e-4


def test_local_layers_with_grouped_queries() -> None:
    """A bidirectional decoder of which every layer has a window."""
    config = TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 3, "is_causal": False, "use_cache": False}
    inputs, mask = inputs_of("bert")
    states = []
    for attention in ("yoso", "sdpa"):
        torch.manual_seed(0)
        model = transformers.MistralModel(transformers.MistralConfig(**config, attn_implementation=attention)).eval()
        states.append(hidden(model, **inputs)[mask])
    assert apart(*states) < 1e-5


@every_model
def test_weights_are_the_expected_ones(name: str, by_formula: Callable[[PreTrainedModel, YosoAttentionOptions], None]) -> None:
    model = build(name, EXPECTED)
    inputs, mask = inputs_of(name)
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions
        assert len(weights) == model.config.num_hidden_layers
        by_formula(model, EXPECTED)
        expected = model(**inputs, output_attentions=True).attentions
    n = mask.shape[1]
    for layer in weights:
        assert layer.shape == (2, HEADS, n, n)
        assert (layer[0, :, :, ~mask[0]] == 0).all()
    assert apart(weights[0].masked_fill(~mask[:, None, None], 0), expected[0].masked_fill(~mask[:, None, None], 0)) < 1e-5


def test_weights_of_local_layers_are_the_eager_ones() -> None:
    local = {"layer_types": ["sliding_attention"] * 3}
    inputs, mask = inputs_of("modernbert")
    ours, theirs = (build("modernbert", attention=x, **local)(**inputs, output_attentions=True).attentions for x in ("yoso", "eager"))
    for got, expected in zip(ours, theirs, strict=True):
        rows = mask[:, None, :, None].expand_as(got)
        assert apart(got[rows], expected[rows]) < 1e-5


# Learning


@pytest.mark.slow
@both_modes
def test_a_model_learns(options: YosoAttentionOptions) -> None:
    """One of two marks stands in every text. The answer is read at the first token, the same in
    all: attention has to bring it there.
    """
    torch.manual_seed(0)
    settings = TEXT | {"vocab_size": 16, "hidden_dropout_prob": 0.0, "yoso_attention": asdict(options)}
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(**settings, attn_implementation="yoso", num_labels=2)
    ).train()
    ids, labels = torch.randint(5, 16, (32, 8)), torch.arange(32) % 2
    ids[:, 0] = 0
    ids[torch.arange(32), torch.randint(1, 8, (32,))] = 3 + labels
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.6
    assert losses[-1] < 0.3 * losses[0]


@both_modes
@pytest.mark.parametrize("grad", ["lower_bound", "exact"])
@pytest.mark.parametrize("backward", ["lsh", "expectation"])
def test_gradients_are_those_of_the_options(options: YosoAttentionOptions, grad: str, backward: str) -> None:
    chosen = asdict(options) | {"grad": grad, "backward": backward}
    layer = one_layer(**chosen).train()
    generator = torch.Generator().manual_seed(0)
    states, toward = (torch.randn(2, 9, HIDDEN, generator=generator) for _ in range(2))
    heads = [x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (layer.query(states), layer.key(states), layer.value(states))]
    del chosen["seed"]
    chosen["layout"] = chosen.pop("hash_layout")
    gradients = []
    for function in (lambda: layer(states)[0], lambda: yoso_attention(*heads, **chosen).transpose(1, 2).flatten(2)):
        torch.manual_seed(4)
        gradients += torch.autograd.grad(function(), layer.query.weight, toward)
    assert gradients[0].abs().max() > 0.1
    assert apart(*gradients) < 1e-5


@both_modes
def test_checkpointing_recomputes_with_the_same_hashes(options: YosoAttentionOptions) -> None:
    inputs, _ = inputs_of("bert")
    gradients = []
    for checkpointed in (False, True):
        model = build("bert", options, hidden_dropout_prob=0.0).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        torch.manual_seed(5)
        model(**inputs).last_hidden_state.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-5)


@both_modes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(options: YosoAttentionOptions, dtype: torch.dtype) -> None:
    model = build("bert", options)
    inputs, mask = inputs_of("bert")
    expected, got = hidden(model, **inputs), hidden(model.to(dtype), **inputs)
    assert got.dtype == dtype
    assert got.isfinite().all()
    # Hash codes flip where rounding moves a vector across a plane; the expectation moves by the
    # rounding alone.
    if options.use_expectation:
        assert apart(got.float()[mask], expected[mask]) < (0.02 if dtype == torch.float16 else 0.15)


@pytest.mark.slow
@both_modes
def test_compiled_in_one_graph(options: YosoAttentionOptions) -> None:
    torch._dynamo.reset()
    model = build("distilbert", options)
    inputs, _ = inputs_of("distilbert")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(hidden(compiled, **inputs), hidden(model, **inputs))
    enable_yoso_attention(YosoAttentionOptions(num_hash=4, hash_code_len=2), model=model)
    assert torch.equal(hidden(compiled, **inputs), hidden(model, **inputs))
    torch._dynamo.reset()


def test_what_trainers_and_tokenizers_add_is_let_through() -> None:
    config = transformers.BertConfig(**TEXT, attn_implementation="yoso")
    model = transformers.BertForMaskedLM(config)
    ids = some_ids(2, 9)
    model(ids, labels=ids, num_items_in_batch=torch.tensor(18)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    extra = {"special_tokens_mask": torch.zeros(2, 9, dtype=torch.long), "head_mask": None}
    plain = build("bert")
    assert torch.equal(hidden(plain, input_ids=ids, **extra), hidden(plain, input_ids=ids))


# What must raise


def causal_models() -> dict[str, Callable[[], Any]]:
    decoder = TEXT | {"attn_implementation": "yoso", "num_key_value_heads": 1}
    ids = some_ids(2, 9)
    return {
        "bert-decoder": lambda: transformers.BertLMHeadModel(transformers.BertConfig(**TEXT, attn_implementation="yoso", is_decoder=True))(
            ids
        ),
        "gpt2": lambda: transformers.GPT2Model(
            transformers.GPT2Config(
                vocab_size=VOCAB, n_embd=HIDDEN, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=2, attn_implementation="yoso"
            )
        )(ids),
        "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**decoder))(ids),
        "mistral-sliding": lambda: transformers.MistralModel(transformers.MistralConfig(**decoder, sliding_window=4))(ids),
    }


SEQ2SEQ = {"d_model": HIDDEN, "vocab_size": VOCAB, "encoder_layers": LAYERS, "decoder_layers": 1} | {
    f"{side}_{name}": number for side in ("encoder", "decoder") for name, number in (("attention_heads", HEADS), ("ffn_dim", 48))
}
SPECIAL = {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}


def seq2seq(name: str, **settings: Any) -> Any:
    """BART or Whisper, with weights large enough for attention to matter."""
    sizes = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20} if name == "Whisper" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SEQ2SEQ | SPECIAL | sizes, **settings)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(std=0.3)
    return model


def source(name: str) -> Tensor:
    return torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0)) if name == "Whisper" else some_ids(2, 9)


both_kinds = pytest.mark.parametrize("name", ["Bart", "Whisper"])


@both_kinds
@both_modes
def test_the_encoder_alone_of_an_encoder_decoder(name: str, options: YosoAttentionOptions, tmp_path: Path) -> None:
    """The decoder and its attention to the encoder stay as they were. The whole generates and
    learns, and says when it is saved that this is not.
    """
    model, plain = seq2seq(name), seq2seq(name)
    enable_yoso_attention(options, model=model.get_encoder())
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert [part.config._attn_implementation for part in (model, model.get_encoder(), model.get_decoder())] == ["sdpa", "yoso", "sdpa"]
    enable_yoso_attention(options, model=model.get_encoder())
    words, begin = source(name), some_ids(2, 4, seed=1)
    with torch.no_grad():
        encoded = model.get_encoder()(words)
        whole = model(words, decoder_input_ids=begin).logits
        assert torch.equal(whole, plain(encoder_outputs=encoded, decoder_input_ids=begin).logits)
        assert apart(whole, plain(words, decoder_input_ids=begin).logits) > 1e-3
        assert model.generate(words, max_new_tokens=3, do_sample=False).shape[0] == 2
    model.train()(words, decoder_input_ids=begin, labels=begin).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with pytest.warns(UserWarning, match=r"ForConditionalGeneration: a part of it attends with YOSO .* not saved"):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    enable_yoso_attention(options, model=again.get_encoder())
    with torch.no_grad():
        assert torch.equal(again(words, decoder_input_ids=begin).logits, whole)


def test_padded_text_of_an_encoder_decoder_is_what_it_is_alone() -> None:
    model = seq2seq("Bart")
    enable_yoso_attention(SAMPLED, model=model.get_encoder())
    words, begin, mask = source("Bart"), some_ids(2, 4, seed=1), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    padded = model(words, attention_mask=mask, decoder_input_ids=begin).logits[0]
    assert apart(padded, model(words[:1, :6], decoder_input_ids=begin[:1]).logits[0]) < 1e-5


@both_kinds
def test_an_encoder_decoder_with_a_causal_decoder_is_refused_as_a_whole(name: str, tmp_path: Path) -> None:
    """And is left as it was."""
    message = r"has a decoder that is causal, which hashing cannot follow; give YOSO to the encoder alone: enable_yoso_attention\(model="
    with pytest.raises(ValueError, match=message):
        seq2seq(name, attn_implementation="yoso")
    model = seq2seq(name)
    for asked in (lambda: enable_yoso_attention(model=model), lambda: model.set_attn_implementation("yoso")):
        with pytest.raises(ValueError, match=message):
            asked()
        assert {part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)} == {"sdpa"}
        assert getattr(model.config, "yoso_attention", None) is None
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        type(model).from_pretrained(tmp_path, attn_implementation="yoso")


@pytest.mark.parametrize("name", causal_models())
def test_causal_models_raise(name: str) -> None:
    with pytest.raises(ValueError, match=r'attn_implementation="yoso": .*(another pattern|is causal)'):
        causal_models()[name]()


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 1, 9, 9, dtype=torch.bool).tril(), ValueError, r"one mask for all queries, shape \(batch, 9\)"),
        (torch.zeros(2, 1, 1, 9), TypeError, "an additive one of torch.float32"),
        (torch.where(torch.arange(9) < 4, 0, -10000).expand(2, 1, 1, 9), ValueError, "need 1 for a token and 0 for padding"),
        (torch.ones(2, 9, 9), ValueError, r"need shape \(batch, 9\), got \(2, 9, 9\)"),
        (torch.ones(2, 8), ValueError, r"need shape \(batch, 9\) given to the model, got \(2, 1, 1, 8\)"),
    ],
    ids=["per-query", "additive", "additive-integers", "three-dims", "too-short"],
)
def test_masks_that_cannot_be_kept_to_raise(mask: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^attention_mask: .*{message}"):
        build("bert")(some_ids(2, 9), attention_mask=mask)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("cu_seq_lens_q", torch.tensor([0, 4, 9])),
        ("position_bias", torch.zeros(1, HEADS, 9, 9)),
        ("a_new_bias", torch.zeros(1, HEADS, 9, 9)),
        ("slopes", torch.zeros(HEADS)),
        ("softcap", 30.0),
        ("cache", object()),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_arguments_that_would_change_the_weights_raise(name: str, given: object) -> None:
    with pytest.raises(ValueError, match=f"BertSelfAttention gives {name}, which YOSO attention cannot take into account"):
        build("bert")(some_ids(2, 9), **{name: given})


def test_relative_positions_raise() -> None:
    t5 = transformers.T5Config(vocab_size=VOCAB, d_model=HIDDEN, d_kv=16, num_layers=1, num_heads=2, d_ff=32, attn_implementation="yoso")
    with pytest.raises(ValueError, match="T5Attention gives position_bias"):
        transformers.T5EncoderModel(t5)(some_ids(2, 9))
    sizes = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 4}
    with pytest.raises(TypeError, match="YOSO has no scores to add a bias to"):
        transformers.SwinModel(transformers.SwinConfig(**sizes, attn_implementation="yoso"))(torch.zeros(1, 3, 16, 16))


def test_a_window_without_its_mask_raises() -> None:
    model = build("modernbert")
    whole = torch.ones(1, 1, 1, 20, dtype=torch.bool)
    for mask in (None, whole):
        with pytest.raises(ValueError, match=r"ModernBertAttention attends within a window .* mask \(batch, 1, 20, 20\)"):
            model(some_ids(1, 20), attention_mask={"full_attention": None, "sliding_attention": mask})


def test_weights_of_sampled_attention_are_shares_of_the_hashes() -> None:
    model = build("bert", SAMPLED).eval()
    found = model(some_ids(1, 9), output_attentions=True)
    assert torch.equal(found.last_hidden_state, model(some_ids(1, 9)).last_hidden_state)
    for weights in found.attentions:
        shares = weights * SAMPLED.num_hash
        torch.testing.assert_close(shares, shares.round(), rtol=0, atol=1e-5)
        assert 0 < weights.mean() < 1
        assert weights.requires_grad


OWN_ATTENTION = {"deberta": "Deberta", "deberta-v2": "DebertaV2", "yoso": "Yoso", "mpnet": "MPNet", "fnet": "FNet"}


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_models_that_never_ask_raise(name: str, tmp_path: Path) -> None:
    kind = getattr(transformers, f"{OWN_ATTENTION[name]}Model")
    message = f"{OWN_ATTENTION[name]}Model computes its attention itself"
    model = kind(getattr(transformers, f"{OWN_ATTENTION[name]}Config")(**TEXT, attn_implementation="eager"))
    with pytest.raises(ValueError, match=message):
        kind(type(model.config)(**TEXT, attn_implementation="yoso"))
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation("yoso")
    with pytest.raises(ValueError, match=message):
        enable_yoso_attention(model=model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        kind.from_pretrained(tmp_path, attn_implementation="yoso")


def test_a_layer_without_a_number_raises_where_it_needs_one() -> None:
    states = torch.randn(1, 9, HIDDEN)
    with pytest.raises(ValueError, match="BertSelfAttention: has no layer number"):
        one_layer(layer_idx=None)(states)
    one_layer(layer_idx=None).train()(states)
    one_layer(layer_idx=None, use_expectation=True)(states)


def test_enabling_again_changes_nothing_else() -> None:
    before = PreTrainedModel.post_init, PreTrainedModel.set_attn_implementation
    enable_yoso_attention()
    assert before == (PreTrainedModel.post_init, PreTrainedModel.set_attn_implementation)
    other = build("bert", attention="sdpa")
    assert other.config._attn_implementation == "sdpa"
    assert not any(hasattr(module, "_yoso_layer") for module in other.modules())
