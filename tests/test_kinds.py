"""Embeddings and features: figures against hand tables and loops; training, measuring and calibration of them."""

import json

import numpy as np
import pytest
import timm
import torch
from conftest import policy_for, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from tokengame.backbones import wrap
from tokengame.baselines.heuristics import AtBudgets, attention
from tokengame.baselines.tome import ToMe, merge_pairs
from tokengame.cli.main import main
from tokengame.config import TYPICAL_LOSS, TrainConfig, with_overrides
from tokengame.data.batches import Batch
from tokengame.data.datasets import FolderImages
from tokengame.errors import TokenGameError
from tokengame.game.testing import Scripted, kept_agents
from tokengame.learning.run import TrainingRun
from tokengame.learning.trainer import Trainer
from tokengame.measure.compare import Entry, compare, qualities, speeds
from tokengame.measure.evaluate import evaluate
from tokengame.measure.fidelity import neighbour_ranks
from tokengame.measure.kinds import KINDS, kind_of, read_bank
from tokengame.measure.scores import EmbeddingScores, FeatureScores
from tokengame.policies import Policy
from tokengame.policies.card import check_card
from tokengame.policies.policy import dial_for
from tokengame.report.html import table, verdict
from tokengame.runtime import prune, prune_by
from tokengame.runtime.features import GridMethod, grid_features

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SMALL = {"updates": 2, "batch_size": 4, "dtype": "float32", "game": {"stages": (1, 2)}}


def embedder(**changes):
    return tiny_vit(**({"num_classes": 0} | changes))


def batches(images=IMAGES, labels=None):
    return [Batch(part, labels, torch.arange(len(part))) for part in images.split(4)]


def keeping(policy, what, **changes):
    return Policy(policy.actor, policy.card | {"keeps": what} | changes)


def unit(degrees):
    return [float(np.cos(np.radians(degrees))), float(np.sin(np.radians(degrees)))]


# Neighbours


def ranks_by_loops(native, queries, gallery):
    found = []
    for i in range(len(native)):
        others = [j for j in range(len(native)) if j != i]
        nearest = max(others, key=lambda j: (float(native[i] @ native[j]), -j))
        order = sorted(others, key=lambda j: (-float(queries[i] @ gallery[j]), j))
        found.append(order.index(nearest))
    return found


@settings(max_examples=30)
@given(st.integers(2, 9), st.integers(0, 1000), st.booleans())
def test_ranks_of_neighbours_are_those_of_a_loop(images, seed, coarse):
    """Coarse: whole numbers, so that many similarities are equal and only the order of images decides."""
    generator = torch.Generator().manual_seed(seed)
    native, queries, gallery = torch.randn(3, images, 4, generator=generator)
    if coarse:
        native, queries, gallery = native.round(), queries.round(), gallery.round()
    assert neighbour_ranks(native, queries, gallery).tolist() == ranks_by_loops(native, queries, gallery)


