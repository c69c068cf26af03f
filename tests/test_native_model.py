"""A pruned model is the native model with fewer tokens: what it honours of the model, and what it refuses by name.

At dial 0 no token is pruned, so whatever the model does, the pruned model does too, or it says that it does not.
docs/native.md lists each line with its test here.
"""

import copy
import warnings

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import policy_for, tiny_vit
from timm.data import resolve_model_data_config
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from timm.optim import create_optimizer_v2
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as masks
from torch.optim import SGD

import tokengame
from tokengame import TokenGameError
from tokengame.game import TokenGame
from tokengame.packed.attention import cross_attention, padded_attention
from tokengame.packed.layout import RaggedLayout

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
QKV, MLP = "blocks.1.attn.qkv", "blocks.2.mlp"


def pruned(model, dial=0.0, transition="merge"):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this policy was trained for other weights")
        return tokengame.prune(model, policy_for(tiny_vit(), transition), dial)


def same(fast, model, images=IMAGES):
    with torch.no_grad():
        torch.testing.assert_close(fast(images), model(images), atol=1e-5, rtol=1e-4)


# Hooks and methods


def halve(_module, _inputs, output):
    return output * 0.5


BYPASSED = ["", "blocks", "blocks.1", "blocks.1.attn", "blocks.1.attn.attn_drop"]
KINDS = {
    "hook": lambda part: part.register_forward_hook(halve),
    "pre-hook": lambda part: part.register_forward_pre_hook(lambda _part, inputs: inputs),
    "pre-hook with keywords": lambda part: part.register_forward_pre_hook(lambda *_: None, with_kwargs=True),
    "backward hook": lambda part: part.register_full_backward_hook(lambda *_: None),
    "method": lambda part: setattr(part, "forward", lambda *args, **_: args[0]),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BYPASSED)
def test_hooks_and_methods_that_would_be_skipped_are_refused(name, kind, when, model):
    fast = pruned(model) if when == "after" else None
    KINDS[kind](model.get_submodule(name))
    said = f"the model's {name} has" if name else "the model has"
    with pytest.raises(TokenGameError, match=said):
        pruned(model) if fast is None else fast(IMAGES)


@pytest.mark.parametrize("method", ["forward_features", "forward_head", "_pos_embed", "pool"])
def test_replaced_methods_of_the_model_are_refused(method, model):
    own = getattr(model, method)
    setattr(model, method, lambda *args, **named: own(*args, **named) * 0.5)
    with pytest.raises(TokenGameError, match=f"the model has another {method} than its class"):
        pruned(model)


@pytest.mark.parametrize("kind", [Block, Attention])
def test_methods_replaced_on_a_class_are_refused(kind, model, monkeypatch):
    own = kind.forward

    def forward(self, *args, **named):
        return own(self, *args, **named) * 0.5

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(TokenGameError, match=f"than its class {kind.__name__}"):
        pruned(model)


@pytest.mark.parametrize("name", [QKV, MLP, "blocks.3.norm1", "blocks.0.attn.proj", "norm"])
def test_hooks_on_other_parts_act_and_are_said_to_see_rows(name, model):
    plain = model(IMAGES)
    model.get_submodule(name).register_forward_hook(halve)
    with pytest.warns(UserWarning, match=f"put on {name} see packed rows"):
        fast = pruned(model)
    same(fast, model)
    assert not torch.allclose(fast(IMAGES), plain, atol=1e-3)


@pytest.mark.parametrize("name", ["patch_embed", "patch_embed.proj", "head", "pos_drop", "fc_norm"])
def test_hooks_on_parts_outside_the_blocks_act_as_natively(name, model):
    model.get_submodule(name).register_forward_hook(halve)
    same(pruned(model), model)


def test_hooks_on_all_modules_are_said_to_see_rows(model):
    handle = register_module_forward_hook(lambda *_: None)
    try:
        with pytest.warns(UserWarning, match="hooks on all modules see packed rows"):
            pruned(model)
    finally:
        handle.remove()


def test_removed_hooks_are_forgotten(model):
    fast, handle = pruned(model), model.blocks[1].register_forward_hook(halve)
    with pytest.raises(TokenGameError, match="forward hook"):
        fast(IMAGES)
    handle.remove()
    same(fast, model)


