"""Rules, DynamicViT and the comparison of methods."""

import csv
import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_vit
from PIL import Image

from tokengame import kernels
from tokengame.backbones import wrap
from tokengame.baselines import Baseline, ats, dynamicvit, evit, heuristics, tome
from tokengame.baselines.dynamicvit import (
    DynamicViT,
    Predictor,
    _masked,
    _masked_attention,
    dynamic_loss,
    pruned_by,
    train_dynamicvit,
)
from tokengame.baselines.heuristics import AtBudgets, KeepBest, Random, attention, keep_best
from tokengame.baselines.reducer import ReducedRows, Reducer
from tokengame.cli.main import main
from tokengame.config import GameConfig
from tokengame.data.batches import Batch
from tokengame.errors import TokenGameError
from tokengame.kernels import library
from tokengame.measure import compare as comparison
from tokengame.measure.compare import Entry, baseline_entries, compare, speed_at, speeds, time_method
from tokengame.measure.scores import Scores
from tokengame.packed.layout import RaggedLayout
from tokengame.report.figures import frontier_figure
from tokengame.runtime import prune_by

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


def batches(number=2, labels=True):
    wanted = torch.tensor([0, 1, 2, 3]) if labels else None
    generator = torch.Generator().manual_seed(0)
    return [Batch(torch.randn(4, 3, 32, 32, generator=generator), wanted, torch.arange(4)) for _ in range(number)]


def test_keep_best_keeps_the_highest_scores_of_each_image():
    layout, score = RaggedLayout([3, 1, 4], CPU), torch.tensor([0.1, 0.9, 0.5, 0.2, 3.0, -1.0, 2.0, 1.0])
    found = keep_best(score, torch.tensor([2, 1, 3]), layout) > 0
    assert found.tolist() == [False, True, True, True, True, False, True, True]


@pytest.mark.parametrize("transition", ["drop", "merge"])
@torch.inference_mode()
def test_attention_keeps_its_share_of_the_most_attended(transition, model):
    shares = (0.7, 0.49)
    fast = prune_by(model, GameConfig(stages=(1, 2), transition=transition), KeepBest(attention, shares))
    output = fast.predict(IMAGES)
    assert [n.tolist() for n in output.kept] == [[12] * 4, [8] * 4]  # ceil of 11.2 and 7.84
    game = fast.game
    state = game.reset(IMAGES)
    obs = game.observe(state)
    keep = (fast.actor(obs) > 0).view(4, 16)
    for image in range(4):
        attended = obs.features[obs.image == image, :2].exp().mean(1)
        assert float(attended[keep[image]].min()) >= float(attended[~keep[image]].max())


@torch.inference_mode()
def test_random_differs_from_call_to_call_and_repeats_with_its_seed(model):
    game = GameConfig(stages=(1,))
    one, other = (prune_by(model, game, KeepBest(Random(3), (0.5,))) for _ in range(2))
    first, second = one.trace(IMAGES), one.trace(IMAGES)
    assert torch.equal(first, other.trace(IMAGES))
    assert not torch.equal(first, second)
    assert (first.sum(2) == 8).all()


@torch.inference_mode()
def test_at_budgets_keeps_the_numbers_of_the_other_model(model):
    game = GameConfig(stages=(1, 2))
    fast = prune_by(model, game, lambda obs: torch.sin(1e3 * obs.token[:, 0]) + 0.3)
    rule = AtBudgets(fast, attention)
    output, expected = rule.predict(IMAGES), fast.predict(IMAGES)
    assert torch.equal(torch.stack(output.kept), torch.stack(expected.kept))
    assert not torch.equal(output.alive, expected.alive)


def predicted_slowly(predictor, tokens, alive):
    """Section 3.2 on one image [n, C]: half of the features local, half the mean over the tokens that are left."""
    features = predictor.local(tokens)
    half = features.shape[1] // 2
    mean = (features[:, half:] * alive[:, None]).sum(0) / alive.sum()
    joined = torch.cat([features[:, :half], mean.expand(len(tokens), -1)], 1)
    return predictor.rest(joined).softmax(1).log()


