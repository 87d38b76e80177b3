"""What others put around a model and into it: hooks, offloading, sharding, gradients of single
texts, adapters in the place of layers; and `adopt` of a model in which they stand.
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from model_support import close, config, enliven, gradients, ids, lively, stock_config
from test_model_common import HEADS, LABELS, WITH_LABELS, both_modes, build, every_head, same, tensors, texts
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.models.yoso import modeling_yoso

from yoso_core.model import YosoConfig, YosoPreTrainedModel, adopt
from yoso_core.model.values import shapes_alone, values_can_be_read

PEFT = "peft is not installed"

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by peft


def without_types(head: str) -> dict[str, Tensor]:
    """Texts whose token types and positions are left to the model, and labels."""
    given = texts(head) | WITH_LABELS[head]
    del given["token_type_ids"]
    return given


# Without values


@every_head
@both_modes
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_shapes_come_without_values(head: str, way: str, training: bool) -> None:
    """On the device meta, and under FakeTensorMode, as estimators of memory and FLOPs use it; and
    nothing of it is left in what is computed afterwards.
    """
    model, given = build(head, way, hash_seed=77).train(training), texts(head) | WITH_LABELS[head]
    shapes = [x.shape for x in tensors(model(**given))]
    model.config.hash_seed += 1  # hashes that no call has drawn yet
    nowhere = copy.deepcopy(model).to("meta")(**{name: x.to("meta") for name, x in given.items()})
    assert [x.shape for x in tensors(nowhere)] == shapes
    assert all(x.is_meta for x in tensors(nowhere))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = model(**given)
    assert [x.shape for x in tensors(fake)] == shapes
    assert all(isinstance(x, FakeTensor) for x in tensors(fake))
    assert not any(isinstance(x, FakeTensor) for x in tensors(model(**given)))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_values_are_read_only_where_there_are_some() -> None:
    x, seen = torch.ones(2), []

    def look(y: Tensor) -> Tensor:
        seen.append(values_can_be_read(y))
        return 2 * y

    look(x)
    assert seen == [True]
    seen.clear()
    look(x.to("meta"))
    with FakeTensorMode() as mode:
        look(fake := mode.from_tensor(x))
        assert shapes_alone()
    look(fake)
    torch.func.vmap(look)(x)
    torch.func.grad(lambda y: look(y).sum())(x)
    torch.func.jvp(look, (x,), (x,))
    torch.fx.experimental.proxy_tensor.make_fx(look)(x)
    assert seen == [False] * 7
    seen.clear()
    torch.jit.trace(look, x, check_trace=False)
    torch.compile(lambda y: look(y), backend="eager", fullgraph=True)(x)
    assert seen == [False] * 2
    assert not shapes_alone()


# Every parameter is used through its module


@every_head
@both_modes
def test_every_module_is_called(head: str, way: str) -> None:
    model = build(head, way, conv_window=3)
    called: list[str] = []
    modules = {name: module for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(**without_types(head))
    assert set(called) == set(modules)


def lend_weights(model: nn.Module) -> None:
    """Let the weights of every module be there for the time of its call, as offloading and sharding
    do.
    """
    kept = {weight: weight.data for weight in model.parameters()}

    def take(module: nn.Module, *_: Any) -> None:
        for weight in module.parameters(recurse=False):
            weight.data = torch.empty(0)

    def give(module: nn.Module, *_: Any) -> None:
        for weight in module.parameters(recurse=False):
            weight.data = kept[weight]

    for module in model.modules():
        module.register_forward_pre_hook(give)
        module.register_forward_hook(take)
        take(module)


@every_head
@both_modes
def test_no_weight_is_read_outside_the_call_of_its_module(head: str, way: str) -> None:
    model = build(head, way, conv_window=3)
    with torch.no_grad():
        expected = model(**without_types(head))
        lend_weights(model)
        same(model(**without_types(head)), expected)


def of_each_text(module: nn.Module, given: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The gradients of a module's weights for each row of the batch, by the formulas."""
    if isinstance(module, nn.Embedding):
        none = torch.zeros_like(module.weight)
        return {"weight": torch.stack([none.index_add(0, i.flatten(), g.flatten(0, -2)) for i, g in zip(given, grad, strict=True)])}
    given, grad = (x.reshape(len(x), -1, x.shape[-1]) for x in (given, grad))
    if isinstance(module, nn.Linear):
        return {"weight": grad.mT @ given, "bias": grad.sum(1)}
    assert isinstance(module, nn.LayerNorm)
    normal = nn.functional.layer_norm(given, module.normalized_shape, eps=module.eps)
    return {"weight": (grad * normal).sum(1), "bias": grad.sum(1)}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # for tables, whose inputs are ids