def test_figures_of_embeddings_by_hand():
    """Four directions in the plane; pruning turns the second from beside the first to beside the third."""
    native, pruned = (torch.tensor([unit(a) for a in angles]) for angles in ((0, 10, 100, 130), (0, 80, 100, 130)))
    scores = EmbeddingScores(macs=[1.0] * 4, kept=[[1]] * 4, macs_native=2.0, bank=torch.tensor([[1.0, 0], [0, 3]]))
    scores.compare(native[:3], 5 * pruned[:3], None)  # lengths do not matter
    scores.compare(native[3:], pruned[3:], None)
    found = scores.summary()
    cosines = [1, np.cos(np.radians(70)), 1, 1]
    assert found["cosine"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found["distance"] == pytest.approx(1 - np.mean(cosines), abs=1e-6)
    # native's nearest are 1 0 3 2; pruned they are 1 2 1 2
    assert (found["same_neighbour"], found["recall_at_1"]) == (0.5, 0.5)
    assert (found["recall_at_5"], found["recall_at_10"]) == (1, 1)
    # among native embeddings the second, at 80 degrees, is nearest the third, the others as they were
    assert found["same_neighbour_native_gallery"] == 0.75
    assert found["zero_shot_agreement"] == 0.75  # the second leaves the first row of the bank for the second
    assert EmbeddingScores(macs=[1.0], kept=[[1]], macs_native=2.0, native=[native[0]], pruned=[native[0]],
                           cosine=[1.0]).summary()["same_neighbour"] is None  # fmt: skip


def test_an_opposite_embedding_is_no_more_than_lost():
    scores = EmbeddingScores()
    scores.compare(torch.ones(2, 3), torch.tensor([[-1.0] * 3, [1.0] * 3]), None)
    assert scores.cosine == pytest.approx([-1, 1])
    assert scores.distances == pytest.approx([1, 0], abs=1e-6)


def test_figures_of_features_by_hand():
    """One prefix row that is not counted, and two places: one exact, one at 60 degrees."""
    native = torch.tensor([[unit(0), unit(0), unit(90)]])
    pruned = torch.tensor([[unit(180), unit(0), unit(30)]])
    scores = FeatureScores(macs=[1.0], kept=[[1]], macs_native=2.0, prefix=1, decoder=lambda x: x[:, 1:, :1])
    scores.compare(native, pruned, None)
    found = scores.summary()
    assert found["feature_cosine"] == pytest.approx(0.75)
    assert found["distance"] == pytest.approx(0.25)
    assert found["feature_cosine_q05"] == pytest.approx(0.525)  # a twentieth of the way from .5 to 1
    assert found["decoded_distance"] == pytest.approx(np.cos(np.radians(30)), abs=1e-6)


# What is compared


@pytest.mark.parametrize("transition", ["merge", "drop"])
@pytest.mark.parametrize("what", ["embedding", "features"])
@torch.no_grad()
def test_what_is_measured_is_what_the_pruned_model_gives(what, transition):
    model = embedder(reg_tokens=2)
    fast = prune(model, keeping(policy_for(model, transition), what), 0.6)
    kind = kind_of(wrap(model), None if what == "embedding" else what)
    scores = evaluate(fast, batches(), kind=kind)
    if what == "embedding":
        wanted = torch.cosine_similarity(fast(IMAGES), model(IMAGES))
    else:
        fill = "absorber" if transition == "merge" else "exit"
        pruned, native = fast.forward_features(IMAGES, fill=fill), model.forward_features(IMAGES)
        wanted = torch.cosine_similarity(pruned, native, dim=2)[:, 3:].mean(1)
    assert scores.cosine == pytest.approx(wanted.tolist(), abs=1e-5)
    assert min(scores.cosine) < 0.9999
    assert len(scores.positions) == len(scores.macs) == 6
    if what == "features":
        dense = GridMethod(fast).macs(GridMethod(fast).predict(IMAGES))[1]
        assert scores.macs == pytest.approx(dense.tolist()), "patches are computed to the last block, and counted"
        assert float(dense.mean()) > float(fast.macs(fast.predict(IMAGES))[1].mean())


@pytest.mark.parametrize("what", ["embedding", "features"])
@torch.no_grad()
def test_all_tokens_kept_is_native(what):
    model = embedder()
    found = evaluate(
        prune(model, keeping(policy_for(model), what), 0.0), batches(), kind=kind_of(wrap(model), what)
    ).summary()
    assert found["distance"] < 1e-6
    if what == "embedding":
        assert {found[name] for name in found if name.startswith(("same", "recall"))} == {1.0}


@torch.no_grad()
def test_grids_are_those_of_forward_features_at_any_decisions():
    table_ = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(2))
    for transition, fill in (("merge", "absorber"), ("drop", "exit")):
        fast = prune_by(embedder(), with_overrides(TrainConfig().game, {"stages": (1, 3), "transition": transition}),
                        Scripted(table_))  # fmt: skip
        found = GridMethod(fast).predict(IMAGES)
        wanted = grid_features(fast.game, Scripted(table_), 0.0, IMAGES, [3], fill, norm=True)[0][0]
        torch.testing.assert_close(found.logits, wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(found.alive, kept_agents(table_)[-1])


@torch.no_grad()
def test_tome_gives_each_token_the_features_of_the_row_it_is_in():
    model = embedder(reg_tokens=1)
    tome = ToMe(model, (3, 2, 0, 1))
    backbone = wrap(model)
    found = tome.on_grid().predict(IMAGES[:2])
    x, place, size = backbone.embed(IMAGES[:2]), torch.arange(18).repeat(2, 1), torch.ones(2, 18)
    for block, r in zip(backbone.blocks, tome.merges, strict=True):
        normed = block.norm1(x)
        keys = block.attn.qkv(normed).view(2, x.shape[1], 3, 2, 16)[:, :, 1].mean(2)
        x = x + block.ls1(block.attn(normed, attn_mask=size.log()[:, None, None]))
        if r:
            merged = merge_pairs(x, size, keys, r, 2)
            x, size = merged.x, merged.size
            place = torch.stack([row[now] for row, now in zip(merged.place(2), place, strict=True)])
        x = x + block.ls2(block.mlp(block.norm2(x)))
    wanted = torch.stack([rows[now] for rows, now in zip(model.norm(x), place, strict=True)])
    torch.testing.assert_close(found.logits, wanted, atol=1e-5, rtol=1e-4)
    assert float(tome.on_grid().macs(found)[1][0]) > float(tome.macs(tome.predict(IMAGES[:2]))[1][0])
    whole = ToMe(model, (0, 0, 0, 0)).on_grid().predict(IMAGES)
    torch.testing.assert_close(whole.logits, model.forward_features(IMAGES), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_methods_are_compared_by_embeddings_and_those_without_a_grid_left_out_of_features():
    model = embedder()
    fast = prune(model, keeping(policy_for(model), "embedding"), 0.5)
    for what, figure, methods in (
        ("embedding", "cosine", {"a", "b", "ToMe"}),
        ("features", "feature_cosine", {"a", "ToMe"}),
    ):
        entries = [
            Entry("a", "", fast),
            Entry("b", "", AtBudgets(fast, attention)),
            Entry("ToMe", "", ToMe(model, (2, 2, 2, 0))),
        ]
        entries[1].is_timed = entries[2].is_timed = False
        rows = compare(model, entries, batches(IMAGES[:4]), 1, kind=kind_of(wrap(model), what))
        assert {row["method"] for row in rows} == methods
        assert all(0 < row[figure] < 1 and row.get("speedup", 1) > 0 for row in rows)
        assert set(speeds(rows)[0]) >= {figure, "a", "fastest_peer"}
        assert any(name.startswith("distance_") for name in qualities(rows)[0])


# Kinds


def test_kinds_are_told_by_the_model_or_named():
    logits, embedding, one = (wrap(tiny_vit(num_classes=n)) for n in (5, 0, 1))
    assert kind_of(logits).name == "logits"
    assert kind_of(embedding).name == "embedding"
    assert kind_of(logits, "embedding").name == "embedding", "of the logits as they are"
    assert {kind_of(each, "features").name for each in (logits, embedding, one)} == {"features"}
    for backbone, what, says in (
        (embedding, "logits", "--keep-what logits needs a classifier of two classes or more, and the model has 0"),
        (one, None, "has one output"),
        (one, "embedding", "has one output"),
        (logits, "all", "--keep-what must be one of logits, embedding, features, not 'all'"),
    ):
        with pytest.raises(TokenGameError, match=says):
            kind_of(backbone, what)
    clip = timm.create_model("vit_xsmall_patch16_clip_224", depth=2, num_classes=512).eval()
    assert kind_of(wrap(clip)).name == "embedding"
    assert list(KINDS) == ["logits", "embedding", "features"]


def test_a_bank_must_fit_and_be_whole(tmp_path):
    backbone, path = wrap(embedder()), tmp_path / "bank.safetensors"
    bank = torch.randn(3, 32)
    save_file({"classes": bank}, path)
    assert torch.equal(kind_of(backbone, bank=read_bank(path)).bank, bank)
    with pytest.raises(TokenGameError, match=r"the bank is \[3, 7\] and must be \[n, 32\]"):
        kind_of(backbone, bank=torch.randn(3, 7))
    with pytest.raises(TokenGameError, match="a bank is to measure embedding with, and features are kept"):
        kind_of(backbone, "features", bank=bank)
    with pytest.raises(TokenGameError, match="a decoder is to measure features with"):
        kind_of(backbone, decoder=torch.nn.Identity())
    for tensors, says in (
        ({"a": bank, "b": bank.clone()}, "holds 2 tensors"),
        ({"a": torch.full((2, 32), torch.nan)}, "one tensor of finite numbers"),
        ({"a": torch.zeros(32)}, "one tensor of finite numbers"),
    ):
        save_file(tensors, path)
        with pytest.raises(TokenGameError, match=says):
            read_bank(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(TokenGameError, match="damaged or not safetensors"):
        read_bank(path)
    with pytest.raises(TokenGameError, match="no bank of embeddings at"):
        read_bank(tmp_path / "none")


# Training


def trainer_of(what, transition="merge", **changes):
    config = with_overrides(TrainConfig.from_preset("tokengame"), {**SMALL, "keep_what": what} | changes)
    config = with_overrides(config, {"game": {"transition": transition}})
    return Trainer(embedder(), config, seed=1)


@pytest.mark.parametrize("transition", ["merge", "drop"])
@pytest.mark.parametrize("what", ["embedding", "features"])
@torch.no_grad()
def test_games_are_charged_for_what_their_own_decisions_lose(what, transition):
    """Each sampled game is played again by the pruned model with the same decisions, from its own records."""
    trainer = trainer_of(what, transition)
    rollout, outcome, metrics = trainer.rollout(IMAGES[:3], None)
    model, games = trainer.backbone.model, IMAGES[:3].repeat_interleave(4, 0)
    fast = prune_by(model, trainer.game.config, Scripted(torch.where(rollout.alive[1:], 1.0, -1.0)))
    if what == "embedding":
        losses = 1 - torch.cosine_similarity(fast(games), model(games))
    else:
        fill = "absorber" if transition == "merge" else "exit"
        found, native = fast.forward_features(games, fill=fill), model.forward_features(games)
        losses = (1 - torch.cosine_similarity(found, native, dim=2))[:, 1:].mean(1)
    charged = 2 * (TYPICAL_LOSS * losses / trainer.scale).sqrt()
    torch.testing.assert_close(outcome.loss, charged, atol=1e-4, rtol=1e-3)
    assert trainer.controller.weight == pytest.approx(2.5 * trainer.config.reward.kl_weight)
    assert metrics["game/distance"] == pytest.approx(float(losses.mean()), rel=1e-3)
    assert metrics["game/loss"] == pytest.approx(TYPICAL_LOSS, rel=1e-4), "the first games set the scale"


def test_the_scale_stays_and_is_saved():
    trainer, other = trainer_of("embedding"), trainer_of("embedding")
    trainer.update(IMAGES, torch.zeros(6, dtype=torch.long))  # labels of what is no class are not read
    scale = trainer.scale
    trainer.update(2 * IMAGES, None)
    assert trainer.scale == scale > 0
    other.load_state_dict(trainer.state_dict())
    assert other.scale == scale
    assert trainer_of("embedding", reward={"scale": 0.5}).scale == 0.5
    assert Trainer(tiny_vit(), TrainConfig.from_preset("tokengame")).scale == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"reward": {"kind": "share"}},
            "--reward.kind share pays for correct predictions, and --keep-what embedding has",
        ),
        ({"reward": {"target_drop": 0.5}}, "--target-drop counts correct predictions"),
        ({"game": {"cascade_margin": 0.1}}, "--game.cascade-margin compares probabilities of classes"),
    ],
)
def test_settings_that_need_classes_are_refused(changes, says):
    config = with_overrides(TrainConfig.from_preset("tokengame"), changes)
    with pytest.raises(TokenGameError, match=says):
        Trainer(embedder(), config)
    with pytest.raises(TokenGameError, match=says):
        with_overrides(config, {"keep_what": "embedding"})