@torch.no_grad()
def test_predictor_is_that_of_the_paper():
    predictor, layout = Predictor(32), RaggedLayout([5, 5], CPU)
    tokens, alive = torch.randn(10, 32), torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1, 1, 0])
    found = predictor(tokens, layout, alive)
    expected = [predicted_slowly(predictor, tokens[i : i + 5], alive[i : i + 5]) for i in (0, 5)]
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_hidden_tokens_are_masked_as_keys_of_all_others():
    qkv, layout = torch.randn(10, 3, 2, 8), RaggedLayout([5, 5], CPU)
    visible = torch.tensor([[1.0, 0, 1, 1, 0], [1, 1, 0, 1, 1]])
    found = _masked_attention(qkv, layout, visible, None)
    allowed = visible.bool()[:, None, None, :] | torch.eye(5, dtype=torch.bool)
    q, k, v = qkv.view(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).reshape(10, 16)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_dynamicvit_learns_its_ratio_and_leaves_the_backbone_as_it_is(model):
    model.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    backbone, data = wrap(model), batches(40, labels=False)
    torch.manual_seed(0)
    untrained = DynamicViT(32, 3, keep=0.5)
    dynamic = train_dynamicvit(model, data, 40, keep=0.5, lr=1e-2)
    losses = []
    for candidate in (untrained, dynamic):
        torch.manual_seed(1)
        losses.append(float(dynamic_loss(backbone, candidate, (1, 2, 3), data[0]).detach()))
    assert losses[1] < losses[0]
    torch.manual_seed(1)
    _, alive = _masked(backbone, torch.cat([b.images for b in data]), (1, 2, 3), dynamic)
    assert float(alive[0].mean().detach()) == pytest.approx(0.5, abs=0.12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_every_loss_reaches_the_predictors(model, monkeypatch):
    model.requires_grad_(False)
    dynamic = DynamicViT(32, 3)
    torch.manual_seed(0)
    loss = dynamic_loss(wrap(model), dynamic, (1, 2, 3), batches(1)[0])
    torch.manual_seed(0)
    without = dynamic_loss(wrap(model), dynamic, (1, 2, 3), replace(batches(1)[0], labels=None))
    assert float(loss.detach()) > float(without.detach()), "labels add cross-entropy"
    for weight in ("WEIGHT_KL", "WEIGHT_TOKENS", "WEIGHT_RATIO"):
        with monkeypatch.context() as patch:
            patch.setattr(dynamicvit, weight, 0.0)
            torch.manual_seed(0)
            assert float(dynamic_loss(wrap(model), dynamic, (1, 2, 3), batches(1)[0]).detach()) < float(loss.detach())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in dynamic.predictors[0].parameters())


@torch.inference_mode()
def test_dynamicvit_drops_the_lowest_ranked_tokens(model):
    fast = pruned_by(model, DynamicViT(32, 3, keep=0.5).eval())
    output = fast.predict(IMAGES)
    assert [n.tolist() for n in output.kept] == [[8] * 4, [4] * 4, [2] * 4]
    native, macs = fast.macs(output)
    assert float(macs.mean()) < 0.75 * native


def test_all_baselines_are_measured_on_the_same_images(model):
    rows = compare(model, baseline_entries(model), batches(), 2)
    methods = {row["method"] for row in rows}
    assert {"ToMe", "EViT", "EViT, not fusing", "ATS", "attention, drop", "attention, merge", "random, drop"} < methods
    assert len({row["top1_native"] for row in rows}) == 1
    for row in rows:
        assert row["images"] == 8
        assert row["speedup"] > 0
        if row["method"] == "all tokens, exact exit":
            assert row["agreement"] == 1
            assert row["kl"] < 1e-6
        assert row["gmacs_ratio"] < 1.03  # on a tiny backbone observing attention costs much
    assert {row["method"] for row in rows if row["published"]} == {"ToMe", "EViT", "EViT, not fusing", "ATS"}


def test_methods_are_timed_by_turns_on_full_batches_dealt_anew(monkeypatch):
    """A batch of 3 and one of 4 give one full batch a round. The first round is not counted, and before it the method
    has two rounds of its own."""
    called, seconds = [], {"fused": 5.0, "unfused": 3.0, "method": 1.5}

    def timed(_, call, images):
        called.append((call, images.flatten().tolist()))
        return None, seconds[call]

    monkeypatch.setattr(comparison, "unfused", lambda _: "unfused")
    monkeypatch.setattr(comparison, "timed", timed)
    monkeypatch.setattr(kernels, "usable", lambda _: False)
    numbers, method = torch.arange(7.0), SimpleNamespace(predict="method")
    assert time_method("fused", method, [numbers[:3], numbers[3:]], rounds=2) == ([(4, 3.0, 1.5)] * 2, [])
    assert [name for name, _ in called[:2]] == ["method"] * 2
    assert len(called) == 2 + 9
    assert [name for name, _ in called[2::3]] == ["fused", "unfused", "method"], "another one begins"
    assert len({tuple(images) for _, images in called}) == 5, "other batches in every round"
    assert all(len(set(images)) == 4 for _, images in called)


