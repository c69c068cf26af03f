"""Rules, DynamicViT and the harness that sets methods against each other."""


import csv
import io
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_vit
from PIL import Image
from tokengame.dynamicvit import _hiding

from tokengame import dynamicvit, kernels
from tokengame.backbones import wrap
from tokengame.baselines.dynamicvit import DynamicViT, Predictor, _masked, dynamic_loss, pruned_by, train_dynamicvit
from tokengame.baselines.heuristics import AtBudgets, KeepBest, Random, attention, keep_best
from tokengame.cli.main import main
from tokengame.config import GameConfig
from tokengame.data.batches import Batch
from tokengame.measure.compare import Entry, baseline_entries, compare, speed_at, speeds, time_method
from tokengame.measure.evaluate import Scores
from tokengame.packed.layout import RaggedLayout
from tokengame.report.figures import frontier_figure
from tokengame.runtime import prune_by

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


def batches(number=2, labels=True):
    wanted = torch.tensor([0, 1, 2, 3]) if labels else None
    generator = torch.Generator().manual_seed(0)
    return [Batch(torch.randn(4, 3, 32, 32, generator=generator), wanted, torch.arange(4)) for _ in range(number)]


def test_the_best_stay():
    layout, score = RaggedLayout([3, 1, 4], CPU), torch.tensor([0.1, 0.9, 0.5, 0.2, 3.0, -1.0, 2.0, 1.0])
    found = keep_best(score, torch.tensor([2, 1, 3]), layout) > 0
    assert found.tolist() == [False, True, True, True, True, False, True, True]


@pytest.mark.parametrize("transition", ["drop", "merge"])
@torch.inference_mode()
def test_attention_keeps_its_share_of_the_most_attended(transition, model):
    shares = (0.7, 0.49)
    fast = prune_by(model, GameConfig(stages=(1, 2), transition=transition), KeepBest(attention, shares))
    state = fast.predict(IMAGES)
    assert [n.tolist() for n in state.kept] == [[12] * 4, [8] * 4]  # ceil of 11.2 and 7.84
    game = fast.game
    state = game.reset(IMAGES)
    obs = game.observe(state)
    stays = (fast.actor(obs) > 0).view(4, 16)
    for image in range(4):
        paid = obs.features[obs.image == image, :2].exp().mean(1)
        assert float(paid[stays[image]].min()) >= float(paid[~stays[image]].max())


@torch.inference_mode()
def test_chance_differs_from_call_to_call_and_repeats_with_its_seed(model):
    game = GameConfig(stages=(1,))
    one, other = (prune_by(model, game, KeepBest(Random(3), (0.5,))) for _ in range(2))
    first, second = one.ttime_method(IMAGES), one.ttime_method(IMAGES)
    assert torch.equal(first, other.ttime_method(IMAGES))
    assert not torch.equal(first, second)
    assert (first.sum(2) == 8).all()


@torch.inference_mode()
def test_budgets_are_the_others(model):
    game = GameConfig(stages=(1, 2))
    fast = prune_by(model, game, lambda obs: torch.sin(1e3 * obs.token[:, 0]) + 0.3)
    ruled = AtBudgets(fast, attention)
    state = ruled.play(IMAGES)
    assert torch.equal(torch.stack(state.kept), torch.stack(fast.predict(IMAGES).kept))
    assert not torch.equal(state.alive, fast.predict(IMAGES).alive)


def predicted_slowly(predictor, tokens, alive):
    """Section 3.2 on one image [n, C]: half of the features local, half the mean over the living."""
    features = predictor.local(tokens)
    half = features.shape[1] // 2
    everyone = (features[:, half:] * alive[:, None]).sum(0) / alive.sum()
    joined = torch.cat([features[:, :half], everyone.expand(len(tokens), -1)], 1)
    return predictor.rest(joined).softmax(1).log()


