"""A policy file is right as a whole or refused in one sentence: card, shapes, weights, and what is no policy."""

import copy
import json
import math
import os
import stat
from functools import lru_cache

import pytest
import torch
from conftest import policy_for, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import tokengame
from tokengame.config import ActorConfig
from tokengame.errors import TokenGameError
from tokengame.policies import Policy
from tokengame.policies.card import SCHEMA, check_card, read_card
from tokengame.policies.networks import build_actor, weight_shapes
from tokengame.policies.policy import SHIPPED, certified, check_weights, dial_for, find_policy, threshold

SHIPPED_FILE = SHIPPED / "vit_tiny_patch16_224.safetensors"
ROW = {"dial": 0.2, "gmacs": 1.0, "gmacs_ratio": 0.8, "keep": 0.5, "agreement": 0.9, "kl": 0.01, "drop_pp": 0.5,
       "drop_pp_ci95": [-1.0, 2.0], "drop_pp_bound95": 3.0, "images": 100}  # fmt: skip


@lru_cache
def policy():
    return policy_for(tiny_vit())


def card():
    rows = [ROW, ROW | {"dial": 0.6, "gmacs_ratio": 0.5, "drop_pp_bound95": 4.0}]
    return copy.deepcopy(policy().card | {"calibration": rows})


def text_of(found):
    """The card as it would stand in a file, whatever it holds."""
    return found if isinstance(found, str) else json.dumps(found)


def refusal(found):
    with pytest.raises(TokenGameError) as caught:
        read_card(text_of(found))
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 400
    return sentence


def changed(place, value):
    """The card with another value at a place such as game.stages[0]; `DELETE` removes it."""
    found = card()
    inner, names = found, place.replace("[", ".").replace("]", "").split(".")
    for name in names[:-1]:
        inner = inner[int(name) if name.isdigit() else name]
    last = int(names[-1]) if names[-1].isdigit() else names[-1]
    if value is DELETE:
        del inner[last]
    else:
        inner[last] = value
    return found