def test_a_method_is_timed_on_pytorchs_kernels_too_where_compiled_ones_run(monkeypatch):
    seconds = {"fused": 5.0, "unfused": 6.0, "compiled": 1.5, "PyTorch's": 4.0}

    def timed(_, call, images):
        return None, seconds[call(images) if callable(call) else call]

    def predict(_):
        return "compiled" if kernels.usable(torch.zeros(1)) else "PyTorch's"

    monkeypatch.setattr(comparison, "unfused", lambda _: "unfused")
    monkeypatch.setattr(comparison, "timed", timed)
    monkeypatch.setattr(kernels, "usable", lambda _: library.level() >= 0)
    found = time_method("fused", SimpleNamespace(predict=predict), [torch.arange(4.0)], rounds=3)
    assert found == ([(4, 5.0, 1.5)] * 3, [4.0] * 3)
    summary = Scores([0], agree=[True], kl=[0.0], confidence=[1.0], macs=[1.0], kept=[[1]], macs_native=1.0)
    summary.seconds, summary.seconds_pytorch = found
    assert summary.summary()["speedup"] == pytest.approx(5.0 / 1.5)
    assert summary.summary()["speedup_pytorch"] == pytest.approx(5.0 / 4.0)


class EverySecondPatch(Reducer):
    """A worked example of a baseline: after the attention of a block it keeps every second patch."""

    def reduce(self, rows, _qkv, _backend):
        layout, prefix = rows.layout, self.backbone.prefix
        place = torch.arange(layout.rows) - layout.start[layout.image]  # [M] in the image
        kept = (place < prefix) | ((place - prefix) % 2 == 0)
        return ReducedRows(rows.x[kept], RaggedLayout(layout.per_image(kept), layout.device))

    def cost(self, rows):
        return rows * 0


def every_second_patch(model):
    return [(f"block {block}", EverySecondPatch(model, (block,))) for block in (0, 2)]


@torch.inference_mode()
def test_a_baseline_is_a_reducer_and_one_line_of_the_registry(model, monkeypatch):
    baseline = Baseline("every second patch", every_second_patch, published=False)
    monkeypatch.setattr(comparison, "BASELINES", (baseline,))
    rows = compare(model, baseline_entries(model), batches(), 2)
    assert [(row["method"], row["setting"]) for row in rows] == [("every second patch", f"block {n}") for n in (0, 2)]
    assert [row["tokens_kept"] for row in rows] == [[8.0], [8.0]]
    assert rows[0]["gmacs_ratio"] < rows[1]["gmacs_ratio"] < 1, "earlier is cheaper"
    for row in rows:
        assert row["images"] == 8
        assert row["kl"] > 0
        assert row["speedup"] > 0
        assert not row["published"]
    ((_, early), _), tokens = every_second_patch(model), wrap(model).embed(IMAGES)
    for index, block in enumerate(model.blocks):  # the same on dense batches, with timm's own attention
        tokens = tokens + block.ls1(block.attn(block.norm1(tokens)))
        tokens = tokens if index else torch.cat([tokens[:, :1], tokens[:, 1::2]], 1)
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    torch.testing.assert_close(early(IMAGES), model.forward_head(model.norm(tokens)), atol=1e-5, rtol=1e-4)


def test_entries_that_are_not_timed_have_no_speed(model):
    fast = prune_by(model, GameConfig(stages=(1,)), KeepBest(attention, (0.5,)))
    (row,) = compare(model, [Entry("a", "", AtBudgets(fast, Random()), False, is_timed=False)], batches(), 2)
    assert "speedup" not in row


def point(method, agreement, speedup, published=True):
    return {
        "method": method,
        "agreement": agreement,
        "speedup": speedup,
        "gmacs_ratio": 1 / speedup,
        "published": published,
    }