@pytest.fixture
def source(tmp_path):
    generator = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return FolderImages(tmp_path, [f"{i}.png" for i in range(8)])


@pytest.mark.parametrize("what", ["embedding", "features"])
def test_a_run_learns_calibrates_and_guarantees(what, source, tmp_path):
    model = embedder()
    config = with_overrides(TrainConfig.from_preset("tokengame"), SMALL | {"keep_what": what})
    run = TrainingRun(model, "tiny", config, source, tmp_path / "run" / "policy.safetensors", seed=3, workers=0)
    before = run.trainer.actor.weight.detach().clone()
    run.run()
    assert not torch.equal(before, run.trainer.actor.weight)
    fast = run.finish(source)
    card = fast.card
    assert (card["keeps"], card["training"]["scale"]) == (what, run.trainer.scale)
    rows = card["calibration"]
    assert all(row["distance"] <= row["distance_bound95"] <= 1 for row in rows)
    assert {"cosine", "same_neighbour"} <= rows[0].keys() if what == "embedding" else "feature_cosine" in rows[0]
    gentlest, hardest = rows[0], rows[-1]
    assert gentlest["distance"] < hardest["distance"]
    bound = max(row["distance_bound95"] for row in rows)
    assert prune(model, Policy.load(run.output), max_distance=bound).dial == hardest["dial"]
    with pytest.warns(
        UserWarning, match="8 calibration images can guarantee a mean 1 - cosine of .* at best, not 0.01"
    ):
        assert prune(model, Policy.load(run.output), max_distance=0.01).dial == 0
    with pytest.raises(TokenGameError, match=f"--max-drop is points of top-1, and this policy keeps {what}"):
        prune(model, Policy.load(run.output), max_drop=1.0)