DELETE = object()
SURROGATE = "\ud800"


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        ("game.stages", [1.0, 2], "each of game.stages must be a whole number, not 1.0"),
        ("game.stages", ["1", 2], "each of game.stages must be a whole number, not '1'"),
        ("game.stages", [True, 2], "each of game.stages must be a whole number, not True"),
        ("game.stages", [2, 1], "stages [2, 1] (--game.stages, of bench --stages) do not fit a model of 4 blocks"),
        ("game.stages", [1, 10**300], "do not fit a model of 4 blocks"),
        ("game.stages", [], "game.stages must have one entry at least"),
        ("game.stages", None, "game.stages must be a list of numbers, not None"),
        ("game.transition", "mErge", "game.transition must be 'drop' or 'merge', not 'mErge'"),
        ("game.transition", ["merge"], "game.transition must be 'drop' or 'merge'"),
        ("game.cascade_margin", -0.1, "game.cascade_margin must be a number from 0"),
        ("game.look_twice", 1, "game has an unknown field 'look_twice'"),
        ("game", [], "game must be an object, not []"),
        ("actor.observation", DELETE, "actor has no observation"),
        ("actor.observation", "everything", "actor.observation must be 'token_id' or 'context'"),
        ("actor.hidden", [10**9], "each of actor.hidden must be a whole number from 1 to 4,096"),
        ("actor.hidden", [32] * 100, "--actor.hidden must be 1 to 8 widths"),
        ("actor.keep", "0.7", "actor.keep must be a number above 0 and below 1, not '0.7'"),
        ("actor.depth", 3, "actor has an unknown field 'depth'"),
        ("agents", 17, "agents must be 16, as input_size and patch have it"),
        ("agents", -16, "agents must be a whole number from 1"),
        ("agents", None, "agents must be a whole number from 1"),
        ("backbone.shape.heads", 10**8, "backbone.shape.heads must be a whole number from 1 to 4,096, not 100000000"),
        ("backbone.shape.dim", -32, "backbone.shape.dim must be a whole number"),
        ("backbone.shape.dim", 32.0, "backbone.shape.dim must be a whole number"),
        ("backbone.shape.patch", [8], "backbone.shape.patch must have 2 entries, not 1"),
        ("backbone.shape.patch", 8, "backbone.shape.patch must be a list, not 8"),
        ("backbone.shape.patch[0]", 0, "backbone.shape.patch[0] must be a whole number"),
        ("backbone.shape.windows", 7, "backbone.shape has an unknown field 'windows'"),
        ("backbone.fingerprint", "x" * 16, "backbone.fingerprint must be 16 hexadecimal digits"),
        ("backbone.fingerprint", DELETE, "backbone has no fingerprint"),
        ("backbone.name", "a\nb", "backbone.name must be a line of text"),
        ("backbone.name", "\x1b[2J", "backbone.name must be a line of text"),
        ("backbone.name", SURROGATE, "backbone.name must be Unicode"),
        ("backbone.name", "", "backbone.name must be a line of text"),
        ("backbone.weights", "/etc/passwd", "backbone.weights must be the plain name of a .safetensors file"),
        ("backbone.weights", "../other.safetensors", "backbone.weights must be the plain name"),
        ("backbone.weights", "a/b.safetensors", "backbone.weights must be the plain name"),
        ("backbone.weights", "a\\b.safetensors", "backbone.weights must be the plain name"),
        ("backbone.weights", "C:b.safetensors", "backbone.weights must be the plain name"),
        ("backbone.weights", "model.bin", "backbone.weights must be the plain name"),
        ("backbone.weights", None, "backbone.weights must be the plain name"),
        ("dial", 1.5, "dial must be a number from 0 to 1, not 1.5"),
        ("dial", True, "dial must be a number from 0 to 1, not True"),
        ("training", DELETE, "the card has no training"),
        ("training", {"loss": 10**5000}, "no JSON document"),
        ("training", {"a": SURROGATE}, "training.a must be Unicode"),
        ("training", {SURROGATE: 1}, "a field's name in training must be a line of text"),
        ("calibration", {}, "calibration must be a list"),
        ("calibration", [3], "calibration[0] must be an object, not 3"),
        ("calibration[0]", {}, "calibration[0] has no dial and no gmacs"),
        ("calibration[0].gmacs_ratio", "0.5", "calibration[0].gmacs_ratio must be a number above 0"),
        ("calibration[0].dial", 0.7, "calibration must be sorted by dial"),
        ("calibration[0].dial", 0.6, "calibration must be sorted by dial"),
        ("calibration[1].drop_pp_bound95", -1.0, "calibration[1].drop_pp_bound95 must be a number from 0 to 100"),
        ("calibration[1].drop_pp_bound95", None, "calibration[1] must have a drop, its interval and its bound"),
        ("calibration[1].drop_pp_bound95", 0.1, "calibration[1].drop_pp_bound95 must not be less than drop_pp"),
        ("calibration[0].drop_pp_ci95", [1.0], "calibration[0].drop_pp_ci95 must have 2 entries"),
        ("calibration[0].images", 0, "calibration[0].images must be a whole number"),
        ("calibration[0].note", {"a": math.nan}, "NaN is no number"),
        ("format", 99, "the card has format 99, game 5; this version reads formats 4 and 5, game 5"),
        ("format", DELETE, "the card has format None"),
        ("format", 5.0, "format must be a whole number"),
        ("format", [5], "the card has format [5]"),
        ("game_version", True, "the card has format 5, game True"),
        ("licence", 3, "licence must be a line of text"),
    ],
)  # fmt: skip
def test_a_field_that_is_wrong_is_named(place, value, sentence):
    if place == "training" and sentence.startswith("no JSON"):
        found = json.dumps(changed(place, {"loss": "HUGE"})).replace('"HUGE"', "1" + "0" * 5000)
    else:
        found = changed(place, value)
    assert sentence in refusal(found)


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ("", "no JSON document"),
        ("[]", "the card must be an object"),
        ("null", "the card must be an object, not None"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"format": 5, "format": 5}', "it names a field twice"),
        ("{} trailing", "no JSON document"),
    ],
)
def test_what_is_no_card_is_refused(header, sentence):
    assert sentence in refusal(header)


def test_numbers_too_large_for_a_float_and_deep_nests_are_refused_where_they_stand():
    assert "dial must be a number" in refusal(text_of(changed("dial", 7)).replace('"dial": 7', '"dial": 1e999'))
    nest = []
    for _ in range(50):
        nest = [nest]
    assert "is nested too deeply" in refusal(changed("training.config", nest))


def test_what_informs_and_decides_nothing_may_be_new():
    for place, value in (("note", {"by": "me"}), ("training.more", [1, {"a": None}]), ("finetuning", {"seed": 1}),
                         ("calibration[0].seconds", 3.5), ("preprocessing", {"mean": [0.5]})):  # fmt: skip
        found = changed(place, value)
        assert read_card(json.dumps(found)) == found


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value, path=()):
    """Where every value of a card stands."""
    yield path
    for name, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, name))