@torch.no_grad()
def test_predictor_is_the_papers():
    predictor, layout = Predictor(32), RaggedLayout([5, 5], CPU)
    tokens, alive = torch.randn(10, 32), torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1, 1, 0])
    found = predictor(tokens, layout, alive)
    expected = [predicted_slowly(predictor, tokens[i : i + 5], alive[i : i + 5]) for i in (0, 5)]
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_hiding_is_a_mask_but_for_oneself():
    qkv, layout = torch.randn(10, 3, 2, 8), RaggedLayout([5, 5], CPU)
    visible = torch.tensor([[1.0, 0, 1, 1, 0], [1, 1, 0, 1, 1]])
    found = _hiding(qkv, layout, visible, None)
    allowed = visible.bool()[:, None, None, :] | torch.eye(5, dtype=torch.bool)
    q, k, v = qkv.view(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).reshape(10, 16)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_dynamicvit_learns_its_ratio_and_the_backbone_stays(model):
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
def test_dynamicvit_really_drops(model):
    fast = pruned_by(model, DynamicViT(32, 3, keep=0.5).eval())
    assert [n.tolist() for n in fast.predict(IMAGES).kept] == [[8] * 4, [4] * 4, [2] * 4]
    native, macs = fast.macs(fast.predict(IMAGES))
    assert float(macs.mean()) < 0.75 * native


def test_methods_meet_on_the_same_images(model):
    rows = compare(model, baseline_entries(model), batches())
    methods = {row["method"] for row in rows}
    assert {"ToMe", "EViT", "EViT, not fusing", "ATS", "attention, drop", "attention, merge", "random, drop"} < methods
    assert len({row["top1_native"] for row in rows}) == 1
    for row in rows:
        assert row["images"] == 8
        assert row["speedup"] > 0
        if row["method"] == "all tokens, exact exit":
            assert row["agreement"] == 1
            assert row["kl"] < 1e-6
        assert row["gmacs_ratio"] < 1.03  # tiny backbones pay for looking at attention
    assert {row["method"] for row in rows if row["published"]} == {"ToMe", "EViT", "EViT, not fusing", "ATS"}


def test_a_race_takes_turns_on_full_batches_dealt_anew(monkeypatch):
    """Seconds by name; a batch of 3 and one of 4 give one full batch a round; the first round does not count,
    and the method alone has two more before it."""
    called, seconds = [], {"fused": 5.0, "written out": 3.0, "method": 1.5}

    def timed(_, call, images):
        called.append((call, images.flatten().tolist()))
        return None, seconds[call]

    monkeypatch.setattr("tokengame.compare.unfused", lambda _: "written out")
    monkeypatch.setattr("tokengame.compare.timed", timed)
    monkeypatch.setattr("tokengame.compare.partial", lambda *_: "method")
    numbers = torch.arange(7.0)
    assert time_method("fused", None, [numbers[:3], numbers[3:]], rounds=2) == ([(4, 3.0, 1.5)] * 2, [])
    assert [name for name, _ in called[:2]] == ["method"] * 2
    assert len(called) == 2 + 9
    assert [name for name, _ in called[2::3]] == ["fused", "written out", "method"], "always the same one first"
    assert len({tuple(images) for _, images in called}) == 5, "the same batches again"
    assert all(len(set(images)) == 4 for _, images in called)


def test_a_race_times_pytorchs_kernels_too_where_ours_run(monkeypatch):
    seconds = {"fused": 5.0, "written out": 6.0, "run": 1.5, "_on_pytorch": 4.0}
    monkeypatch.setattr("tokengame.compare.unfused", lambda _: "written out")
    monkeypatch.setattr("tokengame.compare.timed", lambda _, call, __: (None, seconds[call]))
    monkeypatch.setattr("tokengame.compare.partial", lambda function, _: function.__name__)
    monkeypatch.setattr(kernels, "take", lambda _: True)
    found = time_method("fused", None, [torch.arange(4.0)], rounds=3)
    assert found == ([(4, 5.0, 1.5)] * 3, [4.0] * 3)
    summary = Scores([0], agree=[True], kl=[0.0], confidence=[1.0], macs=[1.0], kept=[[1]], macs_native=1.0)
    summary.seconds, summary.seconds_pytorch = found
    assert summary.summary()["speedup"] == pytest.approx(5.0 / 1.5)
    assert summary.summary()["speedup_pytorch"] == pytest.approx(5.0 / 4.0)