# The card


DISTANCES = {"dial": 0.2, "gmacs": 1.0, "gmacs_ratio": 0.8, "keep": 0.5, "images": 9, "distance": 0.1,
             "distance_bound95": 0.4, "cosine": 0.9}  # fmt: skip


def test_cards_say_what_is_kept_and_carry_its_rows():
    policy = policy_for(tiny_vit())
    card = keeping(
        policy, "embedding", calibration=[DISTANCES, DISTANCES | {"dial": 0.5, "distance_bound95": 0.5}]
    ).card
    check_card(card)
    assert policy.keeps == "logits", "cards of earlier versions do not say"
    assert dial_for(card, max_distance=0.45) == 0.2
    assert dial_for(card, max_distance=0.5) == 0.5
    for changes, says in (
        ({"keeps": "all"}, "keeps must be 'logits' or 'embedding' or 'features', not 'all'"),
        ({"keeps": "logits"}, r"calibration\[0\] has no agreement"),
        ({"calibration": [DISTANCES | {"distance": 0.6}]}, r"calibration\[0\].distance_bound95 must not be less"),
        ({"calibration": [DISTANCES | {"distance_bound95": 1.5}]}, r"distance_bound95 must be"),
        ({"game": card["game"] | {"cascade_margin": 0.2}}, "game.cascade_margin must be 0 where embedding is kept"),
    ):
        with pytest.raises(TokenGameError, match=says):
            check_card(card | changes)