@settings(max_examples=150)
@given(data=st.data())
def test_a_mutated_card_is_refused_in_a_sentence_or_holds(data):
    """One value anywhere is another one or gone; what is read then prunes, at the dial of every target it has."""
    found = card()
    path = data.draw(st.sampled_from([place for place in places(found) if place]))
    inner = found
    for name in path[:-1]:
        inner = inner[name]
    if data.draw(st.booleans()):
        inner[path[-1]] = data.draw(JUNK)
    else:
        del inner[path[-1]]
    try:
        read = read_card(json.dumps(found))
    except TokenGameError:
        return
    check_card(read)
    assert 0 <= read["dial"] <= 1
    if read["calibration"]:
        assert dial_for(read, gmacs_ratio=read["calibration"][0]["gmacs_ratio"]) is not None
        if read["calibration"][0]["drop_pp_bound95"] is not None:
            assert dial_for(read, max_drop=100) == read["calibration"][-1]["dial"]


def test_what_would_be_refused_is_not_written(tmp_path):
    sound, path = copy.deepcopy(policy()), tmp_path / "policy.safetensors"
    sound.save(path)
    before = path.read_bytes()
    for place, value in (("dial", math.nan), ("training", {"loss": math.inf}), ("training", {"a": object()}),
                         ("calibration", [{}])):  # fmt: skip
        with pytest.raises(TokenGameError, match=place):
            Policy(sound.actor, sound.card | {place: value}).save(path)
    sound.actor.weight.data[0, 0] = math.nan
    with pytest.raises(TokenGameError, match="not finite"):
        sound.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["policy.safetensors"]


def test_a_policy_file_has_the_permissions_of_the_users_umask(tmp_path):
    path = tmp_path / "policy.safetensors"
    before = os.umask(0o027)
    try:
        policy().save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


# Shapes and weights


@pytest.mark.parametrize("observation", ["token_id", "context"])
def test_shapes_are_known_without_allocating_and_without_a_random_number(observation):
    shape = {"dim": 48, "heads": 3, "agents": 25, "stages": 2, "transition": "drop"}
    config = ActorConfig(observation, (8, 4))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    found = weight_shapes(config, shape)
    assert torch.equal(torch.rand(3), expected), "a training run's weights depend on the generator"
    assert found == {name: tuple(t.shape) for name, t in build_actor(config, shape).state_dict().items()}


def test_an_actor_larger_than_a_policy_may_be_is_not_built():
    with pytest.raises(TokenGameError, match=r"an actor of 33,\d+,\d+ weights is too large.*smaller --actor.hidden"):
        build_actor(ActorConfig("token_id", (4096,)), {"dim": 4096, "agents": 4096})


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({}, "weight is missing, and must be F32 [2, 9]"),
        ({"weight": torch.zeros(2, 8)}, "weight is F32 [2, 8], and must be F32 [2, 9]"),
        ({"weight": torch.zeros(18)}, "weight is F32 [18]"),
        ({"weight": torch.zeros(2, 9).double()}, "weight is F64 [2, 9]"),
        ({"weight": torch.zeros(2, 9).long()}, "weight is I64 [2, 9]"),
        ({"weight": torch.zeros(2, 9), "more": torch.zeros(1)}, "'more' is F32 [1], and must be absent"),
        ({"weight": torch.full((2, 9), math.inf)}, "the actor's weights are not finite in weight"),
        ({"weight": torch.full((2, 9), 3e38)}, "the actor's weights"),  # the fold makes more of them than floats hold
        ({"weight": torch.full((2, 9), 9e3)}, "the actor's weights reach"),
    ],
)  # fmt: skip
def test_weights_that_contradict_the_card_are_refused(weights, sentence, tmp_path):
    path = tmp_path / "policy.safetensors"
    save_file(weights, path, metadata={"tokengame": json.dumps(policy().card)})
    with pytest.raises(TokenGameError) as caught:
        Policy.load(path)
    assert sentence in str(caught.value).replace("'weight'", "weight")
    assert str(path) in str(caught.value)


def test_what_is_sound_gives_finite_logits_for_any_features():
    """The largest weights that pass, on features far beyond those of any model."""
    actor = copy.deepcopy(policy().actor)
    with torch.no_grad():
        actor.weight.fill_(1e3)
    check_weights(actor)
    weights = actor.line
    assert (weights[:, :-1].abs() @ torch.full((weights.shape[1] - 1,), 1e30)).isfinite().all()


def test_huge_sizes_are_refused_before_they_are_allocated(tmp_path):
    """Under a limit of address space the old reader, which built first, was killed."""
    path = tmp_path / "policy.safetensors"
    for place, value in (("actor.hidden", [30_000]), ("backbone.shape.heads", 4_096), ("backbone.shape.dim", 65_536)):
        found = changed(place, value)
        if place == "backbone.shape.dim":
            found["actor"] = {"observation": "token_id", "hidden": [4_096]}
        save_file({"weight": torch.zeros(2, 9)}, path, metadata={"tokengame": json.dumps(found)})
        before = torch.get_rng_state()
        with pytest.raises(TokenGameError):
            Policy.load(path)
        assert torch.equal(before, torch.get_rng_state()), "weights were initialised"


# Files