def test_what_is_not_timed_has_no_speed(model):
    fast = prune_by(model, GameConfig(stages=(1,)), KeepBest(attention, (0.5,)))
    (row,) = compare(model, [Entry("a", "", AtBudgets(fast, Random()), False, is_timed=False)], batches())
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
    line = [point("a", 0.98, 1.1), point("a", 0.94, 1.3), point("a", 0.90, 1.7)]
    assert speed_at(line, 0.96) == pytest.approx(1.2)
    assert speed_at(line, 0.92) == pytest.approx(1.5)
    assert speed_at(line, 0.99) is None
    assert speed_at(line, 0.80) == pytest.approx(1.7), "better than asked is good enough"
    rows = [*line, point("ours", 0.96, 1.6, published=False), point("b", 0.97, 1.25)]
    table = speeds(rows, levels=(0.96,))
    assert table[0]["fastest_peer"] == "b"
    assert table[0]["fastest_peer_speedup"] == pytest.approx(1.25)
    assert table[0]["ours"] == pytest.approx(1.6)
    slower = [row | {"speedup_pytorch": row["speedup"] / 2} for row in line]
    (both,) = speeds([*slower, *rows[-2:]], levels=(0.96,))
    assert (both["fastest_peer"], both["fastest_peer_pytorch"]) == ("b", "a")
    assert both["fastest_peer_pytorch_speedup"] == pytest.approx(0.6)
    assert "fastest_peer_pytorch" not in table[0]


def test_the_picture_has_panels_over_time_where_that_was_measured():
    rows = [point("a", 0.9, 1.2) | {"kl": 0.1, "drop_pp": 0.0}, point("ours", 0.9, 1.6) | {"kl": 0.0, "drop_pp": None}]
    untimed = [{k: v for k, v in row.items() if k != "speedup"} for row in rows]
    timed, over_compute = (Image.open(io.BytesIO(frontier_figure(r, ["ours"]))) for r in (rows, untimed))
    assert timed.width == over_compute.width
    assert timed.height > 1.5 * over_compute.height


@pytest.fixture
def few_settings(monkeypatch):
    """Two of each method's."""
    for name in ("KEEP", "TOME", "ATS_SHARES"):
        monkeypatch.setattr(f"tokengame.compare.{name}", getattr(comparison, name)[1:6:3])


@pytest.mark.usefixtures("few_settings")
def test_the_command(tmp_path, capsys):
    arguments = ["compare", "--backbone", "fashion", "--images", "fashion", "--holdout", "0.02", "--batch-size", "10"]
    arguments += ["--dynamicvit-updates", "2"]
    assert main([*arguments, "--output", str(tmp_path / "out"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    written = list(csv.DictReader((tmp_path / "out" / "compare.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == [row["method"] for row in written]
    assert "DynamicViT, frozen" in {row["method"] for row in rows}
    assert {row["images"] for row in rows} == {20}
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


def test_dynamicvit_is_never_measured_on_what_it_learned(tmp_path, capsys):
    arguments = ["compare", "--backbone", "fashion", "--images", "fashion", "--dynamicvit-updates", "1"]
    assert main([*arguments, "--output", str(tmp_path)]) == 2
    assert "give --holdout" in " ".join(capsys.readouterr().err.split())


def test_models_without_a_class_token_compare_too():
    model = tiny_vit(global_pool="avg", class_token=False)
    rows = compare(model, baseline_entries(model), batches(1))
    exact = next(row for row in rows if row["method"] == "all tokens, exact exit")
    assert exact["gmacs_ratio"] >= 1