def test_a_policy_for_logits_on_an_embedding_is_named():
    policy, model = policy_for(tiny_vit()), embedder()
    with pytest.warns(UserWarning, match="made for class logits, and the model's output is an embedding"):
        prune(model, policy)
    with pytest.raises(TokenGameError, match="--max-drop is points of top-1, and the model's output is an embedding"):
        prune(model, policy, max_drop=1.0)
    with (
        pytest.warns(UserWarning, match="made for class logits"),
        pytest.raises(
            TokenGameError, match="--max-distance is of embeddings and features, and this policy was made for"
        ),
    ):
        prune(model, policy, max_distance=0.1)
    prune(model, keeping(policy, "embedding"))  # without a warning
    prune(tiny_vit(), keeping(policy, "features"))


# Tables


def test_tables_show_the_measures_of_the_kind():
    times = {"macs": [1.0] * 2, "kept": [[1]] * 2, "macs_native": 2.0, "tokens": 4, "seconds": [(2, 2.0, 1.0)]}
    embedding, features = EmbeddingScores(**times), FeatureScores(**times)
    embedding.compare(torch.eye(2), torch.eye(2), None)
    features.compare(torch.ones(2, 3, 2), torch.ones(2, 3, 2), None)
    found = dict(table(embedding.summary()))
    assert (found["cosine with the native embedding"], found["same nearest image as native"]) == ("1.00000", "100.0%")
    assert "top-1, native" not in found
    assert verdict(embedding.summary()).endswith(
        "embeddings at a cosine of 1.0000 with the native ones, 100.0% of the nearest images unchanged"
    )
    assert dict(table(features.summary()))["its 5 % quantile over places"] == "1.00000"
    assert verdict(features.summary()).endswith("features at a cosine of 1.0000 with the native ones")