def test_what_is_no_file_is_refused_without_blocking(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("not a policy")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)  # takes no disk
    reasons = {"": "is a folder", "empty": "is empty", "dangling": "no policy file", "pipe": "is a pipe", "x" * 300:
               "cannot read policy file", "a\0b": "no policy file", "text": "damaged", "large": "at most"}  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(TokenGameError, match=reason) as caught:
            Policy.load(os.path.join(tmp_path, name))
        assert "\n" not in str(caught.value)


def test_a_link_to_a_policy_is_one(tmp_path):
    (tmp_path / "link.safetensors").symlink_to(SHIPPED_FILE)
    assert Policy.load(find_policy(tmp_path / "link.safetensors")).card == Policy.load(SHIPPED_FILE).card


def test_a_file_cut_or_changed_anywhere_is_refused_or_the_same(tmp_path):
    """Every length, and a bit in every eighth byte of the header."""
    whole, path = SHIPPED_FILE.read_bytes(), tmp_path / "policy.safetensors"
    pieces = [whole[:length] for length in range(1, len(whole), max(1, len(whole) // 60))]
    for place in range(0, 4000, 40):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place // 40 % 8)
        pieces.append(bytes(flipped))
    sentences = []
    for piece in pieces:
        path.write_bytes(piece)
        try:
            Policy.load(path)
        except TokenGameError as error:
            sentences.append(str(error))
    assert len(sentences) > len(pieces) // 2
    assert not [sentence for sentence in sentences if "\n" in sentence]


def test_what_train_and_calibrate_wrote_before_passes():
    for path in SHIPPED.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found = json.loads(file.metadata()["tokengame"])
        assert read_card(json.dumps(found)) == found
        assert set(found) <= {name.removesuffix("?") for name in SCHEMA}
        assert save(load_file(path), metadata={"tokengame": json.dumps(found)}) is not None


# The dial


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -0.1, 1.1, True, "0.5", None, [0.5], torch.tensor(0.5), 10**400])
def test_a_dial_is_a_number_from_0_to_1(wrong):
    with pytest.raises(TokenGameError, match="dial must lie between 0"):
        threshold(wrong)
    model = tiny_vit()
    fast = tokengame.prune(model, policy_for(model))
    with pytest.raises(TokenGameError, match="dial must lie between 0"):
        fast.dial = wrong
    assert fast.dial == 0.5
    if wrong is not None:
        with pytest.raises(TokenGameError, match="dial must lie between 0"):
            tokengame.prune(model, policy_for(model), dial=wrong)


@pytest.mark.parametrize("name", ["max_drop", "gmacs_ratio", "gmacs", "keep"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0, True, "0.5", [0.5], torch.tensor(0.5), 10**400])
def test_a_target_is_a_number_that_it_can_be(name, wrong):
    with pytest.raises(TokenGameError, match=rf"(--)?{name.replace('_', '-')} must be a number"):
        dial_for(card(), **{name: wrong})
    model = tiny_vit()
    with pytest.raises(TokenGameError, match="must be a number"):
        tokengame.prune(model, policy_for(model), **{name: wrong})


def test_a_target_beyond_any_sense_is_refused():
    with pytest.raises(TokenGameError, match="--gmacs-ratio must be a number above 0 and at most 2, not 5"):
        dial_for(card(), gmacs_ratio=5)
    with pytest.raises(TokenGameError, match="give one of max_drop, max_distance, gmacs_ratio, gmacs, keep"):
        dial_for(card())
    with pytest.raises(TokenGameError, match="no target 'speed'"):
        dial_for(card(), speed=2)


@pytest.mark.parametrize("bound", [math.nan, -1.0, "0", True, math.inf])
def test_what_is_no_bound_guarantees_nothing(bound):
    assert certified([0.1, bound, 0.1], 1.0) == 1
    rows = [ROW | {"drop_pp_bound95": 0.1}, ROW | {"dial": 0.9, "drop_pp_bound95": bound}]
    with pytest.raises(TokenGameError, match=r"calibration\[1\].drop_pp_bound95 must be a number from 0 to 100"):
        dial_for({"calibration": rows}, max_drop=1.0)
    with pytest.raises(TokenGameError, match="--max-drop must be a number from 0 to 100, not nan"):
        certified([0.1], math.nan)


def test_compute_that_rises_between_two_dials_gives_the_gentlest_dial_that_reaches_the_target():
    rows = [ROW | {"dial": d, "gmacs_ratio": r} for d, r in ((0.2, 0.9), (0.4, 0.5), (0.6, 0.7), (0.8, 0.3))]
    assert dial_for({"calibration": rows}, gmacs_ratio=0.6) == pytest.approx(0.35)
    assert dial_for({"calibration": rows}, gmacs_ratio=0.4) == pytest.approx(0.7)