# Parametrised, adapted, quantised, replaced and removed parts


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


PARAMETRISED = {
    "spectral norm": nn.utils.spectral_norm,
    "weight norm": nn.utils.weight_norm,
    "pruning mask": lambda layer: masks.random_unstructured(layer, "weight", 0.5),
    "orthogonal": parametrizations.spectral_norm,
    "weight norm of parametrizations": parametrizations.weight_norm,
    "own parametrisation": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("name", [QKV, "blocks.3.attn.qkv", "blocks.2.mlp.fc1", "patch_embed.proj", "head"])
@pytest.mark.parametrize("key", PARAMETRISED)
def test_parametrised_weights_are_those_of_now(key, name, model):
    PARAMETRISED[key](model.get_submodule(name))
    model.eval()
    fast = pruned(model)
    same(fast, model)
    with torch.no_grad():
        for parameter in model.get_submodule(name).parameters():
            parameter.mul_(1.3)
    same(fast, model)


class LoRA(nn.Module):
    """An adapter as peft's: the layer stays inside, and only the call is the layer's."""

    def __init__(self, layer, width, outputs):
        super().__init__()
        self.base_layer, self.down, self.up = layer, nn.Linear(width, 2), nn.Linear(2, outputs)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class LoRAConvolution(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.factor = layer, nn.Parameter(torch.tensor(1.5))

    def forward(self, images):
        return self.factor * self.base_layer(images)


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_act_wherever_they_are(when, model):
    fast = pruned(model) if when == "after" else None
    for block in model.blocks:
        block.attn.qkv = LoRA(block.attn.qkv, 32, 96)
        block.mlp.fc2 = LoRA(block.mlp.fc2, 128, 32)
    model.patch_embed.proj = LoRAConvolution(model.patch_embed.proj)
    model.head = LoRA(model.head, 32, 5)
    with pytest.warns(UserWarning, match=r"blocks.0.attn.qkv and 7 more \(LoRA\) runs on packed rows"):
        same(fast or pruned(model), model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_run_and_count(model):
    before = pruned(model)
    full = before.macs(before.predict(IMAGES))[0]
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    with pytest.warns(UserWarning, match="dynamically quantised layers take the range of all rows"):
        fast = pruned(quantised)
    with torch.no_grad():
        off = (fast(IMAGES) - quantised(IMAGES)).norm() / quantised(IMAGES).norm()
    assert float(off) < 0.05, "activations are quantised by the range of all rows, which differ in the last block"
    assert fast.macs(fast.predict(IMAGES))[0] == full


REPLACED = {
    "a block": lambda model: model.blocks.__setitem__(1, copy.deepcopy(model.blocks[3])),
    "an MLP": lambda model: setattr(model.blocks[1], "mlp", Mlp(32, 16)),
    "an attention": lambda model: setattr(model.blocks[2], "attn", Attention(32, 2, qkv_bias=True)),
    "a norm": lambda model: setattr(model.blocks[2], "norm2", nn.Identity()),
    "an activation": lambda model: setattr(model.blocks[2].mlp, "act", nn.ReLU()),
    "the head": lambda model: setattr(model, "head", nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 4))),
    "no head": lambda model: setattr(model, "head", nn.Identity()),
    "another head": lambda model: model.reset_classifier(3),
    "a position embedding": lambda model: setattr(model, "pos_embed", nn.Parameter(torch.randn(1, 17, 32))),
    "an epsilon": lambda model: setattr(model.blocks[1].norm1, "eps", 1.0),
    "a pooling": lambda model: model.reset_classifier(5, "avg"),
    "a weight": lambda model: setattr(model.blocks[1].mlp.fc1, "weight", nn.Parameter(torch.randn(128, 32))),
}


@pytest.mark.filterwarnings("ignore:this policy was made for class logits")
@pytest.mark.parametrize("when", ["before", "after", "after training"])
@pytest.mark.parametrize("key", REPLACED)
def test_replaced_parts_are_used(key, when, model):
    fast = pruned(model) if when != "before" else None
    if when == "after training":
        fast.train().eval()
    before = model(IMAGES)
    REPLACED[key](model)
    model.eval()
    now = model(IMAGES)
    assert now.shape != before.shape or not torch.allclose(now, before, atol=1e-3)
    same(fast or pruned(model), model)


NOT_EXACT = {
    "depth 4 is now 2": lambda model: model.blocks.__delitem__(slice(2, None)),
    "block 1 is a Identity": lambda model: model.blocks.__setitem__(1, nn.Identity()),
    "mixing": lambda model: setattr(model.blocks[1], "norm1", nn.BatchNorm1d(17)),
    "holds a Conv1d": lambda model: setattr(model.blocks[1], "ls1", nn.Conv1d(17, 17, 1)),
    "has no blocks": lambda model: setattr(model, "blocks", nn.Sequential()),
}


@pytest.mark.parametrize("key", NOT_EXACT)
def test_changes_that_cannot_be_exact_are_refused(key, model):
    fast = pruned(model)
    NOT_EXACT[key](model)
    with pytest.raises(TokenGameError, match="BatchNorm1d" if key == "mixing" else key):
        fast(IMAGES)


def test_changes_after_a_conversion_are_said_not_to_count(model):
    fast = pruned(model).double()
    same(fast, copy.deepcopy(model).double(), IMAGES.double())
    model.blocks[1] = copy.deepcopy(model.blocks[3])
    with pytest.warns(UserWarning, match="the wrapped model has changed, but the pruned one was converted"):
        fast(IMAGES.double())
    fast(IMAGES.double())  # said once


def test_an_optimiser_goes_on_when_the_wrapped_model_gets_a_hook(model):
    """The modules are copied anew, the parameters are not."""
    fast = pruned(model).train()
    parameters = list(fast.model.parameters())
    model.norm.register_forward_hook(halve)
    with pytest.warns(UserWarning, match="see packed rows"):
        fast(IMAGES).sum().backward()
    assert all(one is other for one, other in zip(parameters, fast.model.parameters(), strict=True))
    assert all(p.grad is not None for p in parameters)
    assert fast.model.training
    assert not model.training


# Wrapped models


def test_wrappers_that_compute_the_same_are_left_out_and_it_is_said(model):
    for wrapper in (nn.DataParallel(model), torch.compile(model), torch.compile(nn.DataParallel(model))):
        with pytest.warns(UserWarning, match="wrap the pruned model instead"):
            fast = pruned(wrapper)
        assert fast.restore() is model


class Net(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.backbone, self.classifier = model, nn.Linear(5, 2)


def test_models_that_are_not_supported_are_told_what_to_pass(model):
    class Changed(timm.models.VisionTransformer):
        def forward_features(self, x):
            return super().forward_features(x) * 0.5

    other = {
        r"holds a timm VisionTransformer: .* model.backbone = tokengame.prune\(model.backbone": Net(model),
        "holds a timm VisionTransformer: .* model.1": nn.Sequential(nn.Identity(), model),
        "a subclass of timm's VisionTransformer that has its own forward_features": Changed(
            depth=1, embed_dim=32, num_heads=2
        ),
        "a str is no model": "vit_tiny_patch16_224",
        "a OrderedDict is no model": model.state_dict(),
        "is pruned already": pruned(model),
        "is of no supported family": nn.Linear(2, 2),
    }
    for said, what in other.items():
        with pytest.raises(TokenGameError, match=said):
            pruned(what)


def test_models_of_other_libraries_are_named(monkeypatch):
    said = {
        "transformers.models.vit": "a Hugging Face model of a kind that is not supported",
        "torchvision.models": "of torchvision's models",
    }
    for module, words in said.items():
        monkeypatch.setattr(Net, "__module__", module)
        net = Net(nn.Identity())
        with pytest.raises(TokenGameError, match=words):
            pruned(net)


def test_models_on_the_meta_device_are_refused(model):
    with pytest.raises(TokenGameError, match="cls_token lies on the meta device"):
        pruned(model.to("meta"))


def test_models_wrapped_by_accelerate_are_refused(model):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    add_hook_to_module(model, ModelHook())
    with pytest.raises(TokenGameError, match="wrapped by Accelerate"):
        pruned(model)
    remove_hook_from_module(model)
    add_hook_to_module(model.blocks[1], ModelHook())
    with pytest.raises(TokenGameError, match=r"the model's blocks\.1 was wrapped by Accelerate"):
        pruned(model)


def test_models_compiled_in_place_are_said_to_run_uncompiled(model):
    model.compile()
    with pytest.warns(UserWarning, match="the model was compiled, which a pruned model does not use"):
        same(pruned(model), tiny_vit())


# Training


def numbers_kept(call):
    """How many numbers autograd keeps for the backward pass."""
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(IMAGES)
    return kept


@pytest.mark.parametrize("transition", ["drop", "merge"])
@pytest.mark.parametrize("dial", [0.0, 0.5])
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients(dial, transition):
    model = tiny_vit(drop_path_rate=0.3, attn_drop_rate=0.2, proj_drop_rate=0.2)
    fast = pruned(model, dial, transition).train()
    found = []
    for checkpointing in (False, True):
        fast.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        kept = numbers_kept(fast)
        fast.zero_grad()
        torch.manual_seed(0)
        fast(IMAGES).square().sum().backward()
        found.append((kept, [p.grad.clone() for p in fast.model.parameters()]))
    assert found[1][0] < 0.5 * found[0][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other)
    assert not model.grad_checkpointing, "the wrapped model is as it was"


def test_gradient_checkpointing_of_the_wrapped_model_is_honoured(model):
    fast = pruned(model).train()
    before = numbers_kept(fast)
    model.set_grad_checkpointing(True)
    assert numbers_kept(fast) < 0.5 * before


@pytest.mark.parametrize("transition", ["drop", "merge"])
@pytest.mark.parametrize("gradients", [True, False])
def test_stochastic_depth_drops_whole_images(gradients, transition):
    """With every path dropped or kept by chance, an image's prediction is one of those of the possible networks."""
    model = tiny_vit(depth=2, drop_path_rate=0.5)  # paths of block 1 are dropped, those of block 0 never
    fast = tokengame.runtime.prune_by(
        model, tokengame.config.GameConfig(stages=(1,), transition=transition), lambda obs: torch.ones(len(obs.agent))
    ).train()
    possible = []
    for first in (0.0, 2.0):
        for second in (0.0, 2.0):
            block = copy.deepcopy(model)
            block.blocks[1].drop_path1, block.blocks[1].drop_path2 = Times(first), Times(second)
            possible.append(block.eval()(IMAGES))
    seen = set()
    with torch.set_grad_enabled(gradients):
        for seed in range(40):
            torch.manual_seed(seed)
            for image, logits in enumerate(fast(IMAGES)):
                fits = [k for k, native in enumerate(possible) if torch.allclose(logits, native[image], atol=1e-4)]
                assert fits, f"seed {seed}: part of image {image} was dropped"
                seen.add((image, fits[0]))
    assert len(seen) == 12, "each image has each of the four"


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def test_attention_dropout_drops_weights_and_keeps_their_mean():
    counts = [5, 9]
    layout, qkv = RaggedLayout(counts, torch.device("cpu")), torch.randn(14, 3, 2, 8)
    torch.manual_seed(0)
    draws = torch.stack([padded_attention(qkv, layout, None, 0.3) for _ in range(3000)])
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(draws.mean(0), padded_attention(qkv, layout), atol=0.06, rtol=0)
    q, k, v = qkv.unbind(1)
    draws = torch.stack([cross_attention(q, k, v, layout, layout, None, None, 0.3) for _ in range(3000)])
    torch.testing.assert_close(draws.mean(0), cross_attention(q, k, v, layout, layout), atol=0.06, rtol=0)


@pytest.mark.parametrize("transition", ["drop", "merge"])
def test_attention_dropout_acts_in_training_alone(transition):
    fast = pruned(tiny_vit(attn_drop_rate=0.5), 0.5, transition)
    assert torch.equal(fast(IMAGES), fast(IMAGES))
    fast.train()
    assert not torch.allclose(fast(IMAGES), fast(IMAGES), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_left_by_patch_dropout_keep_their_places(dtype):
    model = tiny_vit(patch_drop_rate=0.5, img_size=160, patch_size=8, class_token=True)  # 400 patches
    fast = pruned_anywhere(model).to(dtype).train()
    images = torch.randn(2, 3, 160, 160).to(dtype)
    game: TokenGame = fast.game
    tokens = game.backbone.embed(images)
    state = game._embedded(images, game.backend_for(images))
    x, places = state.x.unflatten(0, (2, -1)), state.position.unflatten(0, (2, -1))
    assert x.shape == (2, 1 + 200, 32)
    assert places[:, 0].tolist() == [-1, -1]
    for image in range(2):
        assert torch.equal(x[image, 1:], tokens[image, 1 + places[image, 1:]])
    assert state.total == 400
    fast(images).float().sum().backward()


def pruned_anywhere(model, dial=0.5):
    return tokengame.PrunedViT(model, policy_for(tiny_vit()), dial)


def test_patch_dropout_leaves_as_many_patches_as_natively():
    model = tiny_vit(patch_drop_rate=0.25)
    fast = pruned(model).train()
    with torch.no_grad():
        output = fast.predict(IMAGES)
    assert [n.tolist() for n in output.decided] == [[12] * 3, [12] * 3]
    assert output.alive.sum(1).tolist() == [12] * 3
    with pytest.raises(TokenGameError, match="patch dropout"):
        fast.forward_features(IMAGES)


def test_modes_are_those_of_the_pruned_model_and_partial_ones_stay(model):
    model = tiny_vit(proj_drop_rate=0.5)
    fast = pruned(model)
    expected = fast(IMAGES)
    model.train()
    assert torch.equal(fast(IMAGES), expected), "the pruned model is in evaluation mode"
    assert model.training
    fast.train()
    fast.model.eval()
    fast.model.blocks[1].train()
    assert not torch.equal(fast(IMAGES), fast(IMAGES))
    assert not fast.model.blocks[0].training


def test_single_layers_in_training_mode_act_as_natively():
    model = tiny_vit(proj_drop_rate=0.5)
    fast = pruned(model)
    model.blocks[1].mlp.drop1.train()  # Monte Carlo dropout
    assert not torch.equal(fast(IMAGES), fast(IMAGES))


def test_restore_gives_every_module_its_own_mode(model):
    model.train()
    model.blocks[:2].eval()
    before = {name: part.training for name, part in model.named_modules()}
    restored = pruned(model).restore()
    assert {name: part.training for name, part in restored.named_modules()} == before


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("group")
def test_distributed_data_parallel_trains(model):
    fast = pruned(model, 0.5)
    assert not any(p.requires_grad for p in fast.actor.parameters())
    parallel = nn.parallel.DistributedDataParallel(fast).train()
    for _ in range(2):
        parallel(IMAGES).sum().backward()
    assert all(p.grad is not None for p in fast.model.parameters())
    with pytest.warns(UserWarning, match="wrap the pruned model instead, DistributedDataParallel"):
        assert pruned(nn.parallel.DistributedDataParallel(model)).restore() is model


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("group")
def test_a_pruned_model_can_be_sharded_and_a_sharded_one_is_refused(model):
    from torch.distributed.fsdp import fully_shard

    expected, fast = model(IMAGES), pruned(model)
    parameters = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    fully_shard(fast)
    torch.testing.assert_close(fast(IMAGES), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(TokenGameError, match="set the mode before sharding"):
        fast.train()
    fast = pruned(tiny_vit()).train()
    fully_shard(fast)
    optimiser = SGD(fast.parameters(), 0.1)
    fast(IMAGES).square().sum().backward()
    optimiser.step()
    moved = torch.cat([p.full_tensor().flatten() for p in fast.model.parameters()])
    assert not torch.allclose(moved, parameters)
    other = tiny_vit()
    fully_shard(other)
    with pytest.raises(TokenGameError, match="FSDPVisionTransformer is sharded: prune the model first"):
        pruned(other)


@pytest.mark.parametrize("margin", [0.0, 0.9])
def test_distilled_training_gives_both_predictions(margin):
    model = tiny_vit(name="deit_tiny_distilled_patch16_224")
    policy = policy_for(model)
    policy.card["game"]["cascade_margin"] = margin
    fast = tokengame.prune(model, policy, 0.01).train()
    fast.set_distilled_training(True)
    pair = fast(IMAGES)
    assert [x.shape for x in pair] == [(3, 5), (3, 5)]
    torch.testing.assert_close((pair[0] + pair[1]) / 2, fast.eval()(IMAGES), atol=1e-5, rtol=1e-4)
    assert not model.distilled_training


# torch.func, tracing


@pytest.mark.filterwarnings("ignore:.*is deprecated")  # jvp, within torch
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("transform", [vmap, jacrev, grad, lambda f: lambda x: jvp(f, (x,), (x,))])
def test_transforms_of_torch_func_are_refused_and_autograd_works(transform, training, model):
    fast = pruned(model, 0.5).train(training)
    with pytest.raises(TokenGameError, match=r"cannot be transformed by torch\.func"):
        transform(lambda images: fast(images).sum())(IMAGES[:1])
    variable = IMAGES[:1].clone().requires_grad_()
    fast.train()(variable)[0, 2].backward()
    assert variable.grad.abs().sum() > 0


def test_functional_call_uses_the_given_weights(model):
    fast, other = pruned(model), tiny_vit(seed=3)
    weights = {f"model.{name}": p for name, p in other.named_parameters()}
    with torch.no_grad():
        torch.testing.assert_close(functional_call(fast, weights, (IMAGES,)), other(IMAGES), atol=1e-5, rtol=1e-4)
    same(fast, model)


def test_ensembles_by_vmap_are_refused(model):
    fast = pruned(model)
    stacked = {name: torch.stack([p, p]) for name, p in fast.named_parameters()}
    with pytest.raises(TokenGameError, match=r"cannot be transformed by torch\.func"):
        vmap(lambda weights: functional_call(fast, weights, (IMAGES,)))(stacked)


TRACERS = {
    "jit.trace": lambda fast: torch.jit.trace(fast, IMAGES),
    "jit.script": torch.jit.script,
    "export": lambda fast: torch.export.export(fast, (IMAGES,)),
    "strict export": lambda fast: torch.export.export(fast, (IMAGES,), strict=True),
    "fx": torch.fx.symbolic_trace,
    "fake tensors": lambda fast: fast(fake()),
    "meta tensors": lambda fast: fast(IMAGES.to("meta")),
    "DataParallel": lambda fast: fast._replicate_for_data_parallel(),
}


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(1, 3, 32, 32)


@pytest.mark.filterwarnings("ignore:.*is deprecated", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("key", TRACERS)
def test_tracing_is_refused_in_one_sentence(key, model):
    with pytest.raises(Exception, match=r"a pruned model cannot be|copies modules without their games") as caught:
        TRACERS[key](pruned(model))
    if key != "strict export":  # torch wraps what is raised there
        assert caught.type is TokenGameError


def test_images_of_another_shape_are_refused(model):
    with pytest.raises(TokenGameError, match=r"must be \[batch, channels, height, width\], not \[3, 32, 32\]"):
        pruned(model)(IMAGES[0])


# timm's interface


def test_attributes_of_timms_interface_are_the_models(model):
    fast = pruned(model)
    assert resolve_model_data_config(fast) == resolve_model_data_config(model)
    for name in ("pretrained_cfg", "default_cfg", "num_features", "embed_dim", "num_classes", "feature_info"):
        assert getattr(fast, name) == getattr(model, name)
    assert fast.get_classifier() is model.head
    with pytest.raises(AttributeError, match=r"no attribute 'blocks'; the model's own is fast.model.blocks"):
        len(fast.blocks)
    assert not hasattr(fast, "nonsense")


@pytest.mark.parametrize("method", ["set_input_size", "prune_intermediate_layers", "load_pretrained", "init_weights"])
def test_methods_that_would_change_the_shape_are_refused_by_name(method, model):
    with pytest.raises(TokenGameError, match=f"a pruned model has no {method}"):
        getattr(pruned(model), method)()


def test_the_classifier_can_be_reset_and_the_wrapped_model_keeps_its_own(model):
    fast = pruned(model, 0.5)
    assert hasattr(fast, "reset_classifier")
    assert fast.model is model, "to look is not to change"
    fast.reset_classifier(3)
    assert fast(IMAGES).shape == (3, 3)
    assert fast.num_classes == 3
    fast.reset_classifier(0)
    assert fast(IMAGES).shape == (3, 32)
    assert model(IMAGES).shape == (3, 5)


CALLS = {
    "forward_head": lambda m: m.forward_head(m.forward_features(IMAGES)),
    "forward_head before the classifier": lambda m: m.forward_head(m.forward_features(IMAGES), pre_logits=True),
    "get_intermediate_layers": lambda m: m.get_intermediate_layers(IMAGES, n=2),
    "get_intermediate_layers as maps": lambda m: m.get_intermediate_layers(IMAGES, (1, 3), True, True, True),
    "forward_intermediates": lambda m: m.forward_intermediates(IMAGES),
    "of some": lambda m: m.forward_intermediates(IMAGES, [2], True, True),
    "stopped early": lambda m: m.forward_intermediates(IMAGES, [0, 1], stop_early=True, output_fmt="NLC"),
    "only": lambda m: m.forward_intermediates(IMAGES, 2, intermediates_only=True),
    "dictionary": lambda m: m.forward_intermediates(IMAGES, 2, output_dict=True, return_prefix_tokens=True),
    "small dictionary": lambda m: m.forward_intermediates(IMAGES, output_dict=True, intermediates_only=True),
    "empty batch": lambda m: m(IMAGES[:0]),
    "features of an empty batch": lambda m: m.forward_features(IMAGES[:0]),
    "layers of an empty batch": lambda m: m.get_intermediate_layers(IMAGES[:0], 2),
}


@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
@pytest.mark.parametrize("key", CALLS)
@torch.no_grad()
def test_calls_of_timms_interface_give_what_timm_gives(key, changes):
    model = tiny_vit(**changes)
    fast = tokengame.PrunedViT(model, policy_for(model), 0.0)
    found, expected = CALLS[key](fast), CALLS[key](model)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert [x.shape for x in torch.utils._pytree.tree_leaves(found)] == [
        x.shape for x in torch.utils._pytree.tree_leaves(expected)
    ]


@pytest.mark.parametrize("call", ["forward", "forward_features", "forward_intermediates", "get_intermediate_layers"])
def test_attention_masks_are_refused(call, model):
    with pytest.raises(TokenGameError, match="takes no attention mask"):
        getattr(pruned(model), call)(IMAGES, attn_mask=torch.ones(3, 1, 17, 17, dtype=torch.bool))
    if call != "get_intermediate_layers":
        with pytest.raises(TokenGameError, match="takes no attention mask"):
            getattr(pruned(model), call)(IMAGES, is_causal=True)


def test_empty_batches_are_predicted_traced_and_counted(model):
    fast = pruned(model, 0.5)
    output = fast.predict(IMAGES[:0])
    assert output.logits.shape == (0, 5)
    assert output.alive.shape == (0, 16)
    assert [n.shape for n in output.kept] == [(0,), (0,)]
    assert fast.trace(IMAGES[:0]).shape == (2, 0, 16)
    assert fast.macs(output)[1].shape == (0,)


def test_timms_optimiser_groups_are_the_models(model):
    """Weight decay and layer-wise step sizes go by the names of parameters."""
    fast, settings = pruned(model), {"opt": "sgd", "lr": 1.0, "weight_decay": 0.1, "layer_decay": 0.5}

    def of(which, prefix):
        names = {id(p): name.removeprefix(prefix) for name, p in which.named_parameters()}
        groups = create_optimizer_v2(which, **settings).param_groups
        return {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}

    assert of(fast, "model.") == of(model, "")


# Dial 0


@pytest.mark.parametrize("transition", ["drop", "merge"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_dial_0_is_native_whatever_the_policy_says(value, transition, model):
    fast = pruned(model, 0.0, transition)
    with torch.no_grad():
        fast.actor.weight.fill_(value)
    same(fast, model)
    assert fast.trace(IMAGES).all()
    torch.testing.assert_close(fast.forward_features(IMAGES), model.forward_features(IMAGES), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_pixels_that_are_not_numbers_stay_in_their_image(model):
    images = IMAGES.clone()
    images[1, 0, 0, 0] = float("nan")
    fast = pruned(model, 0.5)
    found, clean = fast(images), fast(IMAGES)
    assert found[1].isnan().all()
    assert torch.equal(model(images)[1].isnan(), found[1].isnan())
    torch.testing.assert_close(found[[0, 2]], clean[[0, 2]])


def test_cross_entropy_trains_the_wrapped_weights(model):
    """The pruned model's weights are the model's, so what one learns the other has."""
    fast = pruned(model, 0.5).train()
    optimiser, before = SGD(fast.parameters(), 0.1), model(IMAGES)
    F.cross_entropy(fast(IMAGES), torch.tensor([0, 1, 2])).backward()
    optimiser.step()
    assert not torch.allclose(model(IMAGES), before, atol=1e-4)