@every_head
@both_modes
def test_gradients_of_single_texts_are_those_of_the_texts_alone(head: str, way: str) -> None:
    """By what goes through each module, as differential privacy takes them (opacus): every module
    sees every text by itself, the tables too.
    """
    model = build(head, way).double()
    given = texts(head)
    del given["token_type_ids"]
    names = {id(weight): name for name, weight in model.named_parameters()}
    found: dict[str, Tensor] = {}
    seen: dict[nn.Module, Tensor] = {}

    def backward(module: nn.Module, _: Any, grads: tuple[Tensor, ...]) -> None:
        for name, each in of_each_text(module, seen[module], grads[0]).items():
            name = names[id(getattr(module, name))]
            found[name] = found.get(name, 0) + each

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
            module.register_forward_hook(lambda module, given, _: seen.update({module: given[0].detach()}))
            module.register_full_backward_hook(backward)
    sum(x.square().sum() for x in tensors(model(**given))).backward()
    assert found.keys() == dict(model.named_parameters()).keys()
    batch = len(given["input_ids"])
    for i in range(batch):
        alone = build(head, way).double()
        sum(x.square().sum() for x in tensors(alone(**{name: x[i : i + 1] for name, x in given.items()}))).backward()
        for name, grad in gradients(alone).items():
            if name.endswith("word_embeddings.weight"):
                grad[1] = found[name].unflatten(0, (batch, -1))[i].sum(0)[1]  # the padding's word gets none, by torch's rule
            close(found[name].unflatten(0, (batch, -1))[i].sum(0), grad, 1e-9)


@every_head
@both_modes
def test_torch_func_gives_the_gradients_of_single_texts(head: str, way: str) -> None:
    model = build(head, way).double()
    given, weights = texts(head) | WITH_LABELS[head], {name: weight.detach() for name, weight in model.named_parameters()}

    def score(weights: dict[str, Tensor], one: dict[str, Tensor]) -> Tensor:
        output = torch.func.functional_call(model, weights, kwargs={name: x[None] for name, x in one.items()})
        return sum(x.square().sum() for x in tensors(output))

    found = torch.func.vmap(torch.func.grad(score), in_dims=(None, 0))(weights, given)
    for i in range(len(given["input_ids"])):
        alone = torch.func.grad(score)(weights, {name: x[i] for name, x in given.items()})
        for name, grad in alone.items():
            close(found[name][i], grad, 1e-12)
        assert sum(grad.abs().sum() for grad in alone.values()) > 0