def test_speed_at_an_agreement_by_hand():
    curve = [point("a", 0.98, 1.1), point("a", 0.94, 1.3), point("a", 0.90, 1.7)]
    assert speed_at(curve, 0.96) == pytest.approx(1.2)
    assert speed_at(curve, 0.92) == pytest.approx(1.5)
    assert speed_at(curve, 0.99) is None
    assert speed_at(curve, 0.80) == pytest.approx(1.7), "a setting that agrees more counts too"
    rows = [*curve, point("policy", 0.96, 1.6, published=False), point("b", 0.97, 1.25)]
    table = speeds(rows, levels=(0.96,))
    assert table[0]["fastest_peer"] == "b"
    assert table[0]["fastest_peer_speedup"] == pytest.approx(1.25)
    assert table[0]["policy"] == pytest.approx(1.6)
    slower = [row | {"speedup_pytorch": row["speedup"] / 2} for row in curve]
    (both,) = speeds([*slower, *rows[-2:]], levels=(0.96,))
    assert (both["fastest_peer"], both["fastest_peer_pytorch"]) == ("b", "a")
    assert both["fastest_peer_pytorch_speedup"] == pytest.approx(0.6)
    assert "fastest_peer_pytorch" not in table[0]


def test_the_figure_has_panels_over_speed_where_it_was_measured():
    rows = [
        point("a", 0.9, 1.2) | {"kl": 0.1, "drop_pp": 0.0},
        point("policy", 0.9, 1.6) | {"kl": 0.0, "drop_pp": None},
    ]
    untimed = [{k: v for k, v in row.items() if k != "speedup"} for row in rows]
    timed, over_compute = (Image.open(io.BytesIO(frontier_figure(r, ["policy"]))) for r in (rows, untimed))
    assert timed.width == over_compute.width
    assert timed.height > 1.5 * over_compute.height


@pytest.fixture
def few_settings(monkeypatch):
    """Two of each method."""
    for module, name in ((heuristics, "KEEP"), (evit, "KEEP"), (dynamicvit, "KEEP"), (tome, "MERGES"), (ats, "SHARES")):
        monkeypatch.setattr(module, name, getattr(module, name)[1:6:3])


@pytest.mark.usefixtures("few_settings")
def test_the_command(tmp_path, capsys):
    arguments = ["compare", "--backbone", "fashion", "--images", "fashion", "--holdout", "0.005", "--batch-size", "2"]
    arguments += ["--dynamicvit-updates", "2"]
    assert main([*arguments, "--output", str(tmp_path / "out"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    written = list(csv.DictReader((tmp_path / "out" / "compare.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == [row["method"] for row in written]
    assert "DynamicViT, frozen" in {row["method"] for row in rows}
    assert {row["images"] for row in rows} == {5}
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "speeds.csv").is_file()
    quality = list(csv.DictReader((tmp_path / "out" / "qualities.csv").read_text().splitlines()))
    assert [row["method"] for row in quality] == list(dict.fromkeys(row["method"] for row in rows))


@pytest.mark.usefixtures("few_settings")
def test_without_timing_there_is_quality_alone(tmp_path, capsys):
    arguments = ["compare", "--backbone", "fashion", "--images", "fashion", "--holdout", "0.005", "--no-timing"]
    assert main([*arguments, "--output", str(tmp_path), "--json"]) == 0
    assert not any("speedup" in row for row in json.loads(capsys.readouterr().out))
    assert {path.name for path in tmp_path.iterdir()} == {
        "compare.csv", "table.csv", "table.md", "qualities.csv", "frontier.png",
    }  # fmt: skip


def test_dynamicvit_is_never_measured_on_its_training_images(tmp_path, capsys):
    arguments = ["compare", "--backbone", "fashion", "--images", "fashion", "--dynamicvit-updates", "1"]
    assert main([*arguments, "--output", str(tmp_path)]) == 2
    assert "give --holdout" in " ".join(capsys.readouterr().err.split())


def test_models_without_a_class_token_can_be_compared():
    model = tiny_vit(global_pool="avg", class_token=False)
    rows = compare(model, baseline_entries(model), batches(1), 1)
    exact = next(row for row in rows if row["method"] == "all tokens, exact exit")
    assert exact["gmacs_ratio"] >= 1


def test_baselines_are_chosen_by_name(model):
    chosen = {entry.method for entry in baseline_entries(model, ("ToMe", "rule"))}
    assert chosen == {"ToMe", "rule"}
    assert chosen < {entry.method for entry in baseline_entries(model)}
    with pytest.raises(TokenGameError, match=r"no baseline 'Tome'; there are: .*ToMe"):
        baseline_entries(model, ("Tome",))