# The command line


@pytest.fixture(scope="module")
def small_flags(tmp_path_factory):
    """Weights of a small model that embeds, a bank of four texts, unlabelled images, and a policy trained on them."""
    root, patch = tmp_path_factory.mktemp("kinds"), pytest.MonkeyPatch()
    patch.setattr("tokengame.backbones.embedded.build_embedded", embedder)
    save_file(embedder(seed=1).state_dict(), root / "weights.safetensors")
    save_file({"texts": torch.randn(4, 32)}, root / "bank.safetensors")
    (root / "images").mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
    flags = ["--backbone", "fashion", "--weights", str(root / "weights.safetensors"), "--images", str(root / "images"),
             "--workers", "0"]  # fmt: skip
    small = ["--updates", "1", "--batch-size", "2", "--rollouts", "2", "--output", str(root / "policy.safetensors")]
    assert main(["train", *flags, *small]) == 0
    yield root, [*flags, "--policy", str(root / "policy.safetensors")]
    patch.undo()


def answer(capsys, *arguments):
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_commands_measure_embeddings_by_themselves(small_flags, capsys):
    root, flags = small_flags
    card = Policy.load(root / "policy.safetensors").card
    assert card["keeps"] == "embedding"
    found = answer(capsys, "eval", *flags, "--dial", "0", "--bank", str(root / "bank.safetensors"))
    assert (found["images"], found["same_neighbour"], found["zero_shot_agreement"]) == (5, 1.0, 1.0)
    assert "top1_native" not in found
    rows = answer(
        capsys, "calibrate", *flags, "--keep-what", "features", "--output", str(root / "features.safetensors")
    )
    assert {"feature_cosine", "distance_bound95"} <= rows[0].keys()
    assert Policy.load(root / "features.safetensors").keeps == "features"
    flags[-1] = str(root / "features.safetensors")
    assert "feature_cosine" in answer(capsys, "eval", *flags), "as the policy says"
    assert "cosine" in answer(capsys, "eval", *flags, "--keep-what", "embedding")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max-drop", "1"], "--max-drop is points of top-1, and this policy keeps embedding"),
        (
            ["--max-distance", "0.1", "--dial", "0.5"],
            "give one of --dial, --gmacs-ratio, --max-drop and --max-distance",
        ),
        (["--keep-what", "features", "--bank", "BANK"], "a bank is to measure embedding with, and features are kept"),
        (["--bank", "none.safetensors"], "no bank of embeddings at none.safetensors"),
    ],
)
def test_commands_refuse_in_one_sentence(small_flags, capsys, flags, says):
    root, common = small_flags
    flags = [str(root / "bank.safetensors") if flag == "BANK" else flag for flag in flags]
    common = [*common[:-1], str(root / "policy.safetensors")]
    capsys.readouterr()
    assert main(["eval", *common, *flags]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_commands_that_compare_classes_refuse_embeddings(small_flags, capsys):
    root, flags = small_flags
    assert main(["show", *flags[:-2], "--policy", str(root / "policy.safetensors")]) == 2
    assert "has no classifier: its output is an embedding" in " ".join(capsys.readouterr().err.split())