@pytest.fixture
def one_process() -> Iterator[Any]:
    """A mesh of one process."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")  # nobody writes to it
@both_modes
def test_tables_can_be_sharded_one_by_one(one_process: Any, way: str) -> None:
    """FSDP2, whose shards mix with no plain tensor: every head, forward and backward."""
    from torch.distributed.fsdp import fully_shard

    for head in HEADS:
        model = build(head, way, conv_window=3, tie_word_embeddings=False)
        output = model(**without_types(head))
        output[0].sum().backward()
        expected = gradients(model)
        model.zero_grad()
        for module in model.modules():
            if isinstance(module, nn.Embedding | nn.LayerNorm):
                fully_shard(module, mesh=one_process)
        fully_shard(model, mesh=one_process)
        sharded = model(**without_types(head))
        same(sharded, output)
        sharded[0].sum().backward()
        got = gradients(model)
        assert got.keys() == expected.keys()
        for name, grad in expected.items():
            close(got[name].full_tensor(), grad, 1e-6)


# Adapters


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft", reason=PEFT)


TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def layers_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]


@every_head
@both_modes
def test_adapters_on_every_layer_and_table_learn_and_merge(peft: Any, head: str, way: str) -> None:
    """Each of them has its effect and its gradient; merged they give the same. In float64, where no
    hash differs.
    """
    base = build(head, way, tie_word_embeddings=False).double()
    names = layers_of(base)
    assert {name.rpartition(".")[2] for name in names} >= {*TABLES, "query", "key", "value", "dense"}
    with torch.no_grad():
        plain = base(**without_types(head))[0]
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)).eval()
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.double()
    adapted = model(**without_types(head))[0]
    adapted.square().sum().backward()
    learned = {name.split(".lora_")[0].removeprefix("base_model.model.") for name, grad in gradients(model).items() if grad.any()}
    assert learned >= {name for name in names if not name.endswith(".key")}
    merged = model.merge_and_unload()
    assert layers_of(merged) == names
    with torch.no_grad():
        close(merged(**without_types(head))[0], adapted, 1e-9)
    assert (adapted - plain).abs().max() > 1e-3


@every_head
@pytest.mark.parametrize("table", TABLES)
def test_an_adapter_on_one_table_has_its_effect(peft: Any, head: str, table: str) -> None:
    base = build(head)
    with torch.no_grad():
        plain = base(**without_types(head))[0]
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=[table], init_lora_weights=False)).eval()
    adapted = model(**without_types(head))[0]
    assert (adapted - plain).abs().max() > 1e-4
    adapted.square().sum().backward()
    assert gradients(model)
    assert all(grad.any() for grad in gradients(model).values())


@every_head
@both_modes
def test_single_tokens_can_be_trained(peft: Any, head: str, way: str) -> None:
    """As new words are: only their rows change. Merged with tied words, peft leaves the decoder
    behind (BERT's too), so they are not tied here.
    """
    base = build(head, way, tie_word_embeddings=False)
    before = base.get_input_embeddings().weight.detach().clone()
    choice = {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [5, 6]}}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, **choice)).train()
    trained = [weight for name, weight in model.named_parameters() if "trainable_tokens_delta" in name]
    assert [weight.shape for weight in trained] == [(2, 36)]
    given = without_types(head)
    given["input_ids"][..., 0], given["input_ids"][..., 1] = 5, 6
    given["attention_mask"][..., :2] = 1
    model(**given)[0].square().sum().backward()
    assert trained[0].grad.abs().sum(1).all()
    with torch.no_grad():
        trained[0].add_(1)
        expected = model.eval()(**given)[0]
    merged = model.merge_and_unload()
    changed = (merged.get_input_embeddings().weight - before).abs().sum(1).nonzero().flatten()
    assert changed.tolist() == [5, 6]
    with torch.no_grad():
        close(merged(**given)[0], expected, 1e-5 if way == "expectation" else 0.1)


def test_the_position_table_under_an_adapter_is_not_lengthened(peft: Any) -> None:
    """It would be exchanged, and the adapter with it."""
    model = build("YosoModel")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["position_embeddings"]))
    adapted = model.embeddings.position_embeddings
    with pytest.raises(ValueError, match=r"^position_embeddings: need a plain table .* got peft\..*\.Embedding; lengthen the table before"):
        model.extend_positions(48)
    assert model.embeddings.position_embeddings is adapted
    assert model.config.max_position_embeddings == 24


# Adopted with them

SHARED = [head for head in HEADS if head != "YosoForPreTraining"]

WRAPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "sequence": ("YosoForSequenceClassification", {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}),
    "token": ("YosoForTokenClassification", {"task_type": "TOKEN_CLS", "target_modules": ["query", "value"]}),
    "question": ("YosoForQuestionAnswering", {"task_type": "QUESTION_ANS", "target_modules": ["query", "value"]}),
    "features": ("YosoModel", {"task_type": "FEATURE_EXTRACTION", "target_modules": ["query", "value"]}),
    "embeddings": ("YosoModel", {"target_modules": ["query"], "modules_to_save": ["embeddings"]}),
    "a_whole_layer": ("YosoForMaskedLM", {"target_modules": ["key"], "modules_to_save": ["encoder.layer.1"]}),
    "the_head": ("YosoForMaskedLM", {"target_modules": ["key"], "modules_to_save": ["predictions.transform"]}),
    "words": ("YosoForMaskedLM", {"target_modules": ["query", "word_embeddings"]}),
    "tokens": ("YosoForTokenClassification", {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [5, 6]}}),
}
every_wrapping = pytest.mark.parametrize("case", WRAPPED)


def stock_under(peft: Any, case: str) -> tuple[Any, Any]:
    """transformers' own model, and the model of peft around it, whose adapters matter."""
    head, how = WRAPPED[case]
    model = getattr(modeling_yoso, head)(stock_config(config(num_labels=LABELS, conv_window=3)))
    around = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **how))
    enliven(around)
    return model, around.eval()


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


@every_wrapping
@pytest.mark.parametrize("whole", [True, False], ids=["the_model_of_peft", "the_model_in_it"])
def test_adopted_in_its_wrappers_a_model_is_all_ours(peft: Any, case: str, whole: bool) -> None:
    model, around = stock_under(peft, case)
    words = ids(2, 7)
    with torch.no_grad():
        expected = around(input_ids=words)[0]
        weights = dict(around.named_parameters())
        given = around if whole else model
        assert adopt(given) is given
        close(around(input_ids=words)[0], expected)
    assert isinstance(model, YosoPreTrainedModel)
    assert type(model.config) is YosoConfig
    assert not [name for name, kind in kinds(around).items() if kind.__module__ == modeling_yoso.__name__]
    assert dict(around.named_parameters()).keys() == weights.keys()
    assert all(weight is weights[name] for name, weight in around.named_parameters())
    for module in model.modules():
        assert getattr(module, "config", model.config) is model.config
    if whole:
        assert around.config is model.config
    assert adopt(given) is given
    model.config.use_expectation = False
    sampled = around(input_ids=words)[0]
    assert (sampled - expected).abs().max() > 1e-3
    sampled.square().sum().backward()
    assert all(grad.isfinite().all() for grad in gradients(around).values())
    masked = around(input_ids=words, attention_mask=(torch.arange(7) < 4).long().expand(2, 7))[0]
    assert (masked - sampled).abs().max() > 1e-3


@every_wrapping
def test_a_model_that_cannot_be_adopted_is_left_as_it_was(peft: Any, case: str) -> None:
    """Whatever is found last."""
    model, around = stock_under(peft, case)
    with torch.no_grad():
        expected = around(input_ids=ids(2, 7))[0]
    wrapped = model.base_model.encoder.layer[-1]
    inner = next(module for module in wrapped.modules() if type(module) is modeling_yoso.YosoOutput)
    inner.__class__ = type("AnotherOutput", (modeling_yoso.YosoOutput,), {})
    before = kinds(around)
    with pytest.raises(ValueError, match=r"^model: need a YosoOutput at (yoso\.)?encoder\.layer\.1\.output, got .*AnotherOutput"):
        adopt(model)
    assert kinds(around) == before
    assert type(model.config) is transformers.YosoConfig
    with torch.no_grad():
        assert torch.equal(around(input_ids=ids(2, 7))[0], expected)


def test_adopted_an_adapter_can_be_added(peft: Any) -> None:
    """Its copy of the classifier is made of ours."""
    model, around = stock_under(peft, "sequence")
    adopt(around)
    around.add_adapter("second", peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    around.set_adapter("second")
    around(input_ids=ids(2, 7), labels=torch.tensor([0, 1])).loss.backward()
    assert any("second" in name for name in gradients(around))
    around.set_adapter("default")
    merged = around.merge_and_unload()
    assert merged is model
    assert type(merged.classifier).__module__ == "yoso_core.model.heads"
    assert copy.deepcopy(merged)(ids(2, 7)).logits.shape == (2, LABELS)


def test_adopt_takes_a_module_that_holds_one_model() -> None:
    held = nn.Sequential(modeling_yoso.YosoModel(stock_config(config())))
    assert adopt(held) is held
    assert type(held[0]) is type(lively("YosoModel"))
    two = nn.ModuleList(modeling_yoso.YosoModel(stock_config(config())) for _ in range(2))
    with pytest.raises(TypeError, match=r"^model: need a YOSO model of transformers, got torch\..*ModuleList"):
        adopt(two)
